"""Loads the compiled CPU kernels. Without them every operator runs on its PyTorch reference, and that is said once."""

import warnings
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent.parent / "libsparse_pathways_cpu.so"


def _load() -> str | None:
    """None when the kernels are there, else the reason why not."""
    if not PATH.exists():
        return "they were not compiled at install (no C++ compiler was found)"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return f"{PATH.name} does not load: {error}"
    return None


MISSING = _load()
if MISSING is not None:
    warnings.warn(
        f"sparse_pathways runs without its CPU kernels, on the slow PyTorch reference: {MISSING}. "
        "Install a C++ compiler and reinstall the package to get them.",
        RuntimeWarning,
        stacklevel=2,
    )
