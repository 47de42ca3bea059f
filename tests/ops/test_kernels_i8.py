"""The C++ int8 forward kernels under each instruction set, with and without a handle that holds the weight arranged.

With quantised rows of x: against the written rule in integers. Without (weight-only): against a dense float64 product.
"""

import itertools

import pytest
import torch
from torch import Tensor

from sparse_pathways.ops.reference import reference_linear

OPS = torch.ops.sparse_pathways
ROWS = (0, 1, 2, 3, 5, 8, 9, 16, 17, 25, 33, 64)
BLOCKS = ((8, 1), (16, 1), (8, 4), (4, 4), (1, 1), (3, 5), (8, 3), (8, 6), (16, 16))
SHAPES = ((40, 32), (37, 53))

by_rows = pytest.mark.parametrize("m", ROWS, ids="M{}".format)
by_block = pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-K{0[1]}".format)


def products(x, w, bias, scale, residual=None, activation=0, quantise_x=True):
    """The product by `bcsr_linear`, then the same by a handle."""
    n, k = w.dense.shape
    yield OPS.bcsr_linear(x, *w[1:], bias, n, scale, residual, activation, quantise_x)
    handle = OPS.prepare_linear(*w[1:], bias, n, k, scale, activation, quantise_x, 0)
    try:
        yield OPS.packed_linear(x, handle, residual)
    finally:
        OPS.release_linear(handle)


def rand_int8(*shape, rng) -> Tensor:
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)


def scales(n: int, r: int, rng) -> Tensor:
    return torch.rand(-(-n // r) * r, generator=rng) + 0.5


def emulated(x: Tensor, dense: Tensor, scale: Tensor) -> Tensor:
    """The rule of csrc/core/linear_i8-inl.h, with int64 sums."""
    peak = x.abs().amax(1, keepdim=True)
    whole = torch.round(x * (127 / peak)).long()
    sums = whole @ dense.long().T
    return sums.float() * (peak / 127) * scale[: dense.shape[0]]


@by_shape
@by_block
@by_rows
def test_quantised_rows(level, m, block, shape, blocks_of, rng):
    weight, x = rand_int8(*shape, rng=rng), torch.randn(m, shape[1], generator=rng)
    scale, bias = scales(shape[0], block[0], rng), torch.randn(shape[0], generator=rng)
    for ids, pool in itertools.product((torch.uint16, torch.int32), (False, True)):
        w = blocks_of(weight, block, rng, ids=ids, pool=pool)
        want = emulated(x, w.dense, scale)
        for y in products(x, w, None, scale):
            assert torch.equal(y, want)  # the same roundings in the same order
        for y in products(x, w, bias, scale):
            assert ((y - want - bias).abs() <= 2.0**-22 * (want.abs() + bias.abs())).all()  # or fused with the bias


@by_shape
@by_block
@by_rows
def test_weight_only(level, m, block, shape, blocks_of, rng):
    weight, x = rand_int8(*shape, rng=rng), torch.randn(m, shape[1], generator=rng)
    scale, bias = scales(shape[0], block[0], rng), torch.randn(shape[0], generator=rng)
    for pool in (False, True):
        w = blocks_of(weight, block, rng, pool=pool)
        of_output = scale[: shape[0]].double()
        exact = x.double() @ w.dense.double().T * of_output + bias.double()
        size = x.double().abs() @ w.dense.double().abs().T * of_output + bias.double().abs()
        for y in products(x, w, bias, scale, quantise_x=False):
            # A product of x and an integer, and each sum, round by at most 2^-24; so do scale and bias.
            assert ((y.double() - exact).abs() <= ((w.dense != 0).sum(1) + 4) * 2.0**-24 * size).all()


@pytest.mark.parametrize("block", [(8, 1), (4, 4), (8, 1030)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("m", [1, 2, 4, 7, 16, 33], ids="M{}".format)
def test_long_sums_are_exact(level, m, block, blocks_of, rng):
    """Beyond 2^24, where float would round, and beyond the columns that one part of a sum may have."""
    weight = torch.full((24, 3000), 127, dtype=torch.int8) - rand_int8(24, 3000, rng=rng).abs().clamp(0, 3)
    x = torch.ones(m, 3000) - torch.rand(m, 3000, generator=rng) * 0.01
    w, scale = blocks_of(weight, block, rng, density=0.9), scales(24, block[0], rng)
    for y in products(x, w, None, scale):
        assert torch.equal(y, emulated(x, w.dense, scale))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.6])
@pytest.mark.parametrize("block", [(8, 1), (16, 1), (8, 4), (4, 4), (12, 3)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 24, 25, 40], ids="M{}".format)
def test_wide_and_tall(level, m, block, density, blocks_of, rng):
    """Columns far apart and close together, over many lines of a row of x; more outputs than are stored at once."""
    n, k = 300, 1000
    w = blocks_of(rand_int8(n, k, rng=rng), block, rng, density=density, pool=m % 2 == 0)
    x, scale = torch.randn(m, k, generator=rng), scales(n, block[0], rng)
    for y in products(x, w, None, scale):
        assert torch.equal(y, emulated(x, w.dense, scale))


@pytest.mark.parametrize("m", [1, 3, 6, 12], ids="M{}".format)
def test_shares_of_two_threads(level, m, blocks_of, rng):
    """Shares begin at any block row, not only where a vector of sixteen outputs does."""
    w = blocks_of(rand_int8(1016, 1500, rng=rng), (8, 1), rng, density=0.5)
    x, scale = torch.randn(m, 1500, generator=rng), scales(1016, 8, rng)
    assert 8 * w.col.numel() * max(m, 2) > 1e6  # enough work for a second thread
    torch.set_num_threads(2)
    try:
        for y in products(x, w, None, scale):
            assert torch.equal(y, emulated(x, w.dense, scale))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("m", [1, 6, 33], ids="M{}".format)
def test_columns_in_any_order(level, m, blocks_of, rng):
    w = blocks_of(rand_int8(40, 700, rng=rng), (8, 1), rng)
    order = torch.cat(
        [start + torch.randperm(end - start, generator=rng) for start, end in itertools.pairwise(w.crow.tolist())]
    )
    shuffled = w._replace(values=w.values[order].contiguous(), col=w.col[order])
    x, scale = torch.randn(m, 700, generator=rng), scales(40, 8, rng)
    for y in products(x, shuffled, None, scale):
        assert torch.equal(y, emulated(x, w.dense, scale))


@pytest.mark.parametrize("m", [1, 3, 9], ids="M{}".format)
def test_sums_beyond_int32(level, m, blocks_of, rng):
    weight, x, scale = torch.full((16, 140_000), 127, dtype=torch.int8), torch.ones(m, 140_000), scales(16, 8, rng)
    w = blocks_of(weight, (8, 1), rng, ids=torch.int32)
    for y in products(x, w, None, scale):
        assert torch.equal(y, emulated(x, w.dense, scale))
    assert w.dense.long().sum(1).max() * 127 > 2**31


@by_block
@pytest.mark.parametrize("m", [4, 6, 20, 64], ids="M{}".format)
def test_rows_that_cannot_be_quantised(level, m, block, blocks_of, rng):
    n, k = 37, 53
    w, scale = blocks_of(rand_int8(n, k, rng=rng), block, rng), scales(n, block[0], rng)
    x, bias = torch.randn(m, k, generator=rng), torch.randn(n, generator=rng)
    x[0], x[1, 7], x[2, 1], x[3] = 0, float("nan"), float("-inf"), 1e-40
    want = emulated(x[4:], w.dense, scale)
    for y in products(x, w, bias, scale):
        assert torch.equal(y[0], bias) and torch.equal(y[3], bias)
        assert y[1:3].isnan().all()
        assert ((y[4:] - want - bias).abs() <= 2.0**-22 * (want.abs() + bias.abs())).all()
        for row in range(4):
            for one in products(x[row : row + 1], w, bias, scale):
                assert torch.equal(one.isnan(), y[row : row + 1].isnan())


@by_block
def test_the_reference_follows_the_rule(block, blocks_of, rng):
    n, k = 37, 53
    w, scale = blocks_of(rand_int8(n, k, rng=rng), block, rng, pool=True), scales(n, block[0], rng)
    x = torch.randn(9, k, generator=rng)
    lists = (w.crow, w.col, w.pos)
    assert torch.equal(
        reference_linear(x, w.values, *lists, None, n, scale, None, 0, True), emulated(x, w.dense, scale)
    )
    x[0], x[1, 7], x[2, 1], x[3] = 0, float("nan"), float("inf"), 1e-40
    y = reference_linear(x, w.values, *lists, None, n, scale, None, 0, True)
    assert not y[0].any() and y[1:3].isnan().all() and not y[3].any()


@pytest.mark.parametrize("m", [1, 8, 32], ids="M{}".format)
def test_epilogue(level, m, blocks_of, rng):
    n, k = 40, 53
    w, scale = blocks_of(rand_int8(n, k, rng=rng), (8, 1), rng), scales(n, 8, rng) / 1000
    x, bias, residual = (torch.randn(*shape, generator=rng) for shape in ((m, k), (n,), (m, n)))
    want = torch.relu(emulated(x, w.dense, scale) + bias) + residual
    for y in products(x, w, bias, scale, residual, 1):
        torch.testing.assert_close(y, want, rtol=2.0**-21, atol=2.0**-20)


def test_quantise_x_needs_int8(rng):
    crow, col = torch.zeros(2, dtype=torch.int32), torch.empty(0, dtype=torch.uint16)
    with pytest.raises(RuntimeError, match="quantise_x is for int8"):
        OPS.bcsr_linear(torch.randn(1, 4), torch.empty(0, 1, 8), crow, col, None, None, 8, None, None, 0, True)
