"""Problems with their float64 answers, and a process in which Triton interprets kernels on the CPU."""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor


@dataclass
class Problem:
    """Arguments of `bcsr_linear` and the answer in float64, with the largest error a correct kernel may show."""

    x: Tensor
    values: Tensor
    crow: Tensor
    col: Tensor
    pos: Tensor | None
    bias: Tensor | None
    n: int
    expected: Tensor
    bound: Tensor

    def arguments(self, device: str = "cpu") -> dict:
        tensors = {name: getattr(self, name) for name in ("x", "values", "crow", "col", "pos", "bias")}
        return {name: t if t is None else t.to(device) for name, t in tensors.items()} | {"n": self.n}

    def check(self, y: Tensor) -> None:
        y = y.cpu()
        assert y.dtype == self.x.dtype
        assert y.shape == self.expected.shape
        error = (y.double() - self.expected).abs()
        assert (error <= self.bound).all(), f"largest error {error.max()}, largest allowed {self.bound.max()}"


def dense_from_blocks(mask: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Float64 weight `[n, k]`, block by block: slow, plain, and nothing shared with the package's packer."""
    _, c, r = values.shape
    dense = torch.zeros(mask.shape[0] * r, mask.shape[1] * c, dtype=torch.float64)
    for e, (i, j) in enumerate(mask.nonzero().tolist()):
        dense[i * r : (i + 1) * r, j * c : (j + 1) * c] = values[e].double().T
    return dense[: shape[0], : shape[1]]


def make_problem(
    shape: tuple[int, int, int],
    block: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    *,
    mask: Tensor | None = None,
    bias: bool = True,
    col_dtype: torch.dtype = torch.uint16,
) -> Problem:
    """A problem with seeded numbers; `shape` is (M, N, K); without `mask` about 40 % of the blocks are kept."""
    (m, n, k), (r, c) = shape, block
    grid = (-(-n // r), -(-k // c))
    rng = torch.Generator().manual_seed(m + 7 * n + 11 * k + 13 * r + 17 * c)
    if mask is None:
        mask = torch.rand(grid, generator=rng) < 0.4
    assert mask.shape == grid
    values = torch.randn(int(mask.sum()), c, r, generator=rng).to(dtype)
    row, column = mask.nonzero().unbind(1)
    values[row == grid[0] - 1, :, n - (grid[0] - 1) * r :] = 0  # the layout pads edge blocks with zeros
    values[column == grid[1] - 1, k - (grid[1] - 1) * c :, :] = 0
    x = torch.randn(m, k, generator=rng).to(dtype)
    b = torch.randn(n, generator=rng).to(dtype) if bias else None

    dense = dense_from_blocks(mask, values, (n, k))
    offset = torch.zeros(n, dtype=torch.float64) if b is None else b.double()
    magnitude = x.double().abs() @ dense.abs().T + offset.abs()
    return Problem(
        x=x,
        values=values,
        crow=torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).to(torch.int32),
        col=column.to(col_dtype),
        pos=None,
        bias=b,
        n=n,
        expected=x.double() @ dense.T + offset,
        bound=magnitude * ((k + 1) * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps),
    )


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Tensor]]:
    """`bcsr_linear` run by Triton's interpreter, called with keyword arguments.

    TRITON_INTERPRET is read when `@triton.jit` decorates, for Triton's own library functions when triton is imported.
    By now torch may have imported triton without it, and compiled kernels (torch.compile, the compile test) need it
    unset; so the interpreter has a process of its own, started once per session.
    """
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("interpreter_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert worker.stdin is not None and worker.stdout is not None

    def call(**arguments) -> Tensor:
        try:
            message = io.BytesIO()
            torch.save(arguments, message)  # keeps strides and uint16, which pickle alone does not
            pickle.dump(message.getvalue(), worker.stdin)
            worker.stdin.flush()
            answer = pickle.load(worker.stdout)
        except (EOFError, BrokenPipeError):
            pytest.fail(f"the interpreter process ended with exit code {worker.wait(60)}", pytrace=False)
        if isinstance(answer, str):
            pytest.fail(f"in the interpreter process:\n{answer}", pytrace=False)
        return answer

    yield call
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0
