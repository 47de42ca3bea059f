"""The only table of which kernel serves a product, and the words for it.

Backends: "portable", "avx2", "avx512", "avx512_dot" (C++, CPU; the last is AVX-512 with VNNI, BF16 and VBMI), "triton"
(CUDA), "cuda" (C++ on CUDA: inference with blocks of 8 and more outputs, not yet run on a device), "reference"
(PyTorch, any device and dtype) and "dense" (`F.linear`, taken in training where it is faster).
The environment variable SPARSE_PATHWAYS_BACKEND, read
at the first product, forces one; a product it cannot serve is an error, not a fallback.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_pathways.checks import BackendUnavailable, Block
from sparse_pathways.ops import library, strips

ISAS = ("portable", "avx2", "avx512", "avx512_dot")
NAMES = ("reference", *ISAS, "triton", "cuda")
VARIABLE = "SPARSE_PATHWAYS_BACKEND"
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of stored values; every ISA has a forward kernel for them

_forced: str | None = None
_isa: str | None = None  # the CPU kernels in use; None until the first product, or when they are missing
_initialised = False
epoch = 0  # counts the choices made by `force`: what was prepared under an earlier one is stale


def _why_not(name: str, device: str, dtype: torch.dtype, block: Block) -> str | None:
    """None if backend `name` can serve this product, else the reason why it cannot."""
    if name == "reference":
        return None
    if name in ISAS:
        if device != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        if library.MISSING is not None:
            return f"the CPU kernels are missing: {library.MISSING}"
        if ISAS.index(name) > torch.ops.sparse_pathways.max_isa():
            return "this CPU or operating system does not support it"
        if dtype == torch.float64:
            return None if name == "portable" else "float64 has a portable kernel only"
        return None if dtype in CPU_DTYPES else f"it has no {dtype} kernel"
    if device != "cuda":
        return f"it runs on CUDA devices, the tensors are on {device}"
    if name == "cuda":
        return strips.refusal(dtype, block)
    if not triton_installed():
        return "Triton is not installed"
    from sparse_pathways.kernels.schedule import refusal  # imports Triton: only where it may run

    return refusal(dtype, block)


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def force(name: str | None) -> None:
    """Serve every product by the backend `name` from now on; None returns to the automatic choice.

    Raises:
        BackendUnavailable: unknown name, or one that this machine cannot run on the CPU.
    """
    global _forced, _isa, _initialised, epoch
    _check_name("backend", name)
    if library.MISSING is None:
        if name in ISAS and (reason := _why_not(name, "cpu", torch.float32, (8, 1))):
            raise BackendUnavailable(f"backend = {name!r}: {reason}")
        level = ISAS.index(name) if name in ISAS else torch.ops.sparse_pathways.max_isa()
        torch.ops.sparse_pathways.set_isa(level)
        _isa = ISAS[level]
    _forced, _initialised, epoch = name, True, epoch + 1


def is_forced() -> bool:
    """Whether one backend serves every product, by `force` or the environment variable."""
    initialise()
    return _forced is not None


def forced_name() -> str | None:
    """The backend that `force` or the environment variable chose; None: the automatic choice."""
    return _forced


def initialise() -> None:
    """Take the environment variable into account; called before the first product."""
    if not _initialised:
        name = os.environ.get(VARIABLE) or None
        _check_name(VARIABLE, name)
        force(name)


def _check_name(source: str, name: str | None) -> None:
    if name is not None and name not in NAMES:
        raise BackendUnavailable(f"{source} = {name!r} is not known; choose one of {', '.join(NAMES)}")


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """`force(name)` inside a with block."""
    initialise()
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)


def select(device: str, dtype: torch.dtype, block: Block) -> str:
    """Name of the backend that serves a block-sparse product.

    Args:
        device: device type of the tensors, "cpu" or "cuda".
        dtype: of the stored values.
        block: (R, C).

    Raises:
        BackendUnavailable: a backend is forced and cannot serve this product.
    """
    if not _initialised:
        initialise()
    if _forced is not None:
        reason = _why_not(_forced, device, dtype, block)
        if reason is not None:
            raise BackendUnavailable(f"{VARIABLE} forces {_forced!r}, which cannot serve this product: {reason}")
        return _forced
    if device == "cpu" and _isa is not None:
        if dtype in CPU_DTYPES:
            return _isa
        if dtype == torch.float64:
            return "portable"
    if device == "cuda":
        for name in ("triton", "cuda"):  # square tiles; blocks that are too narrow for them
            if _why_not(name, device, dtype, block) is None:
                return name
    return "reference"


def explain_product(device: str, dtype: torch.dtype, block: Block) -> str:
    """One sentence: which backend serves this product and why."""
    name = select(device, dtype, block)
    if _forced is not None:
        return f"{name}: forced by {VARIABLE} or force()"
    if name != "reference":
        return f"{name}: the widest kernel that this {device.upper()} and {dtype} have"
    fast = ("triton", "cuda") if device == "cuda" else ("portable",)
    reasons = "; ".join(f"{name}: {_why_not(name, device, dtype, block)}" for name in fast)
    return f"reference (slow), because of {reasons}"
