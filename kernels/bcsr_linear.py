"""bcsr_linear and its dX, Triton.   y[M, N] = act(x[M, K] @ W[N, K].T + bias[N]) + residual;   dx[M, K] = dy[M, N] @ W

W      packed: values [nnzb, C, R] (R contiguous, edge blocks padded with zeros), pos [E] int32 (entry e reads
       values[pos[e]]) or None (values[e]); dense storage: the weight itself, [N, K] of any strides, no pos
lists  forward: crow [NB + 1] int32, col [E] uint16 or int32; dX: crow_t [KB + 1], row_t [E], pos_t [E] of the same
       blocks; lists may be longer than crow[NB] says (fixed capacity): the rest is not read
x, y   row-major, last dimension contiguous; x may have any row stride
Maths  operands in x.dtype (float32 without TF32 unless torch's matmul precision allows it), accumulator float32,
       rounded once at the store
Limits R and C powers of two >= 16; float16, bfloat16, float32; M, N and K free (masked); an empty block row yields its
       bias; 2**31 block entries, elements past 2**31 are addressed in 64 bits
Cost   each weight block is read ceil(M / tile_m) times, the rows of x once per kept block of their columns (from L2);
       break-even against the dense product: benchmarks/gpu
"""

import torch
import triton
import triton.language as tl
from sparse_pathways.kernels import tuning
from sparse_pathways.kernels.block_product import add_block_products, store_outputs
from sparse_pathways.kernels.schedule import Schedule, check, precision
from torch import Tensor


@triton.jit
def _bcsr_linear(
    x_ptr,
    w_ptr,
    start_ptr,  # first entry of each block of outputs
    index_ptr,
    pos_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    M,
    N_OUT,
    N_RED,
    x_stride_m,
    y_stride_m,
    residual_stride_m,
    w_stride_out,
    w_stride_red,
    OUT: tl.constexpr,
    RED: tl.constexpr,
    DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_RED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    strips = tl.cdiv(N_OUT, TILE_OUT)
    # The strips of one row tile are neighbours: what they share, x, then comes from L2.
    strip = tl.program_id(0) % strips
    tile = (tl.program_id(0) // strips).to(tl.int64)  # 64 bits before it meets a stride: M * N passes 2**31
    o = strip * TILE_OUT + tl.arange(0, TILE_OUT)
    m = tile * TILE_M + tl.arange(0, TILE_M)
    in_m = m[:, None] < M
    begin = tl.load(start_ptr + strip * TILE_OUT // OUT)
    end = tl.load(start_ptr + strip * TILE_OUT // OUT + 1)
    acc = add_block_products(
        tl.zeros((TILE_M, TILE_OUT), dtype=tl.float32),
        x_ptr + m[:, None] * x_stride_m,
        in_m,
        w_ptr,
        index_ptr,
        pos_ptr,
        begin,
        end,
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
    store_outputs(acc, m, in_m, o, N_OUT, bias_ptr, residual_ptr, y_ptr, y_stride_m, residual_stride_m, ACTIVATION)


def _launch(
    x: Tensor,
    weight: Tensor,
    lists: tuple[Tensor, Tensor, Tensor | None],
    out: int,
    sides: tuple[int, int],
    strides: tuple[int, int],
    schedule: Schedule | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """One product: `sides` of a block and `strides` of the weight are (along the outputs, along the sum)."""
    m, red = x.shape
    check(x.dtype, sides)
    schedule = schedule or tuning.schedule("product", m, sides, x.dtype, x.device)
    y = torch.empty(m, out, device=x.device, dtype=x.dtype)
    programs = triton.cdiv(m, schedule.tile_m) * triton.cdiv(out, schedule.tile_out)
    if programs == 0:
        return y
    _bcsr_linear[(programs,)](
        x,
        weight,
        *lists,
        bias,
        residual,
        y,
        m,
        out,
        red,
        x.stride(0),
        y.stride(0),
        0 if residual is None else residual.stride(0),
        *strides,
        OUT=sides[0],
        RED=sides[1],
        DENSE=weight.dim() == 2,
        ACTIVATION=activation,
        TILE_M=schedule.tile_m,
        TILE_OUT=schedule.tile_out,
        TILE_RED=schedule.tile_red,
        NUM_STAGES=schedule.num_stages,
        PRECISION=precision(x.dtype),
        num_warps=schedule.num_warps,
    )
    return y


def bcsr_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    pos: Tensor | None,
    bias: Tensor | None,
    n: int,
    residual: Tensor | None = None,
    activation: int = 0,
    block: tuple[int, int] | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """`[m, n]` product of the rows of `x` with a block-sparse weight, on x's device and in x's dtype.

    Shapes, index ranges and equal devices are the caller's promise (`ops` checks them once); they are not read here,
    which would wait for the device.

    Args:
        x: `[m, k]`, last dimension contiguous, any row stride. `k` may end inside the last block column.
        values: packed `[nnzb, C, R]`, contiguous, or the dense weight `[n, k]`; dtype of `x`.
        crow: `[NB + 1]`, int32. First entry of every block row.
        col: `[entries]`, uint16 or int32. Block column of every entry.
        pos: `[entries]`, int32, block of every entry in `values`; None when entry e is block e.
        bias: `[n]`, floating point, or None.
        n: outputs, in (NB - 1) * R < n <= NB * R.
        residual: `[m, n]`, last dimension contiguous, added after the activation.
        activation: number of `block_product.activate`.
        block: (R, C) of a dense weight.
        schedule: cut of the work; default `tuning.schedule`.

    Returns:
        `[m, n]`, contiguous.

    Raises:
        ValueError: a dtype or block shape outside the limits.
    """
    if values.dim() == 2:
        assert block is not None, "a dense weight needs its block"
        sides, strides = block, values.stride()
    else:
        sides, strides = (values.shape[2], values.shape[1]), (1, values.shape[2])
    return _launch(x, values, (crow, col, pos), n, sides, strides, schedule, bias, residual, activation)


def bcsr_linear_dx(
    dy: Tensor,
    values: Tensor,
    crow_t: Tensor,
    row_t: Tensor,
    pos_t: Tensor | None,
    k: int,
    block: tuple[int, int] | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """`[m, k]` gradient of the inputs, `dy [m, n] @ W`, from the transposed lists of the same blocks.

    Args:
        dy: `[m, n]`, last dimension contiguous, any row stride.
        values: packed `[nnzb, C, R]`, or the dense weight `[n, k]`; dtype of `dy`.
        crow_t: `[KB + 1]`, int32. First entry of every block column.
        row_t: `[entries]`, uint16 or int32. Block row of every entry.
        pos_t: `[entries]`, int32, block of every entry in `values`; not read for a dense weight.
        k: inputs.
        block: (R, C) of a dense weight.
        schedule: as for `bcsr_linear`.

    Returns:
        `[m, k]`, contiguous.
    """
    if values.dim() == 2:
        assert block is not None, "a dense weight needs its block"
        r, c = block
        return _launch(dy, values, (crow_t, row_t, None), k, (c, r), (values.stride(1), values.stride(0)), schedule)
    _, c, r = values.shape
    return _launch(dy, values, (crow_t, row_t, pos_t), k, (c, r), (r, 1), schedule)
