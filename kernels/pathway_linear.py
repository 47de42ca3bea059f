"""pathway_linear and its dX, Triton: rows of one batch through different pathways over one shared weight.

y[m, n] = sum over k of x[m, k] * W[n, k] * kept[pathway[m], block of (n, k)]   (+ bias[n])

Two cuts of the same product, both reading each weight byte once per row tile:
union     few rows. One list of the blocks that any pathway keeps, with a word of bits per block saying which do; a row
          tile may hold any pathways. A row whose pathway does not keep a block drops that block's partial sum, so
          neither a NaN of a foreign block nor one of x at a foreign input reaches it
segments  many rows. Rows are taken in the order of their pathways (an index list; x is not copied), every row tile has
          one pathway and follows that pathway's own list. Tiles are cut on the device, without waiting for it

W, x, y, maths, limits: as in bcsr_linear.py; at most 32 pathways in a union
Cost   union: density of the union, and one select per partial sum; segments: density of the pathway, at most one short
       tile per pathway
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sparse_pathways.kernels import tuning
from sparse_pathways.kernels.block_product import add_block_products, store_outputs
from sparse_pathways.kernels.schedule import Schedule, check, precision
from torch import Tensor

MAX_PATHWAYS = 32  # bits of a word


@triton.jit
def _union_linear(
    x_ptr,
    w_ptr,
    start_ptr,
    index_ptr,
    pos_ptr,  # packed, and bits: block of every entry; None: e
    bits_ptr,  # per block: bit p is set where pathway p keeps it
    pathway_ptr,  # per row of x
    bias_ptr,
    y_ptr,
    M,
    N_OUT,
    N_RED,
    x_stride_m,
    y_stride_m,
    w_stride_out,
    w_stride_red,
    OUT: tl.constexpr,
    RED: tl.constexpr,
    DENSE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_RED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    STEPS: tl.constexpr = RED // TILE_RED
    strips = tl.cdiv(N_OUT, TILE_OUT)
    strip = tl.program_id(0) % strips
    o = strip * TILE_OUT + tl.arange(0, TILE_OUT)
    m = (tl.program_id(0) // strips).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_m = m < M
    pathway = tl.load(pathway_ptr + m, mask=in_m, other=0).to(tl.int32)
    begin = tl.load(start_ptr + strip * TILE_OUT // OUT)
    end = tl.load(start_ptr + strip * TILE_OUT // OUT + 1)
    acc = tl.zeros((TILE_M, TILE_OUT), dtype=tl.float32)
    for step in tl.range(begin * STEPS, end * STEPS, num_stages=NUM_STAGES):
        entry = step // STEPS
        block = (entry if pos_ptr is None else tl.load(pos_ptr + entry)).to(tl.int64)
        mine = in_m & ((tl.load(bits_ptr + block) >> pathway) & 1 != 0)
        inside = step % STEPS * TILE_RED + tl.arange(0, TILE_RED)
        k = tl.load(index_ptr + entry).to(tl.int32) * RED + inside
        x = tl.load(x_ptr + m[:, None] * x_stride_m + k[None, :], mask=mine[:, None] & (k[None, :] < N_RED), other=0.0)
        if DENSE:
            place = o[None, :].to(tl.int64) * w_stride_out + k[:, None].to(tl.int64) * w_stride_red
            w = tl.load(w_ptr + place, mask=(k[:, None] < N_RED) & (o[None, :] < N_OUT), other=0.0)
        else:
            place = (o % OUT)[None, :] * w_stride_out + inside[:, None] * w_stride_red
            w = tl.load(w_ptr + block * (OUT * RED) + place)
        # The partial sum is dropped, not multiplied by a zero: 0 * NaN would be NaN.
        acc += tl.where(mine[:, None], tl.dot(x, w, input_precision=PRECISION), 0.0)
    store_outputs(acc, m, in_m[:, None], o, N_OUT, bias_ptr, None, y_ptr, y_stride_m, 0, 0)


@triton.jit
def _segment_linear(
    x_ptr,
    w_ptr,
    start_ptr,  # [pathways, blocks of outputs + 1], into the lists of all pathways, one after the other
    index_ptr,
    pos_ptr,
    order_ptr,  # rows in the order of their pathways
    tile_ptr,  # [tiles, 3]: pathway, first and last + 1 of the tile's rows in that order
    bias_ptr,
    y_ptr,
    N_OUT,
    N_RED,
    x_stride_m,
    y_stride_m,
    w_stride_out,
    w_stride_red,
    OUT: tl.constexpr,
    RED: tl.constexpr,
    DENSE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_RED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    strips = tl.cdiv(N_OUT, TILE_OUT)
    strip = tl.program_id(0) % strips
    tile = tl.program_id(0) // strips
    o = strip * TILE_OUT + tl.arange(0, TILE_OUT)
    pathway, first, last = (
        tl.load(tile_ptr + tile * 3),
        tl.load(tile_ptr + tile * 3 + 1),
        tl.load(tile_ptr + tile * 3 + 2),
    )
    if first >= last:  # more tiles are launched than a batch may need
        return
    place = first + tl.arange(0, TILE_M)
    m = tl.load(order_ptr + place, mask=place < last, other=0).to(tl.int64)
    in_m = (place < last)[:, None]
    list_ptr = start_ptr + pathway * (tl.cdiv(N_OUT, OUT) + 1) + strip * TILE_OUT // OUT
    acc = add_block_products(
        tl.zeros((TILE_M, TILE_OUT), dtype=tl.float32),
        x_ptr + m[:, None] * x_stride_m,
        in_m,
        w_ptr,
        index_ptr,
        pos_ptr,
        tl.load(list_ptr),
        tl.load(list_ptr + 1),
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
    store_outputs(acc, m, in_m, o, N_OUT, bias_ptr, None, y_ptr, y_stride_m, 0, 0)


class Lists(NamedTuple):
    """Blocks along one direction: of the union (`bits` given) or of all pathways, one list after the other."""

    start: Tensor  # int32 [blocks of outputs + 1], or [pathways, blocks of outputs + 1]
    index: Tensor  # [entries], block along the sum
    pos: Tensor | None  # int32 [entries], block in values and bits; None: entry e is block e
    bits: Tensor | None  # int32 [blocks]: which pathways keep a block


def cut_segments(pathway: Tensor, pathways: int, tile_m: int) -> tuple[Tensor, Tensor]:
    """(order int32 `[m]`, tiles int32 `[m / tile_m + pathways, 3]`) of a batch, made on its device.

    Args:
        pathway: integer `[m]`, 0 <= pathway < pathways.
        pathways: how many there are.
        tile_m: rows of a tile.
    """
    order = torch.argsort(pathway, stable=True)
    names = torch.arange(pathways + 1, device=pathway.device, dtype=pathway.dtype)
    edges = torch.searchsorted(pathway[order], names)  # first row of every pathway
    tiles = torch.cumsum((edges.diff() + tile_m - 1) // tile_m, 0)  # tiles up to and with each pathway
    number = torch.arange(triton.cdiv(pathway.shape[0], tile_m) + pathways, device=pathway.device)
    mine = torch.searchsorted(tiles, number, right=True).clamp(max=pathways - 1)
    before = torch.cat([tiles.new_zeros(1), tiles])[mine]
    first = edges[mine] + (number - before) * tile_m
    last = torch.minimum(first + tile_m, edges[mine + 1])  # a tile past the last one is empty
    return order.to(torch.int32), torch.stack([mine, first, last], 1).to(torch.int32)


def pathway_linear(
    x: Tensor,
    weight: Tensor,
    lists: Lists,
    pathway: Tensor,
    bias: Tensor | None,
    out: int,
    sides: tuple[int, int],
    strides: tuple[int, int],
    schedule: Schedule | None = None,
) -> Tensor:
    """`[m, out]` product in which every row uses the blocks of its own pathway; y and dx alike.

    Args:
        x: `[m, sum]`, last dimension contiguous, any row stride (dy for dx).
        weight: packed `[blocks, C, R]` or dense `[n, k]`; dtype of x.
        lists: along the outputs; transposed ones for dx.
        pathway: integer `[m]`.
        bias: `[out]` or None.
        out: outputs: n, or k for dx.
        sides: of a block along the outputs and along the sum: (R, C), or (C, R) for dx.
        strides: of the weight, likewise; within a block where it is packed.
        schedule: cut of the work.

    Returns:
        `[m, out]`, contiguous.
    """
    m, red = x.shape
    check(x.dtype, sides)
    schedule = schedule or tuning.schedule("product", m, sides, x.dtype, x.device)
    y = torch.empty(m, out, device=x.device, dtype=x.dtype)
    strips = triton.cdiv(out, schedule.tile_out)
    if m == 0 or out == 0:
        return y
    common = {"OUT": sides[0], "RED": sides[1], "DENSE": weight.dim() == 2, "TILE_M": schedule.tile_m}
    common |= {"TILE_OUT": schedule.tile_out, "TILE_RED": schedule.tile_red, "NUM_STAGES": schedule.num_stages}
    common |= {"PRECISION": precision(x.dtype), "num_warps": schedule.num_warps}
    shape = (out, red, x.stride(0), y.stride(0), *strides)
    if lists.bits is not None:
        programs = triton.cdiv(m, schedule.tile_m) * strips
        _union_linear[(programs,)](x, weight, *lists, pathway, bias, y, m, *shape, **common)
        return y
    order, tiles = cut_segments(pathway, lists.start.shape[0], schedule.tile_m)
    _segment_linear[(tiles.shape[0] * strips,)](x, weight, *lists[:3], order, tiles, bias, y, *shape, **common)
    return y
