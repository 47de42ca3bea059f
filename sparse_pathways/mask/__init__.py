"""Numbers to decisions: block scores, block masks, sparsity schedules. Pure functions on tensors."""

from sparse_pathways.mask.block_mask import expand_blocks, expand_mask, pack_bits, unpack_bits
from sparse_pathways.mask.schedule import Constant, Cubic, Milestones, Schedule
from sparse_pathways.mask.score import block_dots, block_scores
from sparse_pathways.mask.select import global_masks, nm_mask, topk_mask

__all__ = [
    "Constant",
    "Cubic",
    "Milestones",
    "Schedule",
    "block_dots",
    "block_scores",
    "expand_blocks",
    "expand_mask",
    "global_masks",
    "nm_mask",
    "pack_bits",
    "topk_mask",
    "unpack_bits",
]
