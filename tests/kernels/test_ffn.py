"""The fused feed-forward layer against two products in float64, under the interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from sparse_pathways.kernels.ffn import Weight
from sparse_pathways.kernels.schedule import Schedule

FUNCTION = "ffn.bcsr_ffn"
ACTIVATIONS = [lambda y: y, F.relu, F.gelu, F.silu, torch.tanh]


def weight_of(case, dense):
    values = case.weight if dense else case.values
    return Weight(values, case.crow, case.col, None, case.bias, case.weight.shape[0], case.block)


def check(y, first, second, activation):
    """Float64 answer from hidden values rounded to the dtype, with the hidden values' own error carried through W2."""
    exact, bound = first.forward(activation)
    hidden = exact.to(first.dtype).double()
    second.x = hidden
    answer = second.forward()
    carried = (bound + torch.finfo(first.dtype).eps * hidden.abs()) @ second.dense.abs().T
    answer._replace(bound=answer.bound + carried).check(y)


@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense_storage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((37, 64, 96, 48), ((16, 16), (16, 16))), ((5, 61, 77, 83), ((32, 16), (16, 32)))],
    ids=str,
)
def test_equals_two_products(interpreted, problem, shape, blocks, number, dtype, dense):
    m, k, h, n = shape
    first, second = problem((m, h, k), blocks[0], dtype), problem((m, n, h), blocks[1], dtype)
    y = interpreted(
        FUNCTION, x=first.x, first=weight_of(first, dense), second=weight_of(second, dense), activation=number
    )
    assert y.dtype == dtype
    check(y, first, second, ACTIVATIONS[number])


def test_more_row_tiles_than_programs(interpreted, problem):
    """Programs reuse their scratch: 2200 rows in tiles of 16 are 138 tiles for 132 programs."""
    first, second = problem((2200, 32, 16)), problem((2200, 16, 32))
    given = {"first": weight_of(first, False), "second": weight_of(second, False), "activation": 1}
    y = interpreted(FUNCTION, x=first.x, **given, schedule=Schedule(16, 16, 16, 4, 2))
    check(y, first, second, F.relu)


def test_every_program_has_a_scratch_of_its_own(interpreted, problem):
    """Three programs. The interpreter runs one after the other, but knows who wrote what (watched_memory.py)."""
    first, second = problem((37, 32, 16)), problem((37, 16, 32))
    given = {"first": weight_of(first, False), "second": weight_of(second, False), "activation": 1}
    y = interpreted(FUNCTION, x=first.x, **given, schedule=Schedule(16, 16, 16, 4, 2))
    check(y, first, second, F.relu)


def test_far_rows(interpreted, problem):
    """Rows of x and of both weights past element 2**31."""
    first, second = problem((37, 48, 32)), problem((37, 64, 48))
    given = {"x": first.x, "first": weight_of(first, True), "second": weight_of(second, True), "activation": 1}
    check(interpreted.far(FUNCTION, "x", "first", "second", **given), first, second, F.relu)


@pytest.mark.parametrize("m", [0, 1])
def test_few_rows_and_no_block(interpreted, problem, m):
    none = torch.zeros(2, 2, dtype=torch.bool)
    first, second = problem((m, 32, 32)), problem((m, 32, 32), mask=none)
    given = {"first": weight_of(first, True), "second": weight_of(second, True), "activation": 2}
    y = interpreted(FUNCTION, x=first.x, **given)
    assert torch.equal(y, second.bias.expand(m, 32))
