"""The CUDA C++ kernels on a device: what tests/cuda has proven on the host. `benchmarks/gpu/run.py` runs this file."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_pathways as sp
from sparse_pathways.checks import BackendUnavailable
from sparse_pathways.layout.bcsr import NAMES
from sparse_pathways.ops import backends, library, strips

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(library.CUDA_MISSING is not None, reason=f"no CUDA library: {library.CUDA_MISSING}"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ACTIVATIONS = {None: lambda v: v, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def problem(rng, n, k, m, dtype, block=(8, 1), share=0.3):
    """x, packed weight, its dense form in float64, bias; everything on the device."""
    mask = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=rng) < share
    weight, x, bias = (torch.randn(*size, generator=rng).to(dtype) for size in ((n, k), (m, k), (n,)))
    packed = sp.PackedWeight.pack(weight, mask, block)
    return x.cuda(), packed.to("cuda"), packed.unpack().double().cuda(), bias.cuda()


def check(y, x, dense, bias, dtype, activation=None, residual=None):
    """Every element within a few roundings of its sum of products."""
    exact = ACTIVATIONS[activation](F.linear(x.double(), dense, bias.double()))
    size = F.linear(x.double().abs(), dense.abs(), bias.double().abs())
    if residual is not None:
        exact, size = exact + residual.double(), size + residual.double().abs()
    eps = max(torch.finfo(dtype).eps, 2**-20)
    assert y.dtype == dtype and ((y.double() - exact).abs() <= 4 * eps * size + 1e-6).all()


@pytest.mark.parametrize("m", [0, 1, 8, 17, 300, 5000])
@pytest.mark.parametrize("r", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_products(rng, dtype, r, m):
    for n, k in ((136, 72), (256, 1100)):
        x, packed, dense, bias = problem(rng, n, k, m, dtype, (r, 1))
        assert backends.select("cuda", dtype, (r, 1)) == "cuda"
        check(sp.sparse_linear(x, packed, bias), x, dense, bias, dtype)


@pytest.mark.parametrize("tile_m", [16, 64, 128])
@pytest.mark.parametrize("p", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_every_tile_and_height(rng, dtype, p, tile_m):
    if dtype == torch.float32 and tile_m == 128:
        pytest.skip("floats have no tile of 128 rows")
    x, packed, dense, bias = problem(rng, 200, 600, 150, dtype)
    values, ids, begin, _ = strips._pack(packed, packed.index(), p)
    y = torch.ops.sparse_pathways.strips_linear(x, values, ids, begin, bias, None, 200, p, 0, tile_m)
    check(y, x, dense, bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_few_rows_of_long_inputs(rng, dtype):
    for k in (2560, 4608, 9001):
        x, packed, dense, bias = problem(rng, 64, k, 3, dtype)
        check(sp.sparse_linear(x, packed, bias), x, dense, bias, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_what_follows_the_product(rng, dtype, activation):
    x, packed, dense, bias = problem(rng, 120, 96, 70, dtype)
    residual = torch.randn(70, 120, generator=rng).to(dtype).cuda()
    y = sp.sparse_linear(x, packed, bias, activation=activation, residual=residual)
    check(y, x, dense, bias, dtype, activation, residual)


@pytest.mark.parametrize("share", [0.0, 1.0])
@torch.no_grad()
def test_no_block_and_all_blocks(rng, share):
    x, packed, dense, bias = problem(rng, 72, 50, 33, torch.bfloat16, share=share)
    check(sp.sparse_linear(x, packed, bias), x, dense, bias, torch.bfloat16)


@pytest.mark.parametrize("m", [5, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_rows_apart_and_addresses_that_are_not_aligned(rng, dtype, m):
    _, packed, dense, bias = problem(rng, 64, 96, 1, dtype)
    room = torch.randn(m * 101 + 1, generator=rng).to(dtype).cuda()
    x = room[1:].view(m, 101)[:, :96]
    residual = torch.randn(m * 64 + 1, generator=rng).to(dtype).cuda()[1:].view(m, 64)
    values, ids, begin, p = strips.strips_of(packed, packed.index())
    y = torch.ops.sparse_pathways.strips_linear(x, values, ids, begin, bias, residual, 64, p)
    check(y, x, dense, bias, dtype, residual=residual)


@torch.no_grad()
def test_more_than_2_to_the_31_elements(rng):
    m = (1 << 28) + 40
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB")
    _, packed, dense, bias = problem(rng, 8, 8, 1, torch.bfloat16, share=1.0)
    x = torch.empty(m, 8, dtype=torch.bfloat16, device="cuda")
    x[-100:] = torch.randn(100, 8, generator=rng).cuda()
    check(sp.sparse_linear(x, packed, bias)[-100:], x[-100:], dense, bias, torch.bfloat16)


@torch.no_grad()
def test_a_pruned_nan_stays_where_it_is(rng):
    mask = torch.rand(8, 40, generator=rng) < 0.4
    weight = torch.randn(64, 40, generator=rng).to(torch.bfloat16)
    weight[~sp.expand_mask(mask, (8, 1), (64, 40))] = float("nan")
    packed = sp.PackedWeight.pack(weight, mask, (8, 1)).to("cuda")
    assert sp.sparse_linear(torch.ones(9, 40).to(torch.bfloat16).cuda(), packed).isfinite().all()


@torch.no_grad()
def test_strips_made_on_one_stream_serve_another(rng):
    x, packed, dense, bias = problem(rng, 512, 512, 16, torch.bfloat16)
    torch.cuda.synchronize()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        strips.strips_of(packed, packed.index())
    with torch.cuda.stream(other):
        y = sp.sparse_linear(x, packed, bias)
    torch.cuda.synchronize()
    check(y, x, dense, bias, torch.bfloat16)


@torch.no_grad()
def test_in_a_graph(rng):
    x, packed, dense, bias = problem(rng, 256, 256, 4, torch.bfloat16)
    sp.sparse_linear(x, packed, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sp.sparse_linear(x, packed, bias)
    x.copy_(torch.randn(4, 256, generator=rng).to(torch.bfloat16))
    graph.replay()
    check(y, x, dense, bias, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_lstm(rng, dtype, rows):
    lstm = nn.LSTM(48, 64, num_layers=2).to(dtype)
    model = sp.sparsify_(nn.ModuleList([lstm]), (8, 1))
    for layer in sp.sparse_layers(model).values():
        layer.set_mask_(torch.rand(layer.mask().shape, generator=rng) < 0.4)
    exact = model[0].to_lstm().double().cuda()
    packed = sp.pack_(model)[0].cuda()
    x = torch.randn(6, rows, 48, generator=rng).to(dtype).cuda()
    with backends.forced("cuda"):
        y, (h, c) = packed(x)
    for one, other in zip((y, h, c), (lambda r: (r[0], *r[1]))(exact(x.double())), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=20 * torch.finfo(dtype).eps + 1e-5)


def test_lists_of_all_layers_in_a_captured_step(rng):
    grids, block = [(64, 8), (16, 32), (5, 3)], (16, 16)
    shapes = [(n * 16, k * 16) for n, k in grids]
    masks = [(torch.rand(grid, generator=rng) < 0.3).cuda() for grid in grids]
    layouts = sp.StaticLayouts(masks, [block] * 3, shapes, [mask.numel() for mask in masks])
    assert layouts.one_launch
    x, weight = torch.randn(20, shapes[0][1], device="cuda"), torch.randn(shapes[0], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layouts.build()
        y = sp.masked_linear(x, weight, layouts.layouts[0])
    torch.cuda.set_sync_debug_mode("default")
    for replay, share in enumerate((0.7, 0.0, 1.0, 0.2), start=2):
        for mask in masks:
            mask.copy_(torch.rand(mask.shape, generator=rng).cuda() < share)
        graph.replay()
        layouts.check(builds=replay)
        for layout, mask, shape in zip(layouts.layouts, masks, shapes, strict=True):
            exact = sp.BlockLayout.from_mask(mask, block, shape)
            for name in (*NAMES, "row"):
                one, other = getattr(layout, name), getattr(exact, name)
                assert torch.equal(one[: other.numel()].int(), other.int()), name
        masked = torch.where(sp.expand_mask(masks[0], block, shapes[0]), weight, 0)
        torch.testing.assert_close(y, x @ masked.T, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_opcheck(rng):
    x, packed, _, bias = problem(rng, 64, 96, 9, torch.bfloat16)
    values, ids, begin, p = strips.strips_of(packed, packed.index())
    ops, kinds = torch.ops.sparse_pathways, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.strips_linear, (x, values, ids, begin, bias, None, 64, p), test_utils=kinds)
    pack = packed.values, *packed.index(), 64, 96, 8, 1, 8
    torch.library.opcheck(ops.strips_pack, (*pack, 1000), test_utils=("test_schema",))


def test_what_it_has_no_kernel_for_is_an_error_when_forced(rng):
    x, packed, _, bias = problem(rng, 64, 96, 9, torch.bfloat16)
    with backends.forced("cuda"), pytest.raises(BackendUnavailable, match="it has no gradients"):
        sp.sparse_linear(x.requires_grad_(), packed, bias)
