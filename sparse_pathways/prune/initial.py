"""Masks at the start of a run, before any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sparse_pathways.mask import topk_mask
from sparse_pathways.nn import SparseLinear
from sparse_pathways.prune.plan import PruningPlan
from sparse_pathways.prune.scores import magnitude


@torch.no_grad()
def set_initial_masks_(layers: Mapping[str, SparseLinear], pathways: Sequence[str], plan: PruningPlan) -> None:
    """Give the layers the masks that `plan.init` names.

    Args:
        layers: by name.
        pathways: governed by the plan.
        plan: its `init`, `candidates`, `score` and `schedule(0)` are read.
    """
    if plan.init == "current":
        return
    sparsity = 0.0 if plan.init == "dense" else plan.schedule(0)
    for layer in layers.values():
        if plan.init == "dense" or plan.candidates == "all":
            masks = [topk_mask(magnitude(layer.weight, layer.block, plan.score), sparsity)] * len(pathways)
        else:
            masks = [_among_kept(layer, pathway, plan, sparsity) for pathway in pathways]
        for pathway, mask in zip(pathways, masks, strict=True):
            layer.set_mask_(mask, pathway)


def _among_kept(layer: SparseLinear, pathway: str, plan: PruningPlan, sparsity: float) -> torch.Tensor:
    """The highest blocks among those that the pathway keeps now: iterative pruning."""
    kept = layer.mask(pathway)
    scores = torch.where(kept, magnitude(layer.weight, layer.block, plan.score), -1.0)  # behind every kept block
    return topk_mask(scores, sparsity) & kept
