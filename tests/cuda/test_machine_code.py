"""The compiled CUDA library: every kernel for every chip, without a spilled register, with the instructions it is for.

It also has to load and register where there is no device.
"""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparse_pathways.ops.library import CUDA_PATH

pytestmark = pytest.mark.skipif(
    not CUDA_PATH.exists(), reason=f"{CUDA_PATH.name} was not built (no nvcc at install): nothing to inspect"
)
CHIPS = {"sm_80", "sm_90"}
TYPES, HEIGHTS = ("Bf16Type", "HalfType", "FloatType"), (8, 16, 32)
KERNELS = {f"strips_linear<{t}, {p}, {m}>" for t in TYPES for p in HEIGHTS for m in (16, 64, 128)}
KERNELS -= {f"strips_linear<FloatType, {p}, 128>" for p in HEIGHTS}
KERNELS |= {f"strips_lstm_step<{t}>" for t in TYPES}
KERNELS |= {"strips_count", "strips_sum", "strips_fill<unsigned short>", "strips_fill<unsigned int>", "mask_lists"}


def cuobjdump() -> str:
    """From the toolkit, else the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    if path is None or not path.exists():
        pytest.skip("cuobjdump is neither on the path nor in Triton")
    return str(path)


def dump(*options: str) -> str:
    text = subprocess.run([cuobjdump(), *options, str(CUDA_PATH)], check=True, capture_output=True, text=True).stdout
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def short(name: str) -> str:
    """`strips_linear<Bf16Type, 8, 16>` of a demangled kernel."""
    name = re.sub(r"\(anonymous namespace\)::|sp::cuda::|sp::|^void ", "", name)
    return re.sub(r"\(int\)", "", name).split("(")[0].strip()


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(chip, kernel) -> registers, bytes of stack and of static shared memory."""
    found, chip, name = {}, "", ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            chip = match[1]
        elif match := re.match(r"\s*Function (.*):\s*$", line):
            name = short(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found[chip, name] = dict(zip(("reg", "stack", "shared", "local"), map(int, match.groups()), strict=True))
    return found


def test_every_kernel_is_there_for_every_chip(usage):
    for chip in CHIPS:
        assert {name for c, name in usage if c == chip} >= KERNELS, chip


def test_no_register_is_spilled(usage):
    assert {key: one for key, one in usage.items() if one["stack"] or one["local"]} == {}


def test_registers_leave_the_blocks_their_place(usage):
    """Two blocks of 256 threads, or one of 512, per multiprocessor: 128 registers per thread."""
    assert max(one["reg"] for one in usage.values()) <= 128


def test_the_products_gather_by_ldmatrix_and_multiply_on_tensor_cores():
    code, name = {}, ""
    for line in dump("-sass").splitlines():
        if match := re.search(r"Function : (.*)", line):
            name = short(match[1])
        elif match := re.search(r"\b(LDSM\S*|HMMA\S*|LDL\S*|STL\S*)", line):
            code.setdefault(name, set()).add(match[1].rstrip(";"))
    for name in KERNELS:
        used = code.get(name, set())
        assert not any(one.startswith(("LDL", "STL")) for one in used), name
        if name.startswith(("strips_linear", "strips_lstm")):
            assert any(one.startswith("HMMA.1688.F32.TF32" if "Float" in name else "HMMA.16816.F32") for one in used), (
                name
            )
            assert "Float" in name or any(one.startswith("LDSM.16.MT88") for one in used), name


def test_the_library_loads_and_registers_without_a_device():
    code = (
        "import torch, sparse_pathways.ops.strips\n"
        f"torch.ops.load_library({str(CUDA_PATH)!r})\n"
        "for name in ('strips_pack', 'strips_linear', 'strips_lstm', 'mask_lists'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'sparse_pathways::{name}', 'CUDA'), name\n"
        "assert torch.ops.sparse_pathways.lists_jobs.default(9, 33) == 8\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
