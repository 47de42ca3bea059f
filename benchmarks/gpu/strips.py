"""The CUDA C++ kernels over strips: products with blocks of one input, an LSTM step, index lists of a whole model."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from checkout import PRETEND
from problem import Weight, attempt, check, check_product, rows
from timing import DEVICE, DTYPE, median_us, sets_for
from torch import nn

import sparse_pathways as sp

SHAPES = [(64, 64)] if PRETEND else [(512, 512), (1536, 512), (2048, 512), (512, 2048)]  # N, K
ROWS = (5,) if PRETEND else (1, 8, 16, 512, 4096, 16384)
HEIGHTS = (8,) if PRETEND else (8, 16, 32, 64)
SPARSITIES = (0.7,) if PRETEND else (0.5, 0.7, 0.8, 0.9)


def strips() -> Iterator[dict[str, Any]]:
    """All of them; a row that holds "refused" says why the library does not serve this device."""
    with torch.no_grad():
        for (n, k), m, r, sparsity in itertools.product(SHAPES, ROWS, HEIGHTS, SPARSITIES):
            weight = Weight(n, k, (r, 1), sparsity)
            row = {"part": "strips", "op": "forward", "n": n, "k": k, "m": m, "block": [r, 1], "sparsity": sparsity}
            reason = sp.explain(weight.packed, m)
            if not PRETEND and not reason.startswith(f"{m} rows: cuda"):
                yield row | {"refused": reason}
                return
            xs = rows(m, k, sets_for(torch.empty(m, k + n, dtype=DTYPE, device="meta")))
            ours = partial(sp.sparse_linear, packed=weight.packed, bias=weight.bias)
            check_product(ours(xs[0]), xs[0], weight.dense, weight.bias)
            calls = {
                "F.linear": [partial(F.linear, x, weight.dense, weight.bias) for x in xs],
                "cuda": [partial(ours, x) for x in xs],
            }
            yield finished(row, calls, "F.linear", "cuda")
        yield from lstm_steps()
        yield from lists()


def finished(row: dict[str, Any], calls: dict[str, list], dense: str, sparse: str) -> dict[str, Any]:
    times = median_us(calls)
    return row | {"times": times, "best_dense": dense, "ratio": times[dense]["us"] / times[sparse]["us"]}


def lstm_steps() -> Iterator[dict[str, Any]]:
    """A step of torch's LSTM cell against a packed one."""
    size = 64 if PRETEND else 512
    for m, sparsity in itertools.product((4,) if PRETEND else (1, 16, 64), SPARSITIES):
        weights = [Weight(4 * size, size, (8, 1), sparsity) for _ in range(2)]
        cell = nn.LSTMCell(size, size, device=DEVICE, dtype=DTYPE)
        for name, weight in zip(("ih", "hh"), weights, strict=True):
            getattr(cell, f"weight_{name}").copy_(weight.dense / size**0.5)
            getattr(cell, f"bias_{name}").copy_(weight.bias)
        packed = [
            sp.PackedWeight.pack(getattr(cell, f"weight_{name}").detach(), weight.masks[0], (8, 1))
            for name, weight in zip(("ih", "hh"), weights, strict=True)
        ]
        (x, h, c), biases = rows(m, size, 3), (cell.bias_ih.detach(), cell.bias_hh.detach())
        ours = partial(sp.sparse_lstm_cell, x, (h, c), *packed, *biases)
        exact = nn.LSTMCell(size, size, device=DEVICE)
        exact.load_state_dict(cell.state_dict())
        for one, other in zip(ours(), exact(x.float(), (h.float(), c.float())), strict=True):
            check(one, other, other.abs() + 1)
        row = {"part": "strips", "op": "lstm", "n": 4 * size, "k": size, "m": m, "block": [8, 1], "sparsity": sparsity}
        yield finished(row, {"nn.LSTMCell": [partial(cell, x, (h, c))], "cuda": [ours]}, "nn.LSTMCell", "cuda")


def lists() -> Iterator[dict[str, Any]]:
    """Index lists of the masks of 20 layers by one launch."""
    layers = 2 if PRETEND else 20
    shapes = [shape for _ in range(layers) for shape in SHAPES]
    masks = [torch.rand(n // 8, k, device=DEVICE) < 0.3 for n, k in shapes]
    made = sp.StaticLayouts(masks, [(8, 1)] * len(masks), shapes, [mask.numel() for mask in masks])
    reason = attempt(made.check)
    row = {"part": "strips", "name": f"lists of {len(masks)} masks", "one_launch": made.one_launch, "refused": reason}
    yield row if reason is not None else row | {"us": median_us({"lists": [made.build]})["lists"]["us"]}
