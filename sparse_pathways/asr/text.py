"""Text: normal form, sentence pieces, word error rate."""

import io
import unicodedata
from collections.abc import Iterable, Sequence

import jiwer
import sentencepiece


def normalise(text: str, language: str) -> str:
    """The form in which texts are trained on and compared.

    NFC, lower case, letters with their accents, digits, apostrophes at a letter (`l'ora`, `po'`, `'s avonds`) and
    hyphens within a word; everything else separates words. The rule is the same for every language so far;
    `language` is here for those that will need their own (Turkish i).
    """
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    kept = []
    for index, letter in enumerate(text):
        before = index > 0 and text[index - 1].isalnum()
        after = index + 1 < len(text) and text[index + 1].isalnum()
        in_word = letter.isalnum() or unicodedata.category(letter) == "Mn"
        joins = (letter == "'" and (before or after)) or (letter == "-" and before and after)
        kept.append(letter if in_word or joins else " ")
    return " ".join("".join(kept).split())


class Tokenizer:
    """Sentence pieces: text to numbers in `[0, size)` and back. The blank is not among them."""

    def __init__(self, model: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model ({len(model)} bytes): {error}") from error
        self._model = model

    @classmethod
    def train(cls, lines: Iterable[str], vocab: int) -> "Tokenizer":
        """Learn at most `vocab` byte-pair pieces; a small text may not hold that many different ones."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab,
                model_type="bpe",
                character_coverage=1.0,
                hard_vocab_limit=False,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:  # fewer pieces than the text has letters
            raise ValueError(f"vocab = {vocab} does not fit the text: {error}") from error
        return cls(model.getvalue())

    @property
    def size(self) -> int:
        """Number of pieces, without the blank."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Text to pieces."""
        return self._processor.encode(text)

    def decode(self, pieces: Sequence[int]) -> str:
        """Pieces to text."""
        return self._processor.decode([int(piece) for piece in pieces])

    def to_bytes(self) -> bytes:
        """The whole tokenizer, for a file."""
        return self._model

    @classmethod
    def from_bytes(cls, model: bytes) -> "Tokenizer":
        """The tokenizer that `to_bytes` gave."""
        return cls(model)


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate over a whole set: errors / words of the references (0.1 is 10 %; may exceed 1)."""
    if not references or len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses; want as many of each, at least one"
        )
    return float(jiwer.wer(list(references), list(hypotheses)))
