"""Machine code of a kernel exactly as its launcher would launch it, for a GPU that need not be here."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint16: "*u16",
    torch.uint8: "*u8",
}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use


class Launch(NamedTuple):
    """One launch: the kernel, its arguments by name, and the compiler's options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


class Code(NamedTuple):
    """What the compiler made. `stack`: bytes of spilled registers; `shared`: bytes of shared memory per program."""

    ttir: str
    ptx: str
    sass: str
    stack: int
    registers: int
    shared: int


def launches(call: Callable[[], object]) -> list[Launch]:
    """Every kernel that `call` launches; none of them runs. Tensors may be meta tensors."""
    found = []

    def record(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {name: kwargs.pop(name) for name in ("num_warps",) if name in kwargs}
        assert not (kwargs.keys() - set(self.arg_names)), kwargs
        found.append(Launch(self, arguments | kwargs, options))

    original, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = original
    return found


def compile_for(capability: int, launch: Launch) -> Code:
    """The launch compiled as Triton's own launcher would specialise it: ones and None folded in, 16s divisible."""
    kernel, arguments, options = launch
    constexpr = {one.name for one in kernel.params if one.is_constexpr}
    signature, constants, divisible = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible[(place,)] = [["tt.divisibility", 16]]
        elif name in constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            assert isinstance(value, int), (name, value)
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage, sass = (tool("-res-usage", file.name), tool("-sass", file.name))
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    assert {"REG", "STACK", "LOCAL"} <= numbers.keys(), usage
    stack = numbers["STACK"] + numbers["LOCAL"]
    return Code(binary.asm["ttir"], binary.asm["ptx"], sass, stack, numbers["REG"], binary.metadata.shared)


def tool(option: str, file: str) -> str:
    """Output of the cuobjdump that Triton brings."""
    path = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([path, option, file], capture_output=True, text=True, check=True).stdout
