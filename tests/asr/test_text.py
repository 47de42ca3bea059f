import pickle

import pytest

from sparse_pathways.asr.text import Tokenizer, normalise, wer

LINES = ["il est deux heures moins dix", "éteins le four", "l'heure", "rappelle-moi demain", "de auto's"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Il est MIDI, non?", "il est midi non"),
        ("l\u2019\u00c9t\u00e9", "l'été"),
        ("e\u0301te\u0301", "été"),
        ("rappelle-moi - demain", "rappelle-moi demain"),
        ("un po' di", "un po' di"),
        ("'s avonds", "'s avonds"),
        ("a  ' b\t\n", "a b"),
        ("well-", "well"),
        ("", ""),
    ],
    ids=["case", "apostrophe", "composed", "hyphen", "elision", "initial", "stray", "open", "empty"],
)
def test_normalise(text, expected):
    assert normalise(text, "fr") == expected
    assert normalise(expected, "fr") == expected


def test_tokenizer_round_trip():
    tokenizer = Tokenizer.train(LINES, 60)
    again = Tokenizer.from_bytes(tokenizer.to_bytes())
    for line in LINES:
        pieces = again.encode(line)
        assert all(0 <= piece < again.size for piece in pieces)
        assert again.decode(pieces) == line
    assert pickle.loads(pickle.dumps(tokenizer)).encode(LINES[0]) == tokenizer.encode(LINES[0])


def test_small_text_yields_fewer_pieces_than_wanted():
    assert Tokenizer.train(["a b", "b a"], 5000).size < 100


def test_tokenizer_refuses_foreign_bytes():
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Tokenizer.from_bytes(b"no model")


def test_wer_counts_over_the_whole_set():
    assert wer(["a b c", "d"], ["a x c", "d"]) == pytest.approx(1 / 4)
    assert wer(["a"], ["a b c"]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="1 references and 0 hypotheses"):
        wer(["a"], [])
