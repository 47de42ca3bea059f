"""On a GPU machine: the gpu-marked kernel tests, then the Triton kernel against F.linear. README.md tells more.

    python benchmarks/gpu/run.py [--out FILE] [--no-tests]

Needs torch, triton and pytest; the package need not be installed, kernels/ stands alone. Exits 2 without a device, 1 if
a test or a product is wrong.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(512, 512), (2048, 512), (512, 2048), (4096, 4096)]  # N, K: Emformer's layers, and one that fills the GPU
ROWS = [16, 512, 16384]
BLOCKS = [(16, 16), (32, 32), (64, 64)]
SPARSITIES = [0.7, 0.9]
WARM_UP, ROUNDS = 5, 30
ROUND_MS = 0.5


def import_kernels() -> types.ModuleType:
    """`sparse_pathways.kernels.bcsr_linear` from this checkout, installed or not."""
    package = types.ModuleType("sparse_pathways")
    package.__path__ = []
    spec = importlib.util.spec_from_file_location(
        "sparse_pathways.kernels", ROOT / "kernels" / "__init__.py", submodule_search_locations=[str(ROOT / "kernels")]
    )
    kernels = importlib.util.module_from_spec(spec)
    sys.modules |= {"sparse_pathways": package, "sparse_pathways.kernels": kernels}
    package.kernels = kernels
    spec.loader.exec_module(kernels)
    return importlib.import_module("sparse_pathways.kernels.bcsr_linear")


def run_tests() -> int:
    """The gpu-marked kernel tests, in this process."""
    import pytest

    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--confcutdir={ROOT / 'tests' / 'kernels'}"]
    return pytest.main([*arguments, str(ROOT / "tests" / "kernels" / "test_bcsr_linear_gpu.py")])


def median_us(run: Callable[[], object]) -> tuple[float, list[float]]:
    """Median time of a call and its quartiles, by CUDA events around rounds of about ROUND_MS."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(calls: int) -> float:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls * 1e3

    calls = max(1, round(ROUND_MS * 1e3 / timed(WARM_UP)))
    for _ in range(WARM_UP):
        timed(calls)
    times = [timed(calls) for _ in range(ROUNDS)]
    return statistics.median(times), statistics.quantiles(times, n=4)[::2]


def random_weight(shape: tuple[int, int], block: tuple[int, int], sparsity: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A dense bfloat16 weight with random empty blocks, and the same weight as the kernel's arguments."""
    (n, k), (r, c) = shape, block
    grid = (n // r, k // c)
    kept = torch.rand(grid, device="cuda").flatten().argsort()[: round((1 - sparsity) * grid[0] * grid[1])]
    mask = torch.zeros(grid, dtype=torch.bool, device="cuda")
    mask.view(-1)[kept] = True
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    weight *= mask.repeat_interleave(r, 0).repeat_interleave(c, 1)
    values = weight.view(grid[0], r, grid[1], c).permute(0, 2, 3, 1)[mask].contiguous()
    crow = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return weight, {"values": values, "crow": crow, "col": mask.nonzero()[:, 1].to(torch.uint16), "pos": None}


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph: without the launch time of Python, which hides small kernels on both sides."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(kernel: types.ModuleType, shape: tuple[int, int], m: int, block: tuple[int, int], sparsity: float) -> dict:
    """One row of the table; the product is checked before it is timed."""
    n, k = shape
    weight, packed = random_weight(shape, block, sparsity)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    y = kernel.bcsr_linear(x, **packed, bias=bias, n=n)
    exact = F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-2)
    dense, dense_quartiles = median_us(graphed(lambda: F.linear(x, weight, bias)))
    sparse, sparse_quartiles = median_us(graphed(lambda: kernel.bcsr_linear(x, **packed, bias=bias, n=n)))
    times = {"dense_us": dense, "dense_us_quartiles": dense_quartiles}
    times |= {"sparse_us": sparse, "sparse_us_quartiles": sparse_quartiles, "ratio": dense / sparse}
    return {"n": n, "k": k, "m": m, "block": list(block), "sparsity": sparsity, **times}


def measure_all(kernel: types.ModuleType) -> list[dict]:
    """All rows, printed as they come."""
    print("\nbfloat16, CUDA graphs, median us")
    print(f"{'N x K':>12} {'M':>6} {'block':>6} {'sparsity':>8} {'F.linear':>9} {'sparse':>9}  ratio")
    table = []
    for shape, m, block, sparsity in itertools.product(SHAPES, ROWS, BLOCKS, SPARSITIES):
        row = measure(kernel, shape, m, block, sparsity)
        table.append(row)
        size, name = f"{shape[0]} x {shape[1]}", f"{block[0]}x{block[1]}"
        times = f"{row['dense_us']:9.1f} {row['sparse_us']:9.1f} {row['ratio']:5.2f}x"
        print(f"{size:>12} {m:6} {name:>6} {sparsity:8} {times}", flush=True)
    return table


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu_<device>.json)")
    parser.add_argument("--no-tests", action="store_true", help="time only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu/run.py: no CUDA device on this machine; nothing was run", file=sys.stderr)
        return 2
    import triton

    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # the check compares with float32
    kernel = import_kernels()
    if not options.no_tests and run_tests() != 0:
        return 1
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu_{device.lower().replace(' ', '-')}.json"
    about = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "dtype": "bfloat16"}
    table = measure_all(kernel)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
