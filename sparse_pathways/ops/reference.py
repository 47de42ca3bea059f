"""What the operators compute, in plain PyTorch: the oracle of the kernels, and the backend where there is none."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import grid
from sparse_pathways.layout.bcsr import block_rows
from sparse_pathways.mask import expand_mask, unpack_bits

# In the order of the enum in csrc/core/types.h.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (lambda y: y, F.relu, F.gelu, F.silu, torch.tanh)
ACTIVATION_NAMES = (None, "relu", "gelu", "silu", "tanh")


def dense_of_blocks(values: Tensor, rows: Tensor, cols: Tensor, blocks: int, columns: int) -> Tensor:
    """Dense `[NB * R, KB * C]` with `values [nnz, C, R]` at block (rows, cols)."""
    c, r = values.shape[1:]
    grid = values.new_zeros(blocks, columns, c, r)
    grid[rows, cols] = values
    return grid.permute(0, 3, 1, 2).reshape(blocks * r, columns * c)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of float32 `x [M, K]` as whole numbers -127 .. 127 (float32) and what to multiply them by, `[M, 1]`.

    peak = max |x| of the row; numbers = x * (127 / peak) rounded to nearest even; factor = peak / 127. A row with
    peak < 2^-119, where 127 / peak would overflow, counts as zero; the factor of a row with a NaN or infinity is NaN.
    """
    peak = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    usable = peak.isfinite() & (peak >= 2.0**-119)
    whole = torch.where(usable, torch.round(x * (127 / peak)), 0)
    return whole, torch.where(usable, peak / 127, torch.where(peak.isfinite(), 0, torch.nan))


def reference_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    pos: Tensor | None,
    bias: Tensor | None,
    n: int,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    quantise_x: bool = False,
) -> Tensor:
    """What `bcsr_linear` computes, in plain PyTorch: `activation(x @ W.T * scale + bias) + residual`, `[M, n]`.

    With `quantise_x` (int8 values only) the rows of x are rounded to int8 first, see `quantise_rows`.
    """
    columns = -(-x.shape[1] // values.shape[1])
    used = (values if pos is None else values[pos]).to(x.dtype)
    weight = dense_of_blocks(used, block_rows(crow, col.numel()), col.long(), crow.numel() - 1, columns)[
        :n, : x.shape[1]
    ]
    if quantise_x and scale is not None:
        whole, factor = quantise_rows(x)
        y = F.linear(whole.double(), weight.double()).float() * factor * scale[:n]  # in double the integers are exact
        y = y if bias is None else y + bias
    else:
        y = F.linear(x, weight if scale is None else weight * scale[:n, None], bias)
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def reference_dx(
    dy: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    pos: Tensor | None,
    k: int,
    crow_t: Tensor | None = None,
    row_t: Tensor | None = None,
    pos_t: Tensor | None = None,
) -> Tensor:
    """`dy [M, N] @ W`, `[M, k]`; the transposed lists only tell kernels the same once more."""
    columns = -(-k // values.shape[1])
    used = values if pos is None else values[pos]
    weight = dense_of_blocks(used, block_rows(crow, col.numel()), col.long(), crow.numel() - 1, columns)
    return dy @ weight[: dy.shape[1], :k]


def reference_dw(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, pos: Tensor | None, r: int, c: int, blocks: int
) -> Tensor:
    """`dy.T @ x` on the kept blocks: `[blocks, c, r]`, or `[N, K]` where `blocks` is -1."""
    values = reference_gather(dy.T @ x, crow, col, r, c)
    if blocks < 0:
        columns = -(-x.shape[1] // c)
        dense = dense_of_blocks(values, block_rows(crow, col.numel()), col.long(), crow.numel() - 1, columns)
        return dense[: dy.shape[1], : x.shape[1]].contiguous()
    return values if pos is None else values.new_zeros(blocks, c, r).index_copy(0, pos.long(), values)


def reference_masked_weight(
    weight: Tensor, bits: Tensor, r: int, c: int, dense_grad: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """`[N, K]` with pruned blocks zeroed, contiguous, in `dtype`; `bits` are the block mask's."""
    blocks, columns = grid((weight.shape[0], weight.shape[1]), (r, c))
    mask = unpack_bits(bits, blocks * columns).view(blocks, columns)
    kept = torch.where(expand_mask(mask, (r, c), (weight.shape[0], weight.shape[1])), weight, 0)
    return kept.to(dtype or weight.dtype, memory_format=torch.contiguous_format)


def reference_gather(weight: Tensor, crow: Tensor, col: Tensor, r: int, c: int) -> Tensor:
    """Values `[nnz, c, r]` of the kept blocks of a dense weight."""
    blocks, columns = crow.numel() - 1, -(-weight.shape[1] // c)
    padded = F.pad(weight, (0, columns * c - weight.shape[1], 0, blocks * r - weight.shape[0]))
    grid = padded.reshape(blocks, r, columns, c).permute(0, 2, 3, 1)
    return grid[block_rows(crow, col.numel()), col.long()].contiguous()
