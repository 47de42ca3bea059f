"""Weight to block score: one number per block, higher = keep."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import Block, check_block, check_matrix, grid

NORMS = ("l1", "l2")
DOTS = "sparse_pathways::block_dots"

torch.library.define(DOTS, "(Tensor a, Tensor e, int rows, int cols) -> Tensor")


def block_sums(values: Tensor, block: Block = (8, 1)) -> Tensor:
    """Sum of `values` over each block.

    Args:
        values: `[N, K]`.
        block: (R, C); edge blocks sum what they have.

    Returns:
        `[NB, KB]` in the dtype of `values`.
    """
    rows, cols = check_block(block)
    n, k = check_matrix("values", values).shape
    blocks, columns = grid((n, k), (rows, cols))
    padded = F.pad(values, (0, columns * cols - k, 0, blocks * rows - n)) if n % rows or k % cols else values
    return padded.reshape(blocks, rows, columns, cols).sum((1, 3))


def reference_dots(a: Tensor, e: Tensor, rows: int, cols: int) -> Tensor:
    """float32 `[NB, KB]`: sum over each block of a * e, both `[N, K]`."""
    return block_sums(a.float() * e.float(), (rows, cols))


# CUDA tensors, and the CPU without its compiled library; csrc/torch/lists_cpu.cpp serves the CPU otherwise.
torch.library.register_kernel(DOTS, None, reference_dots)


def block_dots(a: Tensor, e: Tensor, block: Block = (8, 1)) -> Tensor:
    """Sum of `a * e` over each block.

    Args:
        a: `[N, K]`, any float dtype.
        e: as `a`.
        block: (R, C); edge blocks sum what they have.

    Returns:
        float32 `[NB, KB]`.
    """
    rows, cols = check_block(block)
    if a.shape != e.shape:
        raise ValueError(f"a is {tuple(a.shape)}, e is {tuple(e.shape)}; want the same shape")
    a, e = check_matrix("a", a).detach(), check_matrix("e", e).detach()
    if a.dtype != e.dtype or a.dtype not in (torch.float32, torch.bfloat16):
        a, e = a.float(), e.float()
    # A block that reaches beyond the edge has what is there.
    rows, cols = (min(side, max(1, size)) for side, size in zip((rows, cols), a.shape, strict=True))
    return torch.ops.sparse_pathways.block_dots.default(a.contiguous(), e.contiguous(), rows, cols)


def block_scores(weight: Tensor, block: Block = (8, 1), norm: str = "l1") -> Tensor:
    """Magnitude of each block.

    Args:
        weight: `[N, K]`, any float dtype.
        block: (R, C) = outputs x inputs of one block. Edge blocks score what they have.
        norm: "l1" (sum of absolute values) or "l2" (root of the sum of squares).

    Returns:
        Scores `[NB, KB]`, non-negative, in the dtype of `weight`.

    Raises:
        ValueError: unknown norm, weight not 2-D, block size below 1.

    Source: Dynamic ASR Pathways (arXiv 2309.13018), block-structured magnitude pruning.
    """
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}; choose one of {', '.join(NORMS)}")
    weight = check_matrix("weight", weight).detach()
    if norm == "l1":
        return block_sums(weight.abs(), block)
    if weight.dtype == torch.float64:
        return block_sums(weight.square(), block).sqrt()
    return block_dots(weight, weight, block).sqrt().to(weight.dtype)  # in float32: half-precision squares overflow
