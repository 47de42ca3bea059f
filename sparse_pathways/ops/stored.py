"""`sparse_pathways::stored_linear`: the training product on CUDA, its weight read from dense storage.

Nothing is gathered or packed: kept blocks are read where they lie in the weight, gradients are written where they
belong, and the lists may be longer than their entries (fixed capacity), so a step can be captured in a CUDA graph and
the masks change between replays. Each of the three products decides for itself between the Triton kernel and a dense
product of the masked weight (ops/cuda.py). On other devices: the masked dense product, as the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import refuse_second_derivative
from sparse_pathways.layout.bcsr import BlockLayout
from sparse_pathways.ops import cuda
from sparse_pathways.ops.reference import reference_masked_weight

STORED = "sparse_pathways::stored_linear"
STORED_DX = "sparse_pathways::stored_linear_dx"
STORED_DW = "sparse_pathways::stored_linear_dw"

torch.library.define(
    STORED,
    "(Tensor x, Tensor weight, Tensor bits, Tensor crow, Tensor col, Tensor row, Tensor crow_t, Tensor row_t, "
    "Tensor? bias, int r, int c, float density, bool dense_grad) -> Tensor",
)
torch.library.define(
    STORED_DX,
    "(Tensor dy, Tensor weight, Tensor bits, Tensor crow_t, Tensor row_t, int r, int c, float density) -> Tensor",
)
torch.library.define(
    STORED_DW,
    "(Tensor dy, Tensor x, Tensor bits, Tensor crow, Tensor col, Tensor row, int r, int c, float density) -> Tensor",
)


@torch.library.register_kernel(STORED, None)
def _stored(x, weight, bits, crow, col, row, crow_t, row_t, bias, r, c, density, dense_grad):  # type: ignore[no-untyped-def]
    return F.linear(x, reference_masked_weight(weight, bits, r, c), bias)


@torch.library.register_kernel(STORED_DX, None)
def _stored_dx(dy, weight, bits, crow_t, row_t, r, c, density):  # type: ignore[no-untyped-def]
    return dy @ reference_masked_weight(weight, bits, r, c)


@torch.library.register_kernel(STORED_DW, None)
def _stored_dw(dy, x, bits, crow, col, row, r, c, density):  # type: ignore[no-untyped-def]
    return reference_masked_weight(dy.T @ x, bits, r, c)


torch.library.register_kernel(STORED, "cuda", cuda.stored_linear)
torch.library.register_kernel(STORED_DX, "cuda", cuda.stored_linear_dx)
torch.library.register_kernel(STORED_DW, "cuda", cuda.stored_linear_dw)


@torch.library.register_fake(STORED)
def _fake(x, weight, bits, crow, col, row, crow_t, row_t, bias, r, c, density, dense_grad):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake(STORED_DX)
def _fake_dx(dy, weight, bits, crow_t, row_t, r, c, density):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], weight.shape[1])


@torch.library.register_fake(STORED_DW)
def _fake_dw(dy, x, bits, crow, col, row, r, c, density):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[1], x.shape[1])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bits, crow, col, row, crow_t, row_t, bias, r, c, density, dense_grad = inputs
    # autograd refuses a backward after the lists have changed in place: a stale layout cannot be used unseen.
    ctx.save_for_backward(x, weight, bits, crow, col, row, crow_t, row_t)
    ctx.block, ctx.density, ctx.dense_grad, ctx.has_bias = (r, c), density, dense_grad, bias is not None


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    refuse_second_derivative()
    x, weight, bits, crow, col, row, crow_t, row_t = ctx.saved_tensors
    dy = dy.contiguous()
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.sparse_pathways.stored_linear_dx(dy, weight, bits, crow_t, row_t, *ctx.block, ctx.density)
    if ctx.needs_input_grad[1] and ctx.dense_grad:
        dweight = dy.T @ x
    elif ctx.needs_input_grad[1]:
        dweight = torch.ops.sparse_pathways.stored_linear_dw(dy, x, bits, crow, col, row, *ctx.block, ctx.density)
    return dx, dweight, *[None] * 6, dy.sum(0) if ctx.has_bias else None, *[None] * 4


torch.library.register_autograd(STORED, _backward, setup_context=_save)


def stored_linear(x: Tensor, weight: Tensor, layout: BlockLayout, bias: Tensor | None, dense_grad: bool) -> Tensor:
    """`x [M, K] @ (mask * weight [N, K]).T + bias`, with gradients; arguments as checked by `masked_linear`."""
    lists = layout.bits, layout.crow, layout.col, layout.rows(), layout.crow_t, layout.row_t
    return torch.ops.sparse_pathways.stored_linear(x, weight, *lists, bias, *layout.block, layout.density, dense_grad)
