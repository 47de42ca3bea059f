"""`sparse_pathways::masked_linear`: the training product. The weight stays dense; only kept blocks are multiplied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import grid
from sparse_pathways.layout.bcsr import BlockLayout
from sparse_pathways.mask import expand_mask, unpack_bits
from sparse_pathways.ops import backends
from sparse_pathways.ops.linear import autocast_dtype, gather, linear, linear_dw, linear_dx, refuse_second_derivative

MASKED = "sparse_pathways::masked_linear"
WEIGHT = "sparse_pathways::masked_weight"

torch.library.define(
    MASKED,
    "(Tensor x, Tensor weight, Tensor crow, Tensor col, Tensor crow_t, Tensor row_t, Tensor pos_t, Tensor? bias, "
    "int r, int c, bool dense_grad) -> (Tensor y, Tensor values)",
)
torch.library.define(WEIGHT, "(Tensor weight, Tensor bits, int r, int c, bool dense_grad) -> Tensor")


@torch.library.register_kernel(MASKED, None)
def _masked(x, weight, crow, col, crow_t, row_t, pos_t, bias, r, c, dense_grad):  # type: ignore[no-untyped-def]
    values = gather(weight, crow, col, r, c)
    return linear(x, values, crow, col, None, bias, weight.shape[0]), values


@torch.library.register_fake(MASKED)
def _fake(x, weight, crow, col, crow_t, row_t, pos_t, bias, r, c, dense_grad):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), weight.new_empty(col.shape[0], c, r)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, crow, col, crow_t, row_t, pos_t, bias, r, c, dense_grad = inputs
    # The values of this forward: a second gathering would cost a pass over the weight, and see it after a change.
    values = output[1]
    ctx.mark_non_differentiable(values)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, values, crow, col, crow_t, row_t, pos_t)
    ctx.block, ctx.dense_grad, ctx.has_bias = (r, c), dense_grad, bias is not None


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    refuse_second_derivative()
    x, values, crow, col, *transposed = ctx.saved_tensors
    dx = dweight = None
    if dy is None:
        return (None,) * 11
    dy = dy.contiguous()
    if ctx.needs_input_grad[0]:
        dx = linear_dx(dy, values, crow, col, None, x.shape[1], tuple(transposed))
    if ctx.needs_input_grad[1]:
        dweight = dy.T @ x if ctx.dense_grad else linear_dw(dy, x, crow, col, None, *ctx.block)
    return dx, dweight, *[None] * 5, dy.sum(0) if ctx.has_bias else None, None, None, None


torch.library.register_autograd(MASKED, _backward, setup_context=_save)


# --- the mask applied, for a dense product ------------------------------------------------------------------------
@torch.library.register_kernel(WEIGHT, None)
def _weight(weight, bits, r, c, dense_grad):  # type: ignore[no-untyped-def]
    blocks, columns = grid(tuple(weight.shape), (r, c))
    mask = unpack_bits(bits, blocks * columns).view(blocks, columns)
    return torch.where(expand_mask(mask, (r, c), tuple(weight.shape)), weight, 0)


@torch.library.register_fake(WEIGHT)
def _fake_weight(weight, bits, r, c, dense_grad):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save_weight(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, bits, r, c, dense_grad = inputs
    ctx.save_for_backward(bits)
    ctx.block, ctx.dense_grad = (r, c), dense_grad


def _weight_backward(ctx, dkept):  # type: ignore[no-untyped-def]
    if not ctx.dense_grad:
        dkept = torch.ops.sparse_pathways.masked_weight.default(
            dkept.contiguous(), *ctx.saved_tensors, *ctx.block, False
        )
    return dkept, None, None, None, None


torch.library.register_autograd(WEIGHT, _weight_backward, setup_context=_save_weight)


def takes_dense(device: str, dtype: torch.dtype, layout: BlockLayout, rows: int) -> bool:
    """Whether `rows` rows train faster by zeroing the pruned weights and multiplying densely than by the CPU kernels.

    The kernels reach the speed of a dense product per kept weight where R is a multiple of 8; of shorter blocks they
    make half or a third of it, and with few rows reading the weight costs as much as the product (measured on a Zen 4).
    A compiled model keeps the kernels: the choice depends on which backend is forced, which a trace cannot ask.
    """
    if (
        torch.compiler.is_compiling()
        or device != "cpu"
        or dtype != torch.float32
        or backends.is_forced()
        or backends.select(device, dtype, layout.block) == "reference"
    ):
        return False
    r = layout.block[0]
    limit = 0.95 if r % 8 == 0 else 0.6 if r % 4 == 0 else 0.35
    return layout.density > (limit if rows >= 64 else 0.6 * limit)


def masked_linear(
    x: Tensor, weight: Tensor, layout: BlockLayout, bias: Tensor | None = None, *, dense_grad: bool = False
) -> Tensor:
    """`x @ (mask * weight).T + bias` for training; pruned weights enter no product, so a NaN there cannot leak.

    Args:
        x: `[..., K]`, in the dtype of weight (converted under autocast; the result comes in autocast's dtype).
        weight: dense Parameter `[N, K]`.
        layout: of the block mask, on the device of weight.
        bias: `[N]`.
        dense_grad: False: the gradient of pruned weights is zero. True: they receive the gradient they would have if
            they were kept (straight-through), so they go on moving and can come back.

    Returns:
        `[..., N]`. Both gradients run over kept blocks only (dW is dense if dense_grad). When nothing is pruned the
        product is `F.linear`; where a dense product is faster (`sp.explain` says so), `F.linear` of the weight with
        its pruned blocks zeroed.

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit.

    Source: dense_grad=True is variant A ("re-admit") of adaptive masking, arXiv 2309.13018 and PARP (2106.05933).
    """
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout is a {type(layout).__name__}; want a BlockLayout: BlockLayout.from_mask(mask, block, shape)"
        )
    if (out := autocast_dtype(x.device.type)) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return masked_linear(x.to(weight.dtype), weight, layout, bias, dense_grad=dense_grad).to(out)
    n, k = layout.shape
    if tuple(weight.shape) != (n, k):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; layout is of {(n, k)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; weight {(n, k)} takes [..., {k}]")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise TypeError(f"x.dtype = {x.dtype}, weight.dtype = {weight.dtype}; they must be equal, and the bias too")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; want ({n},)")
    blocks, columns = grid(layout.shape, layout.block)
    if layout.num_blocks == blocks * columns:
        return F.linear(x, weight, bias)
    if not x.device == weight.device == layout.crow.device:
        raise ValueError(
            f"x is on {x.device}, weight on {weight.device}, layout on {layout.crow.device}; want one device"
        )
    flat = x.reshape(-1, k).contiguous()
    if takes_dense(x.device.type, weight.dtype, layout, flat.shape[0]):
        kept = torch.ops.sparse_pathways.masked_weight(weight.contiguous(), layout.bits, *layout.block, dense_grad)
        return F.linear(x, kept, bias)
    y, _ = torch.ops.sparse_pathways.masked_linear(
        flat,
        weight.contiguous(),
        layout.crow,
        layout.col,
        layout.crow_t,
        layout.row_t,
        layout.pos_t,
        None if bias is None else bias.contiguous(),
        *layout.block,
        dense_grad,
    )
    return y.view(*x.shape[:-1], n)
