"""A corpus made on the spot: sentences from templates, spoken by espeak-ng, in four languages.

espeak-ng comes with the `espeakng-loader` package and is called through ctypes. How it speaks depends, a little, on all
that it has said before, and nothing resets that. So every chunk of utterances is spoken by a fresh process: the corpus
is a function of the configuration, whatever the number of workers.
"""

import ctypes
import hashlib
import itertools
import json
import multiprocessing
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

from .config import CorpusConfig
from .corpus import MANIFEST, SAMPLE_RATE, SPLITS, Utterance, resampler, write_manifest
from .text import normalise

# espeak_ng/speak_lib.h
_SYNCHRONOUS_OUTPUT = 2
_UTF8 = 1
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4

_CHUNK = 50  # utterances spoken by one process
_TELEPHONE_RATE = 8000

Job = tuple[CorpusConfig, str, str, int, Path]  # config, split, language, index, folder


@cache
def sentences() -> dict[str, Any]:
    """The templates and words of every language, from sentences.json."""
    return json.loads(resources.files(__package__).joinpath("sentences.json").read_text(encoding="utf-8"))


def split_of(sentence: str) -> str:
    """The one split a sentence may appear in: one in ten is for test, one in twenty for dev, the others to train on."""
    bucket = hashlib.sha256(sentence.encode()).digest()[0] % 20
    return {0: "test", 1: "test", 2: "dev"}.get(bucket, "train")


def sentence(language: str, split: str, rng: random.Random) -> str:
    """Draw a sentence of a split: each template is equally likely, each word within it too."""
    grammar = sentences()[language]
    while True:
        template = rng.choice(grammar["templates"])
        text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(grammar["words"][slot[1]]), template)
        if split_of(text) == split:
            return text


class Espeak:
    """The espeak-ng of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate = self._library.espeak_Initialize(
            _SYNCHRONOUS_OUTPUT, 0, espeakng_loader.get_data_path().encode(), 0
        )
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng did not start: espeak_Initialize returned {self.sample_rate}")
        self._chunks: list[np.ndarray] = []
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(
            self._receive
        )
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def say(self, text: str, voice: str, rate: int, pitch: int, pitch_range: int, seed: int) -> np.ndarray:
        """Speak; returns float32 samples `[S]` in [-1, 1] at `self.sample_rate`. Some voices breathe, by `seed`.

        Raises:
            ValueError: espeak-ng knows no such voice.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"voice = {voice!r} is unknown to espeak-ng; want LANGUAGE+VARIANT such as 'nl+f3'")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._chunks.clear()
        encoded = text.encode() + b"\0"
        status = self._library.espeak_Synth(encoded, len(encoded), 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng said nothing for {text!r} with voice {voice!r} (status {status})")
        return np.concatenate(self._chunks).astype(np.float32) / 32768


@cache
def _espeak() -> Espeak:
    return Espeak()


def add_noise(samples: np.ndarray, ratio_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add steady noise `ratio_db` decibels below the speech, its spectrum drawn between white and pink."""
    length = 1 << len(samples).bit_length()  # a power of two: other lengths may transform ten times slower
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1) ** -rng.uniform(0.0, 0.5)
    noise = np.fft.irfft(spectrum)[: len(samples)]
    wanted = np.sqrt(np.mean(samples**2)) * 10 ** (-ratio_db / 20)
    return (samples + noise * (wanted / np.sqrt(np.mean(noise**2)))).astype(np.float32)


@cache
def _to_telephone() -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(SAMPLE_RATE, _TELEPHONE_RATE)


def _make(job: Job) -> Utterance:
    """Synthesise one utterance and write its sound file."""
    config, split, language, index, out = job
    rng = random.Random(f"{config.seed}/{split}/{language}/{index}")
    text = sentence(language, split, rng)
    variant = rng.choice(getattr(config, f"{split}_voices"))
    spoken = _espeak().say(
        text,
        f"{sentences()[language]['voice']}+{variant}",
        rng.randint(*config.rate),
        rng.randint(*config.pitch),
        rng.randint(*config.pitch_range),
        rng.getrandbits(31),
    )
    samples = resampler(_espeak().sample_rate)(torch.from_numpy(spoken)).numpy()
    samples = np.pad(samples, [int(SAMPLE_RATE * rng.uniform(*config.silence_s)) for _ in range(2)])
    samples = add_noise(samples, rng.uniform(*config.noise_db), np.random.default_rng(rng.getrandbits(64)))
    if rng.random() < config.telephone:
        narrow = _to_telephone()(torch.from_numpy(samples))
        samples = resampler(_TELEPHONE_RATE)(narrow)[: len(samples)].numpy()
    samples *= 10 ** (-rng.uniform(*config.level_db) / 20) / np.abs(samples).max()
    name = f"{split}-{language}-{index:05d}"
    path = out / split / language / f"{name}.flac"
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
    return Utterance(
        id=name,
        audio=path,
        offset=0.0,
        duration=len(samples) / SAMPLE_RATE,
        language=language,
        text=normalise(text, language),
        speaker=f"espeak-{language}-{variant}",
        split=split,
    )


def _jobs(config: CorpusConfig, out: Path) -> Iterator[Job]:
    for split, language in itertools.product(SPLITS, config.languages):
        (out / split / language).mkdir(parents=True, exist_ok=True)
        for index in range(getattr(config, split)):
            yield config, split, language, index, out


def _make_all(jobs: Sequence[Job]) -> list[Utterance]:
    return [_make(job) for job in jobs]


def _check_voices(config: CorpusConfig) -> None:
    """espeak-ng itself speaks with its default voice when it does not know a variant."""
    if unknown := set(config.languages) - sentences().keys():
        raise ValueError(
            f"CorpusConfig.languages = {config.languages}: no sentences for {', '.join(sorted(unknown))}; "
            f"want some of {', '.join(sentences())}"
        )
    known = {path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir()}
    for split in SPLITS:
        if missing := set(getattr(config, f"{split}_voices")) - known:
            raise ValueError(
                f"CorpusConfig.{split}_voices: espeak-ng has no variant {', '.join(sorted(missing))}; "
                f"it has {', '.join(sorted(known))}"
            )


def synthesise(config: CorpusConfig, out: Path, progress: bool = True) -> Path:
    """Make the corpus in the folder `out`; returns its manifest, written last.

    Raises:
        ValueError: a language without sentences, or a voice espeak-ng does not know.
    """
    _check_voices(config)
    out = Path(out).resolve()
    jobs = list(_jobs(config, out))
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    context = multiprocessing.get_context("forkserver")  # its children have imported all and said nothing
    context.set_forkserver_preload([__name__])
    bar = tqdm(total=len(jobs), desc="speaking", unit=" utterances", disable=not progress)
    utterances = []
    with bar, context.Pool(config.workers, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        for made in pool.imap(_make_all, chunks):
            utterances += made
            bar.update(len(made))
    return write_manifest(out / MANIFEST, utterances)
