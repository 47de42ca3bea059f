"""Block masks as data: bits for storage, elementwise for reference products."""

import functools

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
    return expand_blocks(mask, (rows, cols), shape)


def expand_blocks(values: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """One value per block, `[NB, KB]` of any dtype, to one per weight, `[N, K]` = `shape`; see `expand_mask`."""
    return values.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def pack_bits(flags: Tensor) -> Tensor:
    """Bool `[..., n]` to uint8 `[..., ceil(n / 8)]`, lowest bit first."""
    padded = F.pad(flags, (0, -flags.shape[-1] % 8)) if flags.shape[-1] % 8 else flags.contiguous()
    words = padded.unflatten(-1, (-1, 8)).view(torch.int64).squeeze(-1)
    # The product moves bit 0 of byte i to bit 56 + i, and nothing else above bit 55.
    return (words * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 `[..., ceil(n / 8)]` to bool `[..., n]`."""
    return (
        _bytes_as_flags(bits.device)
        .index_select(0, bits.flatten().int())
        .view(torch.bool)
        .view(*bits.shape[:-1], 8 * bits.shape[-1])[..., :n]
        .contiguous()
    )


@functools.cache
def _bytes_as_flags(device: torch.device) -> Tensor:
    """int64 `[256]`: the eight flags of each byte, as the bytes of one number."""
    with torch.inference_mode(False):
        numbers = torch.arange(256, device=device)
        return torch.stack([numbers >> i & 1 for i in range(8)], -1).bool().view(torch.int64).flatten()
