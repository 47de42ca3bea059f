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


def rows_of(crow: Tensor, col: Tensor) -> Tensor:
    """Block row of every entry of `col`, in its dtype; the last block row behind the last entry. Never waits."""
    entries = torch.arange(col.numel(), dtype=torch.int32, device=crow.device)
    rows = torch.searchsorted(crow, entries, right=True, out_int32=True) - 1
    return rows.clamp(max=crow.numel() - 2).to(id_dtype(crow.numel() - 1))


def static_lists(mask: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """(bits, crow, col, crow_t, row_t, pos_t, row, needed) of a bool mask, with room for `capacity` blocks.

    No size depends on the mask, so the host never waits for the device and a CUDA graph can capture this. `needed`
    (int32 `[1]`) says how many blocks the mask keeps; if more than `capacity`, the lists hold the first ones only, and
    an assertion fails: at once on the CPU, at the next synchronisation on CUDA.
    """
    (blocks, columns), size = mask.shape, mask.numel()
    flat = mask.flatten()
    place = flat.cumsum(0, dtype=torch.int32) - 1  # of every kept block in row order
    kept = flat & (place < capacity)
    number = torch.arange(size, device=mask.device)

    def listed(order: Tensor, numbers: Tensor) -> Tensor:
        """`numbers` of the kept blocks at their places; all others land behind the last place."""
        room = torch.zeros(capacity + 1, dtype=torch.int32, device=mask.device)
        return room.scatter_(0, order.long(), numbers.to(torch.int32))[:capacity]

    def starts(counts: Tensor) -> Tensor:
        return torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])

    grid = kept.view(blocks, columns)
    turned = grid.T.flatten()
    slot = torch.where(kept, place, capacity)
    slot_t = torch.where(turned, turned.cumsum(0, dtype=torch.int32) - 1, capacity)
    needed = flat.sum(dtype=torch.int32).view(1)
    torch._assert_async(
        needed <= capacity, f"a block mask keeps more than the {capacity} blocks that its layout has room for"
    )
    return (
        pack_bits(flat),
        starts(grid.sum(1, dtype=torch.int32)),
        listed(slot, number % columns).to(id_dtype(columns)),
        starts(grid.sum(0, dtype=torch.int32)),
        listed(slot_t, number % blocks).to(id_dtype(blocks)),
        listed(slot_t, place.view(blocks, columns).T.flatten()),
        listed(slot, number // columns).to(id_dtype(blocks)),
        needed,
    )


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
        row: like row_t `[nnz]`, block row of each block in row order; None until `rows()` is called.
        needed: int32 `[1]`, number of kept blocks, where the lists have a fixed capacity; else None.
    """

    shape: tuple[int, int]
    block: Block
    bits: Tensor
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    row_t: Tensor
    pos_t: Tensor
    row: Tensor | None = None
    needed: Tensor | None = None

    def __post_init__(self) -> None:
        if self.crow.is_cuda:  # at once: not under a compiler or inference_mode, where a first training step may be
            self.rows()

    @classmethod
    def from_mask(cls, mask: Tensor, block: Block, shape: tuple[int, int], capacity: int | None = None) -> BlockLayout:
        """Index lists of `mask`, built on its own device without a loop over blocks.

        Args:
            mask: bool `[NB, KB]`.
            block: (R, C).
            shape: (N, K).
            capacity: None: lists as long as the mask has blocks, which the host asks the device. A number: lists with
                room for that many blocks, built without waiting for the device; `update_` then never moves them, so a
                captured CUDA graph can go on with other masks. A mask with more blocks fails an assertion.

        Raises:
            ValueError, TypeError: mask, block and shape do not fit together.
        """
        block, shape = check_block(block), (int(shape[0]), int(shape[1]))
        check_mask(mask, block, shape)
        if capacity is None:
            return cls(shape, block, *torch.ops.sparse_pathways.bcsr_lists.default(mask.contiguous()))
        if not 0 < capacity <= mask.numel():
            raise ValueError(f"capacity = {capacity}; want 1 to {mask.numel()} (all blocks of the grid)")
        return cls(shape, block, *static_lists(mask, capacity))

    def __reduce__(self):  # type: ignore[no-untyped-def]
        # torch cannot pickle uint16 storages; the mask says it all.
        return BlockLayout.from_mask, (self.to_mask(), self.block, self.shape, self._capacity)

    @property
    def is_static(self) -> bool:
        """Whether the lists have a fixed capacity."""
        return self.needed is not None

    @property
    def _capacity(self) -> int | None:
        return self.col.numel() if self.is_static else None

    @property
    def num_blocks(self) -> int:
        """Number of kept blocks; with a fixed capacity the device is asked, which waits for it.

        Raises:
            RuntimeError: the mask keeps more blocks than the capacity.
        """
        if self.needed is None:
            return self.col.numel()
        needed = int(self.needed)
        if needed > self.col.numel():
            raise RuntimeError(f"the block mask keeps {needed} blocks, its layout has capacity = {self.col.numel()}")
        return needed

    @property
    def density(self) -> float:
        """Kept share of the block grid, in [0, 1]; with a fixed capacity, the share that has room."""
        blocks, columns = grid(self.shape, self.block)
        return self.col.numel() / (blocks * columns) if blocks * columns else 1.0

    def rows(self) -> Tensor:
        """Block row of each kept block, like col `[nnz]`; made at the first call."""
        if self.row is None:
            self.row = rows_of(self.crow, self.col)
        return self.row

    def to_mask(self) -> Tensor:
        """The bool block mask `[NB, KB]` again."""
        blocks, columns = grid(self.shape, self.block)
        return unpack_bits(self.bits, blocks * columns).view(blocks, columns)

    def updated(self, mask: Tensor) -> BlockLayout:
        """The layout of a changed mask: `from_mask`, but lists of unchanged block rows and columns are copied from
        here, which is the faster the fewer blocks have changed."""
        check_mask(mask, self.block, self.shape)
        if self.is_static:
            return BlockLayout.from_mask(mask.to(self.bits.device), self.block, self.shape, self._capacity)
        lists = torch.ops.sparse_pathways.bcsr_update.default(mask.to(self.bits.device).contiguous(), *self._lists())
        return BlockLayout(self.shape, self.block, *lists)

    def _lists(self) -> tuple[Tensor, ...]:
        return self.bits, self.crow, self.col, self.crow_t, self.row_t, self.pos_t

    def update_(self, mask: Tensor) -> BlockLayout:
        """Re-pack in place for a changed mask; lists of unchanged length keep their memory (captured graphs)."""
        fresh = self.updated(mask)
        for name in (*NAMES, "row", "needed"):
            old, new = getattr(self, name), getattr(fresh, name)
            if old is not None and new is not None and old.shape == new.shape:
                old.copy_(new)
            else:
                setattr(self, name, new)
        return self

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        device = torch.device(device)
        more = (None if one is None else one.to(device) for one in (self.row, self.needed))
        return BlockLayout(self.shape, self.block, *(one.to(device) for one in self._lists()), *more)
