"""Questions to the compiled library: its compiler, and the threads of its pool."""

from __future__ import annotations

import torch

from sparse_pathways.ops import library

torch.library.define("sparse_pathways::compiler", "() -> str")
torch.library.define("sparse_pathways::pool_helpers", "() -> int")


def compiler() -> str | None:
    """Compiler of the CPU kernels and its version; None where they are missing."""
    return torch.ops.sparse_pathways.compiler() if library.MISSING is None else None


def pool_helpers() -> int | None:
    """Threads that help the caller with CPU products, made at first use; None where the kernels are missing."""
    return torch.ops.sparse_pathways.pool_helpers() if library.MISSING is None else None
