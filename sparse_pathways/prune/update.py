"""What an optimiser step may do to a weight that several pathways share, and what it remembers of changed blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_pathways.mask import expand_blocks, expand_mask
from sparse_pathways.nn import SparseLinear
from sparse_pathways.prune.distributed import own_part, part_like
from sparse_pathways.prune.plan import PruningPlan
from sparse_pathways.prune.scores import is_finite


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimiser inside a wrapper that holds it as `.optimizer` (accelerate), or itself."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; want a torch.optim.Optimizer")
    return inner


def check_holds(optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Refuse an optimiser that does not update a weight that needs a gradient (made before the layers were swapped)."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, weight in weights.items():
        if weight.requires_grad and id(weight) not in held:
            raise ValueError(
                f"optimizer does not hold {name}.weight; want one optimiser of all sparse layers, made from "
                "model.parameters() after sparsify_"
            )


def moments(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """State tensors of the weight's shape, by name: momentum, averages of gradients and their squares, ..."""
    state = optimizer.state.get(weight, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == weight.shape}


def reset_moments(optimizer: Optimizer, weight: Tensor, where: Tensor) -> None:
    """Zero the moments of `weight` where the bool `[N, K]` is True."""
    where = part_like(where, weight)
    for value in moments(optimizer, weight).values():
        own_part(value).masked_fill_(where, 0.0)


def checked_optimizer(optimizer: Any, plan: PruningPlan, layers: Mapping[str, SparseLinear]) -> Optimizer | None:
    """The optimiser that updates the layers; None where none is given and the plan does not act on it."""
    if optimizer is None:
        needs = [
            f"{name} = {value!r}"
            for name in ("dense_grad", "moments", "after_freeze")
            if (value := getattr(plan, name)) in (False, "reset", "inside")
        ]
        if needs:
            raise ValueError(f"optimizer is None, but PruningPlan.{needs[0]} acts on it; pass it")
        return None
    optimizer = torch_optimizer(optimizer)
    check_holds(optimizer, {name: layer.weight for name, layer in layers.items()})
    return optimizer


def scale_blocks(layer: SparseLinear, factor: Tensor) -> None:
    """Multiply every block of the weight with its `factor` `[NB, KB]`."""
    wide = expand_blocks(factor, layer.block, (layer.out_features, layer.in_features))
    own_part(layer.weight).mul_(part_like(wide.to(layer.weight.dtype), layer.weight))


def dense_mask(mask: Tensor, layer: SparseLinear) -> Tensor:
    """Block mask to bool `[N, K]`."""
    return expand_mask(mask, layer.block, (layer.out_features, layer.in_features))


def readable_weights(layers: Mapping[str, SparseLinear], fixed: bool) -> dict[str, Tensor]:
    """The weights that a NaN in would matter of. With masks that are `fixed`, what all pathways have pruned is never
    read again, and comes as zero where a weight is not finite."""
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
    if fixed:
        for name, finite in zip(layers, is_finite(list(weights.values())), strict=True):
            if not finite:
                used = torch.stack(list(layers[name].masks.values())).any(0)
                weights[name] = torch.where(dense_mask(used, layers[name]), weights[name], 0.0)
    return weights


class MaskedUpdate:
    """Undoes, after an optimiser step, what it did outside a mask: gradients alone do not decide that, momentum and
    weight decay move weights of zero gradient too.

    A hook of the optimiser copies weights and moments before each step; `restore` puts them back. Costs one copy of
    both in memory.
    """

    def __init__(self, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer
        self.weights = dict(weights)
        self._before: dict[str, dict[str, Tensor]] | None = None
        self._hook = optimizer.register_step_pre_hook(self._save)

    @torch.no_grad()
    def _save(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._before is not None:
            raise RuntimeError(
                "optimizer.step() was called twice without a step of every Pruner that watches it: the first update "
                "would reach weights outside the pathway; call pruner.step(pathway) after every optimizer.step, and "
                "pruner.detach() when done, also of a Pruner made earlier for this optimizer"
            )
        self._before = {
            name: {
                "weight": own_part(weight).clone(),
                **{key: own_part(value).clone() for key, value in moments(optimizer, weight).items()},
            }
            for name, weight in self.weights.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled optimiser has lost its hooks: hang this one's up again."""
        self.__dict__.update(state)
        self._hook = self.optimizer.register_step_pre_hook(self._save)

    @torch.no_grad()
    def restore(self, masks: Mapping[str, Tensor]) -> None:
        """Put weights and moments outside `masks` (layer to bool `[N, K]`) back to what they were before the step."""
        if self._before is None:
            raise RuntimeError(
                "the optimizer given to Pruner has made no step since the last pruner.step(pathway), so there is "
                "nothing to keep inside the pathway; call pruner.step after optimizer.step of that optimizer, and not "
                "after a step that a gradient scaler skipped"
            )
        for name, weight in self.weights.items():
            before, inside = self._before[name], part_like(masks[name], weight)
            own_part(weight).copy_(torch.where(inside, own_part(weight), before["weight"]))
            for key, value in moments(self.optimizer, weight).items():
                own = own_part(value)
                # Moments born in this step were zero before it.
                own.copy_(torch.where(inside, own, before.get(key, torch.zeros_like(own))))
        self._before = None

    def detach(self) -> None:
        """Remove the hook."""
        self._hook.remove()
        self._before = None
