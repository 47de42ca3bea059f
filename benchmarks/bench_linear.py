"""One linear layer, float32, 8x1 blocks: `sp.sparse_linear` against the best dense product."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import baselines
import pytest
import torch
from comparison import Suite
from torch import Tensor

import sparse_pathways as sp

BLOCK = (8, 1)
SHAPES = [(512, 512), (2048, 512), (512, 2048)]  # N, K: the projections and the two halves of an Emformer feed-forward
ROWS = [1, 4, 16, 64]
SPARSITIES = {"packed 70 %": 0.7, "packed 90 %": 0.9}
TURNS = 11
CONTENDERS = [*baselines.available(), *SPARSITIES]


def _turns():
    """Every contender once per turn, in rotated order, so that none always follows the same neighbour."""
    for (n, k), m in itertools.product(SHAPES, ROWS):
        for turn in range(TURNS):
            first = turn % len(CONTENDERS)
            for contender in CONTENDERS[first:] + CONTENDERS[:first]:
                yield pytest.param((n, k), m, contender, id=f"{n}x{k}-M{m}-{contender.replace(' ', '_')}-{turn}")


@functools.cache
def dense_weight(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng), torch.randn(shape[0], generator=rng)


@functools.cache
def block_mask(shape: tuple[int, int], sparsity: float) -> Tensor:
    return sp.topk_mask(sp.block_scores(dense_weight(shape)[0], BLOCK), sparsity)


@functools.cache
def l2_bytes() -> int:
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 2 * 2**20


@functools.cache
def product(shape: tuple[int, int], m: int, contender: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """A product on its own copy of the weight, and the bytes of that copy."""
    weight, bias = dense_weight(shape)
    if contender in SPARSITIES:
        packed = sp.PackedWeight.pack(weight, block_mask(shape, SPARSITIES[contender]), BLOCK)
        return (lambda x: sp.sparse_linear(x, packed, bias)), packed.nbytes
    return baselines.available()[contender](weight.clone(), bias, m), weight.nbytes


@functools.cache
def products(shape: tuple[int, int], m: int, contender: str, cold: bool) -> list[Callable[[Tensor], Tensor]]:
    """One product when hot; cold, enough copies that each call finds its weight evicted from L2."""
    one, nbytes = product(shape, m, contender)
    copies = max(2, -(-4 * l2_bytes() // nbytes)) if cold else 1
    return [one, *(product.__wrapped__(shape, m, contender)[0] for _ in range(copies - 1))]


@functools.cache
def expected(shape: tuple[int, int], m: int, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, the float64 answer, and the largest error that a float32 dot product of length K may show."""
    weight, bias = dense_weight(shape)
    x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
    kept = sp.expand_mask(block_mask(shape, sparsity), BLOCK, shape)
    dense = torch.where(kept, weight, 0).double()
    magnitude = x.double().abs() @ dense.abs().T + bias.double().abs()
    return x, x.double() @ dense.T + bias.double(), magnitude * (shape[1] + 1) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("shape", "m", "contender"), list(_turns()))
def bench_linear(take_turn, request, shape, m, contender):
    x, answer, bound = expected(shape, m, SPARSITIES.get(contender, 0.0))
    cold = request.config.getoption("--cold")
    contestants = products(shape, m, contender, cold)
    for one in contestants:
        assert ((one(x).double() - answer).abs() <= bound).all(), "a wrong product has no speed"
    next_one = itertools.cycle(contestants).__next__
    take_turn(
        lambda: next_one()(x),
        suite=Suite("linear", "one Python call with bias, float32, block 8x1", "cold" if cold else "hot"),
        group=f"{shape[0]}x{shape[1]} M={m}",
        contender=contender,
        dense=contender not in SPARSITIES,
    )
