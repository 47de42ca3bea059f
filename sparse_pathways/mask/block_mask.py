"""Block masks as data: bits for storage, elementwise for reference products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import Block, check_block, check_mask


def expand_mask(mask: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """Block mask to elementwise mask.

    Args:
        mask: bool `[NB, KB]`.
        block: (R, C).
        shape: (N, K) of the weight; edge blocks are cut to it.

    Returns:
        Bool `[N, K]`.
    """
    rows, cols = check_block(block)
    check_mask(mask, (rows, cols), shape)
    return mask.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: shape[0], : shape[1]]


def pack_bits(flags: Tensor) -> Tensor:
    """Bool `[..., n]` to uint8 `[..., ceil(n / 8)]`, lowest bit first."""
    padded = F.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 `[..., ceil(n / 8)]` to bool `[..., n]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :n].bool()
