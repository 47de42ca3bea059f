"""The Triton forward product on a device; `python benchmarks/gpu/run.py` runs this file on a bare GPU machine."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from sparse_pathways.kernels import bcsr_linear as kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = [(1, 96, 64), (37, 128, 128), (5, 77, 192), (18, 96, 123), (3, 10, 9), (300, 512, 512), (40, 2048, 512)]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (32, 16)]

block_ids = "{0[0]}x{0[1]}".format


@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-N{0[1]}-K{0[2]}".format)
@pytest.mark.parametrize("block", BLOCKS, ids=block_ids)
@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
def test_equals_dense_on_device(problem, shape, block, dtype):
    case = problem(shape, block, dtype)
    case.check(kernel.bcsr_linear(**case.arguments("cuda")))


@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
def test_edges_on_device(problem, dtype):
    """Empty block rows, a shared pool whose other blocks are NaN, NaN behind the last input of each row."""
    mask = torch.tensor([[False, False], [True, True], [False, False], [True, False]])
    case = problem((6, 60, 59), (16, 32), dtype, mask=mask)
    pool = torch.full((7, 32, 16), torch.nan, dtype=dtype)
    pool[[5, 1, 3]] = case.values
    case.values, case.pos = pool, torch.tensor([5, 1, 3], dtype=torch.int32)
    wide = torch.full((6, 128), torch.nan, dtype=dtype)
    wide[:, :59] = case.x
    arguments = case.arguments("cuda") | {"x": wide.cuda()[:, :59]}
    case.check(kernel.bcsr_linear(**arguments))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("tile_m", [16, 64, 128])
@pytest.mark.parametrize("block", [(16, 16), (64, 64)], ids=block_ids)
def test_every_pipeline_depth_gives_the_same_bits(problem, block, tile_m, num_stages):
    """A Triton pipeliner has once given silently wrong numbers at one depth (pytorch/pytorch#113587)."""
    case = problem((130, 256, 512), block, torch.bfloat16)
    schedule = kernel.Schedule(tile_m, *block, num_warps=4, num_stages=num_stages)
    y = kernel.bcsr_linear(**case.arguments("cuda"), schedule=schedule)
    case.check(y)
    again = kernel.bcsr_linear(**case.arguments("cuda"), schedule=schedule._replace(num_stages=1))
    assert torch.equal(y, again)


def test_elements_past_two_to_the_31(problem):
    rows = 2**31 // 2048 + 64
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free device memory")
    case = problem((64, 2048, 64), (64, 64), torch.bfloat16)
    arguments = case.arguments("cuda")
    x = torch.zeros(rows, 64, device="cuda", dtype=torch.bfloat16)
    x[-64:] = arguments["x"]
    case.check(kernel.bcsr_linear(**arguments | {"x": x})[-64:])


def test_replays_in_a_cuda_graph(problem):
    case = problem((8, 512, 512), (32, 32), torch.bfloat16)
    arguments = case.arguments("cuda")
    kernel.bcsr_linear(**arguments)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    x, arguments["x"] = arguments["x"], torch.zeros_like(arguments["x"])
    with torch.cuda.graph(graph):
        y = kernel.bcsr_linear(**arguments)
    arguments["x"].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    case.check(y)
