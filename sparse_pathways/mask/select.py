"""Block scores to a block mask. Ties by index and no random numbers: ranks and resumed runs agree by construction."""

import torch
from torch import Tensor

from sparse_pathways.checks import check_matrix, check_sparsity


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
    if torch.isnan(flat).any():
        first = int(torch.isnan(flat).nonzero()[0])
        raise ValueError(
            f"scores[{first // scores.shape[1]}, {first % scores.shape[1]}] is NaN; blocks cannot be ranked"
        )
    keep = round((1.0 - sparsity) * flat.numel())
    if keep == 0 or keep == flat.numel():
        return torch.full_like(scores, keep > 0, dtype=torch.bool)
    threshold = torch.kthvalue(flat, flat.numel() - keep + 1).values
    above, ties = flat > threshold, flat == threshold
    # Among the blocks that tie at the threshold, the first ones fill what is left.
    return (above | (ties & (ties.cumsum(0) <= keep - above.sum()))).view_as(scores)
