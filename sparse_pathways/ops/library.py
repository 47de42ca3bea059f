"""Loads the compiled kernels. Without those of the CPU every operator runs on its PyTorch reference, and that is said
once; those of CUDA are looked for where there is a device."""

import warnings
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent.parent / "libsparse_pathways_cpu.so"
CUDA_PATH = PATH.with_name("libsparse_pathways_cuda.so")


def _load(path: Path, tool: str) -> str | None:
    """None when the kernels are there, else the reason why not."""
    if not path.exists():
        return f"they were not compiled at install (no {tool} was found)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


MISSING = _load(PATH, "C++ compiler")
CUDA_MISSING = _load(CUDA_PATH, "nvcc") if torch.cuda.is_available() else "there is no CUDA device"
if MISSING is not None:
    warnings.warn(
        f"sparse_pathways runs without its CPU kernels, on the slow PyTorch reference: {MISSING}. "
        "Install a C++ compiler and reinstall the package to get them.",
        RuntimeWarning,
        stacklevel=2,
    )
