"""Weights, masks, exact answers and error bounds; caches of this machine."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import sparse_pathways as sp

BLOCK = (8, 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SIGMAS = 8  # one normal variable in 1e15 lies further out; the largest product here has a million outputs

Shape = tuple[int, int]  # N, K


def cache_bytes(level: int) -> int:
    """Size of the cache of this level as the kernel reports it; 2 and 32 MB where it does not."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level):
            size = (index / "size").read_text().strip()
            return int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
    return {2: 2 * 2**20, 3: 32 * 2**20}[level]


def rotation_bytes(level: str) -> int:
    """How many bytes of weights every contender rotates over, so that a call finds none of its own in that cache."""
    return {"l2": 4 * cache_bytes(2), "l3": cache_bytes(3) * 8 // 5}[level]


def copies(nbytes: int, level: str) -> int:
    return max(1, -(-rotation_bytes(level) // nbytes))


@functools.lru_cache(maxsize=1)
def weight_and_bias(shape: Shape) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng), torch.randn(shape[0], generator=rng)


@functools.lru_cache(maxsize=8)
def block_mask(shape: Shape, sparsity: float) -> Tensor:
    """By the magnitude of a random weight, so block rows differ in length as they do in a trained layer."""
    return sp.topk_mask(sp.block_scores(weight_and_bias(shape)[0], BLOCK), sparsity)


@dataclass(frozen=True)
class Answer:
    """What a product must give, and how far off each element may be."""

    exact: Tensor
    bound: Tensor

    def check(self, name: str, y: Tensor) -> None:
        """Raise ArithmeticError for a wrong product: it has no speed."""
        error = (y.double() - self.exact).abs()
        worst = torch.where(error == 0, 0, error / self.bound).max().item()  # a column without blocks has no error
        if not worst <= 1:  # also NaN
            raise ArithmeticError(f"{name}: an element is {worst:.3g} times its error bound away from the exact answer")


def answer(x: Tensor, weight: Tensor, kept: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Answer:
    """The float64 product of the values that the operands hold, and the bound of its dtype.

    float32: K + 1 roundings. bfloat16: the same sum in float32, then at most two roundings to bfloat16 (sum, bias).
    int8: K independent roundings each of x (one scale per call, the coarsest that anyone uses) and of the weight (one
    scale per output), uniform within a step and so normal in sum: SIGMAS standard deviations.
    """
    w = (weight if kept is None else torch.where(kept, weight, 0)).double()
    exact = x.double() @ w.T + bias.double()
    magnitude = x.double().abs() @ w.abs().T + bias.double().abs()
    bound = magnitude * ((x.shape[1] + 1) * torch.finfo(torch.float32).eps)
    if dtype == torch.bfloat16:
        bound += (exact.abs() + bias.double().abs()) * torch.finfo(torch.bfloat16).eps
    elif dtype == torch.int8:
        step_x, step_w = x.double().abs().max() / 127, w.abs().amax(1) / 127
        used = torch.ones_like(w) if kept is None else kept.double()
        variance = (step_x**2 * w.square().sum(1) + x.double().square() @ used.T * step_w**2) / 12
        bound += SIGMAS * variance.sqrt()
    return Answer(exact, bound)


def mask_at_random_(model: nn.Module, sparsity: float) -> nn.Module:
    """Make every linear layer of a model sparse, with a random mask."""
    sp.sparsify_(model, block=BLOCK)
    rng = torch.Generator().manual_seed(0)
    for layer in sp.sparse_layers(model).values():
        layer.set_mask_(sp.topk_mask(torch.rand(layer.mask().shape, generator=rng), sparsity))
    return model


def masked_dense(sparse: nn.Module) -> nn.Module:
    """A copy with nn.Linears that hold zeros where the mask prunes."""
    model = copy.deepcopy(sparse)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, sp.SparseLinear):
                setattr(module, name, child.to_linear())
    return model.requires_grad_(False)
