"""One block-sparse weight in every form the contenders want, made on the device, with the check of their results."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import DEVICE, DTYPE
from torch import Tensor

import sparse_pathways as sp

EPS = torch.finfo(DTYPE).eps


class Weight:
    """A random weight `[n, k]` with random kept blocks: dense (zero where pruned), packed, and its lists."""

    def __init__(self, n: int, k: int, block: tuple[int, int], sparsity: float, pathways: int = 1) -> None:
        self.n, self.k, self.block = n, k, block
        grid = (n // block[0], k // block[1])
        common = torch.rand(grid, device=DEVICE)
        scores = [common + 0.5 * torch.rand(grid, device=DEVICE) for _ in range(pathways)]  # pathways that overlap
        self.masks = [sp.topk_mask(one, sparsity) for one in scores]
        self.stored = torch.randn(n, k, device=DEVICE).to(DTYPE)
        union = torch.stack(self.masks).any(0)
        self.dense = torch.where(sp.expand_mask(union, block, (n, k)), self.stored, 0)
        self.packed = sp.PackedWeight.pack(
            self.stored, {str(i): one for i, one in enumerate(self.masks)}, block, dtype=DTYPE
        )
        self.layout = sp.BlockLayout.from_mask(union, block, (n, k))
        self.bias = torch.randn(n, device=DEVICE).to(DTYPE)
        self.density = self.layout.density


def rows(m: int, size: int, sets: int) -> list[Tensor]:
    """Several batches of random rows."""
    return [torch.randn(m, size, device=DEVICE).to(DTYPE) for _ in range(sets)]


def check(y: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Every element within a few roundings of its sum of products; a wrong result has no speed."""
    wrong = ~((y.float() - exact).abs() <= 8 * EPS * magnitude + 1e-6)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are wrong; first at {where}: "
            f"{float(y[tuple(where)])}, exact {float(exact[tuple(where)])}"
        )


def check_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """`check` of x @ weight.T + bias on the first and last rows."""
    for part in (slice(0, 64), slice(max(64, x.shape[0] - 64), None)):
        some, offset = x[part].float(), None if bias is None else bias.float()
        exact = F.linear(some, weight.float(), offset)
        check(y[part], exact, F.linear(some.abs(), weight.float().abs(), None if offset is None else offset.abs()))


def attempt(call: Callable[[], Any]) -> str | None:
    """None if the call runs, else one line of why it does not: a contender may not serve a shape."""
    try:
        call()
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
