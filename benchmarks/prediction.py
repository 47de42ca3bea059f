"""How well `sp.recommend` predicts: layers timed one after the other, as a model calls them, beside the prediction.

python benchmarks/prediction.py [ROWS ...]
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import sparse_pathways as sp
from sparse_pathways.nn.calibrate import dense_kernels

# (N, K, density) of ten layers; together they do not fit in an L2 cache, dense or packed.
LAYERS = (
    *((512, 512, 0.3), (512, 512, 0.1), (2048, 512, 0.3), (512, 2048, 0.3), (2048, 512, 0.1)),
    *((1024, 1024, 0.3), (1024, 640, 0.2), (768, 768, 0.5), (256, 512, 0.3), (640, 1024, 0.1)),
)
ROUNDS = 60


def layers() -> tuple[nn.Module, nn.Module]:
    """The same layers dense and packed."""
    rng = torch.Generator().manual_seed(0)
    dense = nn.ModuleList(nn.Linear(k, n) for n, k, _ in LAYERS)
    sparse = sp.sparsify_(nn.ModuleList(nn.Linear(k, n) for n, k, _ in LAYERS))
    for layer, (n, k, density) in zip(sparse, LAYERS, strict=True):
        layer.set_mask_(torch.rand(-(-n // 8), k, generator=rng) < density)
    return dense, sp.pack_(sparse)


def in_turn(calls: list) -> list[float]:
    """Microseconds of each call, the lowest decile over rounds of all of them in order."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, of_call in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            of_call.append(time.perf_counter() - begin)
    return [statistics.quantiles(one, n=10)[0] * 1e6 for one in times]


def sparse_calls(packed: nn.Module, inputs: list) -> list:
    return [
        lambda x=x, one=one: sp.sparse_linear(x, one.packed, one.bias, pathway=one.active)
        for x, one in zip(inputs, packed, strict=True)
    ]


def dense_calls(dense: nn.Module, inputs: list, kernel: str) -> list:
    if kernel == "F.linear":
        return [lambda x=x, one=one: F.linear(x, one.weight, one.bias) for x, one in zip(inputs, dense, strict=True)]
    product, reorder = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._reorder_linear_weight
    packed = [reorder(one.weight, inputs[0].shape[0]) for one in dense]
    return [
        lambda x=x, w=w, b=one.bias: product(x, w, b, "none", [], "")
        for x, w, one in zip(inputs, packed, dense, strict=True)
    ]


@torch.inference_mode()
def main(rows: list[int]) -> None:
    torch.set_num_threads(1)
    dense, packed = layers()
    errors = []
    for m in rows:
        inputs = [torch.randn(m, k) for _, k, _ in LAYERS]
        begin = time.perf_counter()
        predicted = sp.recommend(packed, m)
        print(f"\nM = {m}; calibrated and predicted in {time.perf_counter() - begin:.2f} s")
        sparse_us = in_turn(sparse_calls(packed, inputs))
        kernels = [in_turn(dense_calls(dense, inputs, kernel)) for kernel in dense_kernels(torch.float32)]
        dense_us = [min(times) for times in zip(*kernels, strict=True)]
        print(f"{'N x K':>11} {'kept':>5}   {'packed us: predicted, measured':>32}   {'dense us':>24}   right")
        for row, sparse, best in zip(predicted, sparse_us, dense_us, strict=True):
            off = (row.sparse_us / sparse - 1, row.dense_us / best - 1)
            errors.append(off)
            print(
                f"{f'{row.shape[0]} x {row.shape[1]}':>11} {row.density:5.0%}   {row.sparse_us:12.1f} {sparse:9.1f} "
                f"({off[0]:+5.0%})   {row.dense_us:10.1f} {best:9.1f} ({off[1]:+5.0%})   "
                f"{'yes' if row.pays == (sparse < best) else 'NO'}"
            )
    for name, values in zip(("packed", "dense"), zip(*errors, strict=True), strict=True):
        sizes = sorted(map(abs, values))
        print(f"{name}: median error {statistics.median(sizes):.0%}, largest {sizes[-1]:.0%}")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [1, 4, 8, 16, 32])
