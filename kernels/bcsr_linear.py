"""bcsr_linear, forward, Triton.   y[M, N] = x[M, K] @ W[N, K].T + bias[N]

W      block rows of R outputs, layout `bcsr`: values [nnzb, C, R] (R contiguous, edge blocks padded with zeros),
       crow [NB + 1] int32, col [E] uint16 or int32, pos [E] int32 (entry e reads values[pos[e]]) or None (values[e])
x, y   row-major, last dimension contiguous; x may have any row stride
Maths  operands in x.dtype (float32 without TF32), accumulator float32, rounded once at the store
Limits R and C powers of two >= 16; float16, bfloat16, float32; M, N and K free (masked); an empty block row yields its
       bias; 2**31 block entries, elements past 2**31 are addressed in 64 bits
Cost   each weight block is read ceil(M / tile_m) times, the rows of x once per kept block of their columns (from L2);
       break-even against the dense product: benchmarks/gpu
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Schedule(NamedTuple):
    """How one product is cut into programs."""

    tile_m: int  # rows of x per program
    tile_r: int  # outputs per program, divides R
    tile_c: int  # inputs per step of the inner loop, divides C
    num_warps: int
    num_stages: int  # depth of the load pipeline


@triton.jit
def _bcsr_linear_fwd(
    x_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    pos_ptr,  # None: entry e is block e
    bias_ptr,  # None: no bias
    y_ptr,
    M,
    N,
    K,
    x_stride_m,
    y_stride_m,
    R: tl.constexpr,
    C: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    STEPS: tl.constexpr = C // TILE_C  # inner steps per block
    strips = tl.cdiv(N, TILE_R)
    # The strips of one row tile are neighbours: what they share, x, then comes from L2.
    strip = tl.program_id(0) % strips
    tile = (tl.program_id(0) // strips).to(tl.int64)  # 64 bits before it meets a stride: M * N passes 2**31
    n = strip * TILE_R + tl.arange(0, TILE_R)
    block_row = strip * TILE_R // R
    r = strip * TILE_R % R + tl.arange(0, TILE_R)
    m = tile * TILE_M + tl.arange(0, TILE_M)
    c = tl.arange(0, TILE_C)

    in_m = m[:, None] < M
    x_row_ptr = x_ptr + m[:, None] * x_stride_m
    begin, end = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1)
    offset = c[:, None] * R + r[None, :]  # in a block, of the tile that the first step reads
    acc = tl.zeros((TILE_M, TILE_R), dtype=tl.float32)
    for step in tl.range(begin * STEPS, end * STEPS, num_stages=NUM_STAGES):
        entry = step // STEPS
        block = entry if pos_ptr is None else tl.load(pos_ptr + entry)
        c0 = step % STEPS * TILE_C
        k = tl.load(col_ptr + entry).to(tl.int32) * C + c0 + c
        x = tl.load(x_row_ptr + k[None, :], mask=in_m & (k[None, :] < K), other=0.0)  # [TILE_M, TILE_C]
        w = tl.load(values_ptr + block.to(tl.int64) * (C * R) + c0 * R + offset)  # [TILE_C, TILE_R]
        acc = tl.dot(x, w, acc, input_precision="ieee")
    in_n = n[None, :] < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n[None, :], mask=in_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + m[:, None] * y_stride_m + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=in_m & in_n)


def refusal(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why this kernel cannot serve a dtype and a block shape; None when it can."""
    if dtype not in DTYPES:
        return f"dtype = {dtype}; the Triton kernel takes float16, bfloat16 and float32"
    if any(side < 16 or side & (side - 1) for side in block):
        return f"block = {block}; the Triton kernel takes powers of two from 16 up (a tensor core's tile)"
    return None


def schedule_for(m: int, block: tuple[int, int], dtype: torch.dtype) -> Schedule:
    """The schedule used for `m` rows. A rule, not a tuner: two processes that agree on the shapes agree on the bits."""
    tile_r, tile_c = min(block[0], 128), min(block[1], 64)
    if dtype == torch.float32:  # FMA units: operands live in registers, so tiles stay small
        tile_m, tile_r, tile_c = min(32, max(16, triton.next_power_of_2(m))), min(tile_r, 64), min(tile_c, 32)
        return Schedule(tile_m, tile_r, tile_c, num_warps=4, num_stages=2)
    tile_m = min(128, max(16, triton.next_power_of_2(m)))
    return Schedule(tile_m, tile_r, tile_c, num_warps=8 if tile_m * tile_r >= 128 * 128 else 4, num_stages=3)


def bcsr_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    pos: Tensor | None,
    bias: Tensor | None,
    n: int,
    schedule: Schedule | None = None,
) -> Tensor:
    """`[m, n]` product of the rows of `x` with a block-sparse weight, on x's device and in x's dtype.

    Shapes, index ranges and equal devices are the caller's promise (`ops` checks them once); they are not read here,
    which would wait for the device.

    Args:
        x: `[m, k]`, last dimension contiguous, any row stride. `k` may end inside the last block column.
        values: `[nnzb, C, R]`, contiguous, dtype of `x`.
        crow: `[NB + 1]`, int32. First entry of every block row.
        col: `[entries]`, uint16 or int32. Block column of every entry.
        pos: `[entries]`, int32, block of every entry in `values`; None when entry e is block e.
        bias: `[n]`, floating point, or None.
        n: outputs, in (NB - 1) * R < n <= NB * R.
        schedule: cut of the work; default `schedule_for`.

    Returns:
        `[m, n]`, contiguous.

    Raises:
        ValueError: a dtype or block shape outside the limits.
    """
    m, k = x.shape
    _, c, r = values.shape
    reason = refusal(x.dtype, (r, c))
    if reason is not None:
        raise ValueError(reason)
    schedule = schedule or schedule_for(m, (r, c), x.dtype)
    y = torch.empty(m, n, device=x.device, dtype=x.dtype)
    programs = triton.cdiv(m, schedule.tile_m) * triton.cdiv(n, schedule.tile_r)
    if programs == 0:
        return y
    _bcsr_linear_fwd[(programs,)](
        x,
        values,
        crow,
        col,
        pos,
        bias,
        y,
        m,
        n,
        k,
        x.stride(0),
        y.stride(0),
        R=r,
        C=c,
        TILE_M=schedule.tile_m,
        TILE_R=schedule.tile_r,
        TILE_C=schedule.tile_c,
        NUM_STAGES=schedule.num_stages,
        num_warps=schedule.num_warps,
    )
    return y
