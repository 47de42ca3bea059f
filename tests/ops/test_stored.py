"""The training product of a weight stored dense: operator, gradients, compilation; and the choice of path on CUDA."""

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.ops import backends, cuda, roofline
from sparse_pathways.ops.masked import takes_dense

OPS = torch.ops.sparse_pathways
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
by_device = pytest.mark.parametrize("device", ["cpu", CUDA])

SHAPE, BLOCK = (40, 37), (16, 16)  # N, K


def problem(rng, device, dtype=torch.float64, m=6, shape=SHAPE, block=BLOCK, capacity=9):
    """x, weight (NaN where pruned, so not for gradcheck), bias and a layout of fixed capacity."""
    mask = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=rng) < 0.5
    mask[0, 0], mask[0, 1] = True, False
    layout = sp.BlockLayout.from_mask(mask.to(device), block, shape, capacity)
    tensors = [torch.randn(*size, generator=rng).to(device, dtype) for size in ((m, shape[1]), shape, (shape[0],))]
    return *(t.requires_grad_() for t in tensors), layout


def dense(layout, weight):
    return torch.where(sp.expand_mask(layout.to_mask(), layout.block, layout.shape), weight, 0)


@by_device
@pytest.mark.parametrize("dense_grad", [False, True], ids=["masked_grad", "dense_grad"])
def test_equals_the_masked_product(rng, device, dense_grad):
    x, weight, bias, layout = problem(rng, device)
    y = sp.masked_linear(x, weight, layout, bias, dense_grad=dense_grad)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight, bias), dy)
    exact = torch.nn.functional.linear(x, dense(layout, weight), bias)
    dx, dw, db = torch.autograd.grad(exact, (x, weight, bias), dy)
    expected = dx, dy.T @ x if dense_grad else dw, db
    torch.testing.assert_close(y, exact)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@by_device
def test_gradcheck(rng, device):
    x, weight, bias, layout = problem(rng, device)
    assert torch.autograd.gradcheck(lambda *a: sp.masked_linear(*a[:2], layout, a[2]), (x, weight, bias))


@by_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(rng, device, dtype):
    x, weight, bias, layout = problem(rng, device, dtype)
    lists = layout.bits, layout.crow, layout.col, layout.rows(), layout.crow_t, layout.row_t
    dy = torch.randn(6, 40, generator=rng).to(device, dtype)
    for dense_grad in (False, True):
        torch.library.opcheck(OPS.stored_linear, (x, weight, *lists, bias, *BLOCK, 0.5, dense_grad))
    torch.library.opcheck(OPS.stored_linear, (x, weight, *lists, None, *BLOCK, 0.5, False))
    weight, x = weight.detach(), x.detach()
    torch.library.opcheck(OPS.stored_linear_dx, (dy, weight, layout.bits, layout.crow_t, layout.row_t, *BLOCK, 0.5))
    torch.library.opcheck(OPS.stored_linear_dw, (dy, x, *lists[:4], *BLOCK, 0.5))


@by_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_mask_and_cast(rng, device, dtype):
    _, weight, _, layout = problem(rng, device, torch.float32)
    for dense_grad in (False, True):
        torch.library.opcheck(OPS.masked_cast, (weight, layout.bits, *BLOCK, dense_grad, dtype))
    out = OPS.masked_cast(weight, layout.bits, *BLOCK, False, dtype)
    assert torch.equal(out, dense(layout, weight).to(dtype))
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(grad, dense(layout, torch.ones_like(weight)))


@by_device
def test_compiles_whole_and_for_any_number_of_rows(rng, device):
    _, weight, bias, layout = problem(rng, device, torch.float32)

    def step(x, weight, bias):
        return torch.relu(sp.masked_linear(x, weight, layout, bias)).sum()

    compiled = torch.compile(
        step, fullgraph=True, dynamic=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    for m in (6, 11, 64):
        x = torch.randn(m, SHAPE[1], generator=rng).to(device)
        got = torch.autograd.grad(compiled(x, weight, bias), (weight, bias))
        torch.testing.assert_close(got, torch.autograd.grad(step(x, weight, bias), (weight, bias)))


@by_device
def test_lists_changed_between_forward_and_backward_are_refused(rng, device):
    x, weight, bias, layout = problem(rng, device)
    y = sp.masked_linear(x, weight, layout, bias)
    layout.update_(~layout.to_mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    sp.masked_linear(x, weight, layout, bias).sum().backward()


@by_device
def test_no_second_derivative(rng, device):
    x, weight, bias, layout = problem(rng, device)
    y = sp.masked_linear(x, weight, layout, bias)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@by_device
def test_backward_again(rng, device):
    x, weight, bias, layout = problem(rng, device)
    y = sp.masked_linear(x, weight, layout, bias, dense_grad=False)
    first, again = (torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


@by_device
def test_a_gradient_with_strides(rng, device):
    x, weight, bias, layout = problem(rng, device)
    y = sp.masked_linear(x, weight, layout, bias, dense_grad=False)
    dy = torch.randn(40, 6, generator=rng).to(device, torch.float64)
    got = torch.autograd.grad(y, (x, weight), dy.T, retain_graph=True)
    assert all(map(torch.equal, got, torch.autograd.grad(y, (x, weight), dy.T.contiguous())))


@by_device
@pytest.mark.parametrize("kept", [False, True])
def test_nothing_and_everything_kept(rng, device, kept):
    x, weight, bias, _ = problem(rng, device)
    mask = torch.full((3, 3), kept, device=device)
    layout = sp.BlockLayout.from_mask(mask, BLOCK, SHAPE, capacity=9)
    y = sp.masked_linear(x, weight, layout, bias, dense_grad=False)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight * kept, bias))
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    torch.testing.assert_close(dx, (weight * kept).sum(0).expand_as(dx))
    torch.testing.assert_close(dw, x.sum(0).expand_as(dw) * kept)


@by_device
def test_shapes_of_x(rng, device):
    x, weight, bias, layout = problem(rng, device, m=0)
    y = sp.masked_linear(x, weight, layout, bias)
    assert y.shape == (0, 40)
    y.sum().backward()
    assert not weight.grad.any()
    x, weight, bias, layout = problem(rng, device, m=12)
    expected = sp.masked_linear(x, weight, layout, bias)
    assert torch.equal(sp.masked_linear(x.view(3, 4, 37), weight, layout, bias), expected.view(3, 4, 40))
    slanted = x.detach().T.contiguous().T
    torch.testing.assert_close(sp.masked_linear(slanted, weight, layout, bias), expected)


def test_pruned_weights_are_never_read(rng):
    x, weight, bias, layout = problem(rng, "cpu")
    exact = sp.masked_linear(x, weight, layout, bias)
    poisoned = torch.where(sp.expand_mask(layout.to_mask(), BLOCK, SHAPE), weight, torch.nan).detach()
    assert torch.equal(sp.masked_linear(x, poisoned, layout, bias), exact)


# --- the dispatcher's decisions, which need no device -----------------------------------------------------------
def layout_of(shape, block, density, rng):
    return sp.BlockLayout.from_mask(
        sp.topk_mask(torch.rand(shape[0] // block[0], shape[1] // block[1], generator=rng), 1 - density), block, shape
    )


def test_8x1_trains_dense_on_cuda(rng):
    layout = layout_of((512, 512), (8, 1), 0.1, rng)
    assert takes_dense("cuda", torch.bfloat16, layout, 16384)
    text = cuda.explain_training(16384, 512, 512, (8, 1), 0.1, torch.bfloat16)
    assert text.startswith("dense") and "powers of two from 16 up" in text


@pytest.mark.parametrize("op", roofline.OPS)
def test_the_crossover_is_one_density(op):
    """Sparse below some density, dense above: the model has no second crossing at any shape of the note."""
    for (n, k), m in [((512, 512), 16384), ((2048, 512), 4096), ((4096, 4096), 8192), ((512, 2048), 65536)]:
        for block in ((16, 16), (32, 32), (64, 64), (128, 128)):
            choices = [cuda.takes_dense(op, m, n, k, block, density / 100, torch.bfloat16) for density in range(1, 101)]
            assert choices == sorted(choices), "dense must stay chosen as density grows"
            assert choices[-1], "at density 1 nothing is saved"


def test_large_blocks_few_of_them_take_the_kernel(rng):
    assert not cuda.takes_dense("forward", 16384, 4096, 4096, (64, 64), 0.1, torch.bfloat16)
    assert cuda.takes_dense("forward", 16384, 4096, 4096, (16, 16), 0.3, torch.bfloat16)
    text = cuda.explain_training(16384, 4096, 4096, (64, 64), 0.1, torch.bfloat16)
    assert "forward triton" in text and "model of an H100, not measured" in text
    assert not takes_dense("cuda", torch.bfloat16, layout_of((4096, 4096), (64, 64), 0.1, rng), 16384)


def test_a_forced_backend_is_obeyed():
    shape = "forward", 16384, 4096, 4096, (16, 16), 0.9, torch.bfloat16
    with backends.forced("triton"):
        assert not cuda.takes_dense(*shape)
        assert "forced" in cuda.explain_training(*shape[1:])
        with pytest.raises(sp.BackendUnavailable, match=r"block = \(8, 1\)"):
            cuda.takes_dense("forward", 16384, 4096, 4096, (8, 1), 0.9, torch.bfloat16)
    with backends.forced("reference"):
        assert cuda.takes_dense("forward", 16384, 4096, 4096, (64, 64), 0.01, torch.bfloat16)


def test_the_model_of_the_roofline():
    """Numbers worked by hand from the rates."""
    dense_us, bound = roofline.dense(65536, 4096, 4096)
    assert bound == "compute"
    assert dense_us == pytest.approx(2 * 65536 * 4096 * 4096 / 800e12 * (4096 + 170) / 4096 * 1e6 + 2)
    few = roofline.dense(1, 512, 512)
    assert few.bound == "launch" and few.us < 4
    # 16x16 blocks: each kept weight has a sixteenth of an element of x loaded per row, from L2.
    sparse = roofline.triton("forward", 65536, 4096, 4096, (16, 16), 0.1)
    assert sparse.bound == "L2"
    kept = 0.1 * 4096 * 4096
    assert sparse.us == pytest.approx((65536 * kept / 16 + 512 * kept) * 2 / 5.5e12 * 1e6 + 2)
    # Emformer's FFN1 with large blocks: reading x and writing y is the floor.
    assert roofline.triton("forward", 65536, 2048, 512, (128, 128), 0.1).bound == "HBM"


@pytest.mark.parametrize("op", roofline.OPS)
def test_the_model_knows_empty_products(op):
    for m, n, k in ((0, 512, 512), (16, 0, 512), (16, 512, 0)):
        assert roofline.prefers_dense(op, m, n, k, (32, 32), 0.5, torch.bfloat16) in (True, False)
