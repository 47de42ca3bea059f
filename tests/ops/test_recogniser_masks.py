"""Kernels on masks of a trained recogniser (make_recogniser_masks.py says how they were made).

Layers of four shapes, 70 and 90 % pruned; "lap": one mask for all languages; "dynamic": English and French, which share
a part.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.mask import unpack_bits
from sparse_pathways.ops.lstm import Weight, sparse_lstm
from sparse_pathways.ops.reference import quantise_rows

FILE = Path(__file__).with_name("recogniser_masks.npz")
SHAPES = {  # N, K
    "emb_to_query": (256, 256),
    "emb_to_key_value": (512, 256),
    "ffn": (256, 1024),
    "x2g": (1024, 256),
    "p2g": (1024, 256),
}
MODELS = ("lap70", "lap90", "dynamic70", "dynamic90")
EPS = torch.finfo(torch.float32).eps

by_model = pytest.mark.parametrize("model", MODELS)
by_layer = pytest.mark.parametrize("layer", SHAPES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)


@functools.cache
def masks_of(model, layer):
    """{pathway: block mask [NB, KB]}."""
    n, k = SHAPES[layer]
    with np.load(FILE) as stored:
        bits = torch.from_numpy(stored[f"{model} {layer}"])
    names = ("all",) if model.startswith("lap") else ("en", "fr")
    return {name: unpack_bits(one, n // 8 * k).view(n // 8, k) for name, one in zip(names, bits, strict=True)}


@functools.cache
def problem(model, layer, dtype=torch.float32):
    """Packed weight, and the dense one of each pathway as the packed values are."""
    weight = torch.randn(SHAPES[layer], generator=torch.Generator().manual_seed(1)) / SHAPES[layer][1] ** 0.5
    packed = sp.PackedWeight.pack(weight, masks_of(model, layer), (8, 1), dtype, quantise_x=False)
    return packed, {name: packed.unpack(name).double() for name in packed.pathways}


def rows_of(m, width, seed):
    return torch.randn(m, width, generator=torch.Generator().manual_seed(seed))


@by_model
def test_masks_are_those_that_training_leaves(model):
    """Uneven by far: a random mask of this density has no such rows and columns."""
    kept = {layer: masks_of(model, layer) for layer in SHAPES}
    every = [mask for masks in kept.values() for mask in masks.values()]
    density = sum(int(mask.sum()) for mask in every) / sum(mask.numel() for mask in every)
    assert 0.5 * (1 - int(model[-2:]) / 100) < density < 2 * (1 - int(model[-2:]) / 100)
    for mask in every:
        share = mask.double().mean()
        uneven = mask.sum(1).double().var() / (mask.shape[1] * share * (1 - share))
        assert uneven > 1.5  # 1 for blocks drawn one by one
    for masks in kept.values():
        if len(masks) == 2:
            shared = (masks["en"] & masks["fr"]).sum() / (masks["en"] | masks["fr"]).sum()
            assert 0.2 < shared < 1


@by_model
@by_layer
@by_dtype
def test_product(backend, model, layer, dtype):
    packed, dense = problem(model, layer, dtype)
    integers = sp.PackedWeight(packed.shape, packed.block, packed.values, packed.scale, masks_of(model, layer))
    for m, (name, weight) in ((m, item) for m in (1, 2, 4, 7, 16, 40) for item in dense.items()):
        x = rows_of(m, packed.shape[1], m).to(packed.x_dtype)
        for one in [packed] + [integers] * (dtype == torch.int8):
            given = x.double()
            if one is integers:
                whole, factor = quantise_rows(x)
                given = whole.double() * factor.double()
            want, size = given @ weight.T, given.abs() @ weight.abs().T
            # As many roundings as a row keeps weights, and the last of bfloat16 (twice: a core, and the rest beside).
            bound = size * ((weight != 0).sum(1) + 4) * EPS
            if dtype == torch.bfloat16:
                bound += want.abs() * 2**-8
            with torch.no_grad():
                for _ in range(2):  # the long way, then the prepared one
                    y = sp.sparse_linear(x, one, pathway=name)
                    assert ((y.double() - want).abs() <= bound).all()


@by_model
@by_layer
def test_gradients(backend, model, layer):
    _, dense = problem(model, layer)
    n, k = SHAPES[layer]
    for m, (name, exact) in ((m, item) for m in (1, 2, 3, 16, 25, 40, 300) for item in dense.items()):
        mask = masks_of(model, layer)[name]
        kept = sp.expand_mask(mask, (8, 1), (n, k))
        layout = sp.BlockLayout.from_mask(mask, (8, 1), (n, k))
        weight = torch.where(kept, exact.float(), float("nan")).requires_grad_()
        x, dy = rows_of(m, k, m).requires_grad_(), rows_of(m, n, m + 1)
        dx, dweight = torch.autograd.grad(sp.masked_linear(x, weight, layout), (x, weight), dy)
        given, dy = x.detach().double(), dy.double()
        size = dy.abs() @ exact.abs()
        assert ((dx - dy @ exact).abs() <= size * (kept.sum(0) + 2) * EPS).all()
        assert ((dweight - dy.T @ given).abs()[kept] <= (dy.abs().T @ given.abs() * (m + 2) * EPS)[kept]).all()
        assert not dweight[~kept].any()


@by_model
@by_dtype
def test_lstm(backend, model, dtype):
    """The predictor's two weights in one cell; the bound follows the gates through what comes after them."""
    if (backend, dtype) == ("reference", torch.bfloat16):
        pytest.skip("the reference rounds every operator to bfloat16, the kernels h and c alone")
    (w_ih, dense_ih), (w_hh, dense_hh) = (problem(model, layer, dtype) for layer in ("x2g", "p2g"))
    for m, name in ((m, name) for m in (1, 3, 8, 17) for name in dense_ih):
        x, h, c = (rows_of(m, 256, m + part).to(w_ih.x_dtype) for part in range(3))
        bias = rows_of(1, 1024, 9)[0].to(w_ih.x_dtype)
        with torch.no_grad():
            _, h1, c1 = sparse_lstm(x[None], h, c, Weight(w_ih, bias, name), Weight(w_hh, None, name))
        weight, given = torch.cat([dense_ih[name], dense_hh[name]], 1), torch.cat([x, h], 1).double()
        i, f, g, o = (given @ weight.T + bias.double()).chunk(4, 1)
        size = given.abs() @ weight.abs().T + bias.double().abs()
        di, df, dg, do = (size * ((weight != 0).sum(1) + 8) * EPS).chunk(4, 1)
        last = torch.finfo(c1.dtype).eps
        want_c = f.sigmoid() * c.double() + i.sigmoid() * g.tanh()
        bound_c = (df / 4 + 8 * EPS) * c.double().abs() + di / 4 + dg + 8 * EPS
        want_h = o.sigmoid() * want_c.tanh()
        assert ((c1.double() - want_c).abs() <= bound_c + last * want_c.abs()).all()
        assert ((h1.double() - want_h).abs() <= do / 4 + bound_c + 12 * EPS + 2 * last).all()
