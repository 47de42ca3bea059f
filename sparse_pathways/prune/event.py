"""What a decision of masks changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PruneEvent:
    """One decision of masks. Counts are of blocks over all layers and decided masks; a shared mask counts once.

    Attributes:
        step: optimiser steps so far, over all pathways.
        pathway: that of the batch just trained.
        decided: pathways whose masks were decided.
        sparsity: the scheduled one.
        density: kept blocks / blocks, after the decision.
        blocks: in all decided masks.
        pruned: blocks kept before and not after.
        regrown: blocks kept after and not before.
        iou: intersection over union of the masks before and after; 1.0 = unchanged.
    """

    step: int
    pathway: str
    decided: tuple[str, ...]
    sparsity: float
    density: float
    blocks: int
    pruned: int
    regrown: int
    iou: float

    @classmethod
    def of(
        cls,
        step: int,
        pathway: str,
        decided: tuple[str, ...],
        sparsity: float,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> PruneEvent:
        """The event of masks that were `before` and are `after`, per layer bool `[G, NB, KB]`; one transfer."""
        rows = [
            torch.stack([old.sum(), new.sum(), (old & new).sum()])
            for old, new in ((before[name], after[name]) for name in before)
        ]
        was, kept, both = torch.stack(rows).sum(0).tolist()
        blocks = sum(mask.numel() for mask in after.values())
        either = was + kept - both
        iou = both / either if either else 1.0
        return cls(step, pathway, decided, sparsity, kept / blocks, blocks, was - both, kept - both, iou)
