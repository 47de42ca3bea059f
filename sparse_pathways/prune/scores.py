"""What ranks the blocks of a layer. A score is plain data; what it remembers between steps lives in a memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_pathways.mask import block_scores
from sparse_pathways.mask.score import NORMS


@dataclass(frozen=True)
class Magnitude:
    """Norm of the block in the shared weight.

    It is the same number for every pathway of a layer: pathways decided by it differ only through the moment of their
    decision, their initial masks, or updates kept inside the pathway.

    Attributes:
        norm: "l2" (root of the sum of squares) or "l1" (sum of absolute values).
    """

    norm: str = "l2"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"Magnitude.norm = {self.norm!r}; choose one of {', '.join(NORMS)}")


@dataclass(frozen=True)
class Gradient:
    """First-order change of the pathway's own loss if the block were removed: |sum over the block of w * dL/dw|.

    Averaged over the batches of that pathway only, so the same weight ranks differently for different pathways.

    Attributes:
        decay: of the exponential moving average, per batch of the pathway, in [0, 1).

    Source: Taylor importance (arXiv 1611.06440, equation 8), per block and per pathway.
    """

    decay: float = 0.98

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"Gradient.decay = {self.decay}; want 0 <= decay < 1 (0 = the last batch alone)")


@dataclass(frozen=True)
class Movement:
    """How far training pushes the block away from zero: the sum of -w * dL/dw over the block and over the batches of
    the pathway.

    Attributes:
        decay: what is left of the sum after each batch of the pathway, in (0, 1]; 1: all batches count the same.

    Source: movement pruning (arXiv 2005.07683, equation 3), per block and per pathway.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"Movement.decay = {self.decay}; want 0 < decay <= 1 (1 = all batches count the same)")


@dataclass(frozen=True)
class Learned:
    """Block scores of every pathway, trained by Adam through a straight-through gate: the forward product uses the mask
    of the highest scores, the backward one treats a block's gate as its score, dL/dscore = sum over the block of
    w * dL/dw.

    Scores start from the magnitude of the blocks, divided by its mean over the layer.

    Attributes:
        lr: of Adam, in units of the layer's mean magnitude per batch of the pathway.

    Source: straight-through scores (arXiv 1911.13299), with Adam, per block and per pathway.
    """

    lr: float = 0.05

    def __post_init__(self) -> None:
        if not self.lr > 0.0:
            raise ValueError(f"Learned.lr = {self.lr}; want more than 0")


Score = Magnitude | Gradient | Movement | Learned
BY_NAME: dict[str, type[Magnitude] | type[Gradient] | type[Movement] | type[Learned]] = {
    "magnitude": Magnitude,
    "gradient": Gradient,
    "movement": Movement,
    "learned": Learned,
}


def as_score(score: Score | str) -> Score:
    """A score from its name ("magnitude", "gradient", ...) with default settings; a score object passes through."""
    if isinstance(score, str):
        if score not in BY_NAME:
            raise ValueError(f"score = {score!r}; choose one of {', '.join(BY_NAME)}")
        return BY_NAME[score]()
    if not isinstance(score, tuple(BY_NAME.values())):
        raise TypeError(f"score is a {type(score).__name__}; want one of {', '.join(BY_NAME)}, Magnitude(), Gradient()")
    return score


class ScoreMemory:
    """What a score keeps between steps, per layer float32 `[P, slots, NB, KB]` over the governed pathways.

    `add` takes the signal of one batch of a pathway, `score` gives what its blocks rank by.
    """

    slots = 1

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def start(self, layer: str, pathways: int, magnitude: Tensor) -> None:
        """Make room for a layer whose blocks have `magnitude` `[NB, KB]`."""
        self.tensors[layer] = magnitude.new_zeros(pathways, self.slots, *magnitude.shape)

    def add(self, layer: str, index: int, signal: Tensor, batches: int) -> None:
        """Batch number `batches` of pathway `index`, its `signal` `[NB, KB]`: the sums over its blocks of w * g."""
        raise NotImplementedError

    def score(self, layer: str, index: int, batches: int) -> Tensor:
        """Scores `[NB, KB]` of pathway `index` after `batches` of its batches."""
        return self.tensors[layer][index, 0]


class _GradientMemory(ScoreMemory):
    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def add(self, layer: str, index: int, signal: Tensor, batches: int) -> None:
        self.tensors[layer][index, 0].mul_(self.decay).add_(signal.abs(), alpha=1.0 - self.decay)

    def score(self, layer: str, index: int, batches: int) -> Tensor:
        return self.tensors[layer][index, 0] / (1.0 - self.decay**batches)  # without the bias towards the zero start


class _MovementMemory(ScoreMemory):
    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def add(self, layer: str, index: int, signal: Tensor, batches: int) -> None:
        self.tensors[layer][index, 0].mul_(self.decay).sub_(signal)


class _LearnedMemory(ScoreMemory):
    slots = 3  # score, and Adam's two averages
    betas = (0.9, 0.98)
    epsilon = 1e-12  # signals of a block may be small against 1

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    def start(self, layer: str, pathways: int, magnitude: Tensor) -> None:
        super().start(layer, pathways, magnitude)
        self.tensors[layer][:, 0] = magnitude / magnitude.mean().clamp_min(torch.finfo(torch.float32).tiny)

    def add(self, layer: str, index: int, signal: Tensor, batches: int) -> None:
        score, first, second = self.tensors[layer][index]
        first.mul_(self.betas[0]).add_(signal, alpha=1.0 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(signal, signal, value=1.0 - self.betas[1])
        size = (second / (1.0 - self.betas[1] ** batches)).sqrt_().add_(self.epsilon)
        score.addcdiv_(first, size, value=-self.lr / (1.0 - self.betas[0] ** batches))


def memory_of(score: Score) -> ScoreMemory | None:
    """An empty memory; None for a score that reads the weights alone."""
    match score:
        case Gradient(decay):
            return _GradientMemory(decay)
        case Movement(decay):
            return _MovementMemory(decay)
        case Learned(lr):
            return _LearnedMemory(lr)
    return None


def magnitude(weight: Tensor, block: tuple[int, int], score: Score) -> Tensor:
    """Magnitude of each block, float32 `[NB, KB]`; the l2 norm where `score` has none of its own."""
    return block_scores(weight.float(), block, score.norm if isinstance(score, Magnitude) else Magnitude().norm)


def is_finite(tensors: list[Tensor]) -> list[bool]:
    """Whether each tensor is free of NaN and Inf; one transfer for the whole list."""
    # A sum is finite only if all its terms are. The reverse does not hold, so what is not is looked at again.
    sums = torch.stack([tensor.sum() for tensor in tensors]).isfinite().tolist() if tensors else []
    return [fine or bool(tensor.isfinite().all()) for fine, tensor in zip(sums, tensors, strict=True)]
