import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import sparse_pathways as sp
from sparse_pathways.ops import backends, library
from sparse_pathways.ops.reference import quantise_rows

SHAPES = [(0, 16, 8), (1, 96, 64), (2, 37, 29), (5, 40, 31), (17, 96, 64), (40, 130, 70)]  # M, N, K
BLOCKS = [(8, 1), (16, 1), (4, 4), (16, 16), (3, 5)]


def make_problem(shape, block, rng, dtype=torch.float32, density=0.3):
    """(x, weight, mask, masked dense weight); one block row is empty, one full, pruned weights are NaN or Inf."""
    m, n, k = shape
    grid = (-(-n // block[0]), -(-k // block[1]))
    mask = torch.rand(grid, generator=rng) < density
    mask[0] = False
    mask[-1] = True
    weight, x = torch.randn(n, k, generator=rng, dtype=dtype), torch.randn(m, k, generator=rng, dtype=dtype)
    kept = sp.expand_mask(mask, block, (n, k))
    dense = torch.where(kept, weight, 0)
    bad = torch.where(torch.rand(n, k, generator=rng) < 0.5, float("nan"), float("inf")).to(dtype)
    return x, torch.where(kept, weight, bad), mask, dense


def assert_product(y, x, dense, bias=None):
    """|y - exact| within the error of a fp32 dot product of length K, rounded once to the dtype."""
    exact = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    eps = torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32).eps
    bound = size * ((x.shape[-1] + 1) * eps + torch.finfo(y.dtype).eps) + 1e-30
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-N{0[1]}-K{0[2]}".format)
@pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_sparse_linear_equals_masked_dense(backend, shape, block, with_bias, rng):
    x, weight, mask, dense = make_problem(shape, block, rng)
    bias = torch.randn(shape[1], generator=rng) if with_bias else None
    assert_product(sp.sparse_linear(x, sp.PackedWeight.pack(weight, mask, block), bias), x, dense, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype, rng):
    x, weight, mask, dense = make_problem((5, 40, 31), (8, 1), rng)
    x, dense = x.to(dtype), dense.to(dtype)
    y = sp.sparse_linear(x, sp.PackedWeight.pack(weight, mask, dtype=dtype))
    assert y.dtype == dtype
    assert_product(y, x, dense)


def test_int8_equals_its_unpacked_weight(rng):
    x, weight, mask, _ = make_problem((5, 40, 31), (8, 1), rng)
    packed = sp.PackedWeight.pack(weight, mask, dtype=torch.int8, quantise_x=False)
    torch.testing.assert_close(sp.sparse_linear(x, packed), x @ packed.unpack().T)
    packed = sp.PackedWeight.pack(weight, mask, dtype=torch.int8)
    whole, factor = quantise_rows(x)
    torch.testing.assert_close(sp.sparse_linear(x, packed), (whole * factor) @ packed.unpack().T)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0), (2, 2, 2)], ids=str)
def test_any_leading_shape(backend, leading, rng):
    _, weight, mask, dense = make_problem((1, 40, 31), (8, 1), rng)
    x = torch.randn(*leading, 31, generator=rng)
    y = sp.sparse_linear(x, sp.PackedWeight.pack(weight, mask))
    assert y.shape == (*leading, 40)
    assert_product(y.reshape(-1, 40), x.reshape(-1, 31), dense)


def test_strided_x(backend, rng):
    _, weight, mask, dense = make_problem((1, 40, 31), (8, 1), rng)
    packed = sp.PackedWeight.pack(weight, mask)
    for x in (
        torch.randn(31, 6, generator=rng).T,
        torch.randn(6, 62, generator=rng)[:, ::2],
        torch.randn(31, generator=rng).expand(6, 31),
        torch.randn(6, 40, generator=rng)[:, 4:35],
    ):
        assert not x.is_contiguous()
        assert_product(sp.sparse_linear(x, packed), x, dense)


def test_pathways_by_name_and_mixed_in_one_batch(backend, rng):
    weight, x, bias = (torch.randn(s, generator=rng) for s in ((40, 31), (7, 31), (40,)))
    masks = {name: torch.rand(5, 31, generator=rng) < 0.4 for name in ("en", "fr", "it")}
    packed = sp.PackedWeight.pack(weight, masks)
    dense = {name: torch.where(sp.expand_mask(mask, (8, 1), (40, 31)), weight, 0) for name, mask in masks.items()}
    for name in masks:
        assert_product(sp.sparse_linear(x, packed, bias, pathway=name), x, dense[name], bias)
    rows = torch.tensor([2, 0, 0, 2, 2, 0, 2])  # "fr" does not occur
    y = sp.sparse_linear(x, packed, bias, pathway=rows)
    for row, number in enumerate(rows.tolist()):
        assert_product(y[row : row + 1], x[row : row + 1], dense[packed.pathways[number]], bias)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "tanh"])
def test_activation_and_residual(activation, rng):
    x, weight, mask, dense = make_problem((5, 40, 31), (8, 1), rng)
    bias, residual = torch.randn(40, generator=rng), torch.randn(5, 40, generator=rng)
    functions = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
    y = sp.sparse_linear(x, sp.PackedWeight.pack(weight, mask), bias, activation=activation, residual=residual)
    torch.testing.assert_close(y, functions[activation](x @ dense.T + bias) + residual)


def test_empty_and_full_masks(backend, rng):
    x, weight, bias = (torch.randn(s, generator=rng) for s in ((3, 31), (40, 31), (40,)))
    nothing = sp.PackedWeight.pack(weight, torch.zeros(5, 31, dtype=torch.bool))
    assert torch.equal(sp.sparse_linear(x, nothing, bias), bias.expand(3, 40))
    everything = sp.PackedWeight.pack(weight, torch.ones(5, 31, dtype=torch.bool))
    assert_product(sp.sparse_linear(x, everything), x, weight)


def test_strided_bias(backend, rng):
    x, weight, mask, dense = make_problem((3, 40, 31), (8, 1), rng)
    bias = torch.randn(80, generator=rng)[::2]
    assert_product(sp.sparse_linear(x, sp.PackedWeight.pack(weight, mask), bias), x, dense, bias)
    layout = sp.BlockLayout.from_mask(mask, (8, 1), (40, 31))
    assert_product(sp.masked_linear(x, weight, layout, bias), x, dense, bias)


def test_autocast_gives_its_dtype_like_f_linear(rng):
    x, weight, mask, dense = make_problem((3, 40, 31), (8, 1), rng)
    packed, layout = sp.PackedWeight.pack(weight, mask), sp.BlockLayout.from_mask(mask, (8, 1), (40, 31))
    with torch.autocast("cpu", torch.bfloat16):
        for y in (sp.sparse_linear(x.bfloat16(), packed), sp.masked_linear(x.bfloat16(), weight, layout)):
            assert y.dtype == torch.bfloat16
            assert_product(y, x.bfloat16().float(), dense)


def test_a_second_derivative_is_refused(rng):
    _, weight, mask, _ = make_problem((3, 40, 31), (8, 1), rng)
    x = torch.randn(3, 31, generator=rng, requires_grad=True)
    layout = sp.BlockLayout.from_mask(mask, (8, 1), (40, 31))
    for y in (sp.sparse_linear(x, sp.PackedWeight.pack(weight, mask)), sp.masked_linear(x, weight, layout)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)


BAD = [
    (dict(x=[[0.0] * 31]), TypeError, "x is a list"),
    (dict(x=torch.zeros(2, 30)), ValueError, r"x has shape \(2, 30\)"),
    (dict(x=torch.tensor(1.0)), ValueError, "x has shape"),
    (dict(x=torch.zeros(2, 31, dtype=torch.float64)), TypeError, "x.dtype = torch.float64"),
    (dict(bias=torch.zeros(39)), ValueError, "bias is"),
    (dict(activation="swish"), ValueError, "activation = 'swish'"),
    (dict(pathway=None), ValueError, "pathway is needed: this weight has 2"),
    (dict(pathway="de"), KeyError, "pathway = 'de' is not known; choose one of en, fr"),
    (dict(pathway=torch.tensor([0, 2])), KeyError, "not known"),
    (dict(pathway=torch.tensor([0.0, 1.0])), ValueError, "want a LongTensor"),
    (dict(pathway=torch.tensor([0])), ValueError, r"want a LongTensor \[2\]"),
    (dict(residual=torch.zeros(2, 39)), ValueError, "residual is"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=[next(iter(c[0])) + str(i) for i, c in enumerate(BAD)]
)
def test_bad_arguments_are_named(change, error, message):
    mask = torch.ones(5, 31, dtype=torch.bool)
    arguments = dict(x=torch.zeros(2, 31), bias=None, pathway="en") | change
    packed = sp.PackedWeight.pack(torch.zeros(40, 31), {"en": mask, "fr": mask})
    with pytest.raises(error, match=message):
        sp.sparse_linear(arguments.pop("x"), packed, arguments.pop("bias"), **arguments)


# --- training product -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("block", [(8, 1), (4, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_masked_linear_and_its_gradients(backend, block, dense_grad, rows, rng):
    x, weight, mask, dense = make_problem((rows, 37, 29), block, rng)
    bias = torch.randn(37, generator=rng)
    x, weight, bias = (t.clone().requires_grad_() for t in (x, weight, bias))
    layout = sp.BlockLayout.from_mask(mask, block, (37, 29))
    y = sp.masked_linear(x, weight, layout, bias, dense_grad=dense_grad)
    assert_product(y.detach(), x.detach(), dense, bias.detach())
    dy = torch.randn(rows, 37, generator=rng)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    assert_product(dx, dy, dense.T)
    whole = dy.T @ x.detach()
    kept = sp.expand_mask(mask, block, (37, 29))
    torch.testing.assert_close(dweight, whole if dense_grad else torch.where(kept, whole, 0))
    torch.testing.assert_close(dbias, dy.sum(0))


def test_masked_linear_with_nothing_pruned_is_f_linear(rng):
    x, weight = torch.randn(3, 29, generator=rng), torch.randn(37, 29, generator=rng)
    layout = sp.BlockLayout.from_mask(torch.ones(5, 29, dtype=torch.bool), (8, 1), (37, 29))
    assert torch.equal(sp.masked_linear(x, weight, layout), F.linear(x, weight))


@pytest.mark.parametrize("with_pos", [False, True])
def test_gradcheck_in_float64(with_pos, rng):
    mask = torch.rand(3, 7, generator=rng) < 0.5
    layout = sp.BlockLayout.from_mask(mask, (4, 2), (11, 13))
    values = torch.randn(layout.num_blocks + 2 * with_pos, 2, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    pos = torch.randperm(layout.num_blocks + 2, generator=rng)[: layout.num_blocks].int() if with_pos else None
    x = torch.randn(3, 13, generator=rng, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=rng, dtype=torch.float64, requires_grad=True)
    op = torch.ops.sparse_pathways.bcsr_linear
    torch.autograd.gradcheck(lambda x, v, b: op(x, v, layout.crow, layout.col, pos, b, 11), (x, values, bias))
    weight = torch.randn(11, 13, generator=rng, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w, b: sp.masked_linear(x, w, layout, b), (x, weight, bias))


def test_opcheck(rng):
    mask = torch.rand(5, 29, generator=rng) < 0.5
    layout = sp.BlockLayout.from_mask(mask, (8, 1), (37, 29))
    x, weight, bias = (torch.randn(s, generator=rng, requires_grad=True) for s in ((6, 29), (37, 29), (37,)))
    values = torch.randn(layout.num_blocks, 1, 8, generator=rng, requires_grad=True)
    lists = (layout.crow_t, layout.row_t, layout.pos_t)
    ops = torch.ops.sparse_pathways
    opcheck(ops.bcsr_linear.default, (x, values, layout.crow, layout.col, None, bias, 37))
    opcheck(ops.bcsr_linear.default, (x, values, layout.crow, layout.col, layout.pos_t, None, 37))
    dy, plain = torch.randn(6, 37, generator=rng), (layout.crow, layout.col)
    opcheck(ops.bcsr_linear_dx.default, (dy, values.detach(), *plain, None, 29))
    opcheck(ops.bcsr_linear_dx.default, (dy, values.detach(), *plain, None, 29, *lists))
    opcheck(ops.bcsr_linear_dw.default, (dy, x.detach(), *plain, None, 8, 1, -1))
    opcheck(ops.bcsr_linear_dw.default, (dy, x.detach(), *plain, layout.pos_t, 8, 1, layout.num_blocks))
    opcheck(ops.bcsr_gather.default, (weight.detach(), layout.crow, layout.col, 8, 1))
    for dense_grad in (False, True):
        opcheck(ops.masked_linear.default, (x, weight, layout.crow, layout.col, *lists, bias, 8, 1, dense_grad))
        opcheck(ops.masked_weight.default, (weight, layout.bits, 8, 1, dense_grad))


# --- backends -------------------------------------------------------------------------------------------------------
def test_a_backend_that_cannot_serve_is_an_error_not_a_fallback(rng):
    x, weight, mask, _ = make_problem((2, 40, 31), (8, 1), rng)
    packed = sp.PackedWeight.pack(weight, mask)
    with backends.forced("triton"), pytest.raises(sp.BackendUnavailable, match="runs on CUDA devices"):
        sp.sparse_linear(x, packed)
    with pytest.raises(sp.BackendUnavailable, match="'sse2' is not known; choose one of reference"):
        backends.force("sse2")


def test_what_serves_other_dtypes_is_said_and_forced(rng):
    x, weight, mask, _ = make_problem((2, 40, 31), (8, 1), rng)
    double, half = (sp.PackedWeight.pack(weight, mask, dtype=dtype) for dtype in (torch.float64, torch.float16))
    if library.MISSING is None:
        assert "portable" in sp.explain(double, 1)
        with backends.forced("portable"), pytest.raises(sp.BackendUnavailable, match=r"no torch.float16 kernel"):
            sp.sparse_linear(x.half(), half)
    assert "reference (slow)" in sp.explain(half, 1)


def test_explain_names_the_backend_and_the_reason(backend, rng):
    _, weight, mask, _ = make_problem((2, 40, 31), (8, 1), rng)
    packed = sp.PackedWeight.pack(weight, mask)
    assert f"{backend}: forced" in sp.explain(packed, 1)
    with backends.forced(None):
        assert "reference (slow)" in sp.explain(sp.PackedWeight.pack(weight, mask, dtype=torch.float16), 1)
    with pytest.raises(ValueError, match="rows = -1"):
        sp.explain(packed, -1)
