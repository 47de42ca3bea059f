"""What the operators do on CUDA: the Triton kernels where they serve, else PyTorch. Plain functions of tensors.

Registered for their operators by the files that define them. None of them waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sparse_pathways.checks import BackendUnavailable, Block
from sparse_pathways.layout.bcsr import rows_of, transpose
from sparse_pathways.ops import backends, roofline
from sparse_pathways.ops.reference import reference_dw, reference_dx, reference_linear, reference_masked_weight


def on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` with the device of its first argument as the current one: that is where Triton launches."""

    @functools.wraps(kernel)
    def guarded(*args: Any, **named: Any) -> Any:
        first = args[0] if args else next(iter(named.values()))
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return kernel(*args, **named)
        with torch.cuda.device(first.device):
            return kernel(*args, **named)

    return guarded


def _by_triton(dtype: torch.dtype, block: Block) -> bool:
    return backends.select("cuda", dtype, block) == "triton"


# --- packed weights -----------------------------------------------------------------------------------------------
@on_its_device
def linear(x, values, crow, col, pos, bias, n, scale=None, residual=None, activation=0, quantise_x=False):  # type: ignore[no-untyped-def]
    """`bcsr_linear`."""
    if scale is not None or not _by_triton(values.dtype, (values.shape[2], values.shape[1])):
        return reference_linear(x, values, crow, col, pos, bias, n, scale, residual, activation, quantise_x)
    from sparse_pathways.kernels.bcsr_linear import bcsr_linear  # imports Triton: only where it runs

    return bcsr_linear(x, values, crow, col, pos, bias, n, residual, activation)


@on_its_device
def linear_dx(dy, values, crow, col, pos, k, crow_t=None, row_t=None, pos_t=None):  # type: ignore[no-untyped-def]
    """`bcsr_linear_dx`."""
    if not _by_triton(values.dtype, (values.shape[2], values.shape[1])):
        return reference_dx(dy, values, crow, col, pos, k)
    from sparse_pathways.kernels.bcsr_linear import bcsr_linear_dx

    if crow_t is None:
        crow_t, row_t, pos_t = transpose(crow, col, -(-k // values.shape[1]))
    if pos is not None:
        pos_t = pos[pos_t.long()]
    return bcsr_linear_dx(dy, values, crow_t, row_t, pos_t, k)


@on_its_device
def linear_dw(dy, x, crow, col, pos, r, c, blocks):  # type: ignore[no-untyped-def]
    """`bcsr_linear_dw`."""
    if not _by_triton(x.dtype, (r, c)):
        return reference_dw(dy, x, crow, col, pos, r, c, blocks)
    from sparse_pathways.kernels.bcsr_linear_dw import bcsr_linear_dw

    return bcsr_linear_dw(dy, x, rows_of(crow, col), col, pos, crow[-1:], (r, c), blocks)


# --- a weight stored dense ----------------------------------------------------------------------------------------
@on_its_device
def masked_weight(weight, bits, r, c, dense_grad=False, dtype=None):  # type: ignore[no-untyped-def]
    """`masked_weight` and `masked_cast`: mask and cast in one pass, for any block."""
    types = (weight.dtype, dtype or weight.dtype)
    if not backends.triton_installed() or any(
        one not in (torch.float16, torch.bfloat16, torch.float32) for one in types
    ):
        return reference_masked_weight(weight, bits, r, c, dense_grad, dtype)
    from sparse_pathways.kernels.masked_weight import masked_weight as kernel

    return kernel(weight, bits, (r, c), dtype)


def takes_dense(op: str, m: int, n: int, k: int, block: Block, density: float, dtype: torch.dtype) -> bool:
    """Whether a training product multiplies the masked weight densely: no Triton kernel serves it, or the model
    (`roofline`) expects none to be faster. A forced backend is obeyed.

    Args:
        op: "forward", "dx" or "dw".
        m, n, k: rows, outputs, inputs.
        block: (R, C).
        density: kept share of the blocks.
        dtype: of the operands.
    """
    if backends.forced_name() == "cuda":
        raise BackendUnavailable("the backend 'cuda' is forced, and it has no kernels for training; force another")
    if not _by_triton(dtype, block):
        return True
    return not backends.is_forced() and roofline.prefers_dense(op, m, n, k, block, density, dtype)


@on_its_device
def stored_linear(x, weight, bits, crow, col, row, crow_t, row_t, bias, r, c, density, dense_grad):  # type: ignore[no-untyped-def]
    """`stored_linear`."""
    (m, k), n = x.shape, weight.shape[0]
    if takes_dense("forward", m, n, k, (r, c), density, x.dtype):
        return F.linear(x, masked_weight(weight, bits, r, c), bias)
    from sparse_pathways.kernels.bcsr_linear import bcsr_linear

    return bcsr_linear(x, weight, crow, col, None, bias, n, block=(r, c))


@on_its_device
def stored_linear_dx(dy, weight, bits, crow_t, row_t, r, c, density):  # type: ignore[no-untyped-def]
    """`stored_linear_dx`."""
    (m, n), k = dy.shape, weight.shape[1]
    if takes_dense("dx", m, n, k, (r, c), density, dy.dtype):
        return dy @ masked_weight(weight, bits, r, c)
    from sparse_pathways.kernels.bcsr_linear import bcsr_linear_dx

    return bcsr_linear_dx(dy, weight, crow_t, row_t, None, k, block=(r, c))


@on_its_device
def stored_linear_dw(dy, x, bits, crow, col, row, r, c, density):  # type: ignore[no-untyped-def]
    """`stored_linear_dw`."""
    (m, n), k = dy.shape, x.shape[1]
    if takes_dense("dw", m, n, k, (r, c), density, x.dtype):
        return masked_weight(dy.T @ x, bits, r, c)
    from sparse_pathways.kernels.bcsr_linear_dw import bcsr_linear_dw

    return bcsr_linear_dw(dy, x, row, col, None, crow[-1:], (r, c))


def explain_training(m: int, n: int, k: int, block: Block, density: float, dtype: torch.dtype) -> str:
    """Which path each product of a training step takes on CUDA, and why."""
    if not _by_triton(dtype, block):
        return f"dense, the pruned weights zeroed in one pass; {backends.explain_product('cuda', dtype, block)}"
    if backends.is_forced():
        return backends.explain_product("cuda", dtype, block)
    parts = []
    for op in roofline.OPS:
        dense = roofline.masked_dense(op, m, n, k, dtype.itemsize)
        sparse = roofline.triton(op, m, n, k, block, density, dtype.itemsize)
        name = "dense" if takes_dense(op, m, n, k, block, density, dtype) else "triton"
        parts.append(f"{op} {name} (dense {dense.us:.0f} us, triton {sparse.us:.0f} us, {sparse.bound})")
    return "; ".join(parts) + "; times by a model of an H100, not measured"
