"""One training step of a linear layer: forward, gradient of the input, gradients of weight and bias.

Sparse: `sp.SparseLinear`, 8x1, in both of its forms: pruned weights without a gradient ("kept"), or with the one they
would have if they were kept ("all", the default: a dense product of its own). Dense: F.linear under autograd, and the
same through torch.compile. No optimizer: it costs both sides the same.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_pathways as sp
from benchmarks import duel, workload
from benchmarks.workload import BLOCK, Answer, Shape

ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
SHAPES: tuple[Shape, ...] = ((512, 512), (2048, 512), (512, 2048), (1024, 1024))
GRADIENTS = {"kept": False, "all": True}  # dense_grad
Step = Callable[[], tuple[Tensor, ...]]  # -> y, dx, dweight, dbias


@dataclass(frozen=True)
class Plan:
    """Which cells, and how long each may take."""

    shapes: tuple[Shape, ...] = SHAPES
    rows: tuple[int, ...] = ROWS
    sparsities: tuple[float, ...] = (0.7, 0.9)
    seconds: float = 1.0
    turns: int | None = None


class Batch:
    """x, dy and the exact results of a step."""

    def __init__(self, shape: Shape, m: int) -> None:
        rng = torch.Generator().manual_seed(m)
        self.x = torch.randn(m, shape[1], generator=rng).requires_grad_()
        self.dy = torch.randn(m, shape[0], generator=rng)

    def answers(self, weight: Tensor, bias: Tensor, kept: Tensor | None, dense_grad: bool) -> list[Answer]:
        """Of y, dx, dweight and dbias; a gradient is a product like y, of other operands."""
        used = weight if kept is None else torch.where(kept, weight, 0)
        x, dy, none = self.x.detach(), self.dy, torch.zeros(1)
        answers = [
            workload.answer(x, used, None, bias, torch.float32),
            workload.answer(dy, used.T, None, none, torch.float32),
            workload.answer(dy.T, x.T, None, none, torch.float32),
            workload.answer(dy.T, torch.ones(1, len(dy)), None, none, torch.float32),
        ]
        answers[3] = Answer(answers[3].exact[:, 0], answers[3].bound[:, 0])
        if kept is not None and not dense_grad:
            whole = answers[2]
            answers[2] = Answer(torch.where(kept, whole.exact, 0), torch.where(kept, whole.bound, 1e-30))
        return answers


def _step(batch: Batch, forward: Callable[[Tensor], Tensor], parameters: tuple[Tensor, ...]) -> Step:
    def step() -> tuple[Tensor, ...]:
        y = forward(batch.x)
        return y, *torch.autograd.grad(y, (batch.x, *parameters), batch.dy)

    return step


def _dense(batch: Batch, weights: list[Tensor], bias: Tensor) -> Iterator[tuple[str, list[Step]]]:
    def step(weight: Tensor, product: Callable[..., Tensor]) -> Step:
        return _step(batch, lambda x: product(x, weight, bias), (weight, bias))

    yield "F.linear", [step(weight, F.linear) for weight in weights]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, weight, bias: F.linear(x, weight, bias), dynamic=False)
    yield "torch.compile", [step(weight, compiled) for weight in weights]


def _sparse(batch: Batch, weights: list[Tensor], bias: Tensor, mask: Tensor, dense_grad: bool) -> list[Step]:
    def step(weight: Tensor) -> Step:
        linear = nn.Linear(*reversed(weight.shape), device="meta")
        linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        layer = sp.SparseLinear.from_linear(linear, mask, BLOCK)
        layer.dense_grad = dense_grad
        return _step(batch, layer, (layer.weight, layer.bias))

    return [step(weight) for weight in weights]


def _cell(shape: Shape, m: int, plan: Plan) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per sparsity and form, and what was left out because it was wrong or could not run."""
    batch = Batch(shape, m)
    weight, bias = workload.weight_and_bias(shape)
    bias = bias.clone().requires_grad_()
    weights = [weight.clone().requires_grad_() for _ in range(workload.copies(weight.nbytes, "l2"))]
    exact = batch.answers(weight, bias.detach(), None, True)
    sources = [(name, True, steps, exact) for name, steps in _dense(batch, weights, bias)]
    which: dict[str, tuple[float, str]] = {}
    for sparsity in plan.sparsities:
        mask = workload.block_mask(shape, sparsity)
        kept = sp.expand_mask(mask, BLOCK, shape)
        for gradient, dense_grad in GRADIENTS.items():
            name = f"{sparsity:.0%}, gradient of {gradient}"
            which[name] = sparsity, gradient
            answers = batch.answers(weight, bias.detach(), kept, dense_grad)
            sources.append((name, False, _sparse(batch, weights, bias, mask, dense_grad), answers))
    contenders, faults = [], []
    for name, is_dense, steps, answers in sources:
        try:
            for part, got, answer in zip(("y", "dx", "dweight", "dbias"), steps[-1](), answers, strict=True):
                answer.check(f"{name}: {part}", got.detach())
            contenders.append(duel.Contender(name, is_dense, duel.rotating(steps), rotation=len(steps)))
        except (ArithmeticError, RuntimeError) as error:
            faults.append(f"{shape[0]}x{shape[1]} M={m} {name}: {error}")
    dense = [one.name for one in contenders if one.dense]
    if not dense or len(dense) == len(contenders):
        return [], faults
    times = duel.duel(contenders, plan.seconds, plan.turns)
    dense_us = {name: statistics.median(times[name]) * 1e6 for name in dense}
    return [
        {
            "n": shape[0],
            "k": shape[1],
            "m": m,
            "dtype": "float32",
            "sparsity": which[verdict.name][0],
            "gradient": which[verdict.name][1],
            "best_dense": verdict.best_dense,
            "dense_us": verdict.dense_us,
            "sparse_us": verdict.sparse_us,
            "ratio": verdict.ratio,
            "quartiles": verdict.quartiles,
            "ratio_of_fastest": verdict.ratio_of_fastest,
            "dense": dense_us,
        }
        for verdict in duel.judge(times, dense)
    ], faults


def run(plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """All cells, printed as they are done: (terms, rows, faults). Outside of inference_mode."""
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for shape in plan.shapes:
        for m in plan.rows:
            measured, failed = _cell(shape, m, plan)
            rows += measured
            faults += failed
            print(_line(shape, m, measured), flush=True)
    what = {
        "call": "forward and backward of one layer with bias, float32, block 8x1, one thread, no optimizer",
        "weights": f"rotating over {workload.rotation_bytes('l2') / 2**20:.0f} MB, beyond L2",
        "faults": faults,
    }
    return what, rows, faults


def _line(shape: Shape, m: int, rows: list[dict[str, Any]]) -> str:
    text = f"{f'{shape[0]}x{shape[1]}':10} M={m:<4}"
    if not rows:
        return f"{text} nothing to compare"
    text += f" {rows[0]['best_dense']:13} {rows[0]['dense_us']:8.0f} us"
    for row in rows:
        text += f" | {row['sparsity']:.0%} {row['gradient']} {row['sparse_us']:7.0f} us {row['ratio']:5.2f}x"
    return text
