"""Forward, dX and dW of the Triton kernels against float64, under the interpreter. No GPU needed.

The interpreter's `tl.dot` multiplies bfloat16 operands as 16-bit integers (Triton 3.8), so bfloat16 is not interpreted:
it is compiled (test_machine_code.py), and test_on_device.py checks its numbers on a device.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from sparse_pathways.kernels import bcsr_linear as kernel
from sparse_pathways.kernels.schedule import DTYPES, Schedule, rule, rule_dw

SHAPES = [(1, 96, 64), (37, 128, 128), (5, 80 - 3, 192), (18, 96, 128 - 5), (3, 10, 9)]  # M, N, K: also edges, < block
BLOCKS = [(16, 16), (32, 32), (64, 64), (16, 32), (32, 16)]
INTERPRETED = [torch.float32, torch.float16]
ACTIVATIONS = [None, F.relu, F.gelu, F.silu, torch.tanh]

block_ids = "{0[0]}x{0[1]}".format
by_shape = pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-N{0[1]}-K{0[2]}".format)
by_block = pytest.mark.parametrize("block", BLOCKS, ids=block_ids)
by_dtype = pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
by_storage = pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense_storage"])

FORWARD, DX, DW = "bcsr_linear.bcsr_linear", "bcsr_linear.bcsr_linear_dx", "bcsr_linear_dw.bcsr_linear_dw"


@by_dtype
@by_storage
@by_block
@by_shape
def test_products_equal_dense(interpreted, problem, shape, block, dense, dtype):
    """Pruned weights are NaN: one that is read shows."""
    case = problem(shape, block, dtype)
    y = interpreted(FORWARD, **case.forward_arguments(dense))
    assert y.dtype == dtype
    case.forward().check(y)
    case.dx().check(interpreted(DX, **case.dx_arguments(dense)))
    dw = interpreted(DW, **case.dw_arguments(dense))
    case.dw().check(dw if dense else unpacked(case, dw))


def unpacked(case, values):
    """Dense `[N, K]` of packed values; what lies outside the matrix must be zero."""
    (r, c), (n, k) = case.block, case.weight.shape
    dense = torch.zeros(case.mask.shape[0] * r, case.mask.shape[1] * c, dtype=values.dtype)
    for e, (i, j) in enumerate(case.mask.nonzero().tolist()):
        dense[i * r : (i + 1) * r, j * c : (j + 1) * c] = values[e].T
    assert not dense[n:].any() and not dense[:, k:].any()
    return dense[:n, :k]


@by_storage
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_empty_block_rows_and_columns(interpreted, problem, bias, dense):
    mask = torch.tensor([[False, False, False], [True, False, True], [False, False, False]])
    case = problem((4, 48, 48), mask=mask, bias=bias)
    y = interpreted(FORWARD, **case.forward_arguments(dense))
    case.forward().check(y)
    expected = case.bias if bias else torch.zeros(48)
    assert torch.equal(y[:, :16], expected[:16].expand(4, 16))
    assert torch.equal(y[:, 32:], expected[32:].expand(4, 16))
    dx = interpreted(DX, **case.dx_arguments(dense))
    assert torch.equal(dx[:, 16:32], torch.zeros(4, 16))
    case.dx().check(dx)


@by_storage
def test_no_block_kept(interpreted, problem, dense):
    case = problem((3, 32, 32), mask=torch.zeros(2, 2, dtype=torch.bool))
    case.forward().check(interpreted(FORWARD, **case.forward_arguments(dense)))
    case.dx().check(interpreted(DX, **case.dx_arguments(dense)))
    assert not interpreted(DW, **case.dw_arguments(dense)).any()


@by_storage
def test_no_rows(interpreted, problem, dense):
    case = problem((0, 32, 32))
    assert interpreted(FORWARD, **case.forward_arguments(dense)).shape == (0, 32)
    assert interpreted(DX, **case.dx_arguments(dense)).shape == (0, 32)
    assert not interpreted(DW, **case.dw_arguments(dense)).any()


def test_int32_lists(interpreted, problem):
    case = problem((4, 48, 64), ids=torch.int32)
    case.forward().check(interpreted(FORWARD, **case.forward_arguments()))
    case.dx().check(interpreted(DX, **case.dx_arguments()))
    case.dw().check(interpreted(DW, **case.dw_arguments(dense=True)))


def test_pos_selects_blocks_and_leaves_the_others_unread(interpreted, problem):
    case = problem((9, 48, 96))
    entries = case.col.shape[0]
    pool = torch.full((2 * entries, 16, 16), torch.nan)  # blocks of other pathways: a read of one shows
    order = torch.randperm(2 * entries, generator=torch.Generator().manual_seed(0))[:entries].to(torch.int32)
    pool[order.long()] = case.values
    forward = case.forward_arguments() | {"values": pool, "pos": order}
    case.forward().check(interpreted(FORWARD, **forward))
    dx = case.dx_arguments() | {"values": pool, "pos_t": order[case.pos_t.long()]}
    case.dx().check(interpreted(DX, **dx))
    dw = interpreted(DW, **case.dw_arguments() | {"pos": order, "blocks": 2 * entries})
    case.dw().check(unpacked(case, dw[order.long()]))
    dw[order.long()] = 0
    assert not dw.any()


def test_inputs_of_pruned_block_columns_are_not_read(interpreted, problem):
    mask = torch.tensor([[True, False, True], [True, False, False]])
    case = problem((7, 32, 48), mask=mask)
    expected = case.forward()
    case.x[:, 16:32] = torch.nan  # NaN * 0 would be NaN
    expected.check(interpreted(FORWARD, **case.forward_arguments()))


@by_dtype
@by_storage
def test_rows_with_a_stride_and_nan_behind_the_last_element(interpreted, problem, dtype, dense):
    case = problem((6, 40, 59), (16, 32), dtype, mask=torch.ones(3, 2, dtype=torch.bool))
    answers = case.forward(), case.dx(), case.dw()

    def widened(t):
        wide = torch.full((t.shape[0], 128), torch.nan, dtype=dtype)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]  # what lies behind the last column is in memory and holds NaN

    case.x, case.dy, case.weight = widened(case.x), widened(case.dy), widened(case.weight)
    answers[0].check(interpreted(FORWARD, **case.forward_arguments(dense)))
    answers[1].check(interpreted(DX, **case.dx_arguments(dense)))
    dw = interpreted(DW, **case.dw_arguments(dense))
    answers[2].check(dw if dense else unpacked(case, dw))


def test_a_weight_stored_transposed(interpreted, problem):
    case = problem((6, 48, 64))
    case.weight = case.weight.T.contiguous().T
    case.forward().check(interpreted(FORWARD, **case.forward_arguments(dense=True)))
    case.dx().check(interpreted(DX, **case.dx_arguments(dense=True)))


def test_lists_longer_than_their_entries(interpreted, problem):
    """Lists of fixed capacity: what lies behind the last entry is not read."""
    case = problem((9, 48, 96))
    expected = case.forward(), case.dx(), case.dw()
    for name in ("col", "row", "row_t", "pos_t"):
        ids = getattr(case, name)
        setattr(case, name, torch.cat([ids.int(), torch.full((5,), 30_000, dtype=torch.int32)]).to(ids.dtype))
    expected[0].check(interpreted(FORWARD, **case.forward_arguments(dense=True)))
    expected[1].check(interpreted(DX, **case.dx_arguments(dense=True)))
    expected[2].check(interpreted(DW, **case.dw_arguments(dense=True)))
    expected[2].check(interpreted(DW, **case.dw_arguments(dense=True), splits=2))


@pytest.mark.parametrize("tile_m", [16, 64])
@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (128, 64)], ids=block_ids)
def test_a_block_larger_than_the_tile(interpreted, problem, tile, tile_m):
    case = problem((33, 250, 120), (128, 64), mask=torch.tensor([[True, False], [True, True]]))
    schedule = Schedule(tile_m, *tile, num_warps=4, num_stages=2)
    turned = schedule._replace(tile_out=min(tile[1], 64), tile_red=tile[0])
    for dense in (False, True):
        case.forward().check(interpreted(FORWARD, **case.forward_arguments(dense), schedule=schedule))
        case.dx().check(interpreted(DX, **case.dx_arguments(dense), schedule=turned))
    case.dw().check(interpreted(DW, **case.dw_arguments(dense=True), schedule=schedule))


@by_storage
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_weight_gradient_in_parts(interpreted, problem, splits, dense):
    case = problem((100, 64, 48))
    dw = interpreted(DW, **case.dw_arguments(dense), splits=splits, schedule=Schedule(16, 16, 16, 4, 2))
    case.dw().check(dw if dense else unpacked(case, dw))


FAR = (37, 48, 64)  # rows from 32 on begin past element 2**31


def test_far_rows(interpreted, problem):
    case = problem(FAR)
    case.forward().check(interpreted.far(FORWARD, "x", **case.forward_arguments()))
    case.forward().check(interpreted.far(FORWARD, "residual", **case.forward_arguments(), residual=torch.zeros(37, 48)))
    case.dx().check(interpreted.far(DX, "dy", **case.dx_arguments()))
    case.dw().check(interpreted.far(DW, "x", "dy", **case.dw_arguments(True), schedule=Schedule(16, 16, 16, 4, 2)))


def test_a_far_weight(interpreted, problem):
    """Rows of a dense one, blocks of a pool."""
    case = problem(FAR)
    case.forward().check(interpreted.far(FORWARD, "values", **case.forward_arguments(True)))
    case.dx().check(interpreted.far(DX, "values", **case.dx_arguments(True)))
    before = 2**31 // 256
    forward = case.forward_arguments() | {"pos": torch.arange(case.col.shape[0], dtype=torch.int32) + before}
    case.forward().check(interpreted.far(FORWARD, **forward, pool="values"))
    dx = case.dx_arguments() | {"pos_t": case.pos_t + before}
    case.dx().check(interpreted.far(DX, **dx, pool="values"))


@by_dtype
@pytest.mark.parametrize("number", range(5))
def test_activation_and_residual(interpreted, problem, number, dtype):
    case = problem((9, 40, 64), dtype=dtype)
    case.x[0] *= 30  # far ends of the activations
    case.x[1] *= 1e-3
    wide = torch.randn(9, 50, generator=case.rng).to(dtype)
    residual = wide[:, :40]
    expected = case.forward(ACTIVATIONS[number])
    y = interpreted(FORWARD, **case.forward_arguments(), activation=number)
    expected.check(y)
    more = torch.finfo(dtype).eps * residual.double().abs()
    expected = expected._replace(exact=expected.exact + residual.double(), bound=expected.bound + more)
    expected.check(interpreted(FORWARD, **case.forward_arguments(), activation=number, residual=residual))


def test_nan_and_infinity_reach_what_they_multiply_and_nothing_else(interpreted, problem):
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    case = problem((5, 48, 32), mask=mask)
    case.x[2, 3], case.dy[1, 20] = torch.nan, torch.inf
    y = interpreted(FORWARD, **case.forward_arguments())
    bad = torch.zeros(5, 48, dtype=torch.bool)
    bad[2, :16] = bad[2, 32:] = True
    assert torch.equal(y.isnan(), bad)
    dx = interpreted(DX, **case.dx_arguments(dense=True))
    bad = torch.zeros(5, 32, dtype=torch.bool)
    bad[1, 16:] = True
    assert torch.equal(~dx.isfinite(), bad)
    relu = interpreted(FORWARD, **case.forward_arguments(), activation=1)
    assert relu[2, 0].isnan()


@pytest.mark.parametrize("m", [1, 17, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [*BLOCKS, (16, 256), (512, 16)], ids=block_ids)
def test_the_rule_divides_the_block(m, dtype, block):
    for schedule in (rule(m, *block, dtype), rule_dw(m, *block, dtype)):
        assert block[0] % schedule.tile_out == 0
        assert block[1] % schedule.tile_red == 0
        assert schedule.tile_m >= 16


@pytest.mark.parametrize(
    ("dtype", "block", "message"),
    [
        (torch.float64, (16, 16), "dtype = torch.float64"),
        (torch.float16, (8, 1), r"block = \(8, 1\)"),
        (torch.float16, (16, 48), r"block = \(16, 48\)"),
    ],
)
def test_outside_the_limits_is_refused(dtype, block, message):
    values = torch.zeros(0, block[1], block[0], dtype=dtype)
    index = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        kernel.bcsr_linear(torch.zeros(2, 4, dtype=dtype), values, index, index[:0], None, None, block[0])
