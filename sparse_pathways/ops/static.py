"""Index lists of fixed capacity of many masks, rebuilt in place: on CUDA by one launch for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_pathways.checks import Block, check_block, check_mask
from sparse_pathways.layout import BlockLayout
from sparse_pathways.layout.bcsr import id_dtype
from sparse_pathways.ops import library

torch.library.define("sparse_pathways::mask_lists", "(Tensor table, Tensor first, Tensor(a!) ticket, int jobs) -> ()")
torch.library.define("sparse_pathways::lists_jobs", "(int rows, int cols) -> int")
torch.library.define("sparse_pathways::lists_work", "(int rows, int cols) -> int")


@torch.library.register_fake("sparse_pathways::mask_lists")
def _fake_mask_lists(table, first, ticket, jobs):  # type: ignore[no-untyped-def]
    return None


class StaticLayouts:
    """Layouts of fixed capacity of the masks of many layers, for training steps captured in a CUDA graph.

    The masks are read at every `build`, which never moves a list and never waits for the device: capture
    `build`, the products with `layouts` and their backward once, change the masks in place, replay.

    Attributes:
        layouts: one BlockLayout per mask, of fixed capacity.
        state: int32 `[masks, 3]`: kept blocks; 1 if they exceed the capacity, in which case the lists are those of an
            empty mask; number of builds so far.
        one_launch: whether `build` is one launch (CUDA with the compiled library), or one update per mask.
    """

    def __init__(
        self,
        masks: Sequence[Tensor],
        blocks: Sequence[Block],
        shapes: Sequence[tuple[int, int]],
        capacities: Sequence[int],
    ) -> None:
        """Memory for the lists, and a first `build`.

        Args:
            masks: bool `[NB, KB]`, contiguous, all on one device. Kept, not copied.
            blocks: (R, C) of each.
            shapes: (N, K) of the weight of each.
            capacities: blocks that each may keep, 1 to NB * KB.

        Raises:
            ValueError, TypeError: lists of different lengths; masks that do not fit; a capacity out of range.
        """
        self._masks = list(masks)
        if not self._masks:
            raise ValueError("masks is empty; want those of at least one layer")
        for name, values in (("blocks", blocks), ("shapes", shapes), ("capacities", capacities)):
            if len(values) != len(self._masks):
                raise ValueError(f"{name} has {len(values)} entries for {len(self._masks)} masks")
        device = self._masks[0].device
        for number, (mask, block, shape, capacity) in enumerate(
            zip(self._masks, blocks, shapes, capacities, strict=True)
        ):
            check_mask(mask, check_block(block), shape)
            if not mask.is_contiguous() or mask.device != device:
                raise ValueError(f"masks[{number}]: want contiguous masks on one device, {device}")
            if not 0 < capacity <= mask.numel():
                raise ValueError(f"capacities[{number}] = {capacity}; want 1 to {mask.numel()} (all blocks)")
        self.state = torch.zeros(len(self._masks), 3, dtype=torch.int32, device=device)
        self.one_launch = _launches(device)
        if self.one_launch:
            self._set_up(blocks, shapes, capacities)
        else:
            self.layouts = [
                BlockLayout.from_mask(*one) for one in zip(self._masks, blocks, shapes, capacities, strict=True)
            ]
        self.build()

    def _set_up(self, blocks: Sequence[Block], shapes: Sequence[tuple[int, int]], capacities: Sequence[int]) -> None:
        """Memory of every layer, and the table that tells the kernel where it is."""
        self.layouts, self._work, rows, first = [], [], [], [0]
        device = self.state.device
        for mask, block, shape, capacity, state in zip(
            self._masks, blocks, shapes, capacities, self.state, strict=True
        ):
            lists = _memory(mask, capacity)
            work = torch.zeros(
                torch.ops.sparse_pathways.lists_work.default(*mask.shape), dtype=torch.int32, device=device
            )
            # The order of ListsLayer in csrc/cuda/kernels.h.
            tensors = (
                *(lists[name] for name in ("bits", "crow", "col", "row", "crow_t", "row_t", "pos_t")),
                state,
                work,
            )
            rows.append([mask.data_ptr(), *mask.shape, capacity, *(one.data_ptr() for one in tensors)])
            first.append(first[-1] + torch.ops.sparse_pathways.lists_jobs.default(*mask.shape))
            self.layouts.append(
                BlockLayout((int(shape[0]), int(shape[1])), check_block(block), **lists, needed=state[:1])
            )
            self._work.append(work)
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        self._first = torch.tensor(first, dtype=torch.int32, device=device)
        self._ticket = torch.zeros(2, dtype=torch.int32, device=device)
        self._jobs = first[-1]

    def build(self) -> None:
        """Rebuild all lists from the masks as they are now.

        Raises:
            RuntimeError: a mask keeps more blocks than its capacity; with one launch `check` says so instead.
        """
        if self.one_launch:
            torch.ops.sparse_pathways.mask_lists.default(self._table, self._first, self._ticket, self._jobs)
            return
        for layout, mask, state in zip(self.layouts, self._masks, self.state, strict=True):
            layout.update_(mask)
            state[:1] = layout.needed
            state[2] += 1

    def check(self, builds: int | None = None) -> None:
        """Ask the device, and wait for it.

        Args:
            builds: how often the lists should have been built by now; None: not asked.

        Raises:
            RuntimeError: a mask keeps more blocks than its capacity, or the lists were built another number of times
                (names the mask by its number).
        """
        for number, (kept, overflow, built) in enumerate(self.state.tolist()):
            if overflow:
                capacity = self.layouts[number].col.numel()
                raise RuntimeError(f"masks[{number}] keeps {kept} blocks, its layout has capacity = {capacity}")
            if builds is not None and built != builds:
                raise RuntimeError(f"the lists of masks[{number}] were built {built} times; want {builds}")


def _launches(device: torch.device) -> bool:
    return device.type == "cuda" and library.CUDA_MISSING is None


def _memory(mask: Tensor, capacity: int) -> dict[str, Tensor]:
    """The lists of one layout, by the names of BlockLayout."""
    (blocks, columns), device = mask.shape, mask.device

    def room(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    return {
        "bits": room((mask.numel() + 7) // 8, torch.uint8),
        "crow": room(blocks + 1),
        "col": room(capacity, id_dtype(columns)),
        "crow_t": room(columns + 1),
        "row_t": room(capacity, id_dtype(blocks)),
        "pos_t": room(capacity),
        "row": room(capacity, id_dtype(blocks)),
    }
