"""Block scores to a block mask. Ties by index and no random numbers: ranks and resumed runs agree by construction."""

import torch
from torch import Tensor

from sparse_pathways.checks import check_matrix, check_sparsity

TOPK = "sparse_pathways::topk_blocks"

torch.library.define(TOPK, "(Tensor scores, int keep) -> Tensor")


def reference_topk(scores: Tensor, keep: int) -> Tensor:
    """True at the `keep` highest of scores `[n]`, the lower index among equals; `0 < keep < n`, no NaN."""
    threshold = torch.kthvalue(scores, scores.numel() - keep + 1).values
    above, ties = scores > threshold, scores == threshold
    # Among the blocks that tie at the threshold, the first ones fill what is left.
    return above | (ties & (ties.cumsum(0) <= keep - above.sum()))


# CUDA tensors, and the CPU without its compiled library; csrc/torch/lists_cpu.cpp serves the CPU otherwise.
torch.library.register_kernel(TOPK, None, reference_topk)


def topk_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the highest-scoring blocks of one layer.

    Args:
        scores: `[NB, KB]`, any float dtype, higher = keep, no NaN.
        sparsity: share of blocks removed, in [0, 1].

    Returns:
        Bool `[NB, KB]` on the device of `scores` with exactly `round((1 - sparsity) * NB * KB)` kept blocks; among
        equal scores the lower flat index is kept.

    Raises:
        ValueError: sparsity outside [0, 1], or a NaN score (names the first block).
    """
    check_sparsity(sparsity)
    flat = check_matrix("scores", scores).detach().flatten()
    if torch.isnan(flat.sum()) and torch.isnan(flat).any():  # infinities of both signs add up to NaN too
        first = int(torch.isnan(flat).nonzero()[0])
        raise ValueError(
            f"scores[{first // scores.shape[1]}, {first % scores.shape[1]}] is NaN; blocks cannot be ranked"
        )
    keep = round((1.0 - sparsity) * flat.numel())
    if keep == 0 or keep == flat.numel():
        return torch.full_like(scores, keep > 0, dtype=torch.bool)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    return torch.ops.sparse_pathways.topk_blocks.default(flat.contiguous(), keep).view_as(scores)
