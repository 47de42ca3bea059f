"""Fixtures of the kernel tests: block-sparse problems of any stored dtype, the instruction sets of this machine."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sparse_pathways.ops import linear as _schemas  # noqa: F401  defines the operators
from sparse_pathways.ops.backends import ISAS
from sparse_pathways.ops.library import MISSING


class Blocks(NamedTuple):
    dense: Tensor  # [N, K], 0 where pruned
    values: Tensor  # [entries, C, R], zero padded; with `pos`, a pool with strangers between the kept blocks
    crow: Tensor
    col: Tensor
    pos: Tensor | None


def make_blocks(weight: Tensor, block, rng, *, density=0.3, ids=torch.uint16, pool=False) -> Blocks:
    """Keep random blocks of `weight`: the first block row is empty, the last full, the second block column empty."""
    (n, k), (r, c) = weight.shape, block
    mask = torch.rand(-(-n // r), -(-k // c), generator=rng) < density
    mask[-1], mask[0] = True, False
    if mask.shape[1] > 1:
        mask[:, 1] = False
    padded = torch.zeros(mask.shape[0] * r, mask.shape[1] * c, dtype=weight.dtype)
    padded[:n, :k] = weight
    blocks = padded.view(mask.shape[0], r, mask.shape[1], c).permute(0, 2, 3, 1)
    values, pos = blocks[mask].contiguous(), None
    dense = (blocks * mask[:, :, None, None]).permute(0, 3, 1, 2).reshape(padded.shape)[:n, :k]
    if pool:
        pos = torch.randperm(2 * len(values), generator=rng)[: len(values)].int()
        strangers = torch.full((2 * len(values), c, r), 1, dtype=values.dtype)
        strangers = strangers * (float("nan") if values.is_floating_point() else 77)
        strangers[pos.long()] = values
        values = strangers
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
    return Blocks(dense, values, crow, mask.nonzero()[:, 1].to(ids), pos)


@pytest.fixture
def blocks_of():
    """`make_blocks`."""
    return make_blocks


@pytest.fixture(params=range(torch.ops.sparse_pathways.max_isa() + 1) if MISSING is None else (), ids=ISAS.__getitem__)
def level(request):
    """Runs the test once per instruction set of this machine, by calls of the operator."""
    before = torch.ops.sparse_pathways.set_isa(request.param)
    yield request.param
    torch.ops.sparse_pathways.set_isa(before)
