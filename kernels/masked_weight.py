"""masked_weight, Triton.   out[n, k] = weight[n, k] if its block is kept, else 0; converted to the dtype of out

weight [N, K], last dimension contiguous, any row stride; out [N, K] contiguous, any floating dtype
bits   uint8, one per block in row order, lowest bit first (as `SparseLinear.block_mask` holds them)
Maths  one rounding, to the dtype of out; a pruned weight is not read, so a NaN there cannot leak
Limits any block; float16, bfloat16, float32; elements past 2**31 are addressed in 64 bits
Cost   kept weights are read once, out is written once: one pass where mask and cast apart would take two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_N, TILE_K = 16, 256


@triton.jit
def _masked_weight(
    weight_ptr,
    bits_ptr,
    out_ptr,
    N,
    K,
    weight_stride_n,
    R: tl.constexpr,
    C: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    inside = (n[:, None] < N) & (k[None, :] < K)
    block = (n // R)[:, None].to(tl.int64) * tl.cdiv(K, C) + (k // C)[None, :]
    byte = tl.load(bits_ptr + (block >> 3), mask=inside, other=0).to(tl.int32)
    kept = (byte >> (block & 7).to(tl.int32)) & 1 != 0
    row = n[:, None].to(tl.int64)
    weight = tl.load(weight_ptr + row * weight_stride_n + k[None, :], mask=inside & kept, other=0.0)
    tl.store(out_ptr + row * K + k[None, :], weight.to(out_ptr.dtype.element_ty), mask=inside)


def masked_weight(weight: Tensor, bits: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """The weight with its pruned blocks zeroed, in `dtype` (default: its own).

    Args:
        weight: `[n, k]`, last dimension contiguous.
        bits: uint8 `[ceil(NB * KB / 8)]`, 1 = kept.
        block: (R, C), any.
        dtype: of the result.

    Returns:
        `[n, k]`, contiguous.
    """
    n, k = weight.shape
    out = torch.empty(n, k, device=weight.device, dtype=dtype or weight.dtype)
    if out.numel():
        programs = (triton.cdiv(n, TILE_N), triton.cdiv(k, TILE_K))
        _masked_weight[programs](weight, bits, out, n, k, weight.stride(0), *block, TILE_N, TILE_K)
    return out
