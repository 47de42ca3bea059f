"""The same products under pytest-benchmark: to follow one kernel from commit to commit.

    python -m pytest benchmarks/test_products.py --benchmark-autosave
    python -m pytest benchmarks/test_products.py --benchmark-compare

It times one contender after the other, hot. For ratios take `python -m benchmarks`, where contenders take turns.
"""

import pytest
import torch

import sparse_pathways as sp
from benchmarks import dense, workload

SHAPES = [(512, 512), (2048, 512), (512, 2048)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def operands(shape, rows, dtype):
    """Weight, bias and x as the product of this dtype takes them."""
    weight, bias = workload.weight_and_bias(shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    kind = torch.float32 if dtype == torch.int8 else dtype
    return weight.to(kind), bias.to(kind), x.to(kind)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", workload.DTYPES)
@pytest.mark.parametrize("contender", ["70 %", "90 %", *dense.available(torch.float32), *dense.available(torch.int8)])
def test_product(benchmark, contender, dtype, shape, rows):
    kind = workload.DTYPES[dtype]
    weight, bias, x = operands(shape, rows, kind)
    benchmark.group = f"{dtype} {shape[0]}x{shape[1]} M={rows}"
    if contender.endswith("%"):
        mask = workload.block_mask(shape, float(contender.split()[0]) / 100)
        packed = sp.PackedWeight.pack(weight, mask, workload.BLOCK, dtype=kind)
        kept, call = sp.expand_mask(mask, workload.BLOCK, shape), lambda: sp.sparse_linear(x, packed, bias)
    elif contender in dense.available(kind):
        product = dense.available(kind)[contender](weight, bias, rows)
        kept, call = None, lambda: product(x)
    else:
        pytest.skip(f"{contender} has no {dtype}")
    workload.answer(x, weight, kept, bias, kind).check(contender, call())
    benchmark(call)
