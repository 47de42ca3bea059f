"""Problems with their float64 answers, and a process in which Triton interprets kernels on the CPU."""

import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class Answer(NamedTuple):
    """A product in float64, and the largest error a correct kernel may show, per element."""

    exact: Tensor
    bound: Tensor

    def check(self, y: Tensor) -> None:
        y = y.cpu()
        assert y.shape == self.exact.shape
        wrong = ~((y.double() - self.exact).abs() <= self.bound)  # a NaN is wrong
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} elements; first at {wrong.nonzero()[0].tolist()}: "
            f"{y[wrong][0]}, exact {self.exact[wrong][0]}, allowed error {self.bound[wrong][0]}"
        )


def answer(exact: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype) -> Answer:
    """Float32 sum of `terms` products, each sum of |products| at most `magnitude`, then one rounding to dtype."""
    return Answer(exact, magnitude * ((terms + 2) * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) + 1e-30)


def lists_of(mask: Tensor, ids: torch.dtype) -> dict[str, Tensor]:
    """Index lists block by block: slow, plain, and nothing shared with the package."""
    entries = mask.nonzero().tolist()
    transposed = sorted(range(len(entries)), key=lambda e: (entries[e][1], entries[e][0]))

    def starts(counts: list[int]) -> Tensor:
        return torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)

    return {
        "crow": starts(mask.sum(1).tolist()),
        "col": torch.tensor([j for _, j in entries], dtype=torch.int32).to(ids),
        "row": torch.tensor([i for i, _ in entries], dtype=torch.int32).to(ids),
        "crow_t": starts(mask.sum(0).tolist()),
        "row_t": torch.tensor([entries[e][0] for e in transposed], dtype=torch.int32).to(ids),
        "pos_t": torch.tensor(transposed, dtype=torch.int32),
    }


class Problem:
    """A weight with pruned blocks, its lists, x, dy and bias; seeded. Pruned weights are NaN.

    Args:
        shape: (M, N, K).
        block: (R, C).
        dtype: of all tensors.
        mask: bool `[NB, KB]`; default about 40 % kept.
        bias: whether there is one.
        ids: dtype of the index lists.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        block: tuple[int, int] = (16, 16),
        dtype: torch.dtype = torch.float32,
        *,
        mask: Tensor | None = None,
        bias: bool = True,
        ids: torch.dtype = torch.uint16,
    ) -> None:
        (m, n, k), (r, c) = shape, block
        grid = (-(-n // r), -(-k // c))
        self.rng = torch.Generator().manual_seed(m + 7 * n + 11 * k + 13 * r + 17 * c)
        self.block, self.dtype = block, dtype
        self.mask = torch.rand(grid, generator=self.rng) < 0.4 if mask is None else mask
        assert self.mask.shape == grid
        self.kept = self.mask.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
        exact = torch.randn(n, k, generator=self.rng).to(dtype)
        self.weight = torch.where(self.kept, exact, torch.nan)
        self.x, self.dy = (torch.randn(m, size, generator=self.rng).to(dtype) for size in (k, n))
        self.bias = torch.randn(n, generator=self.rng).to(dtype) if bias else None
        self.__dict__ |= lists_of(self.mask, ids)
        padded = torch.zeros(grid[0] * r, grid[1] * c, dtype=dtype)
        padded[:n, :k] = torch.where(self.kept, exact, 0)
        blocks = [padded[i * r :, j * c :][:r, :c].T for i, j in self.mask.nonzero().tolist()]
        self.values = torch.stack(blocks).contiguous() if blocks else torch.zeros(0, c, r, dtype=dtype)
        self.dense = padded[:n, :k].double()

    def forward(self, activation: Callable[[Tensor], Tensor] | None = None) -> Answer:
        offset = torch.zeros(1, dtype=torch.float64) if self.bias is None else self.bias.double()
        y, size = self.x.double() @ self.dense.T + offset, self.x.double().abs() @ self.dense.abs().T + offset.abs()
        if activation is None:
            return answer(y, size, self.x.shape[1], self.dtype)
        return answer(activation(y), 1.2 * size, self.x.shape[1], self.dtype)  # no activation is steeper than 1.13

    def dx(self) -> Answer:
        dy = self.dy.double()
        return answer(dy @ self.dense, dy.abs() @ self.dense.abs(), dy.shape[1], self.dtype)

    def dw(self) -> Answer:
        x, dy = self.x.double(), self.dy.double()
        return answer(dy.T @ x * self.kept, dy.abs().T @ x.abs() * self.kept, x.shape[0], self.dtype)

    def answer(self, exact: Tensor, magnitude: Tensor, terms: int) -> Answer:
        """Another product of this dtype, for tests that have its float64 answer."""
        return answer(exact, magnitude, terms, self.dtype)

    def forward_arguments(self, dense: bool = False, device: str = "cpu") -> dict[str, Any]:
        """Arguments of `bcsr_linear`, weight packed or stored dense."""
        found = {"x": self.x, "values": self.weight if dense else self.values, "crow": self.crow, "col": self.col}
        found |= {"pos": None, "bias": self.bias, "n": self.weight.shape[0]} | ({"block": self.block} if dense else {})
        return to_device(found, device)

    def dx_arguments(self, dense: bool = False, device: str = "cpu") -> dict[str, Any]:
        """Arguments of `bcsr_linear_dx`."""
        found = {"dy": self.dy, "values": self.weight if dense else self.values, "crow_t": self.crow_t}
        found |= {"row_t": self.row_t, "pos_t": None if dense else self.pos_t, "k": self.weight.shape[1]}
        return to_device(found | ({"block": self.block} if dense else {}), device)

    def dw_arguments(self, dense: bool = False, device: str = "cpu") -> dict[str, Any]:
        """Arguments of `bcsr_linear_dw`."""
        found = {"dy": self.dy, "x": self.x, "row": self.row, "col": self.col, "pos": None, "count": self.crow[-1:]}
        return to_device(found | {"block": self.block, "blocks": -1 if dense else self.values.shape[0]}, device)


def to_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: one.to(device) if isinstance(one, Tensor) else one for name, one in arguments.items()}


@pytest.fixture(scope="session")
def problem() -> type[Problem]:
    return Problem


class Interpreter:
    """Calls functions of `kernels/` in a process started with TRITON_INTERPRET=1.

    TRITON_INTERPRET is read when `@triton.jit` decorates, for Triton's own library functions when triton is imported.
    By now torch may have imported triton without it, and compiled kernels (torch.compile, the compile tests) need it
    unset; so the interpreter has a process of its own, started once per session. What `torch.empty` returns there is
    NaN, so an element that a kernel forgets to write shows.
    """

    def __init__(self, *options: str) -> None:
        import triton

        # The checkout first, then the caller's folders: `make compat` has its Triton there.
        path = os.pathsep.join([str(KERNELS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("interpreter_worker.py")), triton.__version__, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        )

    def __call__(self, function: str, **arguments: Any) -> Any:
        """`interpreted("bcsr_linear.bcsr_linear_dx", dy=...)`: the result of the launcher."""
        outcome = self.ask(function, arguments)
        if isinstance(outcome, str):
            pytest.fail(f"in the interpreter process:\n{outcome}", pytrace=False)
        return outcome

    def far(self, function: str, *rows: str, pool: str | None = None, **arguments: Any) -> Any:
        """The same with the rows of the arguments in `rows`, and the blocks of the packed weight `pool`, past 2**31.

        In memory that is there only where it is touched. A number of 32 bits that meets a stride too early wraps, and
        its address is outside the tensor.
        """
        return self("far", launcher=function, arguments=arguments, rows=rows, pool=pool)

    def ask(self, function: str, arguments: Any) -> Any:
        """The result, or the traceback as a string."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            message = io.BytesIO()
            torch.save((function, arguments), message)  # keeps strides and uint16, which pickle alone does not
            pickle.dump(message.getvalue(), self.process.stdin)
            self.process.stdin.flush()
            return torch.load(io.BytesIO(pickle.load(self.process.stdout)), weights_only=False)
        except (EOFError, BrokenPipeError):
            pytest.fail(f"the interpreter process ended with exit code {self.process.wait(60)}", pytrace=False)

    @contextmanager
    def mutated(self, file: str, old: str, new: str, folder: Path) -> Iterator[None]:
        """Kernels with one place of one file changed, until the block ends."""
        copy = folder / "kernels"
        copy.mkdir()
        for path in KERNELS.glob("*.py"):
            text = path.read_text()
            if path.name == file:
                assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}"
                text = text.replace(old, new)
            (copy / path.name).write_text(text)
        self("load", folder=str(copy))
        try:
            yield
        finally:
            self("load", folder=str(KERNELS))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="Triton is not installed")
    worker = Interpreter()
    yield worker
    worker.close()


def load(name: str) -> ModuleType:
    """A module beside this file."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_module() -> Callable[[str], ModuleType]:
    return load


@pytest.fixture(scope="session")
def machine_code() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    return load("machine_code")


@pytest.fixture
def thorough() -> None:
    """The long part of the proof: `make prove`."""
    if not os.environ.get("SPARSE_PATHWAYS_PROVE"):
        pytest.skip("part of `make prove` (SPARSE_PATHWAYS_PROVE=1)")


@pytest.fixture(scope="session")
def interpreted_package() -> Iterator[Interpreter]:
    """The same with the whole package, whose operators run the Triton kernels on CPU tensors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    worker = Interpreter("--package")
    yield worker
    worker.close()
