"""Kernels on masks that training made: uneven block rows, dead inputs, two pathways that share a part."""

import functools

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.ops.backends import forced
from sparse_pathways.ops.reference import quantise_rows

BLOCKS = [(8, 1), (16, 1), (8, 4), (4, 4), (16, 16)]
STEPS = 40


@functools.cache
def trained(block):
    """A layer pruned to 70 % in training; its inputs fall in size, so masks are far from uniform."""
    torch.manual_seed(0)
    with forced("reference"):  # the same layer for every kernel
        layer = sp.SparseLinear(96, 72, block=block, pathways=("en", "fr"))
        plan = sp.methods.dynamic_asr_pathways(("en", "fr"), sparsity=0.7, steps=STEPS, interval=5)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        pruner = sp.Pruner(layer, plan, optimizer)
        size = torch.linspace(1, 0, 96) ** 2
        target = {name: torch.randn(96, 72) for name in layer.pathways}
        for step in range(STEPS):
            name = layer.pathways[step % 2]
            x = torch.randn(64, 96) * size
            with sp.pathway(layer, name):
                (layer(x) - x @ target[name]).square().mean().backward()
            optimizer.step()
            pruner.step(name)
            optimizer.zero_grad()
    return layer


def test_the_masks_are_uneven():
    english, french = (trained((8, 1)).mask(name) for name in ("en", "fr"))
    rows, columns = english.sum(1), english.sum(0)
    assert rows.max() > rows.min() and columns.max() >= 2 * max(int(columns.min()), 1)
    assert not torch.equal(english, french)


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_product(backend, dtype, block, rows):
    layer = trained(block)
    packed = layer.pack(dtype)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(packed.x_dtype)
    given = x.double()
    if dtype == torch.int8:
        whole, factor = quantise_rows(x)
        given = whole.double() * factor.double()
    for name in layer.pathways:
        weight = packed.unpack(name).double()
        want = given @ weight.T
        size = given.abs() @ weight.abs().T
        # 96 roundings of float32, and the last of bfloat16 (once more where two partial results are added).
        bound = size * 100 * torch.finfo(torch.float32).eps
        if dtype == torch.bfloat16:
            bound += want.abs() * 2**-8
        with torch.no_grad():
            for _ in range(2):  # the long way, then the prepared one
                y = sp.sparse_linear(x, packed, pathway=name)
                assert ((y.double() - want).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("rows", [1, 4, 33, 300])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_gradients(backend, block, rows):
    layer = trained(block)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows), requires_grad=True)
    dy = torch.randn(rows, 72, generator=torch.Generator().manual_seed(rows + 1))
    layout, weight = layer.layout("fr"), layer.weight.detach().clone().requires_grad_()
    sp.masked_linear(x, weight, layout).backward(dy)
    kept = sp.expand_mask(layer.mask("fr"), block, (72, 96))
    exact_dx = dy.double() @ torch.where(kept, weight, 0).double()
    exact_dw = torch.where(kept, dy.double().T @ x.double(), 0)
    eps = torch.finfo(torch.float32).eps
    size_dx = dy.double().abs() @ torch.where(kept, weight, 0).double().abs()
    size_dw = dy.double().abs().T @ x.detach().double().abs()
    assert ((x.grad - exact_dx).abs() <= size_dx * 80 * eps).all()
    assert ((weight.grad - exact_dw).abs() <= size_dw * (rows + 4) * eps).all()
    assert (weight.grad[~kept] == 0).all()
