"""The measuring parts of `run.py`: each yields rows, which are written as they come: a hang loses only the rest.

A row names its part and product and holds microseconds per contender ("us", "low_us", "high_us"), what the model
expected and the ratio to the best dense contender. Every contender's result is checked before it is timed.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from checkout import PRETEND
from problem import Weight, attempt, check, check_product, rows
from sparse_pathways.kernels import bcsr_linear, bcsr_linear_dw, ffn, pathway_linear, tuning
from strips import strips
from timing import DEVICE, DTYPE, median_us, sets_for
from torch import Tensor

import sparse_pathways as sp
from sparse_pathways.ops import roofline

Row = dict[str, Any]
Calls = dict[str, list[Callable[[], Any]]]

EMFORMER = [(512, 512), (1536, 512), (2048, 512), (512, 2048)]  # N, K
# N, K, rows, block: MegaBlocks' FFN, torchao's Llama, superblock's ViT, Llama decode and prefill at 90 % (torchao#1734)
YARDSTICKS = [
    ((2048, 512), 65536, (128, 128)),
    ((4096, 1024), 8192, (128, 128)),
    ((4096, 4096), 8192, (64, 64)),
    ((11008, 4096), 4096, (64, 64)),
    ((3072, 768), 50432, (64, 64)),
    ((14336, 4096), 16, (64, 64)),
    ((4096, 14336), 16, (64, 64)),
]
FORWARD = [(shape, m, (side, side)) for shape in EMFORMER for m in (16, 512, 16384) for side in (16, 32, 64)]
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
if PRETEND:  # one small case of every kind
    EMFORMER, YARDSTICKS, SPARSITIES = [(64, 64)], [((64, 64), 32, (32, 32))], (0.7,)
    FORWARD = [((64, 64), 20, (16, 16))]


def finished(row: Row, contenders: Calls, dense: tuple[str, ...], sparse: str, expected: tuple | None = None) -> Row:
    """The row with its times, the ratio of the best dense contender to `sparse`, and the model's ratio beside it."""
    row["times"] = median_us(contenders, row.get("eager", ()))
    best = min((name for name in dense if name in row["times"]), key=lambda name: row["times"][name]["us"])
    row |= {"best_dense": best, "ratio": row["times"][best]["us"] / row["times"][sparse]["us"]}
    if expected is not None:
        row |= {"model_ratio": expected[0].us / expected[1].us, "model_bound": expected[1].bound}
    return row


def about(part: str, weight: Weight, m: int, sparsity: float, op: str = "forward") -> Row:
    block = list(weight.block)
    return {"part": part, "op": op, "n": weight.n, "k": weight.k, "m": m, "block": block, "sparsity": sparsity}


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 256  # one per shape; beyond the limit it would be eager, unsaid
    return function if PRETEND else torch.compile(function, dynamic=False)


def packed_forward(weight: Weight) -> Callable[[Tensor], Tensor]:
    index = weight.packed.index()
    return lambda x: bcsr_linear.bcsr_linear(x, weight.packed.values, *index, weight.bias, weight.n)


def forward(cases: list | None = None) -> Iterator[Row]:
    """Packed forward product with a bias against F.linear, plain and compiled."""
    dense = compiled(F.linear)
    for ((n, k), m, block), sparsity in itertools.product(FORWARD if cases is None else cases, SPARSITIES):
        weight = Weight(n, k, block, sparsity)
        sparse = packed_forward(weight)
        xs = rows(m, k, sets_for(torch.empty(m, k + n, dtype=DTYPE, device="meta")))
        check_product(sparse(xs[0]), xs[0], weight.dense, weight.bias)
        row = about("forward", weight, m, sparsity)
        row["schedule"] = list(tuning.schedule("product", m, block, DTYPE, torch.device(DEVICE)))
        contenders = {
            "F.linear": [lambda x=x, w=weight: F.linear(x, w.dense, w.bias) for x in xs],
            "compiled": [lambda x=x, w=weight: dense(x, w.dense, w.bias) for x in xs],
            "triton": [lambda x=x, f=sparse: f(x) for x in xs],
        }
        expected = roofline.dense(m, n, k), roofline.triton("forward", m, n, k, block, 1 - sparsity)
        yield finished(row, contenders, ("F.linear", "compiled"), "triton", expected)


def yardsticks() -> Iterator[Row]:
    """The forward product at shapes that others published."""
    for row in forward(YARDSTICKS):
        yield row | {"part": "yardsticks"}


def training() -> Iterator[Row]:
    """Forward, dX and dW from dense storage, each against cuBLAS: what the dispatcher's crossover should be."""
    m = 32 if PRETEND else 16384
    for (n, k), side, sparsity in itertools.product(EMFORMER[-2:], (32, 64, 128), SPARSITIES):
        if PRETEND and side > 32:
            continue
        block = (side, side)
        weight, layout = (made := Weight(n, k, block, sparsity)), made.layout
        x, dy = rows(m, k, 1)[0], rows(m, n, 1)[0]
        crow, lists, count = layout.crow, (layout.rows(), layout.col), layout.crow[-1:]
        stored = weight.stored
        products: dict[str, tuple[Callable, Callable]] = {
            "forward": (
                lambda x=x, w=stored, c=crow, i=layout, n=n, b=block: bcsr_linear.bcsr_linear(
                    x, w, c, i.col, None, None, n, block=b
                ),
                lambda x=x, w=weight.dense: F.linear(x, w),
            ),
            "dx": (
                lambda dy=dy, w=stored, i=layout, k=k, b=block: bcsr_linear.bcsr_linear_dx(
                    dy, w, i.crow_t, i.row_t, None, k, block=b
                ),
                lambda dy=dy, w=weight.dense: dy @ w,
            ),
            "dw": (
                lambda dy=dy, x=x, e=lists, c=count, b=block: bcsr_linear_dw.bcsr_linear_dw(dy, x, *e, None, c, b),
                lambda dy=dy, x=x: dy.T @ x,
            ),
        }
        for op, (sparse, dense) in products.items():
            exact = check_training(op, sparse(), x, dy, weight)
            row = about("training", weight, m, sparsity, op) | {"largest": exact}
            expected = (
                roofline.dense(*{"forward": (m, n, k), "dx": (m, k, n), "dw": (n, k, m)}[op]),
                roofline.triton(op, m, n, k, block, 1 - sparsity),
            )
            yield finished(row, {"cuBLAS": [dense], "triton": [sparse]}, ("cuBLAS",), "triton", expected)


def check_training(op: str, got: Tensor, x: Tensor, dy: Tensor, weight: Weight) -> float:
    """Check one product of a step; the largest element of the result."""
    if op == "forward":
        check_product(got, x, weight.dense)
    elif op == "dx":
        check_product(got, dy, weight.dense.T)
    else:
        kept = sp.expand_mask(weight.masks[0], weight.block, (weight.n, weight.k))
        exact = dy.float().T @ x.float() * kept
        check(got, exact, dy.float().abs().T @ x.float().abs() * kept)
    return float(got.abs().max())


def rival_forms(weight: Weight, sparsity: float) -> dict[str, Callable[[], Tensor]]:
    """torch's own sparse forms of a weight; 2:4 has a pattern of its own, so it stands for its time alone."""
    forms = {"torch BSR": lambda: weight.dense.to_sparse_bsr(weight.block)}
    if sparsity == 0.5:
        pattern = torch.tensor([1, 0, 1, 0], dtype=torch.bool, device=DEVICE).repeat(weight.n, weight.k // 4)
        forms["torch 2:4"] = lambda: torch.sparse.to_sparse_semi_structured(weight.stored * pattern)
    return forms


def rivals() -> Iterator[Row]:
    """torch's own block-sparse and 2:4 products beside ours, where they run at all."""
    m = 32 if PRETEND else 4096
    shapes = [(64, 64)] if PRETEND else [(2048, 512), (4096, 4096)]
    for (n, k), side, sparsity in itertools.product(shapes, (32,) if PRETEND else (16, 32, 64), (0.5, 0.8, 0.9)):
        weight, (x,) = Weight(n, k, (side, side), sparsity), rows(m, k, 1)
        ours = packed_forward(weight)
        check_product(ours(x), x, weight.dense, weight.bias)
        contenders: Calls = {
            "F.linear": [partial(F.linear, x, weight.dense, weight.bias)],
            "triton": [partial(ours, x)],
        }
        row = about("rivals", weight, m, sparsity) | {"refused": {}, "eager": []}
        for name, form in rival_forms(weight, sparsity).items():
            made: list[Tensor] = []

            def call(x=x, made=made, bias=weight.bias) -> Tensor:
                return F.linear(x, made[0], bias)

            reason = attempt(lambda made=made, form=form: made.append(form())) or attempt(call)
            if reason is None:
                contenders[name] = [call]
                row["eager"].append(name)  # they wait for the device, which no graph can hold
            else:
                row["refused"][name] = reason
        if "torch BSR" in contenders:
            check_product(contenders["torch BSR"][0](), x, weight.dense, weight.bias)
        yield finished(row, contenders, ("F.linear",), "triton")


def pathways() -> Iterator[Row]:
    """Rows of four pathways in one batch: union and segments, against the dense product and a loop over pathways."""
    for m, side in itertools.product((20,) if PRETEND else (16, 256, 4096), (32, 64)):
        n, k = (64, 64) if PRETEND else (2048, 512)
        weight = Weight(n, k, (side, side), 0.7, pathways=4)
        (x,), pathway = rows(m, k, 1), torch.arange(m, device=DEVICE) % 4
        layout, entries = weight.layout, torch.stack(weight.masks)[:, weight.layout.to_mask()]
        bits = (entries.to(torch.int32) << torch.arange(4, device=DEVICE, dtype=torch.int32)[:, None]).sum(0)
        union = pathway_linear.Lists(layout.crow, layout.col, None, bits.to(torch.int32))
        indices, before, starts = weight.packed.indices, 0, []
        for one in indices:
            starts.append(one.crow + before)
            before += one.col.numel()
        whole = torch.arange(bits.numel(), device=DEVICE, dtype=torch.int32)  # of a pathway that keeps the whole union
        places = torch.cat([whole if one.pos is None else one.pos for one in indices])
        own = pathway_linear.Lists(torch.stack(starts), torch.cat([one.col for one in indices]), places, None)
        exact = torch.empty(m, n, device=DEVICE)
        for number, mask in enumerate(weight.masks):
            mine, kept = pathway == number, sp.expand_mask(mask, weight.block, (n, k))
            exact[mine] = F.linear(x[mine].float(), torch.where(kept, weight.stored, 0).float(), weight.bias.float())
        size = F.linear(x.float().abs(), weight.dense.float().abs(), weight.bias.float().abs())
        calls = {}
        for name, lists in (("union", union), ("segments", own)):
            given = x, weight.packed.values, lists, pathway, weight.bias, n, (side, side), (1, side)
            calls[name] = [lambda given=given: pathway_linear.pathway_linear(*given)]
            check(calls[name][0](), exact, size)
        calls["F.linear"] = [lambda x=x, w=weight: F.linear(x, w.dense, w.bias)]
        row = about("pathways", weight, m, 0.7)
        yield finished(row, calls, ("F.linear",), "union" if m <= 256 else "segments")


def feed_forward() -> Iterator[Row]:
    """512 -> 2048 -> 512 with SiLU: one launch, two launches, and the dense layer, plain and compiled."""
    n, h, m_all = (64, 64, (40,)) if PRETEND else (512, 2048, (4096, 16384, 65536))
    dense = compiled(lambda x, w1, b1, w2, b2: F.linear(F.silu(F.linear(x, w1, b1)), w2, b2))
    for m, side, sparsity in itertools.product(m_all, (32,) if PRETEND else (32, 64), (0.7, 0.9)):
        one, two = Weight(h, n, (side, side), sparsity), Weight(n, h, (side, side), sparsity)
        (x,) = rows(m, n, 1)
        weights = [ffn.Weight(w.packed.values, *w.packed.index(), w.bias, w.n, w.block) for w in (one, two)]

        def apart(x=x, one=one, two=two) -> Tensor:
            hidden = bcsr_linear.bcsr_linear(x, one.packed.values, *one.packed.index(), one.bias, one.n, activation=3)
            return bcsr_linear.bcsr_linear(hidden, two.packed.values, *two.packed.index(), two.bias, two.n)

        given = x, one.dense, one.bias, two.dense, two.bias
        calls = {
            "dense": [lambda g=given: F.linear(F.silu(F.linear(g[0], g[1], g[2])), g[3], g[4])],
            "compiled": [lambda g=given: dense(*g)],
            "two launches": [apart],
            "one launch": [lambda x=x, w=weights: ffn.bcsr_ffn(x, *w, 3)],
        }
        hidden = F.silu(F.linear(x.float(), one.dense.float(), one.bias.float()))
        size = F.linear(hidden.abs(), two.dense.float().abs(), two.bias.float().abs()) + 1
        exact = F.linear(hidden, two.dense.float(), two.bias.float())
        for name in ("two launches", "one launch"):
            check(calls[name][0](), exact, size)
        yield finished(about("ffn", one, m, sparsity), calls, ("dense", "compiled"), "one launch")


def ceilings() -> Iterator[Row]:
    """What the device can do: copy, bf16 product, launch of an empty kernel."""
    size = 1 << (10 if PRETEND else 29)
    source, target = torch.empty(2, size, dtype=torch.int8, device=DEVICE)
    us = median_us({"copy": [lambda: target.copy_(source)]})["copy"]["us"]
    yield {"part": "ceilings", "name": "copy", "us": us, "tb_per_s": 2 * size / us * 1e-6, "model": roofline.HBM / 1e12}
    for side in (64,) if PRETEND else (4096, 8192):
        (x,), (w,) = rows(side, side, 1), rows(side, side, 1)
        us = median_us({"product": [lambda x=x, w=w: F.linear(x, w)]})["product"]["us"]
        rate = 2 * side**3 / us * 1e-6
        yield {"part": "ceilings", "name": f"product {side}", "us": us, "tflops": rate, "model": roofline.TENSOR / 1e12}
    tiny = torch.zeros(1, device=DEVICE)
    us = median_us({"launch": [lambda: tiny.add_(1)] * 20})["launch"]["us"]
    yield {"part": "ceilings", "name": "launch in a graph", "us": us, "model": roofline.LAUNCH_US}


def tune() -> Iterator[Row]:
    """Schedules for Emformer's shapes, into the user's folder; copy the table to kernels/schedules to ship it."""
    device = torch.cuda.get_device_name()
    for (n, k), m, side in itertools.product(EMFORMER[-1:], (20,) if PRETEND else (16, 512, 16384), (16, 32, 64, 128)):
        if PRETEND and side > 16:
            continue
        block = (side, side)
        weight, (x,) = Weight(n, k, block, 0.8), rows(m, k, 1)
        name, index = tuning.key("product", m, block, DTYPE), weight.packed.index()
        tried = tuning.candidates("product", m, block, DTYPE)

        def run(one, x=x, weight=weight, index=index) -> Tensor:
            return bcsr_linear.bcsr_linear(x, weight.packed.values, *index, None, weight.n, schedule=one)

        timed = {"time_ms": lambda call: float(median_us({"": [call]})[""]["us"])} if PRETEND else {}
        best, outcome = tuning.tune(name, run, tried[:2] if PRETEND else tried, device, **timed)
        yield {
            "part": "tune",
            "name": name,
            "best": list(best),
            "outcome": {str(list(o)): v for o, v in outcome.items()},
        }


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "ceilings": ceilings,
    "forward": forward,
    "training": training,
    "yardsticks": yardsticks,
    "rivals": rivals,
    "pathways": pathways,
    "ffn": feed_forward,
    "strips": strips,
    "tune": tune,
}
