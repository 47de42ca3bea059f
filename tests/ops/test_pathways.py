"""The operator of mixed batches on CUDA: lists, reference, gradients; its kernels under the interpreter."""

import pytest
import torch
import torch.nn.functional as F

import sparse_pathways as sp
from sparse_pathways.ops import pathways

OPS = torch.ops.sparse_pathways
BLOCK = (16, 16)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
by_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def problem(rng, count=4, m=9, shape=(40, 37), dtype=torch.float64, device="cpu"):
    """x, packed weight of several pathways (one empty, one the whole union), a pathway per row, bias."""
    grid = tuple(-(-side // 16) for side in shape)
    masks = torch.rand(count, *grid, generator=rng) < 0.5
    masks[0] = False
    masks[-1] = masks.any(0)
    x, weight, bias = (torch.randn(*size, generator=rng, dtype=dtype) for size in ((m, shape[1]), shape, shape[:1]))
    packed = sp.PackedWeight.pack(weight, {f"p{i}": one for i, one in enumerate(masks)}, BLOCK).to(device)
    return x.to(device), packed, torch.randint(0, count, (m,), generator=rng).to(device), bias.to(device)


def by_rows(x, packed, rows, bias):
    weights = [packed.unpack(name) for name in packed.pathways]
    return torch.stack([F.linear(one, weights[p], bias) for one, p in zip(x, rows.tolist(), strict=True)])


@by_device
@pytest.mark.parametrize("count", [1, 4, 32])
def test_equals_a_loop_over_rows(rng, device, count):
    x, packed, rows, bias = problem(rng, count, device=device)
    lists = pathways.lists_of(packed)
    assert pathways.lists_of(packed) is lists
    y = OPS.bcsr_pathway_linear(x, packed.values, rows, *lists, bias, 40)
    torch.testing.assert_close(y, by_rows(x, packed, rows, bias))
    torch.testing.assert_close(y, sp.sparse_linear(x, packed, bias, pathway=rows))
    assert packed.to(device).prepared == {}


def test_gradcheck_and_opcheck(rng):
    x, packed, rows, bias = problem(rng)
    lists, values = pathways.lists_of(packed), packed.values.requires_grad_()
    leaves = x.requires_grad_(), values, bias.requires_grad_()

    def product(x, values, bias):
        return OPS.bcsr_pathway_linear(x, values, rows, *lists, bias, 40)

    assert torch.autograd.gradcheck(product, leaves)
    torch.library.opcheck(OPS.bcsr_pathway_linear, (x, values, rows, *lists, bias, 40))
    torch.library.opcheck(OPS.bcsr_pathway_linear, (x, values, rows, *lists, None, 40))
    dy = torch.randn(9, 40, generator=rng, dtype=torch.float64)
    x, values = x.detach(), values.detach()
    torch.library.opcheck(OPS.bcsr_pathway_linear_dx, (dy, values, rows, *lists[:3], 37))
    torch.library.opcheck(OPS.bcsr_pathway_linear_dw, (dy, x, rows, *lists[:3], *BLOCK))
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), product(*leaves))


def test_lists_made_under_inference_mode_serve_a_later_training(rng):
    x, packed, rows, _ = problem(rng)
    with torch.inference_mode():
        pathways.lists_of(packed)
    values = packed.values.requires_grad_()
    y = OPS.bcsr_pathway_linear(x, values, rows, *pathways.lists_of(packed), None, 40)
    y.sum().backward()
    assert values.grad.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("m", [9, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mixed_batch_on_a_device(rng, dtype, m):
    x, packed, rows, bias = problem(rng, m=m, dtype=dtype, device="cuda")
    assert pathways.serves(packed)
    x.requires_grad_()
    y = sp.sparse_linear(x, packed, bias, pathway=rows)
    exact = by_rows(
        x.detach().double(),
        sp.PackedWeight.pack(packed.unpack().double(), {name: packed.mask(name) for name in packed.pathways}, BLOCK),
        rows,
        bias.double(),
    )
    size = x.detach().double().abs() @ packed.unpack().double().abs().T + bias.double().abs()
    assert ((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size).all()
    y.sum().backward()
    wanted = torch.stack([packed.unpack(packed.pathways[p]).double().sum(0) for p in rows.tolist()])
    size = packed.unpack().double().abs().sum(0)
    assert ((x.grad.double() - wanted).abs() <= 4 * torch.finfo(dtype).eps * size).all()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sp.sparse_linear(x, packed, bias, pathway=rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
