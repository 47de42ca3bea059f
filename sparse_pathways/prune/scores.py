"""What ranks the blocks of a layer. A score is plain data; what it remembers between steps lives in `ScoreMemory`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_pathways.mask import block_scores, block_sums
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


Score = Magnitude | Gradient
BY_NAME: dict[str, type[Magnitude] | type[Gradient]] = {"magnitude": Magnitude, "gradient": Gradient}


def as_score(score: Score | str) -> Score:
    """A score from its name ("magnitude", "gradient") with default settings; a score object passes through."""
    if isinstance(score, str):
        if score not in BY_NAME:
            raise ValueError(f"score = {score!r}; choose one of {', '.join(BY_NAME)}")
        return BY_NAME[score]()
    if not isinstance(score, (Magnitude, Gradient)):
        raise TypeError(f"score is a {type(score).__name__}; want one of {', '.join(BY_NAME)}, Magnitude(), Gradient()")
    return score


def batch_importance(weight: Tensor, grad: Tensor, block: tuple[int, int]) -> Tensor:
    """|sum over the block of w * g| of one batch, float32 `[NB, KB]`, from weight and gradient `[N, K]`."""
    return block_sums(weight.float() * grad.float(), block).abs()


class ScoreMemory:
    """Moving averages of `Gradient`, per layer float32 `[P, NB, KB]` over the governed pathways.

    Start at zero; `average` removes the bias towards it.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}

    def add(self, layer: str, index: int, pathways: int, importance: Tensor) -> None:
        """One batch of pathway `index` enters the average of `layer`."""
        if layer not in self.averages:
            self.averages[layer] = importance.new_zeros(pathways, *importance.shape)
        self.averages[layer][index].mul_(self.decay).add_(importance, alpha=1.0 - self.decay)

    def average(self, layer: str, index: int, batches: int) -> Tensor:
        """Unbiased average `[NB, KB]` of pathway `index` after `batches` of its batches."""
        return self.averages[layer][index] / (1.0 - self.decay**batches)


def magnitude(weight: Tensor, block: tuple[int, int], score: Score) -> Tensor:
    """Magnitude of each block, float32 `[NB, KB]`; the l2 norm where `score` has none of its own."""
    return block_scores(weight.float(), block, score.norm if isinstance(score, Magnitude) else Magnitude().norm)


def is_finite(tensors: list[Tensor]) -> list[bool]:
    """Whether each tensor is free of NaN and Inf; one transfer for the whole list."""
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).tolist() if tensors else []
