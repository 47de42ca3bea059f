"""What ranks the blocks of a layer. A score is plain data; what it remembers between steps lives in a memory."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_pathways.checks import check_number, set_plain
from sparse_pathways.mask import block_scores
from sparse_pathways.mask.score import NORMS

GATES = ("straight-through", "hard-concrete")


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

    w is the weight after the optimiser's step, as `Pruner.step` comes behind it; dL/dw is of the weight before.
    Averaged over the batches of that pathway only, so the same weight ranks differently for different pathways.

    Attributes:
        decay: of the exponential moving average, per batch of the pathway, in [0, 1).

    Source: Taylor importance (arXiv 1611.06440, equation 8), per block and per pathway.
    """

    decay: float = 0.98

    def __post_init__(self) -> None:
        set_plain(self, "decay", check_number("Gradient.decay", self.decay))
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"Gradient.decay = {self.decay}; want 0 <= decay < 1 (0 = the last batch alone)")


@dataclass(frozen=True)
class Movement:
    """How far training pushes the block away from zero: the sum of -w * dL/dw over the block and over the batches of
    the pathway (w as in `Gradient`).

    Attributes:
        decay: what is left of the sum after each batch of the pathway, in (0, 1]; 1: all batches count the same.

    Source: movement pruning (arXiv 2005.07683, equation 3), per block and per pathway.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        set_plain(self, "decay", check_number("Movement.decay", self.decay))
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"Movement.decay = {self.decay}; want 0 < decay <= 1 (1 = all batches count the same)")


@dataclass(frozen=True)
class Learned:
    """Block scores of every pathway, trained by Adam while the weights train.

    A block's score moves by the gradient of its gate, which multiplies the block: dL/dgate = sum over the block of
    w * dL/dw, divided by the gate (w as in `Gradient`). Scores start from the magnitude of the blocks, divided by its
    mean over the layer.

    Attributes:
        lr: of Adam, in units of the layer's mean magnitude per batch of the pathway.
        gate: "straight-through": a kept block's gate is 1, and dL/dscore = dL/dgate. "hard-concrete": while masks are
            decided and the model trains, the gates of kept blocks are drawn anew for every batch, from between 0 and 1,
            both included, higher the higher the score; the sparsity still is that of the schedule (a ranking takes the
            place of the penalty of the source), and fixed masks have gates of 1. They are drawn within the forward
            pass, where `torch.compile` breaks its graph.
        scale_lr: 0: nothing. Else a factor per block, shared by all pathways, is trained beside its weights with this
            learning rate, while masks are decided: after every batch the block is multiplied by what Adam, on
            dL/dfactor = (sum of w * dL/dw) / factor, has changed of it.

    Source: straight-through scores (arXiv 1911.13299), with Adam, per block and per pathway; hard-concrete gates
        (arXiv 1712.01312, equations 10 and 11), stretched to [-0.1, 1.1], at temperature 2 / 3.
    """

    lr: float = 0.05
    gate: str = "straight-through"
    scale_lr: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "scale_lr"):
            set_plain(self, name, check_number(f"Learned.{name}", getattr(self, name)))
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"Learned.lr = {self.lr}; want more than 0")
        if self.gate not in GATES:
            raise ValueError(f"Learned.gate = {self.gate!r}; choose one of {', '.join(GATES)}")
        if not 0.0 <= self.scale_lr < math.inf:
            raise ValueError(f"Learned.scale_lr = {self.scale_lr}; want 0 (no factors) or more")


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

    @property
    def gates(self) -> bool:
        """Whether products are multiplied with `gate`s, block by block."""
        return False

    def gate(self, layer: str, index: int, batches: int) -> Tensor:
        """What the blocks `[NB, KB]` of pathway `index` are multiplied with in training, after `batches` of its
        batches."""
        raise NotImplementedError

    def rescale(self, layer: str, signal: Tensor, steps: int) -> Tensor | None:
        """What the blocks `[NB, KB]` of the weight are to be multiplied with after this batch; None: nothing."""
        return None

    def replaced(self) -> None:
        """`tensors` are of another run, or of another time."""


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
    slots = 3  # score, and Adam's two averages; of a layer's factors, under another name: the same three
    betas = (0.9, 0.98)
    epsilon = 1e-12  # signals of a block may be small against 1
    low, high, temperature = -0.1, 1.1, 2.0 / 3.0  # of hard-concrete gates
    open = 2.0  # added to the score: a block of mean magnitude begins with a gate of 1 in 4 of 5 draws
    least_scale = 0.01

    def __init__(self, score: Learned) -> None:
        super().__init__()
        self.settings = score
        self._drawn: dict[tuple[str, int], tuple[int, Tensor]] = {}  # layer and pathway: of which batch, and what

    @staticmethod
    def _scale_name(layer: str) -> str:
        return f"{layer}:scale"

    def start(self, layer: str, pathways: int, magnitude: Tensor) -> None:
        super().start(layer, pathways, magnitude)
        self.tensors[layer][:, 0] = magnitude / magnitude.mean().clamp_min(torch.finfo(torch.float32).tiny)
        if self.settings.scale_lr:
            scale = magnitude.new_zeros(self.slots, *magnitude.shape)
            scale[0] = 1.0
            self.tensors[self._scale_name(layer)] = scale

    @property
    def gates(self) -> bool:
        return self.settings.gate == "hard-concrete"

    def gate(self, layer: str, index: int, batches: int) -> Tensor:
        return self._stretched(layer, index, batches).clamp(0.0, 1.0)

    def rescale(self, layer: str, signal: Tensor, steps: int) -> Tensor | None:
        scale = self.tensors.get(self._scale_name(layer))
        if scale is None:
            return None
        before = scale[0].clone()
        self._adam(scale, signal / before, self.settings.scale_lr, steps)
        return scale[0].clamp_(min=self.least_scale) / before

    def replaced(self) -> None:
        self._drawn.clear()

    def _stretched(self, layer: str, index: int, batches: int) -> Tensor:
        """Gates before they are cut to [0, 1]: the same number for the same batch, on every rank and after a resume."""
        done, value = self._drawn.get((layer, index), (-1, None))
        if value is None or done != batches:
            score = self.tensors[layer][index, 0]
            generator = torch.Generator(score.device).manual_seed(zlib.crc32(f"{layer}/{index}/{batches}".encode()))
            noise = torch.empty_like(score).uniform_(1e-6, 1.0 - 1e-6, generator=generator).logit_()
            value = torch.sigmoid((noise + score + self.open) / self.temperature)
            value = value * (self.high - self.low) + self.low
            self._drawn[layer, index] = batches, value
        return value

    def add(self, layer: str, index: int, signal: Tensor, batches: int) -> None:
        if self.settings.gate == "hard-concrete":
            stretched = self._stretched(layer, index, batches - 1)
            share = (stretched - self.low) / (self.high - self.low)
            slope = (self.high - self.low) * share * (1.0 - share) / self.temperature  # dgate/dscore where not cut
            cut = (stretched <= 0.0) | (stretched >= 1.0)
            signal = torch.where(cut, 0.0, signal * slope / stretched)
        self._adam(self.tensors[layer][index], signal, self.settings.lr, batches)

    def _adam(self, state: Tensor, gradient: Tensor, lr: float, count: int) -> None:
        """One step of Adam on `state` `[3, NB, KB]`: value and averages."""
        value, first, second = state
        first.mul_(self.betas[0]).add_(gradient, alpha=1.0 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1.0 - self.betas[1])
        size = (second / (1.0 - self.betas[1] ** count)).sqrt_().add_(self.epsilon)
        value.addcdiv_(first, size, value=-lr / (1.0 - self.betas[0] ** count))


def memory_of(score: Score) -> ScoreMemory | None:
    """An empty memory; None for a score that reads the weights alone."""
    match score:
        case Gradient(decay):
            return _GradientMemory(decay)
        case Movement(decay):
            return _MovementMemory(decay)
        case Learned():
            return _LearnedMemory(score)
    return None


def magnitude(weight: Tensor, block: tuple[int, int], score: Score) -> Tensor:
    """Magnitude of each block, float32 `[NB, KB]`; the l2 norm where `score` has none of its own."""
    return block_scores(weight.float(), block, score.norm if isinstance(score, Magnitude) else Magnitude().norm)


def is_finite(tensors: list[Tensor]) -> list[bool]:
    """Whether each tensor is free of NaN and Inf; one transfer for the whole list."""
    # A sum is finite only if all its terms are. The reverse does not hold, so what is not is looked at again.
    sums = torch.stack([tensor.sum() for tensor in tensors]).isfinite().tolist() if tensors else []
    return [fine or bool(tensor.isfinite().all()) for fine, tensor in zip(sums, tensors, strict=True)]
