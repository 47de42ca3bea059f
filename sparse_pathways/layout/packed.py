"""Weights packed by block: one pool of values, one index list per pathway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import Block, check_block, check_mask, check_matrix, check_names, grid, unknown_pathway
from sparse_pathways.layout.bcsr import block_rows, compress

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)


class BlockIndex(NamedTuple):
    """Which blocks one pathway uses: `col[i]` is a block column, `pos[i]` its place in the values (None: i itself)."""

    crow: Tensor
    col: Tensor
    pos: Tensor | None


def gather_blocks(weight: Tensor, mask: Tensor, block: Block) -> Tensor:
    """Values `[nnz, C, R]` of the kept blocks in row order; edge blocks are padded with zeros."""
    (n, k), (blocks, columns), (rows, cols) = weight.shape, mask.shape, block
    padded = F.pad(weight, (0, columns * cols - k, 0, blocks * rows - n)) if n % rows or k % cols else weight
    return padded.reshape(blocks, rows, columns, cols).permute(0, 2, 3, 1)[mask].contiguous()


class PackedWeight:
    """A weight `[N, K]` of which only kept blocks are stored; several pathways share one pool of values.

    Build it with `PackedWeight.pack`. The values of the union of all pathways are stored once, in row order; a pathway
    that is the whole union needs no positions. Pruned values are not stored, so nothing in them can reach a product.

    Attributes:
        shape: (N, K).
        block: (R, C).
        pathways: names, in the order of a mixed batch's indices.
        values: `[nnz, C, R]`, R contiguous.
        scale: float32 `[NB * R]`, one per output, for int8 values; else None.
        quantise_x: int8 values only: True: products round each row of x to int8, too, and multiply integers (fastest);
            False: x stays float32.
        device: where the tensors are.
        indices: one BlockIndex per pathway.
        prepared: what operators keep with this weight, by pathway; theirs alone.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        block: Block,
        values: Tensor,
        scale: Tensor | None,
        masks: dict[str, Tensor],
        quantise_x: bool = True,
    ):
        """Index `values` (the union's blocks in row order) by `masks`, {name: bool `[NB, KB]`}."""
        self.shape, self.block, self.values, self.scale = shape, block, values, scale
        self.quantise_x = quantise_x and scale is not None
        self.device = values.device
        self.prepared: dict[object, Any] = {}
        self.pathways = tuple(masks)
        stacked = torch.stack(list(masks.values()))
        union = stacked.any(0)
        if int(union.sum()) != values.shape[0]:
            raise ValueError(f"masks keep {int(union.sum())} blocks in all, values holds {values.shape[0]}")
        place = (union.flatten().cumsum(0, dtype=torch.int32) - 1).view_as(union)
        self.indices = tuple(
            BlockIndex(*compress(mask), None if torch.equal(mask, union) else place[mask]) for mask in stacked
        )

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        mask: Tensor | Mapping[str, Tensor],
        block: Block = (8, 1),
        dtype: torch.dtype | None = None,
        quantise_x: bool = True,
    ) -> PackedWeight:
        """Pack the kept blocks of a dense weight.

        Args:
            weight: `[N, K]`, float.
            mask: bool `[NB, KB]`, or {pathway: bool `[NB, KB]`}; a bare mask becomes the pathway "default".
            block: (R, C).
            dtype: of the stored values: float32, float64, bfloat16, float16 or int8 (one scale per output); default the
                weight's.
            quantise_x: int8 only, see the attribute.

        Raises:
            TypeError, ValueError: arguments that do not fit together; int8 of values that are not finite.
        """
        block = check_block(block)
        weight = check_matrix("weight", weight).detach()
        if not weight.is_floating_point():
            raise TypeError(f"weight.dtype = {weight.dtype}; want a float weight (dtype=torch.int8 quantises it)")
        dtype = weight.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype = {dtype}; choose one of {', '.join(map(str, DTYPES))}")
        masks = dict(mask) if isinstance(mask, Mapping) else {"default": mask}
        check_names(masks)
        shape = (weight.shape[0], weight.shape[1])
        for name, one in masks.items():
            check_mask(one, block, shape, name=f"mask[{name!r}]" if isinstance(mask, Mapping) else "mask")
        masks = {name: one.to(weight.device) for name, one in masks.items()}
        union = torch.stack(list(masks.values())).any(0)
        values = gather_blocks(weight, union, block)
        scale = None
        if dtype == torch.int8:
            values, scale = _quantise(values, compress(union)[0])
        return cls(shape, block, values.to(dtype), scale, masks, quantise_x)

    def __reduce__(self):  # type: ignore[no-untyped-def]
        # torch cannot pickle uint16 storages; the masks say it all.
        masks = {name: self.mask(name) for name in self.pathways}
        return PackedWeight, (self.shape, self.block, self.values, self.scale, masks, self.quantise_x)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored values."""
        return self.values.dtype

    @property
    def x_dtype(self) -> torch.dtype:
        """Dtype of the activations that a product with this weight takes."""
        return self.values.dtype if self.scale is None else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: values, scales and index lists."""
        return sum(t.numel() * t.element_size() for t in self._tensors() if t is not None)

    def _tensors(self) -> list[Tensor | None]:
        return [self.values, self.scale, *(t for index in self.indices for t in index)]

    def index(self, pathway: str | None = None) -> BlockIndex:
        """The index lists of one pathway; the name may be left out when there is only one."""
        if pathway is None:
            if len(self.indices) == 1:
                return self.indices[0]
            raise ValueError(f"pathway is needed: this weight has {len(self.indices)} ({', '.join(self.pathways)})")
        try:
            return self.indices[self.pathways.index(pathway)]
        except ValueError:
            raise unknown_pathway(pathway, self.pathways) from None

    def mask(self, pathway: str | None = None) -> Tensor:
        """Bool block mask `[NB, KB]` of one pathway; of the union when the name is left out."""
        mask = torch.zeros(grid(self.shape, self.block), dtype=torch.bool, device=self.device)
        for index in self.indices if pathway is None else (self.index(pathway),):
            mask[block_rows(index.crow, index.col.numel()), index.col.long()] = True
        return mask

    def density(self, pathway: str | None = None) -> float:
        """Kept share of the blocks of one pathway; of the union (what is stored) when the name is left out."""
        blocks, columns = grid(self.shape, self.block)
        kept = self.values.shape[0] if pathway is None else self.index(pathway).col.numel()
        return kept / (blocks * columns) if blocks * columns else 1.0

    def unpack(self, pathway: str | None = None) -> Tensor:
        """Dense `[N, K]`, zero where pruned; of the union when the name is left out. int8 comes back as float32."""
        blocks, columns = grid(self.shape, self.block)
        values = self.values if self.scale is None else self.values.float()
        dense = values.new_zeros(blocks, columns, self.block[1], self.block[0])
        dense[self.mask()] = values
        if pathway is not None:
            dense[~self.mask(pathway)] = 0
        dense = dense.permute(0, 3, 1, 2).reshape(blocks * self.block[0], columns * self.block[1])
        if self.scale is not None:
            dense = dense * self.scale[:, None]
        return dense[: self.shape[0], : self.shape[1]].contiguous()

    def select(self, *pathways: str) -> PackedWeight:
        """A packed weight of these pathways alone, its values no longer shared with the others."""
        masks = {name: self.mask(name) for name in check_names(pathways)}
        kept = torch.stack(list(masks.values())).any(0)[self.mask()]
        return PackedWeight(self.shape, self.block, self.values[kept], self.scale, masks, self.quantise_x)

    def part(self, mask: Tensor) -> tuple[Tensor, BlockIndex]:
        """Copies of the values that `mask` (bool `[NB, KB]`, within the union) keeps, in row order, and their index."""
        return self.values[mask[self.mask()]], BlockIndex(*compress(mask), None)

    def _apply(self, convert) -> PackedWeight:  # type: ignore[no-untyped-def]
        moved = object.__new__(PackedWeight)
        moved.shape, moved.block, moved.pathways = self.shape, self.block, self.pathways
        moved.quantise_x = self.quantise_x
        moved.values, moved.prepared = convert(self.values), {}
        moved.device = moved.values.device
        moved.scale = None if self.scale is None else self.scale.to(moved.values.device)
        moved.indices = tuple(
            BlockIndex(convert(crow), convert(col), None if pos is None else convert(pos))
            for crow, col, pos in self.indices
        )
        return moved

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same packed weight on another device."""
        device = torch.device(device)
        return self._apply(lambda t: t.to(device))

    def __repr__(self) -> str:
        return (
            f"PackedWeight(shape={self.shape}, block={self.block}, dtype={self.dtype}, pathways={self.pathways}, "
            f"density={self.density():.3f})"
        )


def _quantise(values: Tensor, crow: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per output, taken over the kept values of that output."""
    if not torch.isfinite(values).all():
        raise ValueError("weight has kept values that are NaN or infinite; int8 cannot hold them")
    rows = block_rows(crow, values.shape[0])
    peak = values.abs().float().amax(1)  # [nnz, R]
    largest = torch.zeros(crow.numel() - 1, values.shape[2], dtype=torch.float32, device=values.device)
    largest.scatter_reduce_(0, rows[:, None].expand_as(peak), peak, "amax")
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return torch.round(values.float() / scale[rows][:, None, :]), scale.flatten()
