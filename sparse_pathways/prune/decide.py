"""From scores to masks, as a plan says: the initial ones and every later decision."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_pathways.mask import global_masks, nm_mask, topk_mask
from sparse_pathways.nn import SparseLinear
from sparse_pathways.prune.distributed import whole
from sparse_pathways.prune.plan import PruningPlan
from sparse_pathways.prune.scores import Learned, magnitude

Masks = dict[str, Tensor]  # layer to bool [G, NB, KB]


def select(plan: PruningPlan, scores: Mapping[str, Tensor], current: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Masks from scores.

    Args:
        plan: its `candidates`, `scope` and `floor` are read.
        scores: per layer `[G, NB, KB]`, one grid per mask to decide.
        current: bool, of the same shapes: what is kept now.
        sparsity: to reach.

    Returns:
        Bool, of the same shapes.
    """
    if plan.candidates == "kept":  # a pruned block ranks behind every kept one
        scores = {name: torch.where(current[name], score, -torch.inf) for name, score in scores.items()}
    if plan.scope == "global":
        count = next(iter(scores.values())).shape[0]
        decided = [global_masks([score[g] for score in scores.values()], sparsity, plan.floor) for g in range(count)]
        masks = {name: torch.stack(parts) for name, parts in zip(scores, zip(*decided, strict=True), strict=True)}
    else:
        masks = {name: torch.stack([_one(plan, grid, sparsity) for grid in score]) for name, score in scores.items()}
    if plan.candidates == "kept":
        masks = {name: mask & current[name] for name, mask in masks.items()}
    return masks


def _one(plan: PruningPlan, scores: Tensor, sparsity: float) -> Tensor:
    if plan.pattern is None:
        return topk_mask(scores, sparsity)
    return nm_mask(scores, *plan.pattern) if sparsity else torch.ones_like(scores, dtype=torch.bool)


@torch.no_grad()
def set_initial_masks_(layers: Mapping[str, SparseLinear], pathways: Sequence[str], plan: PruningPlan) -> None:
    """Give the layers the masks that `plan.init` names, before any step.

    Args:
        layers: by name.
        pathways: governed by the plan.
        plan: its `init`, `schedule(0)`, `score` and what `select` reads.
    """
    if plan.init == "current":
        return
    current = {name: torch.stack([layer.mask(one) for one in pathways]) for name, layer in layers.items()}
    if plan.masks == "shared":
        current = {name: mask.any(0, keepdim=True).expand_as(mask) for name, mask in current.items()}
    if plan.init == "dense":
        masks = {name: torch.ones_like(mask) for name, mask in current.items()}
    else:
        scores = {name: _initial_scores(name, layer, pathways, plan) for name, layer in layers.items()}
        masks = select(plan, scores, current, plan.schedule(0))
    for name, layer in layers.items():
        for pathway, mask in zip(pathways, masks[name], strict=True):
            layer.set_mask_(mask, pathway)


def _initial_scores(name: str, layer: SparseLinear, pathways: Sequence[str], plan: PruningPlan) -> Tensor:
    """`[P, NB, KB]`: magnitudes, the same for all; or random numbers that name and pathway decide."""
    score = magnitude(whole(layer.weight.detach()), layer.block, plan.score)
    if plan.init == "magnitude":
        return score.expand(len(pathways), *score.shape)
    # A shared mask is one draw; a pathway's own mask depends on its name, not on the order of the pathways.
    draws = []
    for pathway in pathways:
        seed = zlib.crc32(f"{name}/{'' if plan.masks == 'shared' else pathway}".encode())
        draws.append(torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(draws).to(score.device)


def check_reachable(layers: Mapping[str, SparseLinear], pathways: Sequence[str], plan: PruningPlan) -> None:
    """Refuse masks that the plan cannot bring, or has promised not to bring, to its sparsity."""
    target = plan.levels[-1]
    totals = dict.fromkeys(pathways, 0)
    blocks = 0
    for name, layer in layers.items():
        size = layer.mask().numel()
        least = round((1.0 - target) * size)
        blocks += size
        if plan.scope == "layer" and plan.freeze != 0 and size and least == 0 and target < 1.0:
            warnings.warn(
                f"{name}: none of its {size} blocks of {layer.block} is left at sparsity {target}, its output will be "
                "its bias alone; leave the layer out by sparsify_(filter_fn=...), or take smaller blocks",
                stacklevel=3,
            )
        unlike = any(not torch.equal(layer.mask(one), layer.mask(pathways[0])) for one in pathways)
        if plan.masks == "shared" and plan.freeze == 0 and unlike:
            raise ValueError(
                f"{name}: its pathways have different masks, PruningPlan.masks = 'shared' with freeze = 0 never makes "
                "them one; want masks = 'own', or init = 'magnitude'"
            )
        for pathway in pathways:
            kept = int(layer.mask(pathway).sum())
            totals[pathway] += kept
            short = plan.scope == "layer" and kept < least
            if plan.candidates == "kept" and plan.freeze != 0 and short:
                raise ValueError(
                    f"{name}: pathway {pathway!r} keeps {kept} blocks, fewer than the {least} of "
                    f"sparsity {target}, and candidates = 'kept' brings none back; want init = 'dense', or scope = "
                    "'global' if the masks were ranked over all layers"
                )
    for pathway, kept in totals.items():
        unlike = abs(kept - (1.0 - target) * blocks) > len(layers) and plan.pattern is None
        short = (1.0 - target) * blocks - kept > len(layers)
        if plan.candidates == "kept" and plan.freeze != 0 and short and plan.pattern is None:
            raise ValueError(
                f"pathway {pathway!r} keeps {kept} of {blocks} blocks, fewer than sparsity {target} leaves, and "
                "candidates = 'kept' brings none back; want init = 'dense'"
            )
        if plan.freeze == 0 and unlike:
            raise ValueError(
                f"pathway {pathway!r} has sparsity {1 - kept / blocks:.4f}, PruningPlan.schedule says {target} and "
                "freeze = 0 never decides it: set or load the masks before making the Pruner"
            )


def check_apart(layers: Mapping[str, SparseLinear], plan: PruningPlan) -> None:
    """Refuse layers that share one weight where an update of one of them would be undone, or done twice."""
    scaled = isinstance(plan.score, Learned) and plan.score.scale_lr > 0.0
    if plan.dense_grad and plan.after_freeze == "same" and not scaled:
        return
    found: dict[int, str] = {}
    for name, layer in layers.items():
        other = found.setdefault(id(layer.weight), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} share one weight, which updates inside pathways (dense_grad = False, after_freeze "
                "= 'inside') and Learned.scale_lr cannot follow: leave one of them out, or untie them"
            )
