"""The C++ bf16 forward kernels under each instruction set, against a dense float64 product."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

OPS = torch.ops.sparse_pathways
ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 31, 33, 64)
BLOCKS = ((8, 1), (16, 1), (8, 4), (4, 4), (1, 1), (3, 5), (8, 3), (16, 16))
SHAPES = ((40, 32), (37, 53))
ACTIVATIONS = (lambda y: y, F.relu, F.gelu, F.silu, torch.tanh)

by_rows = pytest.mark.parametrize("m", ROWS, ids="M{}".format)
by_block = pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-K{0[1]}".format)


def randn(*shape, rng) -> Tensor:
    return torch.randn(*shape, generator=rng).bfloat16()


def by_lists(x, w, bias=None, residual=None, activation=0) -> Tensor:
    """The product of the lists as they are."""
    return OPS.bcsr_linear(x, w.values, w.crow, w.col, w.pos, bias, w.dense.shape[0], None, residual, activation)


def prepared(x, w, bias=None, residual=None, activation=0) -> Tensor:
    """The product of a handle, which has the weight arranged for the kernel."""
    handle = OPS.prepare_linear(
        w.values, w.crow, w.col, w.pos, bias, *w.dense.shape, None, activation, quantise_x=False, base=0
    )
    try:
        return OPS.packed_linear(x, handle, residual)
    finally:
        OPS.release_linear(handle)


by_way = pytest.mark.parametrize("linear", [by_lists, prepared])


def product(x: Tensor, dense: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x @ dense.T + bias in float64, and how far a float32 sum of its terms in any order may be from it.

    Products of two bf16 numbers are exact in float32, so t terms cost t roundings of at most 2^-24 of sum |x w|; one
    more for the bias. What vdpbf16ps flushes to zero is below 2^-126 per term.
    """
    exact = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T
    terms = (dense != 0).sum(1)
    if bias is not None:
        exact, size, terms = exact + bias.double(), size + bias.double().abs(), terms + 1
    return exact, (terms + 1) * (size * 2.0**-24 + 2.0**-126)


def assert_rounded(y: Tensor, exact: Tensor, error: Tensor) -> None:
    """y is bf16 and rounds (by at most 2^-8 of it) something within `error` of `exact`."""
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= error + 2.0**-8 * (exact.abs() + error)).all()


@by_way
@by_shape
@by_block
@by_rows
def test_linear(level, linear, m, block, shape, blocks_of, rng):
    weight, x, bias = randn(*shape, rng=rng), randn(m, shape[1], rng=rng), randn(shape[0], rng=rng)
    for ids, pool, b in itertools.product((torch.uint16, torch.int32), (False, True), (None, bias)):
        w = blocks_of(weight, block, rng, ids=ids, pool=pool)
        assert_rounded(linear(x, w, b), *product(x, w.dense, b))


@by_way
@pytest.mark.parametrize("m", [1, 2, 4, 7, 16, 32], ids="M{}".format)
def test_a_realistic_size(level, linear, m, blocks_of, rng):
    w, x = blocks_of(randn(264, 1031, rng=rng), (8, 1), rng), randn(m, 1031, rng=rng)
    assert_rounded(linear(x, w), *product(x, w.dense, None))


@by_way
@by_block
@pytest.mark.parametrize("m", [1, 2, 4, 8, 17, 32], ids="M{}".format)
def test_epilogue(level, linear, m, block, blocks_of, rng):
    n, k = 37, 53
    w, x = blocks_of(randn(n, k, rng=rng), block, rng), randn(m, k, rng=rng)
    bias, residual = randn(n, rng=rng), randn(m, n, rng=rng)
    exact, error = product(x, w.dense, bias)
    for number, activation in enumerate(ACTIVATIONS):
        y = linear(x, w, bias, residual, number)
        want = activation(exact) + residual.double()
        # No activation is steeper than 1.13 (GELU); its float32 formula adds 2^-20 of its value, erf 1.5e-7 |y|.
        slack = 1.13 * error + 2.0**-20 * (exact.abs() + 1) + 2.0**-23 * want.abs()
        assert_rounded(y, want, slack)
        want = want - residual.double()
        assert_rounded(linear(x, w, bias, None, number), want, slack)


@by_way
@by_block
@pytest.mark.parametrize("m", [3, 8, 20, 64], ids="M{}".format)
def test_a_bad_row_stays_alone(level, linear, m, block, blocks_of, rng):
    n, k = 37, 53
    w, x = blocks_of(randn(n, k, rng=rng), block, rng), randn(m, k, rng=rng)
    x[1] = float("nan")
    y = linear(x, w)
    good = torch.arange(m) != 1
    assert_rounded(y[good], *product(x[good], w.dense, None))
    assert y[1, -1].isnan()


@by_way
@by_block
@pytest.mark.parametrize("m", [1, 2, 3, 8, 20], ids="M{}".format)
def test_an_infinity_stays_an_infinity(level, linear, m, block, blocks_of, rng):
    """Padding and the partner of an odd last column must not turn inf * w into NaN."""
    n, k = 37, 53
    w = blocks_of(randn(n, k, rng=rng).abs() + 1, block, rng)
    x = torch.ones(m, k, dtype=torch.bfloat16)
    x[:, -1] = float("inf")
    y = linear(x, w)
    assert torch.equal(y.isinf(), (w.dense[:, -1] != 0).expand(m, n))


@by_way
@by_block
@pytest.mark.parametrize("m", [1, 2, 3, 8, 20], ids="M{}".format)
def test_inputs_that_nobody_keeps_are_not_used(level, linear, m, block, blocks_of, rng):
    n, k = 37, 53
    w, x = blocks_of(randn(n, k, rng=rng), block, rng), randn(m, k, rng=rng)
    clean, unused = x.clone(), ~(w.dense != 0).any(0)
    assert unused.any()
    x[:, unused], clean[:, unused] = float("nan"), 0
    y = linear(x, w)
    assert_rounded(y, *product(clean, w.dense, None))


@pytest.mark.parametrize("m", [0, 1, 2, 4, 40], ids="M{}".format)
def test_nothing_kept_gives_the_bias(level, m, rng):
    crow, col = torch.zeros(6, dtype=torch.int32), torch.empty(0, dtype=torch.uint16)
    values, bias = torch.empty(0, 1, 8, dtype=torch.bfloat16), randn(37, rng=rng)
    y = OPS.bcsr_linear(randn(m, 24, rng=rng), values, crow, col, None, bias, 37)
    assert torch.equal(y, bias.expand(m, 37))


@pytest.mark.parametrize("m", [1, 3, 33], ids="M{}".format)
def test_more_block_columns_than_uint16_holds(level, m, rng):
    k = 70_000
    crow, col = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, k - 1, 65_536], dtype=torch.int32)
    values, x = randn(3, 1, 8, rng=rng), randn(m, k, rng=rng)
    dense = torch.zeros(16, k)
    dense[:8, 1], dense[:8, k - 1], dense[8:, 65_536] = values[:, 0].float()
    assert_rounded(OPS.bcsr_linear(x, values, crow, col, None, None, 16), *product(x, dense, None))


@pytest.mark.parametrize("m", [1, 4, 33, 200], ids="M{}".format)
def test_threads_do_not_change_a_bit(level, m, blocks_of, rng):
    w, x = blocks_of(randn(1024, 700, rng=rng), (8, 1), rng, density=0.4), randn(m, 700, rng=rng)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OPS.bcsr_linear(x, w.values, w.crow, w.col, None, None, 1024))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
