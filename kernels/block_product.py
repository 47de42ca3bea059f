"""The inner loop shared by the products: rows of x times the kept blocks of one strip of outputs; and the epilogue.

One loop serves y = x @ W.T (outputs N, sums over K) and dx = dy @ W (outputs K, sums over N): OUT and RED are the sides
of a block along the outputs and along the sum, and two strides say where element (output, input) of the weight lies.

W      packed: block b begins at b * OUT * RED, strides within the block; dense storage: strides of the whole matrix, of
       which only kept blocks are read
Maths  operands in x.dtype (float32 without TF32 unless PRECISION says so), accumulator float32
"""

import triton
import triton.language as tl


@triton.jit
def add_block_products(
    acc,  # [TILE_M, outputs of the strip]
    x_rows,  # pointers [TILE_M, 1] to the rows of x
    in_m,  # [TILE_M, 1]: which of these rows exist
    w_ptr,
    index_ptr,  # block along the sum, per entry
    pos_ptr,  # packed: block in the values, per entry; None: entry e is block e
    begin,
    end,  # entries of this strip's list
    o,  # outputs of this strip
    N_OUT,
    N_RED,
    w_stride_out,
    w_stride_red,
    OUT: tl.constexpr,
    RED: tl.constexpr,
    DENSE: tl.constexpr,  # weight stored dense
    TILE_RED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc plus the products of all entries of one list."""
    STEPS: tl.constexpr = RED // TILE_RED  # inner steps per block
    i = tl.arange(0, TILE_RED)
    if DENSE:
        w_out = w_ptr + o[None, :].to(tl.int64) * w_stride_out  # 64 bits: N * K passes 2**31
    else:
        w_out = w_ptr + (o % OUT)[None, :] * w_stride_out
    for step in tl.range(begin * STEPS, end * STEPS, num_stages=NUM_STAGES):
        entry = step // STEPS
        inside = step % STEPS * TILE_RED + i  # inputs of this step, within their block
        k = tl.load(index_ptr + entry).to(tl.int32) * RED + inside
        x = tl.load(x_rows + k[None, :], mask=in_m & (k[None, :] < N_RED), other=0.0)  # [TILE_M, TILE_RED]
        if DENSE:
            in_w = (k[:, None] < N_RED) & (o[None, :] < N_OUT)
            w = tl.load(w_out + k[:, None].to(tl.int64) * w_stride_red, mask=in_w, other=0.0)  # [TILE_RED, outputs]
        else:
            block = (entry if pos_ptr is None else tl.load(pos_ptr + entry)).to(tl.int64)
            w = tl.load(w_out + block * (OUT * RED) + inside[:, None] * w_stride_red)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """0 none, 1 ReLU, 2 GELU (erf), 3 SiLU, 4 tanh: the numbers of `ACTIVATIONS` in ops/reference.py."""
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    elif ACTIVATION == 2:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = y * tl.sigmoid(y)
    elif ACTIVATION == 4:
        t = tl.exp(-2 * tl.abs(y))
        far = (1 - t) / (1 + t)
        s = y * y  # near 0 the quotient cancels: there a series, good to float32 below 0.25
        near = y * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        y = tl.where(s < 0.0625, near, tl.where(y < 0, -far, far))
    return y


@triton.jit
def store_outputs(
    acc,
    m,  # rows of y, int64
    in_m,
    o,
    N_OUT,
    bias_ptr,  # None: no bias
    residual_ptr,  # None: nothing is added after the activation
    y_ptr,
    y_stride_m,
    residual_stride_m,
    ACTIVATION: tl.constexpr,
):
    """y = activation(acc + bias) + residual, rounded once."""
    in_o = o[None, :] < N_OUT
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o[None, :], mask=in_o, other=0.0).to(tl.float32)
    y = activate(acc, ACTIVATION)
    if residual_ptr is not None:
        place = residual_ptr + m[:, None] * residual_stride_m + o[None, :]
        y += tl.load(place, mask=in_m & in_o, other=0.0).to(tl.float32)
    tl.store(y_ptr + m[:, None] * y_stride_m + o[None, :], y.to(y_ptr.dtype.element_ty), mask=in_m & in_o)
