"""Predicted time of products on an H100, from its rates and the traffic of each kernel. A model, not a measurement.

time = max(arithmetic / tensor cores, bytes / L2, bytes / HBM) + launch. Not in it: L1 hits, load imbalance between
block rows, latency of a short inner loop. The rates are those of an H100 SXM (HBM and large bf16 products as measured
on one; L2 as published by micro-benchmarks). `python -m benchmarks.gpu.model` prints the table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_pathways.checks import Block

SMS = 132
TENSOR = 800e12  # bf16 FLOP/s of a large dense product
FP32 = 50e12  # FLOP/s of float32 products without TF32
HBM = 3.0e12  # bytes/s
L2 = 5.5e12  # bytes/s, all SMs
L2_OF_ONE_SM = 112e9  # bytes/s: 64 bytes per clock
LAUNCH_US = 2.0  # of one kernel in a CUDA graph
OPS = ("forward", "dx", "dw")
TILE_M = 128  # rows per program of the Triton kernels, at most

# Share of the dense rate that products with so few columns of outputs reach (operand traffic in shared memory).
EFFICIENCY = {16: 0.49, 32: 0.82, 64: 0.90, 128: 0.95}


class Prediction(NamedTuple):
    """Time of one product and what bounds it: "compute", "L2", "HBM" or "launch"."""

    us: float
    bound: str


def _slowest(**seconds: float) -> Prediction:
    bound = max(seconds, key=lambda name: seconds[name])
    us = seconds[bound] * 1e6
    return Prediction(us + LAUNCH_US, "launch" if us < LAUNCH_US else bound)


def dense(m: int, n: int, k: int, itemsize: int = 2) -> Prediction:
    """A dense product of `[m, k]` and `[k, n]` by cuBLAS, which reaches its rate at long sums only."""
    rate = (TENSOR if itemsize == 2 else FP32) * max(k, 1) / (k + 170)  # 600 TFLOP/s at K = 512, 740 at 2048
    return _slowest(compute=2 * m * n * k / rate, HBM=itemsize * (m * k + n * k + m * n) / HBM)


def masking(n: int, k: int, itemsize: int = 2) -> float:
    """Microseconds to write a masked copy of a weight: it is read and written once."""
    return 2 * itemsize * n * k / HBM * 1e6 + LAUNCH_US


def masked_dense(op: str, m: int, n: int, k: int, itemsize: int = 2) -> Prediction:
    """The dense product of a masked weight; of "dw": the dense gradient, then masked."""
    shape = {"forward": (m, n, k), "dx": (m, k, n), "dw": (n, k, m)}[op]
    us, bound = dense(*shape, itemsize)
    return Prediction(us + masking(n, k, itemsize), bound)


def triton(op: str, m: int, n: int, k: int, block: Block, density: float, itemsize: int = 2) -> Prediction:
    """A product of the Triton kernels (`kernels/`), which read a tile of activations again for every kept block.

    Args:
        op: "forward" (x @ W.T), "dx" (dy @ W) or "dw" (dy.T @ x on kept blocks).
        m, n, k: rows, outputs, inputs.
        block: (R, C).
        density: kept share of the blocks.
        itemsize: bytes of an element.
    """
    (r, c), kept = block, density * n * k  # kept weights
    rate = TENSOR if itemsize == 2 else FP32
    if op == "dw":
        steps = m * kept * (1 / r + 1 / c)  # elements of dy and x that blocks load
        programs = kept / (r * c) * max(1.0, m / 512)
        side, hbm = min(r, c), float(m * (n + k) + n * k)
    else:
        out, red = (r, c) if op == "forward" else (c, r)
        tile = min(out, 128)
        tiles = -(-m // TILE_M)
        steps = m * kept / tile + tiles * kept
        programs = tiles * ((n if op == "forward" else k) / tile)
        side, hbm = min(out, red), m * (n + k) + kept
    share = EFFICIENCY[max(16, min(128, side))] if itemsize == 2 else 0.5  # float32 by plain FMA loops
    return _slowest(
        compute=2 * m * kept / (rate * share),
        L2=itemsize * steps / min(L2, max(programs, 1) * L2_OF_ONE_SM),
        HBM=itemsize * hbm / HBM,
    )


def prefers_dense(op: str, m: int, n: int, k: int, block: Block, density: float, dtype: torch.dtype) -> bool:
    """Whether the model expects the dense product of a masked weight to be at least as fast as the Triton kernel."""
    size = dtype.itemsize
    return masked_dense(op, m, n, k, size).us <= triton(op, m, n, k, block, density, size).us
