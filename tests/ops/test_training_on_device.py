"""Training through `masked_linear` on a device: every path, every edge. `benchmarks/gpu/run.py` runs this file too."""

import copy

import pytest
import torch
import torch.nn.functional as F

import sparse_pathways as sp
from sparse_pathways.ops import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPE = (256, 192)  # N, K


@pytest.fixture(params=[None, "triton"], ids=["automatic", "triton"])
def path(request):
    """The dispatcher's choice, and the Triton kernels for every product."""
    with backends.forced(request.param):
        yield request.param


def problem(rng, dtype, block=(32, 32), m=100, share=0.4):
    mask = torch.rand(-(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1]), generator=rng) < share
    x, weight, bias = (
        torch.randn(*size, generator=rng).cuda().to(dtype).requires_grad_()
        for size in ((m, SHAPE[1]), SHAPE, SHAPE[:1])
    )
    return x, weight, bias, mask.cuda()


def check(y, tensors, mask, block, dense_grad, dtype, eps=None):
    """y and the gradients against float64; a few roundings of the dtype are allowed, each relative to sums of sizes."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in tensors)
    kept = sp.expand_mask(mask, block, SHAPE)
    masked = torch.where(kept, weight, 0)
    exact = F.linear(x, masked, bias)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, tensors, dy)
    dx, dw, db = torch.autograd.grad(exact, (x, weight, bias), dy.double())
    wide = dy.double()
    size = wide.abs().T @ x.abs()
    if dense_grad:
        dw = wide.T @ x
    sizes = F.linear(x.abs(), masked.abs(), bias.abs()), wide.abs() @ masked.abs(), size, wide.abs().sum(0)
    eps = 4 * torch.finfo(dtype).eps if eps is None else eps
    for one, other, size in zip((y, *got), (exact, dx, dw, db), sizes, strict=True):
        assert ((one.double() - other).abs() <= eps * size + 1e-12).all()


@pytest.mark.parametrize("dense_grad", [False, True], ids=["masked_grad", "dense_grad"])
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (32, 16)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capacity", [False, True], ids=["exact", "capacity"])
def test_step(rng, path, dtype, block, dense_grad, capacity):
    x, weight, bias, mask = problem(rng, dtype, block)
    layout = sp.BlockLayout.from_mask(mask, block, SHAPE, mask.numel() if capacity else None)
    y = sp.masked_linear(x, weight, layout, bias, dense_grad=dense_grad)
    check(y, (x, weight, bias), mask, block, dense_grad, dtype)


@pytest.mark.parametrize("block", [(8, 1), (16, 16)], ids="{0[0]}x{0[1]}".format)
def test_nan_in_a_pruned_weight_stays_there(rng, block):
    x, weight, bias, mask = problem(rng, torch.bfloat16, block)
    kept = sp.expand_mask(mask, block, SHAPE)
    weight = torch.where(kept, weight, torch.nan).detach().requires_grad_()
    y = sp.masked_linear(x, weight, sp.BlockLayout.from_mask(mask, block, SHAPE), bias)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dense_grad", [False, True])
def test_autocast(rng, path, dense_grad):
    x, weight, bias, mask = problem(rng, torch.float32)
    layout = sp.BlockLayout.from_mask(mask, (32, 32), SHAPE)
    with torch.autocast("cuda", torch.bfloat16):
        y = sp.masked_linear(x, weight, layout, bias, dense_grad=dense_grad)
    assert y.dtype == torch.bfloat16
    eps = 8 * torch.finfo(torch.bfloat16).eps
    check(y, (x, weight, bias), mask, (32, 32), dense_grad, torch.bfloat16, eps)


def test_a_graph_goes_on_with_other_masks(rng):
    """A captured step, its mask changed between replays, lists rebuilt within the capture."""
    x, weight, _, mask = problem(rng, torch.bfloat16)
    layout = sp.BlockLayout.from_mask(mask, (32, 32), SHAPE, mask.numel())
    static_mask, dy = mask.clone(), torch.randn(100, SHAPE[0], device="cuda", dtype=torch.bfloat16)

    def step():
        layout.update_(static_mask)
        y = sp.masked_linear(x, weight, layout)
        return y.detach(), *torch.autograd.grad(y, (x, weight), dy)

    with backends.forced("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for share in (0.9, 0.1, 0.0, 1.0):
            static_mask.copy_(torch.rand(mask.shape, generator=rng).cuda() < share)
            graph.replay()
            for got, expected in zip(results, step(), strict=True):
                assert torch.equal(got, expected)


def test_lists_are_made_without_waiting(rng):
    mask = torch.rand(32, 32, generator=rng).cuda() < 0.5
    sp.BlockLayout.from_mask(mask, (16, 16), (512, 512), capacity=1024)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = sp.BlockLayout.from_mask(mask, (16, 16), (512, 512), capacity=1024)
        layout.update_(~mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(layout.to_mask(), ~mask)


def test_a_layer_of_a_model(rng, path):
    """SparseLinear: moved, copied, compiled, saved, trained a step."""
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0])
    mask = torch.rand(8, 6, generator=rng) < 0.4
    layer = sp.SparseLinear.from_linear(linear, mask, (32, 32)).cuda()
    x = torch.randn(100, SHAPE[1], device="cuda")
    with torch.inference_mode():
        y = layer(x)
    for other in (copy.deepcopy(layer), torch.compile(layer, fullgraph=True)):
        torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)
    assert "model" in sp.explain(layer, 100) or path == "triton"
    layer(x).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert sp.SparseLinear.from_linear(linear, mask, (32, 32)).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_product_and_its_gradient(rng, dtype):
    x, weight, bias, mask = problem(rng, dtype)
    other = ~mask
    packed = sp.PackedWeight.pack(weight.detach(), {"a": mask, "b": other}, (32, 32)).to("cuda")
    for name, one in (("a", mask), ("b", other)):
        y = sp.sparse_linear(x, packed, bias, pathway=name)
        exact = F.linear(x.double(), dense(weight, one), bias.double())
        size = F.linear(x.double().abs(), dense(weight, one).abs(), bias.double().abs())
        assert ((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size).all()
        (dx,) = torch.autograd.grad(y.sum(), x)
        wanted = dense(weight, one).sum(0).expand_as(dx)
        assert ((dx.double() - wanted).abs() <= 4 * torch.finfo(dtype).eps * dense(weight, one).abs().sum(0)).all()


def dense(weight, mask):
    return torch.where(sp.expand_mask(mask, (32, 32), SHAPE), weight.detach().double(), 0)
