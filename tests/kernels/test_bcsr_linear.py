"""The Triton forward product: numbers under the interpreter, machine code from the compiler. No GPU needed.

The interpreter's `tl.dot` multiplies bfloat16 operands as 16-bit integers (Triton 3.8), so bfloat16 is not interpreted:
here it is compiled, and test_bcsr_linear_gpu.py checks its numbers on a device.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from sparse_pathways.kernels import bcsr_linear as kernel  # noqa: E402
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHAPES = [(1, 96, 64), (37, 128, 128), (5, 80 - 3, 192), (18, 96, 128 - 5), (3, 10, 9)]  # M, N, K: also edges, < block
BLOCKS = [(16, 16), (32, 32), (64, 64), (16, 32), (32, 16)]
DTYPES = [torch.float32, torch.float16]

block_ids = "{0[0]}x{0[1]}".format


@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-N{0[1]}-K{0[2]}".format)
@pytest.mark.parametrize("block", BLOCKS, ids=block_ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_dense(interpreted, problem, shape, block, dtype):
    case = problem(shape, block, dtype)
    case.check(interpreted(**case.arguments()))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_empty_block_rows_give_the_bias_or_zero(interpreted, problem, bias):
    mask = torch.tensor([[False, False], [True, True], [False, False]])
    case = problem((4, 48, 32), mask=mask, bias=bias)
    y = interpreted(**case.arguments())
    case.check(y)
    expected = case.bias if bias else torch.zeros(48)
    assert torch.equal(y[:, :16], expected[:16].expand(4, 16))
    assert torch.equal(y[:, 32:], expected[32:].expand(4, 16))


def test_no_block_kept(interpreted, problem):
    case = problem((3, 32, 32), mask=torch.zeros(2, 2, dtype=torch.bool))
    case.check(interpreted(**case.arguments()))


def test_no_rows(interpreted, problem):
    case = problem((0, 32, 32))
    assert interpreted(**case.arguments()).shape == (0, 32)


def test_int32_columns(interpreted, problem):
    case = problem((4, 48, 64), col_dtype=torch.int32)
    case.check(interpreted(**case.arguments()))


def test_pos_selects_blocks_and_leaves_the_others_unread(interpreted, problem):
    case = problem((9, 48, 96))
    entries = case.col.shape[0]
    pool = torch.full((2 * entries, 16, 16), torch.nan)  # blocks of other pathways: a read of one shows
    order = torch.randperm(2 * entries, generator=torch.Generator().manual_seed(0))[:entries]
    pool[order] = case.values
    case.values, case.pos = pool, order.to(torch.int32)
    case.check(interpreted(**case.arguments()))


def test_inputs_of_pruned_block_columns_are_not_read(interpreted, problem):
    mask = torch.tensor([[True, False, True], [True, False, False]])
    case = problem((7, 32, 48), mask=mask)
    case.x[:, 16:32] = torch.nan  # NaN * 0 would be NaN
    case.check(interpreted(**case.arguments()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_a_stride_and_nan_behind_the_last_input(interpreted, problem, dtype):
    case = problem((6, 40, 59), (16, 32), dtype, mask=torch.ones(3, 2, dtype=torch.bool))
    wide = torch.full((6, 128), torch.nan, dtype=dtype)
    wide[:, :59] = case.x
    case.x = wide[:, :59]  # inputs 59..63 of the last block column lie in memory and hold NaN
    case.check(interpreted(**case.arguments()))


@pytest.mark.parametrize("tile_m", [16, 64])
@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (128, 64)], ids=block_ids)
def test_a_block_larger_than_the_tile(interpreted, problem, tile, tile_m):
    case = problem((33, 250, 120), (128, 64))
    schedule = kernel.Schedule(tile_m, *tile, num_warps=4, num_stages=2)
    case.check(interpreted(**case.arguments(), schedule=schedule))


@pytest.mark.parametrize("m", [1, 17, 5000])
@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
@pytest.mark.parametrize("block", [*BLOCKS, (16, 256), (512, 16)], ids=block_ids)
def test_schedule_divides_the_block(m, dtype, block):
    schedule = kernel.schedule_for(m, block, dtype)
    assert block[0] % schedule.tile_r == 0
    assert block[1] % schedule.tile_c == 0
    assert schedule.tile_m >= 16


@pytest.mark.parametrize(
    ("dtype", "block", "message"),
    [
        (torch.float64, (16, 16), "dtype = torch.float64"),
        (torch.float16, (8, 1), r"block = \(8, 1\)"),
        (torch.float16, (16, 48), r"block = \(16, 48\)"),
    ],
)
def test_outside_the_limits_is_refused(dtype, block, message):
    values = torch.zeros(0, block[1], block[0], dtype=dtype)
    index = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        kernel.bcsr_linear(torch.zeros(2, 4, dtype=dtype), values, index, index[:0], None, None, block[0])


TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # what many rows must use; one row: mma.sync
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compiled(capability: int, dtype: torch.dtype, block: tuple[int, int], m: int, pos: bool):
    """The kernel as `bcsr_linear` launches it for aligned K and N, compiled for a GPU that need not be here."""
    fn = kernel._bcsr_linear_fwd
    schedule = kernel.schedule_for(m, block, dtype)
    element = TYPES[dtype]
    constants = {"R": block[0], "C": block[1], "TILE_M": schedule.tile_m, "TILE_R": schedule.tile_r}
    constants |= {"TILE_C": schedule.tile_c, "NUM_STAGES": schedule.num_stages}
    signature = dict.fromkeys(fn.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {"x_ptr": element, "values_ptr": element, "bias_ptr": element, "y_ptr": element}
    signature |= {"crow_ptr": "*i32", "col_ptr": "*u16", "pos_ptr": "*i32"}
    if not pos:
        constants["pos_ptr"] = None
        signature["pos_ptr"] = "constexpr"
    aligned = [i for i, name in enumerate(fn.arg_names) if signature[name] != "constexpr" and name != "M"]
    source = ASTSource(fn, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": schedule.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def bytes_on_the_stack(cubin: bytes, folder: Path) -> int:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert len(sizes) == 2, usage
    return sum(map(int, sizes))


@pytest.mark.parametrize("capability", TENSOR_CORE, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (256, 32)], ids=block_ids)
@pytest.mark.parametrize("m", [1, 4096], ids="M{}".format)
def test_compiles_to_tensor_core_code_without_spills(capability, dtype, block, m, tmp_path):
    binary = compiled(capability, dtype, block, m, pos=m == 1)
    assert binary.asm["cubin"][:4] == b"\x7fELF"
    assert bytes_on_the_stack(binary.asm["cubin"], tmp_path) == 0  # registers that spill live on the stack
    if dtype == torch.float32:  # float32 products stay float32: TF32 would round the operands to 10 bits
        assert "tf32" not in binary.asm["ptx"]
    else:
        assert (TENSOR_CORE[capability] if m > 1 else "mma.sync") in binary.asm["ptx"]
