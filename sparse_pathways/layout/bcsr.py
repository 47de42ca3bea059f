"""Index lists of a block mask, for the product and for the transposed product.

Layout `bcsr`: block rows one after the other. `crow [NB + 1]` says where each block row begins, `col` holds the block
column of every kept block. The transposed order is a second pair of lists plus `pos_t`, which points into the same
values: transposing moves no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_pathways.checks import Block, check_block, check_mask, grid


def id_dtype(count: int) -> torch.dtype:
    """Dtype of block ids below `count`: 16 bits where they fit, since the kernels read one id per block."""
    return torch.uint16 if count <= 1 << 16 else torch.int32


def compress(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(crow int32 `[NB + 1]`, col `[nnz]`) of a bool mask `[NB, KB]`."""
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(mask.sum(1, dtype=torch.int32), 0, dtype=torch.int32, out=crow[1:])
    return crow, mask.nonzero()[:, 1].to(id_dtype(mask.shape[1]))


def block_rows(crow: Tensor, count: int) -> Tensor:
    """Block row of each of the `count` kept blocks, int64 `[count]`."""
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return torch.repeat_interleave(rows, crow.diff(), output_size=count)


def transpose(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_t, row_t, pos_t) of the same blocks in column order."""
    rows = block_rows(crow, col.numel())
    cols, pos_t = torch.sort(col.to(torch.int32), stable=True)
    edges = torch.arange(columns + 1, dtype=torch.int32, device=crow.device)
    crow_t = torch.searchsorted(cols, edges, out_int32=True)
    return crow_t, rows[pos_t].to(id_dtype(crow.numel() - 1)), pos_t.to(torch.int32)


@dataclass(eq=False)
class BlockLayout:
    """Index lists of one block mask; built by `BlockLayout.from_mask`.

    Attributes:
        shape: (N, K) of the weight.
        block: (R, C).
        crow: int32 `[NB + 1]`, start of each block row.
        col: uint16 (int32 where KB > 65536) `[nnz]`, block column of each kept block, ascending within a block row.
        crow_t: int32 `[KB + 1]`, start of each block column in the transposed order.
        row_t: like col `[nnz]`, block row of each block in the transposed order.
        pos_t: int32 `[nnz]`, position in row order of each block of the transposed order.
    """

    shape: tuple[int, int]
    block: Block
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    row_t: Tensor
    pos_t: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, block: Block, shape: tuple[int, int]) -> BlockLayout:
        """Index lists of `mask`, built on its own device without a loop over blocks.

        Args:
            mask: bool `[NB, KB]`.
            block: (R, C).
            shape: (N, K).

        Raises:
            ValueError, TypeError: mask, block and shape do not fit together.
        """
        block, shape = check_block(block), (int(shape[0]), int(shape[1]))
        check_mask(mask, block, shape)
        crow, col = compress(mask)
        return cls(shape, block, crow, col, *transpose(crow, col, mask.shape[1]))

    def __reduce__(self):  # type: ignore[no-untyped-def]
        # torch cannot pickle uint16 storages; the mask says it all.
        return BlockLayout.from_mask, (self.to_mask(), self.block, self.shape)

    @property
    def num_blocks(self) -> int:
        """Number of kept blocks."""
        return self.col.numel()

    @property
    def density(self) -> float:
        """Kept share of the block grid, in [0, 1]."""
        blocks, columns = grid(self.shape, self.block)
        return self.num_blocks / (blocks * columns) if blocks * columns else 1.0

    def to_mask(self) -> Tensor:
        """The bool block mask `[NB, KB]` again."""
        mask = torch.zeros(grid(self.shape, self.block), dtype=torch.bool, device=self.crow.device)
        mask[block_rows(self.crow, self.num_blocks), self.col.long()] = True
        return mask

    def update_(self, mask: Tensor) -> BlockLayout:
        """Re-pack in place for a changed mask; lists of unchanged length keep their memory (captured graphs)."""
        fresh = self.from_mask(mask.to(self.crow.device), self.block, self.shape)
        for name in ("crow", "col", "crow_t", "row_t", "pos_t"):
            old, new = getattr(self, name), getattr(fresh, name)
            if old.shape == new.shape:
                old.copy_(new)
            else:
                setattr(self, name, new)
        return self

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        device = torch.device(device)
        lists = (self.crow, self.col, self.crow_t, self.row_t, self.pos_t)
        return BlockLayout(self.shape, self.block, *(t.to(device) for t in lists))
