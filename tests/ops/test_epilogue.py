"""scale, bias, activation and residual inside the kernels, against float64."""

import pytest
import torch
import torch.nn.functional as F

import sparse_pathways as sp

EXACT = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def problem(rows, block, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(37, 29, generator=rng)
    mask = torch.rand(-(-37 // block[0]), -(-29 // block[1]), generator=rng) < 0.6
    x, bias = torch.randn(rows, 29, generator=rng), torch.randn(37, generator=rng)
    return sp.PackedWeight.pack(weight, mask, block), x, bias, torch.randn(rows, 37, generator=rng)


@pytest.mark.parametrize("block", [(8, 1), (16, 1), (8, 4), (4, 4), (16, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 11, 16, 37])
@pytest.mark.parametrize("activation", EXACT)
def test_activation_and_residual(backend, block, rows, activation):
    packed, x, bias, residual = problem(rows, block)
    with torch.inference_mode():
        y = sp.sparse_linear(x, packed, bias, activation=activation, residual=residual)
    before = F.linear(x.double(), packed.unpack().double(), bias.double())
    want = EXACT[activation](before) + residual.double()
    # Every activation has a slope of at most 1.2; 30 roundings before it, 8 in and after it (erf: 1.5e-7 of its own).
    size = (x.double().abs() @ packed.unpack().double().abs().T + bias.abs() + residual.abs() + 1).double()
    assert ((y - want).abs() <= size * 40 * torch.finfo(torch.float32).eps).all()


def reach(activation):
    """Outputs of one product whose sums are exactly these values, from -inf to inf."""
    tiny = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-8, 1e-4, 0.6249, 0.6251, 87.0, -87.4, 88.8, -104.0, 3e38, -3e38])
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    values = torch.cat([tiny, special, torch.linspace(-30, 30, 2047)])
    values = F.pad(values, (0, -len(values) % 8))
    packed = sp.PackedWeight.pack(values[:, None], torch.ones(len(values) // 8, 1, dtype=torch.bool))
    with torch.inference_mode():
        return values.double(), sp.sparse_linear(torch.ones(1, 1), packed, activation=activation)[0].double()


@pytest.mark.parametrize("activation", EXACT)
def test_activation_over_its_whole_range(backend, activation):
    values, y = reach(activation)
    want = EXACT[activation](values)
    plain = want.isfinite() & ((activation != "gelu") | (values.abs() < 1e37))  # torch's own gelu overflows above
    eps = torch.finfo(torch.float32).eps
    bound = 4 * eps * want.abs() + (4 * eps * values.abs().clamp(max=40) if activation == "gelu" else 4e-38)
    assert ((y - want).abs()[plain] <= bound[plain]).all()
    assert torch.equal(y.isnan()[plain | values.isnan()], want.isnan()[plain | values.isnan()])
