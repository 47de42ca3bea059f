"""Block scores to a block mask. Ties by index and no random numbers: ranks and resumed runs agree by construction."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def global_masks(scores: Sequence[Tensor], sparsity: float, floor: float = 0.0) -> list[Tensor]:
    """Keep the highest-scoring blocks of several layers together.

    Args:
        scores: `[NB, KB]` per layer, as for `topk_mask`; comparable between layers.
        sparsity: share of all blocks removed, in [0, 1].
        floor: every layer keeps at least this share, in [0, 1], of the blocks that it would keep alone.

    Returns:
        Bool `[NB, KB]` per layer, with exactly `round((1 - sparsity) * blocks)` kept in all; ties go to the earlier
        layer and the lower index.

    Raises:
        ValueError: sparsity or floor outside [0, 1], no scores, or a NaN score.
    """
    check_sparsity(sparsity)
    check_sparsity(floor, "floor")
    if not scores:
        raise ValueError("scores is empty; want those of at least one layer")
    safe = [topk_mask(one, 1.0 - floor * (1.0 - sparsity)) for one in scores]
    flat = [torch.where(keep, torch.inf, one.float()).flatten() for keep, one in zip(safe, scores, strict=True)]
    mask = topk_mask(torch.cat(flat)[None], sparsity)[0]
    return [part.view_as(one) for part, one in zip(mask.split([one.numel() for one in scores]), scores, strict=True)]


def nm_mask(scores: Tensor, keep: int, group: int) -> Tensor:
    """Keep `keep` of every `group` neighbours along a row of blocks (N:M sparsity; on 1x1 blocks 2:4 is that of GPUs).

    Args:
        scores: `[NB, KB]`, any float dtype, higher = keep, no NaN.
        keep: N.
        group: M; a last group of fewer blocks keeps at most N.

    Returns:
        Bool `[NB, KB]`; among equal scores the lower index is kept.

    Raises:
        ValueError: N or M out of range, or a NaN score.
    """
    if not 1 <= keep <= group:
        raise ValueError(f"keep = {keep} of group = {group}; want 1 <= keep <= group")
    if torch.isnan(check_matrix("scores", scores)).any():
        raise ValueError("scores holds NaN; blocks cannot be ranked")
    columns = scores.shape[1]
    # Behind every block that is there: those of an incomplete last group.
    padded = F.pad(scores.detach(), (0, -columns % group), value=-torch.inf).unflatten(1, (-1, group))
    order = torch.argsort(padded, dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
    return mask.flatten(1)[:, :columns].contiguous()
