"""Corpora: utterances, their manifest file and their audio.

A corpus is a folder with `manifest.jsonl`, one JSON object per line and utterance, and audio files that libsndfile
reads. Audio paths in the file are relative to the manifest's folder, so a corpus can be moved as a whole.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

import sparse_pathways as sp

SAMPLE_RATE = 16_000
SPLITS = ("train", "dev", "test")
MANIFEST = "manifest.jsonl"
_SLACK_SECONDS = 0.05  # what published segment times may exceed their files by


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One spoken sentence.

    Args:
        id: Name, unique within the corpus.
        audio: Sound file; absolute once read from a manifest.
        offset: Start within the file, in seconds.
        duration: Length in seconds.
        language: Language code, such as "en"; the name of its pathway.
        text: Normalised transcript.
        speaker: Who speaks.
        split: "train", "dev" or "test".
    """

    id: str
    audio: Path
    offset: float
    duration: float
    language: str
    text: str
    speaker: str
    split: str

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split = {self.split!r} of utterance {self.id!r}; want one of {', '.join(SPLITS)}")
        if not self.duration > 0 or self.offset < 0:
            raise ValueError(
                f"offset = {self.offset}, duration = {self.duration} of utterance {self.id!r}; "
                "want offset >= 0 and duration > 0 seconds"
            )


_TYPES: dict[str, tuple[type, ...]] = {
    field.name: (int, float) if field.type is float else (str,) for field in fields(Utterance)
}


def manifest_path(corpus: Path) -> Path:
    """The manifest of a corpus given by its folder or by the manifest itself."""
    return corpus / MANIFEST if corpus.is_dir() else corpus


def read_manifest(path: Path) -> list[Utterance]:
    """Read a manifest; `path` is the file or its folder.

    Raises:
        sp.FormatError: no such file, or a line that is not an utterance (with its number).
    """
    path = manifest_path(Path(path))
    if not path.is_file():
        raise sp.FormatError(path, "no such manifest; make a corpus with `sparse-pathways data`")
    folder = path.resolve().parent
    utterances = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            utterances.append(_parse(json.loads(line), folder))
        except ValueError as error:  # JSON errors are ValueErrors
            raise sp.FormatError(path, f"line {number}: {error}") from error
    return utterances


def _parse(record: object, folder: Path) -> Utterance:
    if not isinstance(record, dict):
        raise ValueError(f"want a JSON object, got {type(record).__name__}")
    if missing := _TYPES.keys() - record.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    values = {name: record[name] for name in _TYPES}  # further fields are allowed and ignored
    for name, types in _TYPES.items():
        if not isinstance(values[name], types):
            raise ValueError(f"{name} = {values[name]!r}; want {types[-1].__name__}")
    return Utterance(**(values | {"audio": folder / values["audio"]}))


def write_manifest(path: Path, utterances: Iterable[Utterance]) -> Path:
    """Write a manifest (atomically); audio paths become relative to its folder."""
    path = Path(path)
    folder = path.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for utterance in utterances:
            audio = os.path.relpath(Path(utterance.audio).resolve(), folder)
            record = asdict(utterance) | {"audio": Path(audio).as_posix()}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


@cache
def resampler(rate: int) -> torchaudio.transforms.Resample:
    """From `rate` to 16 kHz. Cached: building the filter costs more than using it."""
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


def read_audio(utterance: Utterance) -> Tensor:
    """The samples of one utterance, float32 `[S]` in [-1, 1] at 16 kHz, channels averaged.

    Raises:
        sp.FormatError: the file is missing, unreadable, or ends before the utterance does.
    """
    try:
        with soundfile.SoundFile(utterance.audio) as file:
            file.seek(round(utterance.offset * file.samplerate))
            wanted = round(utterance.duration * file.samplerate)
            samples = torch.from_numpy(file.read(wanted, dtype="float32", always_2d=True)).mean(1)
            rate = file.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise sp.FormatError(utterance.audio, f"audio of utterance {utterance.id!r}: {error}") from error
    if len(samples) < wanted - _SLACK_SECONDS * rate:
        raise sp.FormatError(
            utterance.audio, f"ends {(wanted - len(samples)) / rate:.2f} s before utterance {utterance.id!r} does"
        )
    return samples if rate == SAMPLE_RATE else resampler(rate)(samples)
