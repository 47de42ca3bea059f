"""`sparse_pathways::masked_linear`: the training product. The weight stays dense; only kept blocks are multiplied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import grid, refuse_second_derivative
from sparse_pathways.layout.bcsr import BlockLayout
from sparse_pathways.ops import backends, cuda
from sparse_pathways.ops.linear import autocast_dtype, gather, linear, linear_dw, linear_dx
from sparse_pathways.ops.reference import reference_masked_weight
from sparse_pathways.ops.stored import stored_linear

MASKED = "sparse_pathways::masked_linear"
WEIGHT = "sparse_pathways::masked_weight"
CAST = "sparse_pathways::masked_cast"

torch.library.define(
    MASKED,
    "(Tensor x, Tensor weight, Tensor crow, Tensor col, Tensor crow_t, Tensor row_t, Tensor pos_t, Tensor? bias, "
    "int r, int c, bool dense_grad) -> (Tensor y, Tensor values)",
)
torch.library.define(WEIGHT, "(Tensor weight, Tensor bits, int r, int c, bool dense_grad) -> Tensor")
torch.library.define(CAST, "(Tensor weight, Tensor bits, int r, int c, bool dense_grad, ScalarType dtype) -> Tensor")


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
torch.library.register_kernel(WEIGHT, None, reference_masked_weight)
torch.library.register_kernel(WEIGHT, "cuda", cuda.masked_weight)
torch.library.register_kernel(CAST, None, reference_masked_weight)
torch.library.register_kernel(CAST, "cuda", cuda.masked_weight)


def _fake_weight(weight, bits, r, c, dense_grad, dtype=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _save_weight(ctx, inputs, output):  # type: ignore[no-untyped-def]
    weight, bits, r, c, dense_grad, *_ = inputs
    ctx.save_for_backward(bits)
    ctx.block, ctx.dense_grad, ctx.dtype, ctx.arguments = (r, c), dense_grad, weight.dtype, len(inputs)


def _weight_backward(ctx, dkept):  # type: ignore[no-untyped-def]
    masked, last = torch.ops.sparse_pathways.masked_weight.default, []
    if dkept.dtype != ctx.dtype:
        masked, last = torch.ops.sparse_pathways.masked_cast.default, [ctx.dtype]
    if ctx.dense_grad:
        dweight = dkept.to(ctx.dtype)
    else:
        dweight = masked(dkept.contiguous(), *ctx.saved_tensors, *ctx.block, False, *last)
    return dweight, *[None] * (ctx.arguments - 1)


for name in (WEIGHT, CAST):
    torch.library.register_fake(name, _fake_weight)
    torch.library.register_autograd(name, _weight_backward, setup_context=_save_weight)


def takes_dense(device: str, dtype: torch.dtype, layout: BlockLayout, rows: int) -> bool:
    """Whether `rows` rows train faster by zeroing the pruned weights and multiplying densely than by the kernels.

    The CPU kernels reach the speed of a dense product per kept weight where R is a multiple of 8; of shorter blocks
    they make half or a third of it, and with few rows reading the weight costs as much as the product (measured on a
    Zen 4). On CUDA a model decides, for each product: see `cuda.takes_dense`; here only whether all of them are dense.
    A compiled model keeps the operator: the choice depends on which backend is forced, which a trace cannot ask.
    """
    if device == "cuda" and not torch.compiler.is_compiling() and not layout.is_static:
        shape = rows, *layout.shape, layout.block, layout.density, dtype
        return all(cuda.takes_dense(op, *shape) for op in ("forward", "dx"))
    if (
        torch.compiler.is_compiling()
        or device != "cpu"
        or layout.is_static
        or dtype != torch.float32
        or backends.is_forced()
        or backends.select(device, dtype, layout.block) == "reference"
    ):
        return False
    r = layout.block[0]
    limit = 0.95 if r % 8 == 0 else 0.6 if r % 4 == 0 else 0.35
    return layout.density > (limit if rows >= 64 else 0.6 * limit)


def _under_autocast(
    x: Tensor, weight: Tensor, layout: BlockLayout, bias: Tensor | None, dense_grad: bool, out: torch.dtype
) -> Tensor:
    """On CUDA the product is taken in autocast's dtype, the weight masked and cast in one pass; CPU kernels of training
    are float32."""
    if x.device.type != "cuda":
        return masked_linear(x.to(weight.dtype), weight, layout, bias, dense_grad=dense_grad).to(out)
    kept = torch.ops.sparse_pathways.masked_cast(weight.contiguous(), layout.bits, *layout.block, dense_grad, out)
    x, bias = x.to(out), None if bias is None else bias.to(out)
    if takes_dense("cuda", out, layout, x.shape[:-1].numel()):
        return F.linear(x, kept, bias)
    return masked_linear(x, kept, layout, bias, dense_grad=dense_grad)


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
    n, k = layout.shape
    if tuple(weight.shape) != (n, k):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; layout is of {(n, k)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; weight {(n, k)} takes [..., {k}]")
    if (out := autocast_dtype(x.device.type)) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return _under_autocast(x, weight, layout, bias, dense_grad, out)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise TypeError(f"x.dtype = {x.dtype}, weight.dtype = {weight.dtype}; they must be equal, and the bias too")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; want ({n},)")
    blocks, columns = grid(layout.shape, layout.block)
    if not layout.is_static and layout.num_blocks == blocks * columns:
        return F.linear(x, weight, bias)
    if not x.device == weight.device == layout.crow.device:
        raise ValueError(
            f"x is on {x.device}, weight on {weight.device}, layout on {layout.crow.device}; want one device"
        )
    flat = x.reshape(-1, k).contiguous()
    if takes_dense(x.device.type, weight.dtype, layout, flat.shape[0]):
        kept = torch.ops.sparse_pathways.masked_weight(weight.contiguous(), layout.bits, *layout.block, dense_grad)
        return F.linear(x, kept, bias)
    bias = None if bias is None else bias.contiguous()
    if flat.is_cuda or layout.is_static:
        return stored_linear(flat, weight.contiguous(), layout, bias, dense_grad).view(*x.shape[:-1], n)
    y, _ = torch.ops.sparse_pathways.masked_linear(
        flat,
        weight.contiguous(),
        layout.crow,
        layout.col,
        layout.crow_t,
        layout.row_t,
        layout.pos_t,
        bias,
        *layout.block,
        dense_grad,
    )
    return y.view(*x.shape[:-1], n)
