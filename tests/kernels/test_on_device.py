"""The Triton kernels on a device; `python benchmarks/gpu/run.py` runs this file on a bare GPU machine."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from sparse_pathways.kernels import bcsr_linear, bcsr_linear_dw, ffn, masked_weight, pathway_linear, tuning
from sparse_pathways.kernels.schedule import DTYPES, Schedule
from torch.library import opcheck

OPS = torch.ops.sparse_pathways

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = [(1, 96, 64), (37, 128, 128), (5, 77, 192), (18, 96, 123), (3, 10, 9), (300, 512, 512), (40, 2048, 512)]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (32, 16)]

block_ids = "{0[0]}x{0[1]}".format
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_storage = pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense_storage"])


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def products(case, dense, schedule=None, schedule_dw=None):
    """(y, dx, dw) on the device."""
    return (
        bcsr_linear.bcsr_linear(**case.forward_arguments(dense, "cuda"), schedule=schedule),
        bcsr_linear.bcsr_linear_dx(**case.dx_arguments(dense, "cuda"), schedule=schedule),
        bcsr_linear_dw.bcsr_linear_dw(**case.dw_arguments(True, "cuda"), schedule=schedule_dw),
    )


@by_storage
@pytest.mark.parametrize(
    ("dtype", "block"),
    [(one, block) for one in DTYPES for block in (BLOCKS if one == torch.bfloat16 else BLOCKS[::2])],
    ids=lambda one: str(one) if isinstance(one, torch.dtype) else block_ids(one),
)
@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-N{0[1]}-K{0[2]}".format)
def test_products_equal_dense(problem, shape, block, dense, dtype):
    case = problem(shape, block, dtype)
    for answer, got in zip((case.forward(), case.dx(), case.dw()), products(case, dense), strict=True):
        answer.check(got)


@by_dtype
def test_edges(problem, dtype):
    """Empty block rows, a shared pool whose other blocks are NaN, NaN behind the last input of each row."""
    mask = torch.tensor([[False, False], [True, True], [False, False], [True, False]])
    case = problem((6, 60, 59), (16, 32), dtype, mask=mask)
    pool = torch.full((7, 32, 16), torch.nan, dtype=dtype)
    order = torch.tensor([5, 1, 3], dtype=torch.int32)
    pool[order.long()] = case.values
    wide = torch.full((6, 128), torch.nan, dtype=dtype)
    wide[:, :59] = case.x
    given = case.forward_arguments(device="cuda") | {"values": pool.cuda(), "pos": order.cuda()}
    case.forward().check(bcsr_linear.bcsr_linear(**given | {"x": wide.cuda()[:, :59]}))
    packed = bcsr_linear_dw.bcsr_linear_dw(**case.dw_arguments(device="cuda") | {"pos": order.cuda(), "blocks": 7})
    assert torch.equal(packed[[0, 2, 4, 6]], torch.zeros_like(packed[:4]))


@pytest.mark.parametrize(("block", "dense"), [((16, 16), False), ((64, 64), True), ((128, 128), False)], ids=str)
def test_every_pipeline_depth_gives_the_same_bits(problem, block, dense):
    """A Triton pipeliner has once given silently wrong numbers at one depth (pytorch/pytorch#113587)."""
    case = problem((300, 512, 512), block, torch.bfloat16)
    answers = case.forward(), case.dx(), case.dw()
    for tile_m, warps in ((16, 4), (128, 8)):
        one = Schedule(tile_m, min(block[0], 64), min(block[1], 64), warps, 1)
        for answer, got in zip(answers, at_every_depth(lambda s: products(case, dense, s, s), one), strict=True):
            answer.check(got)


def at_every_depth(call, one):
    """The results of `call` under a schedule of one stage; those of deeper pipelines have the same bits."""
    first = call(one)
    for stages in (2, 3, 4, 5):
        deeper = one._replace(num_stages=stages)
        for got, other in zip(call(deeper), first, strict=True):
            assert torch.equal(got, other), (deeper, "differs from a pipeline of one stage")
    return first


@by_storage
@pytest.mark.parametrize("cut", ["union", "segments"])
@pytest.mark.parametrize("block", [(16, 16), (64, 64)], ids=block_ids)
def test_every_pipeline_depth_of_several_pathways(load_module, problem, block, cut, dense):
    suite = load_module("test_pathways")
    mixed = suite.Mixed(problem, (300, 512, 512), block, torch.bfloat16)
    for dx in (False, True):
        given = pathway_arguments(suite, mixed, problem, cut, dense, dx)
        answer = mixed.by_loop(lambda case, dx=dx: case.dx() if dx else case.forward())
        for tile_m, warps in ((16, 4), (128, 8)):
            one = Schedule(tile_m, *block, warps, 1)
            (y,) = at_every_depth(lambda s, given=given: [pathway_linear.pathway_linear(**given, schedule=s)], one)
            answer.check(y)


@by_storage
@pytest.mark.parametrize("block", [(16, 16), (64, 64)], ids=block_ids)
def test_every_pipeline_depth_of_the_feed_forward(load_module, problem, block, dense):
    suite = load_module("test_ffn")
    first, second = (problem(shape, block, torch.bfloat16) for shape in ((300, 512, 256), (300, 256, 512)))
    x, weights = first.x.cuda(), [on_device(suite.weight_of(one, dense)) for one in (first, second)]
    for tile_m, warps in ((16, 4), (64, 4)):
        one = Schedule(tile_m, *block, warps, 1)
        (y,) = at_every_depth(lambda s: [ffn.bcsr_ffn(x, *weights, 3, s)], one)
        suite.check(y, first, second, F.silu)


def on_device(tensors):
    """A NamedTuple with its tensors on the device."""
    return type(tensors)(*(one.cuda() if isinstance(one, torch.Tensor) else one for one in tensors))


def pathway_arguments(suite, mixed, problem, cut, dense, dx=False):
    given = suite.arguments(mixed, problem, cut, dense, dx)
    given = {name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    return given | {"lists": on_device(given["lists"])}


def test_every_run_gives_the_same_bits(problem):
    case = problem((5000, 256, 512), (64, 64), torch.bfloat16)
    first = products(case, True)
    for _ in range(20):
        for got, other in zip(products(case, True), first, strict=True):
            assert torch.equal(got, other)


@by_dtype
@pytest.mark.parametrize("number", range(5))
def test_activation_and_residual(problem, number, dtype):
    case = problem((40, 80, 64), dtype=dtype)
    activation = [None, F.relu, F.gelu, F.silu, torch.tanh][number]
    answer = case.forward(activation)
    answer.check(bcsr_linear.bcsr_linear(**case.forward_arguments(device="cuda"), activation=number))
    residual = torch.randn(40, 80, generator=case.rng).to(dtype)
    more = torch.finfo(dtype).eps * residual.double().abs()
    answer = answer._replace(exact=answer.exact + residual.double(), bound=answer.bound + more)
    given = case.forward_arguments(device="cuda") | {"residual": residual.cuda()}
    answer.check(bcsr_linear.bcsr_linear(**given, activation=number))


@pytest.mark.parametrize("source", DTYPES, ids=str)
@by_dtype
@pytest.mark.parametrize("block", [(8, 1), (16, 16), (3, 5)], ids=block_ids)
def test_mask_and_cast(problem, block, source, dtype):
    case = problem((1, 77, 300), block, source)
    bits = case.mask.flatten().to(torch.uint8)
    bits = F.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    bits = (bits << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
    out = masked_weight.masked_weight(case.weight.cuda(), bits.cuda(), block, dtype)
    assert torch.equal(out.cpu(), torch.where(case.kept, case.weight, 0).to(dtype))


@by_dtype
@by_storage
@pytest.mark.parametrize("cut", ["union", "segments"])
@pytest.mark.parametrize("m", [5, 700])
def test_rows_of_several_pathways(load_module, problem, m, cut, dense, dtype):
    suite = load_module("test_pathways")
    mixed = suite.Mixed(problem, (m, 256, 128), (32, 32), dtype)
    for dx in (False, True):
        y = pathway_linear.pathway_linear(**pathway_arguments(suite, mixed, problem, cut, dense, dx))
        mixed.by_loop(lambda case, dx=dx: case.dx() if dx else case.forward()).check(y)


@by_dtype
@by_storage
@pytest.mark.parametrize("m", [7, 5000])
def test_feed_forward(load_module, problem, m, dense, dtype):
    suite = load_module("test_ffn")
    first, second = problem((m, 256, 128), (32, 32), dtype), problem((m, 128, 256), (32, 32), dtype)
    weights = [on_device(suite.weight_of(one, dense)) for one in (first, second)]
    y = ffn.bcsr_ffn(first.x.cuda(), *weights, 3)
    suite.check(y, first, second, F.silu)
    for _ in range(20):  # a missing barrier would show as numbers that move
        assert torch.equal(ffn.bcsr_ffn(first.x.cuda(), *weights, 3), y)


def gradients(product, leaves, dy):
    """(y, gradient of every leaf)."""
    y = product(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def check_all(answers, case, results):
    """y, dx and dvalues, and the gradient of the bias: a sum over the rows."""
    dy = case.dy.double()
    answers = *answers, case.answer(dy.sum(0), dy.abs().sum(0), dy.shape[0])
    for answer, got in zip(answers, results, strict=True):
        answer.check(got)


def leaves_of(case):
    return [t.cuda().requires_grad_() for t in (case.x, case.values, case.bias)]


def packed_dw(case):
    """Answer to the packed gradient of a weight whose sides its block divides."""
    (nb, kb), (r, c), dense = case.mask.shape, case.block, case.dw()
    return type(dense)(*(t.view(nb, r, kb, c).permute(0, 2, 3, 1)[case.mask] for t in dense))


@by_dtype
def test_operators_of_a_packed_weight(problem, dtype):
    """Schema, fake, autograd and ahead-of-time graph of all three products. Lists in int32: opcheck compares its
    arguments with copies, and few of torch's own operations take uint16 on a device."""
    case = problem((37, 80, 96), (16, 32), dtype, ids=torch.int32)
    x, values, bias = leaves_of(case)
    union, dy, entries = (case.crow.cuda(), case.col.cuda()), case.dy.cuda(), case.col.numel()
    pos = torch.arange(entries, dtype=torch.int32).flip(0).cuda()
    for some, offset in ((None, bias), (pos, None)):
        opcheck(OPS.bcsr_linear.default, (x, values, *union, some, offset, 80))
    x, values, lists = x.detach(), values.detach(), [t.cuda() for t in (case.crow_t, case.row_t, case.pos_t)]
    for some in (None, pos):
        opcheck(OPS.bcsr_linear_dx.default, (dy, values, *union, some, 96))
        opcheck(OPS.bcsr_linear_dx.default, (dy, values, *union, some, 96, *lists))
        opcheck(OPS.bcsr_linear_dw.default, (dy, x, *union, some, 16, 32, entries))
    opcheck(OPS.bcsr_linear_dw.default, (dy, x, *union, None, 16, 32, -1))


@by_dtype
def test_gradients_of_a_packed_weight_plain_and_compiled(problem, dtype):
    case = problem((37, 80, 96), (16, 32), dtype)
    crow, col, dy = case.crow.cuda(), case.col.cuda(), case.dy.cuda()

    def product(x, values, bias):
        return OPS.bcsr_linear(x, values, crow, col, None, bias, 80)

    answers = case.forward(), case.dx(), packed_dw(case)
    for one in (product, torch.compile(product, fullgraph=True)):
        check_all(answers, case, gradients(one, leaves_of(case), dy))


def lists_of(mixed, problem):
    """Of the operator of mixed batches: the union's and every pathway's own."""
    own, union = mixed.lists(problem, "segments"), mixed.union
    return [t.cuda() for t in (union.crow, union.col, mixed.bits, own.start, own.index, own.pos)]


@by_dtype
@pytest.mark.parametrize("m", [37, 300], ids=["union", "segments"])
def test_operators_of_several_pathways(load_module, problem, m, dtype):
    mixed = load_module("test_pathways").Mixed(problem, (m, 80, 96), (16, 32), dtype)
    lists = [t.int() if t.dtype == torch.uint16 else t for t in lists_of(mixed, problem)]
    (x, values, bias), rows, dy = leaves_of(mixed.union), mixed.pathway.cuda(), mixed.union.dy.cuda()
    for offset in (bias, None):
        opcheck(OPS.bcsr_pathway_linear.default, (x, values, rows, *lists, offset, 80))
    x, values = x.detach(), values.detach()
    opcheck(OPS.bcsr_pathway_linear_dx.default, (dy, values, rows, *lists[:3], 96))
    opcheck(OPS.bcsr_pathway_linear_dw.default, (dy, x, rows, *lists[:3], 16, 32))


@by_dtype
@pytest.mark.parametrize("m", [37, 300], ids=["union", "segments"])
def test_gradients_of_several_pathways_plain_and_compiled(load_module, problem, m, dtype):
    mixed = load_module("test_pathways").Mixed(problem, (m, 80, 96), (16, 32), dtype)
    lists, rows, dy = lists_of(mixed, problem), mixed.pathway.cuda(), mixed.union.dy.cuda()

    def product(x, values, bias):
        return OPS.bcsr_pathway_linear(x, values, rows, *lists, bias, 80)

    answers = mixed.by_loop(lambda case: case.forward()), mixed.by_loop(lambda case: case.dx()), mixed.dw()
    for one in (product, torch.compile(product, fullgraph=True)):
        check_all(answers, mixed.union, gradients(one, leaves_of(mixed.union), dy))


def test_elements_past_two_to_the_31(problem):
    rows = 2**31 // 2048 + 64
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free device memory")
    case = problem((64, 2048, 64), (64, 64), torch.bfloat16)
    given = case.forward_arguments(device="cuda")
    x = torch.zeros(rows, 64, device="cuda", dtype=torch.bfloat16)
    x[-64:] = given["x"]
    case.forward().check(bcsr_linear.bcsr_linear(**given | {"x": x})[-64:])


def test_replays_in_a_cuda_graph(problem):
    case = problem((8, 512, 512), (32, 32), torch.bfloat16)
    given = case.forward_arguments(device="cuda")
    bcsr_linear.bcsr_linear(**given)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    x, given["x"] = given["x"], torch.zeros_like(given["x"])
    with torch.cuda.graph(graph):
        y = bcsr_linear.bcsr_linear(**given)
    given["x"].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    case.forward().check(y)


def test_runs_on_the_current_stream(problem):
    case = problem((64, 512, 512), (32, 32), torch.bfloat16)
    given = case.forward_arguments(device="cuda")
    x, given["x"] = given["x"], torch.empty_like(given["x"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        given["x"].copy_(x)  # a kernel on another stream would read x before this
        y = bcsr_linear.bcsr_linear(**given)
    torch.cuda.synchronize()
    case.forward().check(y)


def test_tuning_on_the_device(problem, tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    tuning._table.cache_clear()
    case = problem((256, 128, 128), (32, 32), torch.bfloat16)
    given, device = case.forward_arguments(device="cuda"), torch.cuda.get_device_name()
    name = tuning.key("product", 256, (32, 32), torch.bfloat16)
    tried = tuning.candidates("product", 256, (32, 32), torch.bfloat16)[:4]
    best, _ = tuning.tune(name, lambda one: bcsr_linear.bcsr_linear(**given, schedule=one), tried, device)
    assert tuning.schedule("product", 256, (32, 32), torch.bfloat16, torch.device("cuda")) == best
    case.forward().check(bcsr_linear.bcsr_linear(**given))
    tuning._table.cache_clear()
