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
from sparse_pathways.mask import pack_bits, unpack_bits

LISTS = "sparse_pathways::bcsr_lists"
UPDATE = "sparse_pathways::bcsr_update"
NAMES = ("bits", "crow", "col", "crow_t", "row_t", "pos_t")  # of the lists, in the order of the operators

torch.library.define(
    LISTS, "(Tensor mask) -> (Tensor bits, Tensor crow, Tensor col, Tensor crow_t, Tensor row_t, Tensor pos_t)"
)
torch.library.define(
    UPDATE,
    "(Tensor mask, Tensor bits, Tensor crow, Tensor col, Tensor crow_t, Tensor row_t, Tensor pos_t) -> "
    "(Tensor bits_, Tensor crow_, Tensor col_, Tensor crow_t_, Tensor row_t_, Tensor pos_t_)",
)


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


def reference_lists(mask: Tensor) -> tuple[Tensor, ...]:
    """(bits, crow, col, crow_t, row_t, pos_t) of a bool mask, in plain PyTorch on any device."""
    crow, col = compress(mask)
    return (pack_bits(mask.flatten()), crow, col, *transpose(crow, col, mask.shape[1]))


# CUDA tensors, and the CPU without its compiled library; csrc/torch/lists_cpu.cpp serves the CPU otherwise.
torch.library.register_kernel(LISTS, None, reference_lists)
torch.library.register_kernel(UPDATE, None, lambda mask, *before: reference_lists(mask))


@dataclass(eq=False)
class BlockLayout:
    """Index lists of one block mask; built by `BlockLayout.from_mask`.

    Attributes:
        shape: (N, K) of the weight.
        block: (R, C).
        bits: uint8 `[ceil(NB * KB / 8)]`, the mask in row order, lowest bit first.
        crow: int32 `[NB + 1]`, start of each block row.
        col: uint16 (int32 where KB > 65536) `[nnz]`, block column of each kept block, ascending within a block row.
        crow_t: int32 `[KB + 1]`, start of each block column in the transposed order.
        row_t: like col `[nnz]`, block row of each block in the transposed order.
        pos_t: int32 `[nnz]`, position in row order of each block of the transposed order.
    """

    shape: tuple[int, int]
    block: Block
    bits: Tensor
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
        return cls(shape, block, *torch.ops.sparse_pathways.bcsr_lists.default(mask.contiguous()))

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
        blocks, columns = grid(self.shape, self.block)
        return unpack_bits(self.bits, blocks * columns).view(blocks, columns)

    def updated(self, mask: Tensor) -> BlockLayout:
        """The layout of a changed mask: `from_mask`, but lists of unchanged block rows and columns are copied from
        here, which is the faster the fewer blocks have changed."""
        check_mask(mask, self.block, self.shape)
        lists = torch.ops.sparse_pathways.bcsr_update.default(mask.to(self.bits.device).contiguous(), *self._lists())
        return BlockLayout(self.shape, self.block, *lists)

    def _lists(self) -> tuple[Tensor, ...]:
        return self.bits, self.crow, self.col, self.crow_t, self.row_t, self.pos_t

    def update_(self, mask: Tensor) -> BlockLayout:
        """Re-pack in place for a changed mask; lists of unchanged length keep their memory (captured graphs)."""
        fresh = self.updated(mask)
        for name, old, new in zip(NAMES, self._lists(), fresh._lists(), strict=True):
            if old.shape == new.shape:
                old.copy_(new)
            else:
                setattr(self, name, new)
        return self

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        device = torch.device(device)
        return BlockLayout(self.shape, self.block, *(one.to(device) for one in self._lists()))
