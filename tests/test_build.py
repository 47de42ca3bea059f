"""What the build leaves behind: a library safe on any CPU and any torch of the stable ABI, and no stray module."""

import re
import shutil
import subprocess
import sys

import pytest

from sparse_pathways.ops.library import MISSING, PATH

VECTOR = re.compile(r"%[yz]mm\d|\bvz?eroupper\b")


def tool_output(*command: str) -> list[str]:
    if MISSING is not None:
        pytest.skip(f"no compiled library to look into: {MISSING}")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run([*command, str(PATH)], check=True, capture_output=True, text=True).stdout.splitlines()


def wide_functions(listing: list[str]) -> set[str]:
    """Names of the functions whose code, as objdump prints it, uses 256- or 512-bit registers."""
    found, name = set(), ""
    for line in listing:
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = header[1]
        elif VECTOR.search(line):
            found.add(name)
    return found


def test_wide_instructions_stay_in_the_kernels():
    """A template of the standard library compiled with AVX flags would be shared with code that runs on every CPU."""
    listing = tool_output("objdump", "-d", "-C", "--no-show-raw-insn")
    kernels = {name for name in wide_functions(listing) if "sp::(anonymous namespace)::" in name}
    assert not wide_functions(listing) - kernels
    if any("elf64-x86-64" in line for line in listing):
        assert kernels, "the library for x86-64 holds no AVX kernel"


def test_wide_functions_are_recognised():
    listing = [
        "0000000000001000 <std::sort()>:",
        "    1000:\tvaddps %zmm1,%zmm0,%zmm0",
        "0000000000002000 <plain>:",
        "ret",
    ]
    assert wide_functions(listing) == {"std::sort()"}


def test_only_the_stable_interface_of_torch_is_used():
    """C++ symbols of torch change between versions; the library may need its C functions alone."""
    needed = [line.split()[-1] for line in tool_output("nm", "-D", "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in needed)
    mangled = re.compile(r"_Z\w*?\d(at|c10|torch|caffe2)\d")
    assert not [name for name in needed if mangled.match(name)]


def test_the_library_is_no_python_module():
    exported = [line.split()[-1] for line in tool_output("nm", "-D", "--defined-only")]
    assert not [name for name in exported if name.startswith("PyInit")]


def test_the_kernels_folder_is_no_top_level_module(tmp_path):
    """`kernels/` is installed as sparse_pathways.kernels; a bare `kernels` would shadow another package."""
    code = (
        "from importlib.util import find_spec\n"
        "assert find_spec('sparse_pathways.kernels') is not None, 'sparse_pathways.kernels is missing'\n"
        "spec = find_spec('kernels')\n"
        "assert spec is None or 'sparse' not in str(spec.origin), f'top-level kernels at {spec.origin}'\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
