"""Decisions to indices: the block layout of a mask, and weights packed by it. Knows blocks, not layers."""

from sparse_pathways.layout.bcsr import BlockLayout
from sparse_pathways.layout.packed import BlockIndex, PackedWeight

__all__ = ["BlockIndex", "BlockLayout", "PackedWeight"]
