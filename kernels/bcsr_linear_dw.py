"""bcsr_linear_dw, Triton.   dW[n, k] = sum over m of dy[m, n] * x[m, k], on kept blocks only

lists  COO: row [E], col [E] uint16 or int32, pos [E] int32 or None; E may pass crow[NB] (fixed capacity): the number of
       entries is read on the device
dW     packed [blocks, C, R] at pos[e] (or e), or dense [N, K], zero outside kept blocks
Maths  operands in x.dtype, accumulator float32, rounded once; M is cut into `splits` parts summed in order by a second
       kernel: no atomics, every run gives the same bits
Limits R and C powers of two >= 16; float16, bfloat16, float32; M, N, K free
Cost   per kept block M * (R + C) elements (from L2): small blocks lose to the dense gradient, masked (ops/roofline.py)
"""

import torch
import triton
import triton.language as tl
from sparse_pathways.kernels import tuning
from sparse_pathways.kernels.schedule import Schedule, check, precision
from torch import Tensor

PROGRAMS = 264  # two for each multiprocessor of an H100: M is split until so many run


@triton.jit
def _bcsr_linear_dw(
    dy_ptr,
    x_ptr,
    row_ptr,
    col_ptr,
    pos_ptr,  # None, or block of every entry in dw
    count_ptr,  # number of entries
    bits_ptr,  # None, or per entry the pathways that keep it
    pathway_ptr,  # per row of x, its pathway; with bits_ptr only
    dw_ptr,
    M,
    N,
    K,
    rows_per_split,
    dy_stride_m,
    x_stride_m,
    dw_stride_n,  # dense
    R: tl.constexpr,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (R // TILE_R) * (C // TILE_C)
    entry = tl.program_id(0) // TILES
    count = tl.load(count_ptr)
    if entry >= count:
        return
    r = tl.program_id(0) % TILES // (C // TILE_C) * TILE_R + tl.arange(0, TILE_R)
    c = tl.program_id(0) % (C // TILE_C) * TILE_C + tl.arange(0, TILE_C)
    n = tl.load(row_ptr + entry).to(tl.int32) * R + r
    k = tl.load(col_ptr + entry).to(tl.int32) * C + c
    split = tl.program_id(1).to(tl.int64)
    first, last = split * rows_per_split, min((split + 1) * rows_per_split, M)
    if bits_ptr is not None:
        bits = tl.load(bits_ptr + entry)
    acc = tl.zeros((TILE_R, TILE_C), dtype=tl.float32)
    for begin in tl.range(first, last, TILE_M, num_stages=NUM_STAGES):
        m = begin + tl.arange(0, TILE_M).to(tl.int64)  # 64 bits before it meets a stride
        used = m < last
        if bits_ptr is not None:  # rows of pathways that do not keep this block: neither operand is read
            used = used & ((bits >> tl.load(pathway_ptr + m, mask=used, other=0).to(tl.int32)) & 1 != 0)
        dy = tl.load(  # [TILE_R, TILE_M]
            dy_ptr + m[None, :] * dy_stride_m + n[:, None], mask=used[None, :] & (n[:, None] < N), other=0.0
        )
        x = tl.load(  # [TILE_M, TILE_C]
            x_ptr + m[:, None] * x_stride_m + k[None, :], mask=used[:, None] & (k[None, :] < K), other=0.0
        )
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    if DENSE:
        place = dw_ptr + n[:, None].to(tl.int64) * dw_stride_n + k[None, :]
        inside = (n[:, None] < N) & (k[None, :] < K)
        tl.store(place, acc.to(dw_ptr.dtype.element_ty), mask=inside)
    else:
        block = entry if pos_ptr is None else tl.load(pos_ptr + entry)
        # Parts of M lie one after the other; there is one part where the values are written at once.
        block = split * (tl.num_programs(0) // TILES) + block
        tl.store(dw_ptr + block * (R * C) + c[None, :] * R + r[:, None], acc.to(dw_ptr.dtype.element_ty))


@triton.jit
def _sum_of_parts(
    parts_ptr,  # float32 [splits, E, C, R]
    row_ptr,
    col_ptr,
    pos_ptr,
    count_ptr,
    dw_ptr,
    N,
    K,
    splits,
    stride_split,
    dw_stride_n,
    R: tl.constexpr,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    entry = tl.program_id(0)
    if entry >= tl.load(count_ptr):
        return
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    r = tl.arange(0, R)
    inside = c[:, None] * R + r[None, :]
    part_ptr = parts_ptr + entry.to(tl.int64) * (R * C)
    acc = tl.zeros((TILE_C, R), dtype=tl.float32)
    for _ in range(splits):
        acc += tl.load(part_ptr + inside)
        part_ptr += stride_split
    if DENSE:
        n = tl.load(row_ptr + entry).to(tl.int32) * R + r
        k = tl.load(col_ptr + entry).to(tl.int32) * C + c
        place = dw_ptr + n[None, :].to(tl.int64) * dw_stride_n + k[:, None]
        tl.store(place, acc.to(dw_ptr.dtype.element_ty), mask=(n[None, :] < N) & (k[:, None] < K))
    else:
        block = (entry if pos_ptr is None else tl.load(pos_ptr + entry)).to(tl.int64)
        tl.store(dw_ptr + block * (R * C) + inside, acc.to(dw_ptr.dtype.element_ty))


def splits_for(m: int, programs: int, tile_m: int) -> int:
    """In how many parts M is cut: enough programs for the device, at least 8 steps each. No look at the device: equal
    shapes give equal bits everywhere."""
    return max(1, min(triton.cdiv(PROGRAMS, max(programs, 1)), m // (8 * tile_m)))


def bcsr_linear_dw(
    dy: Tensor,
    x: Tensor,
    row: Tensor,
    col: Tensor,
    pos: Tensor | None,
    count: Tensor,
    block: tuple[int, int],
    blocks: int = -1,
    bits: Tensor | None = None,
    pathway: Tensor | None = None,
    splits: int | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Gradient of a block-sparse weight on its kept blocks, in x's dtype.

    Args:
        dy: `[m, n]`, last dimension contiguous, any row stride.
        x: `[m, k]`, likewise.
        row: `[entries]`, uint16 or int32. Block row of every entry.
        col: `[entries]`, uint16 or int32. Block column of every entry.
        pos: `[entries]`, int32, block of every entry in the result; None: e. Not read where blocks is -1.
        count: int32, one element on the device: how many entries there are (`crow[-1:]`).
        block: (R, C).
        blocks: blocks of the packed result, or -1: dense `[n, k]`.
        bits: int32 `[entries]`: bit p is set where pathway p keeps the block (mixed batch).
        pathway: `[m]`, integer, pathway of every row; with `bits`.
        splits: parts of M; default `splits_for`.
        schedule: cut of the work; default `tuning.schedule`.

    Returns:
        `[blocks, C, R]`, zero in blocks without an entry, or `[n, k]`, zero outside kept blocks.
    """
    (m, n), k, (r, c), entries = dy.shape, x.shape[1], block, row.shape[0]
    check(x.dtype, block)
    schedule = schedule or tuning.schedule("dw", m, block, x.dtype, x.device)
    dense = blocks < 0
    dw = torch.zeros((n, k) if dense else (blocks, c, r), device=x.device, dtype=x.dtype)
    if entries == 0 or m == 0:
        return dw
    per_block = (r // schedule.tile_out) * (c // schedule.tile_red)
    splits = splits or splits_for(m, entries * per_block, schedule.tile_m)
    rows_per_split = triton.cdiv(triton.cdiv(m, splits), schedule.tile_m) * schedule.tile_m
    parts = torch.empty(splits, entries, c, r, device=x.device, dtype=torch.float32) if splits > 1 else dw
    _bcsr_linear_dw[(entries * per_block, splits)](
        dy,
        x,
        row,
        col,
        pos if splits == 1 else None,
        count,
        bits,
        pathway,
        parts,
        m,
        n,
        k,
        rows_per_split,
        dy.stride(0),
        x.stride(0),
        dw.stride(0),
        R=r,
        C=c,
        DENSE=dense and splits == 1,
        TILE_M=schedule.tile_m,
        TILE_R=schedule.tile_out,
        TILE_C=schedule.tile_red,
        NUM_STAGES=schedule.num_stages,
        PRECISION=precision(x.dtype),
        num_warps=schedule.num_warps,
    )
    if splits > 1:
        tile_c = min(c, 32)
        _sum_of_parts[(entries, c // tile_c)](
            parts, row, col, pos, count, dw, n, k, splits, parts.stride(0), dw.stride(0), r, c, dense, tile_c
        )
    return dw
