"""bcsr_ffn, Triton.   y[M, N2] = act(x[M, K] @ W1.T + b1) @ W2.T + b2, in one launch; the hidden rows stay in L2

W1, W2 packed or dense storage, as in bcsr_linear.py, each with its lists crow, col (pos)
hidden a scratch of one row tile per program, [programs, TILE_M, H]: a program computes all hidden strips of its row
       tile, then, after a barrier, all strips of y from them, and goes on to its next row tile
Maths  as in bcsr_linear.py; the hidden values are rounded to x.dtype, as two products in a row would
Limits as in bcsr_linear.py; a program does a whole row tile, so fewer row tiles than multiprocessors leave some idle:
       with few rows two products are faster
Cost   HBM traffic M * (K + N2) instead of M * (K + 2 H + N2); L2 traffic as the two products
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sparse_pathways.kernels import tuning
from sparse_pathways.kernels.block_product import add_block_products, store_outputs
from sparse_pathways.kernels.schedule import Schedule, check, precision
from torch import Tensor

PROGRAMS = 132  # row tiles in flight: multiprocessors of an H100
ROWS = 64  # of a tile, at most: 132 scratches of 64 x 2048 bf16 are 35 MB, of 128 rows they would pass its L2


@triton.jit
def _strips(
    x_ptr,
    x_stride_m,
    m_x,
    w_ptr,
    start_ptr,
    index_ptr,
    pos_ptr,
    bias_ptr,
    y_ptr,
    y_stride_m,
    m_y,
    in_m,
    N_OUT,
    N_RED,
    w_stride_out,
    w_stride_red,
    OUT: tl.constexpr,
    RED: tl.constexpr,
    DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_RED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All strips of outputs of one row tile."""
    for strip in range(0, tl.cdiv(N_OUT, TILE_OUT)):
        o = strip * TILE_OUT + tl.arange(0, TILE_OUT)
        acc = add_block_products(
            tl.zeros((TILE_M, TILE_OUT), dtype=tl.float32),
            x_ptr + m_x[:, None] * x_stride_m,
            in_m,
            w_ptr,
            index_ptr,
            pos_ptr,
            tl.load(start_ptr + strip * TILE_OUT // OUT),
            tl.load(start_ptr + strip * TILE_OUT // OUT + 1),
            o,
            N_OUT,
            N_RED,
            w_stride_out,
            w_stride_red,
            OUT,
            RED,
            DENSE,
            TILE_RED,
            NUM_STAGES,
            PRECISION,
        )
        store_outputs(acc, m_y, in_m, o, N_OUT, bias_ptr, None, y_ptr, y_stride_m, 0, ACTIVATION)


@triton.jit
def _bcsr_ffn(
    x_ptr,
    w1_ptr,
    start1_ptr,
    index1_ptr,
    pos1_ptr,
    bias1_ptr,
    w2_ptr,
    start2_ptr,
    index2_ptr,
    pos2_ptr,
    bias2_ptr,
    hidden_ptr,  # [programs, TILE_M, H]
    y_ptr,
    M,
    H,
    N_OUT,
    N_RED,
    x_stride_m,
    y_stride_m,
    w1_stride_out,
    w1_stride_red,
    w2_stride_out,
    w2_stride_red,
    R1: tl.constexpr,
    C1: tl.constexpr,
    R2: tl.constexpr,
    C2: tl.constexpr,
    DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT1: tl.constexpr,
    TILE_RED1: tl.constexpr,
    TILE_OUT2: tl.constexpr,
    TILE_RED2: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    here = tl.arange(0, TILE_M).to(tl.int64)
    scratch_ptr = hidden_ptr + tl.program_id(0).to(tl.int64) * TILE_M * H
    for tile in range(tl.program_id(0), tl.cdiv(M, TILE_M), tl.num_programs(0)):
        m = tile * TILE_M + here  # 64 bits before it meets a stride
        in_m = m[:, None] < M
        _strips(
            x_ptr,
            x_stride_m,
            m,
            w1_ptr,
            start1_ptr,
            index1_ptr,
            pos1_ptr,
            bias1_ptr,
            scratch_ptr,
            H,
            here,
            in_m,
            H,
            N_RED,
            w1_stride_out,
            w1_stride_red,
            R1,
            C1,
            DENSE,
            ACTIVATION,
            TILE_M,
            TILE_OUT1,
            TILE_RED1,
            NUM_STAGES,
            PRECISION,
        )
        tl.debug_barrier()  # every thread's hidden values are written before any is read
        _strips(
            scratch_ptr,
            H,
            here,
            w2_ptr,
            start2_ptr,
            index2_ptr,
            pos2_ptr,
            bias2_ptr,
            y_ptr,
            y_stride_m,
            m,
            in_m,
            N_OUT,
            H,
            w2_stride_out,
            w2_stride_red,
            R2,
            C2,
            DENSE,
            0,
            TILE_M,
            TILE_OUT2,
            TILE_RED2,
            NUM_STAGES,
            PRECISION,
        )
        tl.debug_barrier()  # ... and all are read before the next tile's are written


class Weight(NamedTuple):
    """One of the two weights, packed `[blocks, C, R]` or dense `[N, K]`; its forward lists, bias, outputs, block."""

    values: Tensor
    crow: Tensor
    col: Tensor
    pos: Tensor | None
    bias: Tensor | None
    n: int
    block: tuple[int, int]

    @property
    def strides(self) -> tuple[int, int]:
        """Of the weight, along outputs and inputs; within a block where it is packed."""
        return self.values.stride() if self.values.dim() == 2 else (1, self.block[0])


def bcsr_ffn(x: Tensor, first: Weight, second: Weight, activation: int, schedule: Schedule | None = None) -> Tensor:
    """`act(x @ W1.T + b1) @ W2.T + b2`, `[m, second.n]`.

    Args:
        x: `[m, k]`, last dimension contiguous, any row stride.
        first: W1, whose outputs are the inputs of W2; both packed or both dense storage.
        second: W2.
        activation: number of `block_product.activate`, after the first product.
        schedule: tile_m, num_warps and num_stages are used; tiles of a block as the rule cuts it.
    """
    m, k = x.shape
    check(x.dtype, first.block)
    check(x.dtype, second.block)
    one, two = (tuning.schedule("product", m, one.block, x.dtype, x.device) for one in (first, second))
    warps = 8 if max(one.tile_out, two.tile_out) >= 128 else 4
    if schedule is None:
        tile_m = min(ROWS, one.tile_m)
        # One program per multiprocessor has its shared memory to itself: the largest tiles, and the smallest of few
        # rows, which wait longest for their loads, get a deeper pipeline.
        smallest = tile_m == 16 and max(one.tile_out, two.tile_out) <= 32
        stages = one.num_stages + (smallest or (warps == 8 and tile_m == ROWS))
        schedule = one._replace(tile_m=tile_m, num_warps=warps, num_stages=stages)
    y = torch.empty(m, second.n, device=x.device, dtype=x.dtype)
    programs = min(PROGRAMS, triton.cdiv(m, schedule.tile_m))
    if programs == 0 or second.n == 0:
        return y
    hidden = torch.empty(programs, schedule.tile_m, first.n, device=x.device, dtype=x.dtype)
    _bcsr_ffn[(programs,)](
        x,
        *first[:5],
        *second[:5],
        hidden,
        y,
        m,
        first.n,
        second.n,
        k,
        x.stride(0),
        y.stride(0),
        *first.strides,
        *second.strides,
        *first.block,
        *second.block,
        DENSE=first.values.dim() == 2,
        ACTIVATION=activation,
        TILE_M=schedule.tile_m,
        TILE_OUT1=one.tile_out,
        TILE_RED1=one.tile_red,
        TILE_OUT2=two.tile_out,
        TILE_RED2=two.tile_red,
        NUM_STAGES=schedule.num_stages,
        PRECISION=precision(x.dtype),
        num_warps=schedule.num_warps,
    )
    return y
