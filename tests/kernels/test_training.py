"""Training through `masked_linear` on the Triton kernels: from operator to kernel and back, under the interpreter."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("dense_grad", [False, True], ids=["masked_grad", "dense_grad"])
@pytest.mark.parametrize("dense", [(), ("forward",), ("dx",), ("dw",), ("forward", "dx", "dw")], ids="-".join)
@pytest.mark.parametrize(("shape", "block"), [((37, 96, 64), (16, 16)), ((5, 77, 83), (16, 32))], ids=str)
def test_step_equals_dense(interpreted_package, problem, shape, block, dense, dense_grad):
    """Any mixture of sparse and dense products; pruned weights are NaN."""
    case = problem(shape, block)
    capacity = int(case.mask.sum()) + 1
    y, dx, dweight, dbias, launched = interpreted_package(
        "train",
        x=case.x,
        weight=case.weight,
        mask=case.mask,
        block=block,
        bias=case.bias,
        dy=case.dy,
        dense_grad=dense_grad,
        capacity=capacity,
        dense=dense,
    )
    case.forward().check(y)
    case.dx().check(dx)
    expected = case.dw()
    if dense_grad:
        x, dy = case.x.double(), case.dy.double()
        eps = torch.finfo(torch.float32).eps
        expected = expected._replace(exact=dy.T @ x, bound=dy.abs().T @ x.abs() * (shape[0] + 2) * eps)
    expected.check(dweight)
    torch.testing.assert_close(dbias, case.dy.sum(0))
    wanted = [] if "forward" in dense else ["_bcsr_linear"]
    wanted += [] if "dx" in dense else ["_bcsr_linear"]
    wanted += [] if "dw" in dense or dense_grad else ["_bcsr_linear_dw"]
    assert [name for name in launched if name != "_masked_weight"] == wanted
    masked = sum(op in dense for op in ("forward", "dx")) + ("dw" in dense and not dense_grad)
    assert launched.count("_masked_weight") == masked


def test_packed_gradients_by_either_lists(interpreted_package, problem):
    """The operators of a packed weight: dX by either lists, with a pool of blocks; dW into the pool."""
    case = problem((9, 48, 96))
    entries = case.col.shape[0]
    order = torch.randperm(2 * entries, generator=torch.Generator().manual_seed(0))[:entries].to(torch.int32)
    pool = torch.full((2 * entries, 16, 16), torch.nan)
    pool[order.long()] = case.values
    transposed = {"crow_t": case.crow_t, "row_t": case.row_t, "pos_t": case.pos_t}
    for (values, pos), lists in itertools.product([(case.values, None), (pool, order)], [{}, transposed]):
        given = {"dy": case.dy, "values": values, "crow": case.crow, "col": case.col, "pos": pos, "k": 96}
        case.dx().check(interpreted_package("sparse_pathways.ops.cuda.linear_dx", **given, **lists))
    given = {"dy": case.dy, "x": case.x, "crow": case.crow, "col": case.col, "r": 16, "c": 16}
    case.dw().check(interpreted_package("sparse_pathways.ops.cuda.linear_dw", **given, pos=None, blocks=-1))
    packed = interpreted_package("sparse_pathways.ops.cuda.linear_dw", **given, pos=None, blocks=entries)
    pooled = interpreted_package("sparse_pathways.ops.cuda.linear_dw", **given, pos=order, blocks=2 * entries)
    assert torch.equal(pooled[order.long()], packed)
    given = {"x": case.x, "values": pool, "crow": case.crow, "col": case.col, "pos": order, "bias": case.bias, "n": 48}
    y = interpreted_package("sparse_pathways.ops.cuda.linear", **given, activation=1)
    case.forward(torch.relu).check(y)


@pytest.mark.parametrize("m", [9, 300])
def test_mixed_batch_of_a_packed_weight(interpreted_package, problem, load_module, m):
    """The operators of mixed batches: few rows by the union, many by segments; gradients by the union."""
    mixed = load_module("test_pathways").Mixed(problem, (m, 48, 64), (16, 16), torch.float32)
    u, own = mixed.union, mixed.lists(problem, "segments")
    union = {"pathway": mixed.pathway, "crow": u.crow, "col": u.col, "bits": mixed.bits}
    lists = {"starts": own.start, "cols": own.index, "places": own.pos}
    module = "sparse_pathways.ops.pathways"
    y = interpreted_package(f"{module}.cuda_linear", x=u.x, values=u.values, **union, **lists, bias=u.bias, n=48)
    mixed.by_loop(lambda case: case.forward()).check(y)
    dx = interpreted_package(f"{module}.cuda_dx", dy=u.dy, values=u.values, **union, k=64)
    mixed.by_loop(lambda case: case.dx()).check(dx)
    dw = interpreted_package(f"{module}.cuda_dw", dy=u.dy, x=u.x, **union, r=16, c=16)
    mixed.dw().check(dw)
