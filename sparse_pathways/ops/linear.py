"""`sparse_pathways::bcsr_linear`: y = x @ W.T + bias with W held as packed blocks, and its transposed product.

Here: schemas, fakes, autograd and the public `sparse_linear`. Reference: reference.py. Kernels: csrc/torch/ (CPU),
kernels/bcsr_linear.py (CUDA, Triton).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_pathways.checks import BackendUnavailable, refuse_second_derivative, unknown_pathway
from sparse_pathways.layout.packed import BlockIndex, PackedWeight
from sparse_pathways.ops import backends, cuda, direct, pathways, strips
from sparse_pathways.ops.prepared import is_forward_mode, is_plain_call, prepare
from sparse_pathways.ops.reference import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    reference_dw,
    reference_dx,
    reference_gather,
    reference_linear,
)

LINEAR = "sparse_pathways::bcsr_linear"
LINEAR_DX = "sparse_pathways::bcsr_linear_dx"
LINEAR_DW = "sparse_pathways::bcsr_linear_dw"
GATHER = "sparse_pathways::bcsr_gather"

torch.library.define(
    LINEAR,
    "(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? pos, Tensor? bias, int n, Tensor? scale=None, "
    "Tensor? residual=None, int activation=0, bool quantise_x=False) -> Tensor",
)
torch.library.define(
    LINEAR_DX,
    "(Tensor dy, Tensor values, Tensor crow, Tensor col, Tensor? pos, int k, Tensor? crow_t=None, Tensor? row_t=None, "
    "Tensor? pos_t=None) -> Tensor",
)
torch.library.define(
    LINEAR_DW, "(Tensor dy, Tensor x, Tensor crow, Tensor col, Tensor? pos, int r, int c, int blocks) -> Tensor"
)
torch.library.define(GATHER, "(Tensor weight, Tensor crow, Tensor col, int r, int c) -> Tensor")
torch.library.define("sparse_pathways::set_isa", "(int level) -> int")
torch.library.define("sparse_pathways::isa", "() -> int")
torch.library.define("sparse_pathways::max_isa", "() -> int")

torch.library.register_kernel(LINEAR, None, reference_linear)
torch.library.register_kernel(LINEAR_DX, None, reference_dx)
torch.library.register_kernel(LINEAR_DW, None, reference_dw)
torch.library.register_kernel(GATHER, None, reference_gather)


torch.library.register_kernel(LINEAR, "cuda", cuda.linear)
torch.library.register_kernel(LINEAR_DX, "cuda", cuda.linear_dx)
torch.library.register_kernel(LINEAR_DW, "cuda", cuda.linear_dw)


# --- fakes --------------------------------------------------------------------------------------------------------
@torch.library.register_fake(LINEAR)
def _fake_linear(x, values, crow, col, pos, bias, n, scale=None, residual=None, activation=0, quantise_x=False):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], n)


@torch.library.register_fake(LINEAR_DX)
def _fake_dx(dy, values, crow, col, pos, k, crow_t=None, row_t=None, pos_t=None):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], k)


@torch.library.register_fake(LINEAR_DW)
def _fake_dw(dy, x, crow, col, pos, r, c, blocks):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[1], x.shape[1]) if blocks < 0 else dy.new_empty(blocks, c, r)


@torch.library.register_fake(GATHER)
def _fake_gather(weight, crow, col, r, c):  # type: ignore[no-untyped-def]
    return weight.new_empty(col.shape[0], c, r)


# --- autograd -----------------------------------------------------------------------------------------------------
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, values, crow, col, pos, bias, _, scale, residual, activation, _ = inputs
    if scale is not None or residual is not None or activation:
        raise RuntimeError("bcsr_linear with a scale, a residual or an activation has no gradient; apply them after it")
    ctx.save_for_backward(x, values, crow, col, pos)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    refuse_second_derivative()
    x, values, crow, col, pos = ctx.saved_tensors
    dy = dy.contiguous()
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        dx = linear_dx(dy, values, crow, col, pos, x.shape[1])
    if ctx.needs_input_grad[1]:
        dvalues = linear_dw(dy, x, crow, col, pos, values.shape[2], values.shape[1], values.shape[0])
    return dx, dvalues, None, None, None, dy.sum(0) if ctx.has_bias else None, *[None] * 5


torch.library.register_autograd(LINEAR, _backward, setup_context=_save)


# --- kernel or reference ------------------------------------------------------------------------------------------
_bcsr_linear = torch.ops.sparse_pathways.bcsr_linear.default
_is_dynamo = torch.compiler.is_dynamo_compiling


GRADIENT_DTYPES = (torch.float32, torch.float64)  # of the CPU kernels of gradients


def _no_gradient_kernel(t: Tensor) -> bool:
    return not t.is_cuda and t.dtype not in GRADIENT_DTYPES


def _use_reference(values: Tensor) -> bool:
    return backends.select(values.device.type, values.dtype, (values.shape[2], values.shape[1])) == "reference"


def linear(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, pos: Tensor | None, bias: Tensor | None, n: int
) -> Tensor:
    """`bcsr_linear` by the selected backend: `x [M, K]` contiguous -> `[M, n]`."""
    if _use_reference(values):
        return reference_linear(x, values, crow, col, pos, bias, n)
    return _bcsr_linear(x, values, crow, col, pos, bias, n)


def linear_dx(
    dy: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    pos: Tensor | None,
    k: int,
    transposed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """`dy [M, N] @ W` by the selected backend, `[M, k]`. `transposed`: the lists (crow_t, row_t, pos_t), which serve a
    few rows faster."""
    if _use_reference(values) or _no_gradient_kernel(values):
        return reference_dx(dy, values, crow, col, pos, k)
    return torch.ops.sparse_pathways.bcsr_linear_dx.default(dy, values, crow, col, pos, k, *(transposed or ()))


def linear_dw(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, pos: Tensor | None, r: int, c: int, blocks: int = -1
) -> Tensor:
    """`dy.T @ x` on the kept blocks by the selected backend: `[blocks, c, r]`, or `[N, K]` where `blocks` is -1."""
    if backends.select(x.device.type, x.dtype, (r, c)) == "reference" or _no_gradient_kernel(x):
        return reference_dw(dy, x, crow, col, pos, r, c, blocks)
    return torch.ops.sparse_pathways.bcsr_linear_dw.default(dy, x, crow, col, pos, r, c, blocks)


def gather(weight: Tensor, crow: Tensor, col: Tensor, r: int, c: int) -> Tensor:
    """Values `[nnz, c, r]` of the kept blocks of a dense weight, by the selected backend."""
    if backends.select(weight.device.type, weight.dtype, (r, c)) == "reference" or weight.is_cuda:
        return reference_gather(weight, crow, col, r, c)
    return torch.ops.sparse_pathways.bcsr_gather.default(weight, crow, col, r, c)


# --- public -------------------------------------------------------------------------------------------------------
def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient of one of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _product(
    x: Tensor,
    packed: PackedWeight,
    index: BlockIndex,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """`x [M, K]` contiguous -> `[M, N]` through the backend that serves it."""
    n, values, scale = packed.shape[0], packed.values, packed.scale
    quantise_x = packed.quantise_x
    differentiable = wants_grad(x, values, bias, residual)
    name = backends.select(packed.device.type, values.dtype, packed.block)
    if name == "cuda" and not differentiable and not torch.compiler.is_compiling() and not is_forward_mode():
        return strips.linear(x, packed, index, bias, residual, activation)
    if name == "cuda" and backends.is_forced():
        raise BackendUnavailable(
            "the backend 'cuda' is forced, and it has no gradients and no kernels inside torch.compile; call under "
            "torch.no_grad(), or force another"
        )
    if name == "reference" or (differentiable and scale is not None) or is_forward_mode():
        return reference_linear(x, values, *index, bias, n, scale, residual, activation, quantise_x)
    if torch.compiler.is_compiling() or differentiable:
        y = ACTIVATIONS[activation](_bcsr_linear(x, values, *index, bias, n, scale, None, 0, quantise_x))
        return y if residual is None else y + residual
    if torch.is_inference_mode_enabled():
        return _bcsr_linear(x, values, *index, bias, n, scale, residual, activation, quantise_x)
    # Past the autograd formula, which is Python and slower than a kernel.
    with torch._C._AutoDispatchBelowAutograd():
        return _bcsr_linear(x, values, *index, bias, n, scale, residual, activation, quantise_x)


def _mixed(x: Tensor, packed: PackedWeight, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of one batch through different pathways: on CUDA by one operator, else one product per pathway that
    occurs."""
    if pathways.serves(packed):
        lists = pathways.lists_of(packed)
        return torch.ops.sparse_pathways.bcsr_pathway_linear(x, packed.values, rows, *lists, bias, packed.shape[0])
    y = x.new_empty(x.shape[0], packed.shape[0])
    for number in range(len(packed.pathways)):
        mine = (rows == number).nonzero().flatten()
        if mine.numel():
            y = y.index_copy(0, mine, _product(x[mine], packed, packed.indices[number], bias))
    return y


def _check_rows(rows: Tensor, packed: PackedWeight, count: int) -> Tensor:
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.numel() != count:
        raise ValueError(
            f"pathway is a tensor {rows.dtype} {tuple(rows.shape)}; want a LongTensor [{count}], one index per row of x"
        )
    if rows.is_cuda:  # looking at the numbers would wait for the device
        inside = ((rows >= 0) & (rows < len(packed.pathways))).all()
        torch._assert_async(inside, f"pathway: an index is outside 0..{len(packed.pathways) - 1}")
    elif rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(packed.pathways):
        raise unknown_pathway(f"index {int(rows.min())}..{int(rows.max())}", map(str, enumerate(packed.pathways)))
    return rows.to(packed.device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes of a product on this device type; None where it is off."""
    return torch.get_autocast_dtype(device) if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) else None


def _outside_autocast(x, packed, bias, pathway, activation, residual, out):  # type: ignore[no-untyped-def]
    x, residual = (t if t is None else t.to(packed.x_dtype) for t in (x, residual))
    with torch.autocast(x.device.type, enabled=False):
        return sparse_linear(x, packed, bias, pathway=pathway, activation=activation, residual=residual).to(out)


def sparse_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    *,
    pathway: str | Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias) + residual`, W packed.

    Args:
        x: `[..., K]`, any strides, in the dtype of `packed` (float32 for int8); not converted. Under autocast it is
            converted, and the result comes in autocast's dtype.
        packed: weight `[N, K]`.
        bias: `[N]`.
        pathway: a name, or a LongTensor `[rows]` of indices into `packed.pathways` (mixed-language batch); needed when
            `packed` has more than one.
        activation: None, "relu", "gelu", "silu" or "tanh".
        residual: `[..., N]`, added last.

    Returns:
        `[..., N]` in the dtype of x.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, device or activation. KeyError: unknown pathway.
        BackendUnavailable: a forced backend cannot serve this product.
    """
    try:
        # Each of these tests is a hundredth of a small product; direct.linear makes the others.
        ready = packed.prepared.get(pathway)
        if (
            not _is_dynamo()
            and ready is not None
            and ready.bias is bias
            and ready.activation == activation
            and ready.epoch == backends.epoch
        ):
            y = direct.linear(x, ready.handle, residual, packed.values, bias, ready.version, ready.pointer)
            if y is not None:
                return y
    except (AttributeError, RuntimeError, TypeError):
        pass  # the checks of the long way word what is wrong
    return _checked(x, packed, bias, pathway, activation, residual)


def _checked(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    pathway: str | Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`sparse_linear` with every argument looked at; leaves a prepared product for the next call where it can."""
    if not isinstance(packed, PackedWeight) or not isinstance(x, Tensor):
        raise TypeError(
            f"x is a {type(x).__name__}, packed a {type(packed).__name__}; want a Tensor and a PackedWeight"
        )
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; want a Tensor or None")
    if (out := autocast_dtype(x.device.type)) is not None:
        return _outside_autocast(x, packed, bias, pathway, activation, residual, out)
    n, k = packed.shape
    wanted = packed.x_dtype
    if x.dtype != wanted:
        raise TypeError(f"x.dtype = {x.dtype}; packed is {packed.dtype} and takes x in {wanted}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; packed {packed.shape} takes [..., {k}]")
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device}, packed on {packed.device}; move one of them")
    if bias is not None and (bias.shape != (n,) or bias.dtype != wanted or bias.device != x.device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; want {wanted} ({n},) on {x.device}"
        )
    if activation not in ACTIVATION_NAMES:
        names = ", ".join(name for name in ACTIVATION_NAMES if name)
        raise ValueError(f"activation = {activation!r}; choose one of {names} or None")
    shape = (*x.shape[:-1], n)
    if residual is not None and (residual.shape != shape or residual.dtype != wanted or residual.device != x.device):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}; "
            f"want {wanted} {shape} on {x.device}"
        )
    flat = (x if x.dim() == 2 else x.reshape(-1, k)).contiguous()
    added = None if residual is None else residual.reshape(-1, n).contiguous()
    given = bias
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    number = ACTIVATION_NAMES.index(activation)
    if isinstance(pathway, Tensor):
        rows = _check_rows(pathway, packed, flat.shape[0])
        y = ACTIVATIONS[number](_mixed(flat, packed, rows, bias))
        y = y if added is None else y + added
    else:
        index = packed.index(pathway)
        y = _product(flat, packed, index, bias, added, number)
        if (
            backends.select(packed.device.type, packed.dtype, packed.block) in backends.ISAS
            and type(y) is Tensor
            and is_plain_call()
            and bias is given
            and not wants_grad(x, packed.values, bias, residual)
        ):
            ready = packed.prepared.get(pathway)
            if (
                ready is None
                or ready.values is not packed.values
                or ready.is_stale()
                or ready.bias is not bias
                or ready.activation != activation
            ):
                packed.prepared[pathway] = prepare(packed, pathway, bias, activation, number)
    return y if x.dim() == 2 else y.view(shape)
