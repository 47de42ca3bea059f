"""How products are cut into programs: the rule, and what the kernels refuse.

A rule, not a tuner: two processes that agree on the shapes agree on the bits. `tuning.py` finds better schedules on a
device and keeps them; where it holds one for a product, that one is used.
"""

from typing import NamedTuple

import torch
import triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Schedule(NamedTuple):
    """How one product is cut into programs."""

    tile_m: int  # rows of x per program; of dW: rows per step
    tile_out: int  # outputs per program, divides the block; of dW: outputs per program
    tile_red: int  # inputs per step of the inner loop, divides the block; of dW: inputs per program
    num_warps: int
    num_stages: int  # depth of the load pipeline


def refusal(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why the kernels cannot serve a dtype and a block shape; None when they can."""
    if dtype not in DTYPES:
        return f"dtype = {dtype}; the Triton kernels take float16, bfloat16 and float32"
    if any(side < 16 or side & (side - 1) for side in block):
        return f"block = {block}; the Triton kernels take powers of two from 16 up (a tensor core's tile)"
    return None


def check(dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Raise ValueError with the `refusal`, if there is one."""
    reason = refusal(dtype, block)
    if reason is not None:
        raise ValueError(reason)


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch's own products are (`torch.set_float32_matmul_precision`)."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def rule(m: int, out: int, red: int, dtype: torch.dtype) -> Schedule:
    """Schedule of `m` rows times blocks of `out` outputs and `red` inputs."""
    tile_m = max(16, triton.next_power_of_2(m))
    if dtype == torch.float32 and precision(dtype) == "ieee":  # FMA units: operands in registers
        return Schedule(min(32, tile_m), min(out, 64), min(red, 32), num_warps=4, num_stages=2)
    tile_m, tile_out = min(128, tile_m), min(out, 128)
    warps = 8 if tile_m * tile_out >= 128 * 128 else 4
    return Schedule(tile_m, tile_out, min(red, 128 // dtype.itemsize), num_warps=warps, num_stages=3)


def rule_dw(m: int, r: int, c: int, dtype: torch.dtype) -> Schedule:
    """Schedule of the weight gradient of blocks of `r` outputs and `c` inputs over `m` rows."""
    if dtype == torch.float32 and precision(dtype) == "ieee":
        return Schedule(min(32, max(16, triton.next_power_of_2(m))), min(r, 32), min(c, 32), num_warps=4, num_stages=2)
    tile_m = min(128 // dtype.itemsize, max(16, triton.next_power_of_2(m)))
    tile_r, tile_c = min(r, 128), min(c, 128)
    return Schedule(tile_m, tile_r, tile_c, num_warps=8 if tile_r * tile_c >= 128 * 128 else 4, num_stages=3)
