"""The C++ kernels, each operator under each instruction set this CPU has, called as the package calls them.

Index lists are built here from the mask and the oracle is a dense float64 product: nothing is shared with the packer.
"""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sparse_pathways.ops import linear as _schemas  # noqa: F401  defines the operators
from sparse_pathways.ops.backends import ISAS
from sparse_pathways.ops.library import MISSING

if MISSING is not None:
    pytest.skip(f"no compiled CPU kernels: {MISSING}", allow_module_level=True)

OPS = torch.ops.sparse_pathways
LEVELS = range(OPS.max_isa() + 1)
# Every path and its edges: M = 1, 2 to 4, 5 to 8, one panel, several, a short last one.
ROWS = (0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 64)
BLOCKS = ((8, 1), (16, 1), (8, 4), (4, 4), (1, 1), (3, 5), (16, 16))
SHAPES = ((40, 32), (37, 53))  # N, K: whole blocks of 8x1; ragged in both directions for every block but 1x1
ID_TYPES = (torch.uint16, torch.int32)  # of block columns and block rows

by_rows = pytest.mark.parametrize("m", ROWS, ids="M{}".format)
by_block = pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-K{0[1]}".format)
by_type = pytest.mark.parametrize("ids_dtype", ID_TYPES, ids=["u16", "i32"])


@pytest.fixture(autouse=True)
def one_thread():
    """The oracle's small products gain nothing from a second thread and wait for it when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS, ids=ISAS.__getitem__)
def isa(request):
    before = OPS.set_isa(request.param)
    assert OPS.isa() == request.param
    yield ISAS[request.param]
    OPS.set_isa(before)


class Problem(NamedTuple):
    weight: Tensor  # [N, K], NaN or Inf where pruned
    dense: Tensor  # [N, K], 0 where pruned
    values: Tensor  # [blocks, C, R], zero padded
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    row_t: Tensor
    pos_t: Tensor


def make_problem(shape, block, rng, ids_dtype=torch.uint16, dtype=torch.float32, density=0.3) -> Problem:
    """Random mask with one empty and one full block row and one empty block column, index lists made block by block."""
    (n, k), (r, c) = shape, block
    mask = torch.rand(-(-n // r), -(-k // c), generator=rng) < density
    mask[-1], mask[0] = True, False
    if mask.shape[1] > 1:
        mask[:, 1] = False
    kept = mask.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    weight = torch.randn(n, k, generator=rng, dtype=dtype)
    bad = torch.where(torch.rand(n, k, generator=rng) < 0.5, float("nan"), float("inf")).to(dtype)
    padded = torch.zeros(mask.shape[0] * r, mask.shape[1] * c, dtype=dtype)
    padded[:n, :k] = weight
    places = [(b, j) for b in range(mask.shape[0]) for j in range(mask.shape[1]) if mask[b, j]]
    values = torch.stack([padded[b * r : (b + 1) * r, j * c : (j + 1) * c].T for b, j in places]).contiguous()
    by_column = sorted(range(len(places)), key=lambda e: (places[e][1], places[e][0]))
    return Problem(
        weight=torch.where(kept, weight, bad),
        dense=torch.where(kept, weight, 0),
        values=values,
        crow=starts(mask.sum(1)),
        col=torch.tensor([j for _, j in places]).to(ids_dtype),
        crow_t=starts(mask.sum(0)),
        row_t=torch.tensor([places[e][0] for e in by_column]).to(ids_dtype),
        pos_t=torch.tensor(by_column, dtype=torch.int32),
    )


@functools.cache
def wide_problem(n: int, k: int) -> Problem:
    """8x1 blocks; made once, because index lists made block by block take a second here."""
    return make_problem((n, k), (8, 1), torch.Generator().manual_seed(7), density=0.4)


def starts(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()


def shuffled(values: Tensor, rng) -> tuple[Tensor, Tensor]:
    """The same blocks in another order with strangers (NaN) between them, and the position of each."""
    pos = torch.randperm(2 * len(values), generator=rng)[: len(values)]
    pool = torch.full((2 * len(values), *values.shape[1:]), float("nan"), dtype=values.dtype)
    pool[pos] = values
    return pool, pos.int()


def soil(m: int, n: int, dtype=torch.float32) -> None:
    """Leave NaN in the block of memory that the next tensor of this size most likely gets."""
    torch.full((m, n), float("nan"), dtype=dtype)


def assert_product(got: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """got = x @ dense.T + bias within the bound of a sum of t rounded terms in any order: (t + 1) u sum |x w|.

    u is the unit roundoff; t counts the kept inputs of the output and its bias. Zero padding adds nothing.
    """
    exact = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T
    terms = (dense != 0).sum(1)
    if bias is not None:
        exact, size, terms = exact + bias.double(), size + bias.double().abs(), terms + 1
    bound = (terms + 1) * (torch.finfo(got.dtype).eps / 2) * size
    if got.dtype == torch.float64:
        bound = 2 * bound  # the oracle rounds as often
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= bound).all()


@by_shape
@by_block
@by_rows
def test_linear(isa, m, block, shape, rng):
    problem = make_problem(shape, block, rng)
    pool, pos = shuffled(problem.values, rng)
    x, bias = torch.randn(m, shape[1], generator=rng), torch.randn(shape[0], generator=rng)
    for ids_dtype, b in itertools.product(ID_TYPES, (None, bias)):
        for values, where in ((problem.values, None), (pool, pos)):
            soil(m, shape[0])
            y = OPS.bcsr_linear(x, values, problem.crow, problem.col.to(ids_dtype), where, b, shape[0])
            assert_product(y, x, problem.dense, b)


@by_shape
@by_block
@by_rows
def test_linear_dx(isa, m, block, shape, rng):
    problem = make_problem(shape, block, rng)
    pool, pos = shuffled(problem.values, rng)
    dy = torch.randn(m, shape[0], generator=rng)
    for ids_dtype in ID_TYPES:
        col, row_t = problem.col.to(ids_dtype), problem.row_t.to(ids_dtype)
        for values, where in ((problem.values, None), (pool, pos)):
            pos_t = problem.pos_t if where is None else where[problem.pos_t.long()]
            for transposed in ((), (problem.crow_t, row_t, pos_t)):
                soil(m, shape[1])
                dx = OPS.bcsr_linear_dx(dy, values, problem.crow, col, where, shape[1], *transposed)
                assert_product(dx, dy, problem.dense.T)


@by_block
@pytest.mark.parametrize("m", [1, 3, 8, 17], ids="M{}".format)
def test_float64(m, block, rng):
    n, k = SHAPES[1]
    problem = make_problem((n, k), block, rng, dtype=torch.float64)
    x, dy = (torch.randn(m, size, generator=rng, dtype=torch.float64) for size in (k, n))
    y = OPS.bcsr_linear(x, problem.values, problem.crow, problem.col, None, None, n)
    dx = OPS.bcsr_linear_dx(dy, problem.values, problem.crow, problem.col, None, k)
    assert_product(y, x, problem.dense)
    assert_product(dx, dy, problem.dense.T)


@by_type
@by_shape
@by_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gather_reads_kept_blocks_only(dtype, block, shape, ids_dtype, rng):
    problem = make_problem(shape, block, rng, ids_dtype)
    soil(problem.values.numel(), 1, dtype)
    values = OPS.bcsr_gather(problem.weight.to(dtype), problem.crow, problem.col, *block)
    assert values.dtype == dtype
    assert torch.equal(values, problem.values.to(dtype))


@pytest.mark.parametrize("m", [0, 1, 4, 40], ids="M{}".format)
def test_nothing_kept_gives_the_bias(isa, m, rng):
    crow, col, values = torch.zeros(6, dtype=torch.int32), torch.empty(0, dtype=torch.uint16), torch.empty(0, 1, 8)
    bias = torch.randn(37, generator=rng)
    x, dy = torch.randn(m, 24, generator=rng), torch.randn(m, 37, generator=rng)
    assert torch.equal(OPS.bcsr_linear(x, values, crow, col, None, bias, 37), bias.expand(m, 37))
    assert not OPS.bcsr_linear(x, values, crow, col, None, None, 37).any()
    transposed = (torch.zeros(25, dtype=torch.int32), col, torch.empty(0, dtype=torch.int32))
    assert not OPS.bcsr_linear_dx(dy, values, crow, col, None, 24).any()
    assert not OPS.bcsr_linear_dx(dy, values, crow, col, None, 24, *transposed).any()


@by_block
@pytest.mark.parametrize("m", [3, 8, 20, 64], ids="M{}".format)
def test_a_bad_row_stays_alone(isa, m, block, rng):
    n, k = SHAPES[1]
    problem = make_problem((n, k), block, rng)
    x, dy = torch.randn(m, k, generator=rng), torch.randn(m, n, generator=rng)
    x[1], dy[1] = float("nan"), float("inf")
    good = torch.arange(m) != 1
    y = OPS.bcsr_linear(x, problem.values, problem.crow, problem.col, None, None, n)
    dx = OPS.bcsr_linear_dx(dy, problem.values, problem.crow, problem.col, None, k)
    assert_product(y[good], x[good], problem.dense)
    assert_product(dx[good], dy[good], problem.dense.T)
    assert y[1, -1].isnan() and not dx[1].isfinite().all()


@by_block
@pytest.mark.parametrize("m", [1, 3, 20], ids="M{}".format)
def test_inputs_that_nobody_keeps_are_not_used(isa, m, block, rng):
    n, k = SHAPES[1]
    problem = make_problem((n, k), block, rng)
    x = torch.randn(m, k, generator=rng)
    clean = x.clone()
    unused = ~(problem.dense != 0).any(0)
    assert unused.any()
    x[:, unused], clean[:, unused] = float("nan"), 0
    y = OPS.bcsr_linear(x, problem.values, problem.crow, problem.col, None, None, n)
    assert_product(y, clean, problem.dense)


@pytest.mark.parametrize("m", [1, 4, 16, 33, 64, 200], ids="M{}".format)
def test_threads_do_not_change_a_bit(isa, m, rng):
    """Wide enough that a second thread is used: an output is computed by one thread, in one order."""
    n, k = 1024, 700
    problem = wide_problem(n, k)
    x, dy = torch.randn(m, k, generator=rng), torch.randn(m, n, generator=rng)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = OPS.bcsr_linear(x, problem.values, problem.crow, problem.col, None, None, n)
        dx = OPS.bcsr_linear_dx(dy, problem.values, problem.crow, problem.col, None, k)
        results.append((y, dx))
    assert_product(results[0][0], x, problem.dense)
    assert_product(results[0][1], dy, problem.dense.T)
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


@pytest.mark.parametrize("m", [1, 3], ids="M{}".format)
def test_more_block_columns_than_uint16_holds(isa, m, rng):
    k = 70_000
    crow, col = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, k - 1, 65_536], dtype=torch.int32)
    values, x = torch.randn(3, 1, 8, generator=rng), torch.randn(m, k, generator=rng)
    dense = torch.zeros(16, k)
    dense[:8, 1], dense[:8, k - 1], dense[8:, 65_536] = values[:, 0]
    assert_product(OPS.bcsr_linear(x, values, crow, col, None, None, 16), x, dense)


def test_set_isa_returns_the_level_before_and_refuses_others():
    before = OPS.isa()
    assert OPS.set_isa(0) == before
    assert OPS.set_isa(before) == 0
    for level in (-1, OPS.max_isa() + 1):
        with pytest.raises(RuntimeError, match=f"level = {level}; this machine has 0 .. {OPS.max_isa()}"):
            OPS.set_isa(level)
    assert OPS.isa() == before


WRONG = {  # argument of bcsr_linear -> (its bad value, made from the good one; what the error must say)
    "x-dtype": (0, lambda x: x.to(torch.bfloat16), "differ in dtype"),
    "x-strided": (0, lambda x: x.T.contiguous().T, "x is not contiguous"),
    "x-1d": (0, lambda x: x[0], "x has 1 dimensions"),
    "values-dtype": (1, lambda values: values.double(), "differ in dtype"),
    "values-few": (1, lambda values: values[:-1], "fewer blocks"),
    "crow-dtype": (2, lambda crow: crow.long(), "crow must be int32"),
    "crow-short": (2, lambda crow: crow[:-1], "does not fit n = 40"),
    "col-dtype": (3, lambda col: col.long(), "col must be uint16 or int32"),
    "pos-short": (4, lambda _: torch.zeros(1, dtype=torch.int32), "pos and col differ in length"),
    "bias-short": (5, lambda _: torch.zeros(3), "bias must be"),
}


@pytest.mark.parametrize("argument, spoil, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(argument, spoil, message, rng):
    problem = make_problem((40, 32), (8, 1), rng)
    arguments = [torch.randn(3, 32), problem.values, problem.crow, problem.col, None, None, 40]
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(RuntimeError, match=message):
        OPS.bcsr_linear(*arguments)
