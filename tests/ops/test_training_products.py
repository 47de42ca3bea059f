"""The products of the gradients, under each instruction set, against a dense float64 oracle."""

import itertools

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.ops import backends
from sparse_pathways.ops.library import MISSING
from sparse_pathways.ops.masked import takes_dense

if MISSING is not None:
    pytest.skip(f"no compiled CPU kernels: {MISSING}", allow_module_level=True)

OPS = torch.ops.sparse_pathways
ROWS = (0, 1, 2, 3, 7, 8, 9, 16, 24, 25, 33, 100, 256, 257)  # a weight gradient changes its way after 24 or 256
BLOCKS = ((8, 1), (16, 1), (8, 4), (4, 4), (16, 16), (3, 5), (1, 1))
SHAPES = ((40, 32), (37, 53))  # N, K: whole blocks of 8x1; ragged in both directions for every block but 1x1

by_rows = pytest.mark.parametrize("m", ROWS, ids="M{}".format)
by_block = pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-K{0[1]}".format)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@pytest.fixture(params=range(OPS.max_isa() + 1), ids=backends.ISAS.__getitem__)
def isa(request):
    before = OPS.set_isa(request.param)
    yield request.param
    OPS.set_isa(before)


def random_layout(shape, block, rng) -> sp.BlockLayout:
    """One empty block row, one full one, one empty block column."""
    mask = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=rng) < 0.4
    mask[-1], mask[0] = True, False
    if mask.shape[1] > 1:
        mask[:, 1] = False
    return sp.BlockLayout.from_mask(mask, block, shape)


def assert_sums(got, exact, size, terms):
    """|got - exact| within the bound of a sum of `terms` rounded products in any order: (terms + 1) u sum |a b|."""
    unit = torch.finfo(got.dtype).eps / 2
    slack = 2 if got.dtype == torch.float64 else 1  # the oracle rounds as often
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= slack * (terms + 1) * unit * size).all()


@by_dtype
@by_shape
@by_block
@by_rows
def test_weight_gradient_on_kept_blocks(isa, m, block, shape, dtype, rng):
    check_weight_gradient(m, block, shape, dtype, rng)


@by_dtype
@by_block
def test_weight_gradient_in_chunks_of_rows_and_panels_of_columns(isa, block, dtype, rng):
    check_weight_gradient(1100, block, (24, 530), dtype, rng)


def check_weight_gradient(m, block, shape, dtype, rng):
    layout = random_layout(shape, block, rng)
    kept = sp.expand_mask(layout.to_mask(), block, shape)
    dy, x = (torch.randn(m, size, generator=rng, dtype=dtype) for size in shape)
    exact, size = dy.double().T @ x.double() * kept, dy.double().abs().T @ x.double().abs() * kept
    lists = [(layout.crow, layout.col.to(ids)) for ids in (torch.uint16, torch.int32)]
    pos = torch.randperm(2 * layout.num_blocks, generator=rng)[: layout.num_blocks].int()
    for crow, col in lists:
        assert_sums(OPS.bcsr_linear_dw(dy, x, crow, col, None, *block, -1), exact, size, m)
        in_blocks = [OPS.bcsr_gather(t, crow, col, *block) for t in (exact, size)]  # zero where a block sticks out
        dvalues = OPS.bcsr_linear_dw(dy, x, crow, col, None, *block, layout.num_blocks)
        assert_sums(dvalues, *in_blocks, m)
        pool = OPS.bcsr_linear_dw(dy, x, crow, col, pos, *block, 2 * layout.num_blocks)
        assert torch.equal(pool[pos.long()], dvalues)
        pool[pos.long()] = 0
        assert not pool.any()


@by_dtype
@by_shape
@by_block
@by_rows
def test_input_gradient_by_either_lists(isa, m, block, shape, dtype, rng):
    layout = random_layout(shape, block, rng)
    kept = sp.expand_mask(layout.to_mask(), block, shape)
    weight = torch.where(kept, torch.randn(shape, generator=rng, dtype=dtype), float("nan"))
    dense = torch.where(kept, weight, 0).double()
    values = OPS.bcsr_gather(weight, layout.crow, layout.col, *block)
    dy = torch.randn(m, shape[0], generator=rng, dtype=dtype)
    exact, size = dy.double() @ dense, dy.double().abs() @ dense.abs()
    for transposed in ((), (layout.crow_t, layout.row_t, layout.pos_t)):
        dx = OPS.bcsr_linear_dx(dy, values, layout.crow, layout.col, None, shape[1], *transposed)
        assert_sums(dx, exact, size, kept.sum(0))


@pytest.mark.parametrize("block", [(8, 1), (4, 4)], ids=str)
def test_threads_do_not_change_a_bit(isa, block, rng):
    shape = (512, 384)
    layout = random_layout(shape, block, rng)
    values = torch.randn(layout.num_blocks, block[1], block[0], generator=rng)
    lists, transposed = (layout.crow, layout.col, None), (layout.crow_t, layout.row_t, layout.pos_t)
    before = torch.get_num_threads()
    for m in (3, 40, 700):
        dy, x = (torch.randn(m, size, generator=rng) for size in shape)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dx = OPS.bcsr_linear_dx(dy, values, *lists, shape[1], *transposed)
            results.append((dx, OPS.bcsr_linear_dw(dy, x, *lists, *block, -1)))
        torch.set_num_threads(before)
        for one in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(one, results[0], strict=True))


def test_a_nan_in_a_row_reaches_only_what_it_multiplies(isa, rng):
    layout = random_layout((40, 32), (8, 1), rng)
    mask = layout.to_mask()
    dy, x = torch.randn(20, 40, generator=rng), torch.randn(20, 32, generator=rng)
    x[3, 5] = float("nan")
    mask[1, 5] = True
    layout = sp.BlockLayout.from_mask(mask, (8, 1), (40, 32))
    dw = OPS.bcsr_linear_dw(dy, x, layout.crow, layout.col, None, 8, 1, -1)
    bad = sp.expand_mask(mask, (8, 1), (40, 32))
    bad[:, torch.arange(32) != 5] = False
    assert torch.equal(dw.isnan(), bad)


@pytest.mark.parametrize("m", [1, 6, 40], ids="M{}".format)
def test_packed_values_have_a_gradient(backend, m, rng):
    """Two pathways over one pool of values: blocks that the active one leaves out have the gradient zero."""
    weight, x = torch.randn(37, 29, generator=rng), torch.randn(m, 29, generator=rng, requires_grad=True)
    masks = {name: torch.rand(5, 29, generator=rng) < 0.4 for name in ("en", "fr")}
    packed = sp.PackedWeight.pack(weight, masks)
    packed.values.requires_grad_()
    dy = torch.randn(m, 37, generator=rng)
    dx, dvalues = torch.autograd.grad(sp.sparse_linear(x, packed, pathway="fr"), (x, packed.values), dy)
    kept = sp.expand_mask(masks["fr"], (8, 1), (37, 29))
    torch.testing.assert_close(dx, dy @ torch.where(kept, weight, 0))
    union = sp.BlockLayout.from_mask(masks["en"] | masks["fr"], (8, 1), (37, 29))
    whole = torch.where(kept, dy.T @ x.detach(), 0)
    torch.testing.assert_close(dvalues, OPS.bcsr_gather(whole, union.crow, union.col, 8, 1))


def test_the_gradient_is_that_of_the_weight_the_forward_saw(rng):
    layout = random_layout((37, 29), (8, 1), rng)
    weight = torch.randn(37, 29, generator=rng)
    dense = torch.where(sp.expand_mask(layout.to_mask(), (8, 1), (37, 29)), weight, 0)
    x = torch.randn(6, 29, generator=rng, requires_grad=True)
    y = sp.masked_linear(x, weight, layout)
    weight.zero_()
    dy = torch.randn(6, 37, generator=rng)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dense_grad", [False, True])
def test_half_precision_trains(dtype, dense_grad, rng):
    layout = random_layout((37, 29), (8, 1), rng)
    kept = sp.expand_mask(layout.to_mask(), (8, 1), (37, 29))
    weight, x = (torch.randn(s, generator=rng).to(dtype).requires_grad_() for s in ((37, 29), (6, 29)))
    y = sp.masked_linear(x, weight, layout, dense_grad=dense_grad)
    dy = torch.randn(6, 37, generator=rng).to(dtype)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert dx.dtype == dweight.dtype == dtype
    plain = [t.detach().float() for t in (x, weight)]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dx.float(), dy.float() @ torch.where(kept, plain[1], 0), rtol=eps, atol=16 * eps)
    whole = dy.float().T @ plain[0]
    expected = whole if dense_grad else torch.where(kept, whole, 0)
    torch.testing.assert_close(dweight.float(), expected, rtol=eps, atol=16 * eps)


# --- where a dense product is faster ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("block", [(4, 4), (3, 5), (1, 1)], ids=str)
def test_the_dense_way_gives_the_same(block, dense_grad, rng):
    shape = (37, 29)
    mask = torch.rand(-(-37 // block[0]), -(-29 // block[1]), generator=rng) < 0.8
    mask[0, 0] = False
    layout = sp.BlockLayout.from_mask(mask, block, shape)
    kept = sp.expand_mask(mask, block, shape)
    weight = torch.where(kept, torch.randn(shape, generator=rng), float("nan"))
    operands = [weight, *(torch.randn(size, generator=rng) for size in ((100, 29), (37,)))]
    dy = torch.randn(100, 37, generator=rng)
    assert takes_dense("cpu", torch.float32, layout, 100)
    results = []
    for name in (None, "portable"):
        with backends.forced(name):
            assert takes_dense("cpu", torch.float32, layout, 100) == (name is None)
            weight, x, bias = (t.clone().requires_grad_() for t in operands)
            y = sp.masked_linear(x, weight, layout, bias, dense_grad=dense_grad)
            results.append((y, *torch.autograd.grad(y, (x, weight, bias), dy)))
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-4)
    assert results[0][2].isfinite().all()
    assert dense_grad or not results[0][2][~kept].any()


@pytest.mark.parametrize("dense_grad", [False, True])
def test_a_compiled_layer_keeps_the_kernels(dense_grad, rng):
    linear = torch.nn.Linear(32, 32)
    mask = sp.topk_mask(sp.block_scores(linear.weight, (4, 4)), 0.2)
    layer = sp.SparseLinear.from_linear(linear, mask, (4, 4))
    layer.dense_grad = dense_grad
    x = torch.randn(70, 32, generator=rng, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x).square().sum(), (x, layer.weight)) for f in (compiled, layer)]
    for traced, eager in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)


def test_explain_says_where_training_is_dense(rng):
    for block, sparsity in itertools.product([(8, 1), (4, 4)], [0.2, 0.7]):
        linear = torch.nn.Linear(64, 64)
        layer = sp.SparseLinear.from_linear(
            linear, sp.topk_mask(sp.block_scores(linear.weight, block), sparsity), block
        )
        dense = block == (4, 4) and sparsity == 0.2
        assert ("F.linear with the pruned weights zeroed" in sp.explain(layer, 512)) == dense


WRONG = {  # of bcsr_linear_dw and bcsr_linear_dx: what is wrong -> (operator, change, message)
    "dw-rows": ("dw", dict(x=torch.zeros(4, 32)), "dy has 3 rows, x has 4"),
    "dw-dtype": ("dw", dict(x=torch.zeros(3, 32, dtype=torch.float64)), "differ in dtype"),
    "dw-half": ("dw", dict(dy=torch.zeros(3, 40).half(), x=torch.zeros(3, 32).half()), "take float32 and float64"),
    "dw-crow": ("dw", dict(crow=torch.zeros(3, dtype=torch.int32)), "does not fit n = 40"),
    "dx-half": ("dx", dict(dy=torch.zeros(3, 40).half()), "take float32 and float64"),
    "dx-crow": ("dx", dict(crow=torch.zeros(3, dtype=torch.int32)), "does not fit n = 40"),
    "dx-crow_t": ("dx", dict(dy=torch.zeros(2, 40), crow_t=torch.zeros(3, dtype=torch.int32)), "does not fit k = 32"),
}


@pytest.mark.parametrize(("which", "change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(which, change, message, rng):
    layout = random_layout((40, 32), (8, 1), rng)
    given = dict(dy=torch.zeros(3, 40), x=torch.zeros(3, 32), crow=layout.crow, crow_t=layout.crow_t) | change
    with pytest.raises(RuntimeError, match=message):
        if which == "dw":
            OPS.bcsr_linear_dw(given["dy"], given["x"], given["crow"], layout.col, None, 8, 1, -1)
        else:
            values = torch.zeros(layout.num_blocks, 1, 8)
            transposed = (given["crow_t"], layout.row_t, layout.pos_t)
            OPS.bcsr_linear_dx(given["dy"], values, given["crow"], layout.col, None, 32, *transposed)
