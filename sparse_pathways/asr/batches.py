"""Batches: features once computed and kept on disk, one language at a time, neighbours in length.

What is in a batch is a function of (seed, step) alone: no order to save, every rank knows every other's share, and a
resumed run sees the batches it would have seen.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import sparse_pathways as sp

from .corpus import Utterance, manifest_path, read_audio, read_manifest
from .features import MELS, LogMel
from .text import Tokenizer


class Features:
    """The features of one split, memory-mapped from a file beside the manifest.

    Half precision: the rounding (0.4 % of a bin's deviation) is far below the noise of any recording, and all processes
    of a machine share the pages.
    """

    def __init__(self, corpus: Path, split: str, utterances: Sequence[Utterance]) -> None:
        path, index = _feature_files(corpus, split)
        offsets = json.loads(index.read_text())
        if len(offsets) != len(utterances) + 1 or path.stat().st_size != offsets[-1] * MELS * 2:
            raise sp.FormatError(path, f"does not fit the manifest; delete it and {index.name} to have them made anew")
        self._frames = np.memmap(path, dtype=np.float16, mode="r", shape=(offsets[-1], MELS))
        self._offsets = np.asarray(offsets)
        self.lengths = np.diff(self._offsets)

    def __getitem__(self, index: int) -> Tensor:
        """Features of one utterance, float32 `[T, 80]`."""
        return torch.from_numpy(self._frames[self._offsets[index] : self._offsets[index + 1]].astype(np.float32))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation per bin, `[80]` each, over up to 2000 utterances spread over the split."""
        chosen = np.unique(np.linspace(0, len(self.lengths) - 1, 2000).astype(int))
        frames = torch.cat([self[index] for index in chosen])
        return frames.mean(0), 1 / (frames.std(0) + 1e-3)


def _feature_files(corpus: Path, split: str) -> tuple[Path, Path]:
    manifest = manifest_path(corpus)
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
    stem = manifest.parent / f"features-{split}-{digest}"
    return stem.with_suffix(".f16"), stem.with_suffix(".json")


def prepare_features(corpus: Path, split: str, utterances: Sequence[Utterance], progress: bool = True) -> None:
    """Compute the features of a split if its files are not there yet."""
    path, index = _feature_files(corpus, split)
    if index.is_file():
        return
    log_mel = LogMel()
    offsets = [0]
    partial = path.with_suffix(f".{os.getpid()}.partial")
    workers = torch.get_num_threads()
    with partial.open("wb") as file, ThreadPoolExecutor(workers) as pool, torch.inference_mode():
        computed = pool.map(lambda utterance: log_mel(read_audio(utterance)).numpy(), utterances)
        for frames in tqdm(
            computed, total=len(utterances), desc=f"features of {split}", unit=" utterances", disable=not progress
        ):
            file.write(frames.astype(np.float16).tobytes())
            offsets.append(offsets[-1] + len(frames))
    partial.replace(path)
    index.write_text(json.dumps(offsets))  # last: its presence says that the features are complete


@dataclass(frozen=True)
class Batch:
    """Utterances of one language.

    Shapes: feats `[B, T, 80]`, lengths `[B]`, targets `[B, U]`, target_lengths `[B]`.
    """

    language: str
    feats: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = (t.to(device) for t in (self.feats, self.lengths, self.targets, self.target_lengths))
        return Batch(self.language, *moved)


class Corpus:
    """One split of a corpus, ready to be cut into batches.

    Args:
        path: Corpus folder or manifest.
        split: "train", "dev" or "test".
        languages: Languages to keep; None: all.
        progress: Show a bar when features have to be computed.
    """

    def __init__(self, path: Path, split: str, languages: Sequence[str] | None = None, progress: bool = True) -> None:
        path = Path(path)
        self.utterances = [utterance for utterance in read_manifest(path) if utterance.split == split]
        if not self.utterances:
            raise sp.FormatError(manifest_path(path), f"has no utterances in the split {split!r}")
        prepare_features(path, split, self.utterances, progress)
        self.features = Features(path, split, self.utterances)
        present = sorted({utterance.language for utterance in self.utterances})
        self.languages = tuple(languages) if languages is not None else tuple(present)
        if missing := set(self.languages) - set(present):
            raise ValueError(f"languages = {self.languages}, but {path} has none of {', '.join(sorted(missing))}")
        # per language, shortest first: neighbours make batches with little padding
        order = np.argsort(self.features.lengths, kind="stable")
        self.by_length = {
            language: np.array([i for i in order if self.utterances[i].language == language])
            for language in self.languages
        }

    def texts(self) -> list[str]:
        """Transcripts, as many characters of each language as the smallest one has (to learn pieces from)."""
        per_language = {
            language: [self.utterances[i].text for i in sorted(indices)] for language, indices in self.by_length.items()
        }
        budget = min(sum(map(len, texts)) for texts in per_language.values())
        chosen = []
        for texts in per_language.values():
            ends = np.cumsum([len(text) for text in texts])
            chosen += texts[: int(np.searchsorted(ends, budget)) + 1]
        return chosen

    def collate(self, indices: Sequence[int], tokenizer: Tokenizer) -> Batch:
        """Pad utterances (of one language) to a batch."""
        feats = [self.features[i] for i in indices]
        targets = [torch.tensor(tokenizer.encode(self.utterances[i].text)) for i in indices]
        return Batch(
            self.utterances[indices[0]].language,
            torch.nn.utils.rnn.pad_sequence(feats, batch_first=True),
            torch.tensor([len(f) for f in feats]),
            torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
            torch.tensor([len(t) for t in targets]),
        )


class Sampler:
    """Which utterances each rank takes at each step.

    Args:
        corpus: What to draw from.
        batch: Utterances per rank and step.
        seed: Same seed, same batches.
        alpha: How far languages with more speech are drawn more often: 1 in proportion, 0 all alike.
    """

    def __init__(self, corpus: Corpus, batch: int, seed: int, alpha: float) -> None:
        self._corpus, self._batch, self._seed = corpus, batch, seed
        seconds = np.array([corpus.features.lengths[indices].sum() for indices in corpus.by_length.values()]) / 100
        weights = (seconds / seconds.sum()) ** alpha
        self.shares = weights / weights.sum()

    def language(self, step: int) -> str:
        """The language of a step.

        Drawn in rounds of as many steps as there are languages, spread evenly over the shares: languages of equal share
        come once a round each, in random order, and none stays away for long by chance.
        """
        languages = self._corpus.languages
        turn, place = divmod(step, len(languages))
        rng = np.random.default_rng((self._seed, turn, 1))
        point = (rng.permutation(len(languages))[place] + rng.random()) / len(languages)
        return languages[min(int(np.searchsorted(self.shares.cumsum(), point, side="right")), len(languages) - 1)]

    def draw(self, step: int, world: int) -> tuple[str, list[int]]:
        """The language and the utterances of all `world` ranks together; rank r takes `[r::world]`."""
        rng = np.random.default_rng((self._seed, step, 0))
        language = self.language(step)
        order = self._corpus.by_length[language]
        size = min(self._batch, len(order) // world) * world
        if size == 0:
            raise ValueError(f"{len(order)} utterances of {language!r} do not go round {world} processes")
        # windows may start before the first utterance or end after the last: else these would hardly ever be drawn
        start = int(rng.integers(-(size // 2), len(order) - size // 2))
        start = min(max(start, 0), len(order) - size)
        return language, order[start : start + size].tolist()


def spec_augment(
    batch: Batch, fill: Tensor, seed: tuple[int, ...], bands: int, band: int, spans: int, span: int
) -> Batch:
    """Hide frequency bands and time spans of every utterance (SpecAugment, arXiv 1904.08779).

    Args:
        batch: Left as it is; the result has features of its own.
        fill: `[80]`, what to put there: the mean, which is 0 once normalised.
        seed: Decides the masks, together with the row.
        bands: Frequency bands per utterance, of 0 to `band` bins each.
        band: Widest band, in bins.
        spans: Time spans per utterance, of 0 to `span` frames each, at most a fifth of the utterance.
        span: Longest span, in frames.
    """
    rng = np.random.default_rng(seed)
    feats = batch.feats.clone()
    for row, length in zip(feats, batch.lengths.tolist(), strict=True):
        for _ in range(bands):
            width = int(rng.integers(0, band + 1))
            start = int(rng.integers(0, MELS - width + 1))
            row[:, start : start + width] = fill[start : start + width]
        for _ in range(spans):
            width = int(rng.integers(0, min(span, length // 5) + 1))
            start = int(rng.integers(0, length - width + 1))
            row[start : start + width] = fill
    return Batch(batch.language, feats, batch.lengths, batch.targets, batch.target_lengths)
