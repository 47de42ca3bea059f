"""Multilingual LibriSpeech as it is published: a manifest over its folders, no audio copied.

Layout: `mls_english/{train,dev,test}/` with `transcripts.txt` (id TAB text), `segments.txt` (id, source, start, end)
and `audio/SPEAKER/BOOK/SPEAKER_BOOK_NUMBER.flac` or `.opus`. Licence of the corpus: CC BY 4.0.
"""

from collections.abc import Iterator
from pathlib import Path

import soundfile

import sparse_pathways as sp

from .corpus import MANIFEST, SPLITS, Utterance, write_manifest
from .text import normalise

FOLDERS = {
    "de": "mls_german",
    "en": "mls_english",
    "es": "mls_spanish",
    "fr": "mls_french",
    "it": "mls_italian",
    "nl": "mls_dutch",
    "pl": "mls_polish",
    "pt": "mls_portuguese",
}
SUBSETS = ("all", "9hr", "1hr")


def import_mls(root: Path, languages: tuple[str, ...], out: Path, train_subset: str = "all") -> Path:
    """Write a corpus manifest over MLS; returns it.

    Args:
        root: Folder that holds `mls_english`, `mls_dutch`, ...
        languages: Codes of `FOLDERS`.
        out: Folder for the manifest (and later the features); audio stays where it is.
        train_subset: "all", or the published subset "9hr" or "1hr" of the training split (limited supervision).

    Raises:
        ValueError: a language MLS does not have, or another subset.
        sp.FormatError: a folder or file of the layout is missing, or a line is not of its form (with its number).
    """
    if unknown := [language for language in languages if language not in FOLDERS]:
        raise ValueError(f"languages = {languages}: MLS has no {unknown[0]!r}; want some of {', '.join(FOLDERS)}")
    if train_subset not in SUBSETS:
        raise ValueError(f"train_subset = {train_subset!r}; want one of {', '.join(SUBSETS)}")
    root = Path(root).resolve()
    utterances = (
        utterance
        for language in languages
        for split in SPLITS
        for utterance in _split(root / FOLDERS[language] / split, language, split, train_subset)
    )
    return write_manifest(Path(out) / MANIFEST, utterances)


def _split(folder: Path, language: str, split: str, train_subset: str) -> Iterator[Utterance]:
    seconds = {name: float(end) - float(start) for name, _, start, end in _table(folder / "segments.txt", 4)}
    wanted = _handles(folder, train_subset) if split == "train" and train_subset != "all" else None
    for name, text in _table(folder / "transcripts.txt", 2):
        if wanted is not None and name not in wanted:
            continue
        speaker, book, _ = name.split("_", 2)
        audio = folder / "audio" / speaker / book / f"{name}.flac"
        if not audio.is_file():
            audio = audio.with_suffix(".opus")
        yield Utterance(
            id=f"mls-{language}-{name}",
            audio=audio,
            offset=0.0,
            duration=seconds[name] if name in seconds else _length(audio),
            language=language,
            text=normalise(text, language),
            speaker=f"mls-{language}-{speaker}",
            split=split,
        )


def _table(path: Path, columns: int) -> Iterator[list[str]]:
    """Lines of a table whose cells are separated by tabs."""
    if not path.is_file():
        raise sp.FormatError(path, "no such file; want a folder of Multilingual LibriSpeech as it is published")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\n").split("\t")
            if len(cells) != columns or cells[0].count("_") != 2:
                raise sp.FormatError(path, f"line {number}: want {columns} cells, the first SPEAKER_BOOK_NUMBER")
            yield cells


def _handles(folder: Path, subset: str) -> set[str]:
    """Names in a published subset; that of one hour comes in six parts of ten minutes."""
    base = folder / "limited_supervision" / subset
    lists = sorted(base.rglob("handles.txt"))
    if not lists:
        raise sp.FormatError(base, "holds no handles.txt")
    return {name for path in lists for name in path.read_text(encoding="utf-8").split()}


def _length(audio: Path) -> float:
    try:
        return soundfile.info(audio).duration
    except soundfile.LibsndfileError as error:
        raise sp.FormatError(audio, str(error)) from error
