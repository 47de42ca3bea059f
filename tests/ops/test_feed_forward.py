"""Two packed products with an activation between; the kernel that fuses them: tests/kernels/test_ffn.py."""

import pytest
import torch
import torch.nn.functional as F

import sparse_pathways as sp
from sparse_pathways.ops import backends, feed_forward

ACTIVATIONS = {None: lambda v: v, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def problem(rng, dtype=torch.float32, block=(16, 16), device="cpu", pathways=("a", "b")):
    made = []
    for n, k in ((96, 40), (30, 96)):
        grid = (-(-n // block[0]), -(-k // block[1]))
        masks = {name: torch.rand(grid, generator=rng) < 0.5 for name in pathways}
        weight, bias = (torch.randn(*size, generator=rng).to(dtype) / 4 for size in ((n, k), (n,)))
        made += [sp.PackedWeight.pack(weight, masks, block).to(device), bias.to(device)]
    return torch.randn(3, 5, 40, generator=rng).to(dtype).to(device), *made


def exact(x, first, b1, second, b2, activation, pathway):
    w1, w2 = (one.unpack(pathway).double() for one in (first, second))
    return F.linear(ACTIVATIONS[activation](F.linear(x.double(), w1, b1.double())), w2, b2.double())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", [(16, 16), (8, 1)], ids=str)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_equals_two_products(rng, device, block, activation):
    x, first, b1, second, b2 = problem(rng, block=block, device=device)
    with torch.no_grad():
        y = sp.sparse_feed_forward(x, first, second, b1, b2, pathway="b", activation=activation)
    assert y.shape == (3, 5, 30) and y.dtype == x.dtype
    torch.testing.assert_close(y.double(), exact(x, first, b1, second, b2, activation, "b"), rtol=1e-4, atol=1e-4)


def test_gradients_and_mixed_batches_take_two_products(rng):
    x, first, b1, second, b2 = problem(rng)
    x.requires_grad_()
    sp.sparse_feed_forward(x, first, second, b1, b2, pathway="a", activation="silu").sum().backward()
    wide = x.detach().double().requires_grad_()
    exact(wide, first, b1, second, b2, "silu", "a").sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    rows = torch.arange(15) % 2
    y = sp.sparse_feed_forward(x.detach().view(15, 40), first, second, b1, b2, pathway=rows)
    for number, name in enumerate("ab"):
        one = exact(x.detach().view(15, 40), first, b1, second, b2, "relu", name)
        torch.testing.assert_close(y[rows == number].double(), one[rows == number], rtol=1e-4, atol=1e-4)


def test_the_operator(rng):
    x, first, b1, second, b2 = problem(rng)
    given = (
        x.view(15, 40),
        *(first.values, *first.index("a"), b1, 96),
        *(second.values, *second.index("a"), b2, 30, 3),
    )
    y = torch.ops.sparse_pathways.bcsr_ffn(*given)
    torch.testing.assert_close(
        y.double(), exact(x, first, b1, second, b2, "silu", "a").view(15, 30), rtol=1e-4, atol=1e-4
    )
    kinds = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_pathways.bcsr_ffn, given, test_utils=kinds)


def test_one_kernel_is_taken_where_it_serves(rng, monkeypatch):
    """Pretended device: who would take the kernel, and who two products."""
    pytest.importorskip("triton", reason="Triton is not installed")
    x, first, b1, second, b2 = problem(rng)
    tall = sp.PackedWeight.pack(torch.randn(96, 40), torch.ones(12, 40, dtype=torch.bool), (8, 1))
    for one in (first, second, tall):
        monkeypatch.setattr(one, "device", torch.device("cuda"))

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    x, b1, b2 = (one.as_subclass(OnCuda) for one in (x, b1, b2))
    fused = feed_forward._is_fused
    assert fused(x, first, second, b1, b2, "a")
    assert fused(x, first, second, None, None, None)
    assert not fused(x, first, second, b1, b2, torch.zeros(15, dtype=torch.int64))
    assert not fused(x.half(), first, second, b1, b2, "a")
    assert not fused(x.clone().requires_grad_(), first, second, b1, b2, "a")
    assert not fused(x, first, second, b1[1:], b2, "a")
    assert not fused(x, tall, second, b1, b2, None)
    assert backends.select("cuda", torch.float32, (16, 16)) == "triton"


def test_bad_arguments_are_named(rng):
    x, first, b1, second, b2 = problem(rng)
    with pytest.raises(ValueError, match="second takes 40 inputs, first has 96 outputs"):
        sp.sparse_feed_forward(x, first, first, pathway="a")
    with pytest.raises(TypeError, match="second is a Tensor; want a PackedWeight"):
        sp.sparse_feed_forward(x, first, second.values, pathway="a")
    with pytest.raises(ValueError, match="activation = 'swish'"):
        sp.sparse_feed_forward(x, first, second, pathway="a", activation="swish")
    with pytest.raises(ValueError, match=r"bias is .*\(30,\)"):
        sp.sparse_feed_forward(x, first, second, b2, b1, pathway="a")
