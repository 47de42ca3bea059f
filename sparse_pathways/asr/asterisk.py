"""Human speech from Debian: the telephone prompts of the packages asterisk-core-sounds-{en,fr,it}.

One voice per language, studio recordings. The variant `-wav` holds 8 kHz, `-g722` 16 kHz; the transcripts come with
the package without suffix. Prompts with notes ("[tone]"), or with digits that may be read in several ways, are left
out. Licences: CC BY-SA 3.0 (en, fr), CC BY 3.0 (it).
"""

import gzip
import hashlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

import sparse_pathways as sp

from .corpus import MANIFEST, SAMPLE_RATE, Utterance, resampler, write_manifest
from .text import normalise

FOLDERS = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "it": "it_IT_m_Carlo"}
_UNSPOKEN = re.compile(r"[][()<>0-9]")


def import_prompts(root: Path, out: Path) -> Path:
    """Make a corpus of the prompts below `root`; returns its manifest.

    Args:
        root: "/" where the packages are installed, or a folder they were unpacked to (`dpkg -x`).
        out: Corpus folder; gets 16 kHz FLAC files in splits by sentence: 80 % train, 10 % dev, 10 % test.

    Raises:
        sp.FormatError: none of the packages is below `root`, or one of a pair (text, sound) is missing.
        ImportError: only G.722 files are there and the package G722 is not installed.
    """
    root, out = Path(root), Path(out).resolve()
    present = [language for language in FOLDERS if _sounds(root, language).is_dir()]
    if not present:
        raise sp.FormatError(
            root,
            "holds no usr/share/asterisk/sounds/*; install asterisk-core-sounds-en and asterisk-core-sounds-en-wav",
        )
    return write_manifest(
        out / MANIFEST, (utterance for language in present for utterance in _prompts(root, language, out))
    )


def _sounds(root: Path, language: str) -> Path:
    return root / "usr/share/asterisk/sounds" / FOLDERS[language]


def _prompts(root: Path, language: str, out: Path) -> Iterator[Utterance]:
    for key, text in _transcripts(root, language).items():
        source = _sounds(root, language) / f"{key}.wav"
        if source.is_file():
            wave = _read_wav(source)
        elif source.with_suffix(".g722").is_file():
            wave = _read_g722(source.with_suffix(".g722"))
        else:
            continue  # some transcripts have no recording
        name = f"asterisk-{language}-{key.replace('/', '-')}"
        path = out / language / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave.numpy(), SAMPLE_RATE, subtype="PCM_16")
        yield Utterance(
            id=name,
            audio=path,
            offset=0.0,
            duration=len(wave) / SAMPLE_RATE,
            language=language,
            text=text,
            speaker=FOLDERS[language],
            split=_split(text),
        )


def _transcripts(root: Path, language: str) -> dict[str, str]:
    """Key of a prompt, such as "digits/1", to its normalised text."""
    folder = root / "usr/share/doc" / f"asterisk-core-sounds-{language}"
    plain = folder / f"core-sounds-{language}.txt"
    packed = plain.with_suffix(".txt.gz")
    if packed.is_file():
        lines = gzip.decompress(packed.read_bytes()).decode("utf-8-sig").splitlines()
    elif plain.is_file():
        lines = plain.read_text(encoding="utf-8-sig").splitlines()
    else:
        raise sp.FormatError(packed, f"no such file; install asterisk-core-sounds-{language} beside the sounds")
    pairs = (line.partition(":") for line in lines if not line.startswith(";"))
    texts = {key.strip(): normalise(text, language) for key, _, text in pairs if not _UNSPOKEN.search(text)}
    return {key: text for key, text in texts.items() if text}


def _split(text: str) -> str:
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")


def _read_wav(path: Path) -> Tensor:
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise sp.FormatError(path, str(error)) from error
    wave = torch.from_numpy(samples).mean(1)
    return wave if rate == SAMPLE_RATE else resampler(rate)(wave)


def _read_g722(path: Path) -> Tensor:
    try:
        module = importlib.import_module("G722")
    except ImportError as error:
        raise ImportError(
            "the G.722 variant of the prompts needs the package G722 (pip install G722); "
            "or install asterisk-core-sounds-*-wav"
        ) from error
    samples = module.G722(SAMPLE_RATE, 64_000).decode(path.read_bytes())  # a decoder remembers: one for each file
    return torch.from_numpy(np.asarray(samples, dtype=np.float32) / 32768)
