"""`sparse_pathways::bcsr_pathway_linear`: rows of one batch through different pathways of one packed weight, on CUDA.

Few rows read the union of all pathways once, with a word of bits per block; many rows are taken pathway by pathway,
each with its own list (kernels/pathway_linear.py). Nothing waits for the device. The CPU has a way of its own: one
product per pathway that occurs (`linear.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import refuse_second_derivative
from sparse_pathways.layout.bcsr import compress, rows_of, transpose
from sparse_pathways.layout.packed import PackedWeight
from sparse_pathways.ops import backends
from sparse_pathways.ops.cuda import on_its_device
from sparse_pathways.ops.reference import dense_of_blocks

LINEAR = "sparse_pathways::bcsr_pathway_linear"
DX = "sparse_pathways::bcsr_pathway_linear_dx"
DW = "sparse_pathways::bcsr_pathway_linear_dw"
FEW_ROWS = 256  # up to here the union is read; a tile of rows then holds several pathways
MAX_PATHWAYS = 32  # bits of a word

LISTS = "Tensor crow, Tensor col, Tensor bits, Tensor starts, Tensor cols, Tensor places"
torch.library.define(LINEAR, f"(Tensor x, Tensor values, Tensor pathway, {LISTS}, Tensor? bias, int n) -> Tensor")
torch.library.define(
    DX, "(Tensor dy, Tensor values, Tensor pathway, Tensor crow, Tensor col, Tensor bits, int k) -> Tensor"
)
torch.library.define(
    DW, "(Tensor dy, Tensor x, Tensor pathway, Tensor crow, Tensor col, Tensor bits, int r, int c) -> Tensor"
)


class PathwayLists(NamedTuple):
    """Lists of all pathways of a packed weight.

    crow, col: of the union, whose entry e is block e. bits: int32 `[nnz]`, bit p set where pathway p keeps the block.
    starts int32 `[P, NB + 1]`, cols, places: every pathway's own list, one after the other; places are blocks.
    """

    crow: Tensor
    col: Tensor
    bits: Tensor
    starts: Tensor
    cols: Tensor
    places: Tensor


def lists_of(packed: PackedWeight) -> PathwayLists:
    """The lists of a packed weight, made at its first mixed batch and kept with it."""
    found = packed.prepared.get(PathwayLists)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # else no later backward could save them
            found = _make_lists(packed)
        packed.prepared[PathwayLists] = found
        if found.bits.is_cuda and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(found.bits.device).synchronize()  # the next batch may come on another stream
    return found


def _make_lists(packed: PackedWeight) -> PathwayLists:
    union = compress(packed.mask())
    bits = torch.zeros(packed.values.shape[0], dtype=torch.int32, device=packed.device)
    whole = torch.arange(bits.numel(), dtype=torch.int32, device=packed.device)
    starts, cols, places, before = [], [], [], 0
    for number, (crow, col, pos) in enumerate(packed.indices):
        place = whole if pos is None else pos
        word = torch.tensor(1 << number if number < 31 else -(2**31), dtype=torch.int32, device=packed.device)
        bits[place.long()] |= word
        starts.append(crow + before)
        cols.append(col)
        places.append(place)
        before += col.numel()
    return PathwayLists(*union, bits, torch.stack(starts), torch.cat(cols), torch.cat(places))


def serves(packed: PackedWeight) -> bool:
    """Whether a mixed batch of this weight goes by the operator."""
    few = len(packed.pathways) <= MAX_PATHWAYS and packed.scale is None
    return few and packed.device.type == "cuda" and backends.select("cuda", packed.dtype, packed.block) == "triton"


# --- reference ----------------------------------------------------------------------------------------------------
def _each(x: Tensor, values: Tensor, pathway: Tensor, crow: Tensor, col: Tensor, bits: Tensor, k: int, dx: bool):  # type: ignore[no-untyped-def]
    """`x` times the dense weight of every pathway (its transpose for dx), of which each row keeps its own."""
    columns, kept = -(-k // values.shape[1]), bits[None] >> torch.arange(MAX_PATHWAYS, device=bits.device)[:, None] & 1
    products = []
    for one in kept[: int(pathway.max()) + 1 if pathway.numel() else 1]:
        own = torch.where(one[:, None, None] != 0, values, 0)
        weight = dense_of_blocks(own, rows_of(crow, col).long(), col.long(), crow.numel() - 1, columns)
        products.append(x @ weight[: x.shape[1]] if dx else x @ weight[:, : x.shape[1]].T)
    return torch.stack(products)[pathway, torch.arange(x.shape[0], device=x.device)]


@torch.library.register_kernel(LINEAR, None)
def _linear(x, values, pathway, crow, col, bits, starts, cols, places, bias, n):  # type: ignore[no-untyped-def]
    y = _each(x, values, pathway, crow, col, bits, x.shape[1], False)[:, :n]
    return y.contiguous() if bias is None else y + bias


@torch.library.register_kernel(DX, None)
def _dx(dy, values, pathway, crow, col, bits, k):  # type: ignore[no-untyped-def]
    return _each(dy, values, pathway, crow, col, bits, k, True)[:, :k].contiguous()


@torch.library.register_kernel(DW, None)
def _dw(dy, x, pathway, crow, col, bits, r, c):  # type: ignore[no-untyped-def]
    mine = (bits[None] >> pathway[:, None] & 1).to(x.dtype)[..., None]  # [M, nnz, 1]
    dy = F.pad(dy, (0, (crow.numel() - 1) * r - dy.shape[1])).view(dy.shape[0], -1, r)[:, rows_of(crow, col).long()]
    x = F.pad(x, (0, -x.shape[1] % c)).view(x.shape[0], -1, c)[:, col.long()]
    return torch.einsum("mer,mec->ecr", dy * mine, x)


# --- kernels ------------------------------------------------------------------------------------------------------
@on_its_device
def cuda_linear(x, values, pathway, crow, col, bits, starts, cols, places, bias, n):  # type: ignore[no-untyped-def]
    """`bcsr_pathway_linear` on CUDA."""
    from sparse_pathways.kernels.pathway_linear import Lists, pathway_linear  # imports Triton: only where it runs

    lists = Lists(crow, col, None, bits) if x.shape[0] <= FEW_ROWS else Lists(starts, cols, places, None)
    _, c, r = values.shape
    return pathway_linear(x, values, lists, pathway, bias, n, (r, c), (1, r))


@on_its_device
def cuda_dx(dy, values, pathway, crow, col, bits, k):  # type: ignore[no-untyped-def]
    """`bcsr_pathway_linear_dx` on CUDA: the union, transposed."""
    from sparse_pathways.kernels.pathway_linear import Lists, pathway_linear

    _, c, r = values.shape
    lists = Lists(*transpose(crow, col, -(-k // c)), bits)
    return pathway_linear(dy, values, lists, pathway, None, k, (c, r), (r, 1))


@on_its_device
def cuda_dw(dy, x, pathway, crow, col, bits, r, c):  # type: ignore[no-untyped-def]
    """`bcsr_pathway_linear_dw` on CUDA."""
    from sparse_pathways.kernels.bcsr_linear_dw import bcsr_linear_dw

    row, blocks = rows_of(crow, col), col.numel()
    return bcsr_linear_dw(dy, x, row, col, None, crow[-1:], (r, c), blocks, bits, pathway)


torch.library.register_kernel(LINEAR, "cuda", cuda_linear)
torch.library.register_kernel(DX, "cuda", cuda_dx)
torch.library.register_kernel(DW, "cuda", cuda_dw)


@torch.library.register_fake(LINEAR)
def _fake(x, values, pathway, crow, col, bits, starts, cols, places, bias, n):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], n)


@torch.library.register_fake(DX)
def _fake_dx(dy, values, pathway, crow, col, bits, k):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], k)


@torch.library.register_fake(DW)
def _fake_dw(dy, x, pathway, crow, col, bits, r, c):  # type: ignore[no-untyped-def]
    return dy.new_empty(col.shape[0], c, r)


# --- autograd -----------------------------------------------------------------------------------------------------
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, values, pathway, crow, col, bits, _, _, _, bias, _ = inputs
    ctx.save_for_backward(x, values, pathway, crow, col, bits)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    refuse_second_derivative()
    x, values, pathway, *union = ctx.saved_tensors
    dy, ops = dy.contiguous(), torch.ops.sparse_pathways
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        dx = ops.bcsr_pathway_linear_dx(dy, values, pathway, *union, x.shape[1])
    if ctx.needs_input_grad[1]:
        dvalues = ops.bcsr_pathway_linear_dw(dy, x, pathway, *union, values.shape[2], values.shape[1])
    return dx, dvalues, *[None] * 7, dy.sum(0) if ctx.has_bias else None, None


torch.library.register_autograd(LINEAR, _backward, setup_context=_save)
