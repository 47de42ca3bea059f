"""The only code that changes masks while a model trains."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pathways.checks import check_count, unknown_pathway
from sparse_pathways.mask import block_dots, pack_bits, unpack_bits
from sparse_pathways.nn import SparseLinear
from sparse_pathways.prune import distributed
from sparse_pathways.prune.decide import check_apart, check_reachable, select, set_initial_masks_
from sparse_pathways.prune.distributed import own_part, whole
from sparse_pathways.prune.event import PruneEvent
from sparse_pathways.prune.plan import PruningPlan
from sparse_pathways.prune.scores import ScoreMemory, is_finite, magnitude, memory_of
from sparse_pathways.prune.state import check_state
from sparse_pathways.prune.update import (
    MaskedUpdate,
    checked_optimizer,
    dense_mask,
    readable_weights,
    reset_moments,
    scale_blocks,
)

Masks = dict[str, Tensor]  # pathway, or layer, to bool tensor


class Pruner:
    """Decides the block masks of a model's `SparseLinear` layers by a plan, one call per optimiser step.

    With several processes (torch.distributed) all ranks must train the same pathway in a step; that, and the equality
    of every decision, is checked.

    Args:
        model: any module that holds `SparseLinear` layers (not wrapped for distributed training). Its initial masks
            and the layers' `dense_grad` are set here as the plan says: on resume make the Pruner first, then load the
            model's state and the Pruner's; or give `state`.
        plan: see `PruningPlan`; `sparse_pathways.methods` has those of the papers.
        optimizer: the one that updates all sparse layers; needed for `dense_grad=False` and `moments="reset"`.
        state: `state_dict()` of a run to go on with, whose masks the model has already; None: a new run.

    Raises:
        ValueError: no layer to prune; a pathway of the plan that a layer lacks; masks of the model that do not fit the
            plan; an optimiser that is missing or does not hold the layers' weights.
        RuntimeError: the processes start from different masks.
    """

    def __init__(
        self, model: nn.Module, plan: PruningPlan, optimizer: Any = None, state: dict[str, Any] | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; want an nn.Module")
        if not isinstance(plan, PruningPlan):
            more = "; phases, as those of methods.imp, are for run_phases" if isinstance(plan, tuple) else ""
            raise TypeError(f"plan is a {type(plan).__name__}; want a PruningPlan{more}")
        self.plan = plan
        self.layers = {
            name or type(model).__name__: module
            for name, module in model.named_modules()
            if isinstance(module, SparseLinear)
        }
        if not self.layers:
            raise ValueError("model holds no SparseLinear; call sparsify_(model, ...) first")
        self.pathways = self._governed()
        check_apart(self.layers, plan)
        for name, layer in self.layers.items():
            if layer.gates is not None:
                raise ValueError(f"{name}: another Pruner draws the gates of its blocks; call its detach() first")
        self.steps = 0
        self._detached = False
        self.batches = dict.fromkeys(self.pathways, 0)
        self._memory = memory_of(plan.score)
        self._explored: Masks | None = None  # bool [P, NB, KB]: kept at some time since the schedule ended
        self._owed: tuple[str, ...] = ()  # pathways whose decision an error has put off
        self._fixed = plan.freeze == 0
        self._gaps = {name: [plan.interval, plan.interval] for name in self.pathways}  # interval now, next count
        self._optimizer = checked_optimizer(optimizer, plan, self.layers)
        self._update: MaskedUpdate | None = None
        if self._optimizer is not None and not plan.dense_grad:
            self._update = MaskedUpdate(self._optimizer, {name: layer.weight for name, layer in self.layers.items()})
        for layer in self.layers.values():
            layer.dense_grad = plan.dense_grad
        if state is None:
            set_initial_masks_(self.layers, self.pathways, plan)
            check_reachable(self.layers, self.pathways, plan)
        if self._memory is not None:
            for name, layer in self.layers.items():
                self._memory.start(name, len(self.pathways), self._magnitude(layer))
            self._set_gates(not self._fixed)
        if distributed.several_processes():
            distributed.check_same_masks({name: self._stacked(layer) for name, layer in self.layers.items()}, step=0)
        if state is not None:
            self.load_state_dict(state)

    def _governed(self) -> tuple[str, ...]:
        first, layer = next(iter(self.layers.items()))
        names = self.plan.pathways or tuple(layer.pathways)
        for layer_name, layer in self.layers.items():
            missing = [name for name in names if name not in layer.pathways]
            if missing:
                raise ValueError(
                    f"PruningPlan.pathways: {layer_name} has no pathway {missing[0]!r}, only "
                    f"{', '.join(layer.pathways)}; name it in sparsify_, or leave it out of the plan"
                    + ("" if self.plan.pathways else f" ({first} has it)")
                )
        return names

    # --- one optimiser step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, pathway: str | None = None) -> PruneEvent | None:
        """Call after `optimizer.step()` and before `zero_grad()`: scores may read gradients.

        Args:
            pathway: that of the batch just trained; may be left out when the plan governs one pathway only.

        Returns:
            What was decided, or None when no decision was due.

        Raises:
            KeyError: pathway not governed by the plan.
            FloatingPointError: w * g, a weight or a score is NaN or infinite; names layer and step. Averages and masks
                stay as they were; a decision that was due is made at the next step. (A step that a gradient scaler
                skipped leaves infinite gradients: do not call this after it.)
            ValueError: a pathway without batches must be decided by its gradients.
            RuntimeError: no layer has a gradient to score by; the optimiser has made no step since the last call, and
                its steps are to be kept inside the pathway; the processes disagree.
        """
        pathway = self._trained(pathway)
        step = self.steps + 1
        open_masks = self.plan.freeze is None or step <= self.plan.freeze
        per_pathway = self.plan.masks == "own" or self._memory is not None
        if distributed.several_processes() and (self._update is not None or (open_masks and per_pathway)):
            index = self.pathways.index(pathway)
            distributed.check_same_pathway(index, self.pathways, step, next(iter(self.layers.values())).weight.device)
        if self._update is not None:
            self._update.restore({name: dense_mask(layer.mask(pathway), layer) for name, layer in self.layers.items()})
        if open_masks and self._memory is not None:
            self._observe(self._memory, pathway, step)
        else:  # a shard is looked at when a decision gathers it
            layers = {n: layer for n, layer in self.layers.items() if own_part(layer.weight) is layer.weight}
            weights = readable_weights(layers, fixed=not open_masks or self.plan.freeze == 0)
            self._refuse_non_finite(weights, step, f"a weight after a batch of pathway {pathway!r}")
        self.steps = step
        self.batches[pathway] += 1
        due = tuple(name for name in self.pathways if name in {*self._owed, *self._due(pathway)})
        if self._explored is None and step > self.plan.schedule_end:
            self._explored = {name: self._stacked(layer) for name, layer in self.layers.items()}
        self._owed = due  # an error in the decision puts it off to the next step, it is not lost
        event = self._decide(due, pathway) if due else None
        self._owed = ()
        if event is not None and self.plan.churn is not None:
            self._adapt_gaps(event)
        if not self._fixed and self.plan.freeze is not None and step >= self.plan.freeze:
            self._fixed = True
            self._set_gates(False)
            if self.plan.after_freeze == "inside":
                self._stay_inside()
        return event

    def _set_gates(self, on: bool) -> None:
        """Have the layers ask for the gates of their blocks, or no longer."""
        if self._memory is None or not self._memory.gates:
            return
        for name, layer in self.layers.items():
            owner = None if layer.gates is None else layer.gates.func.__self__  # type: ignore[attr-defined]
            if owner in (None, self):
                layer.gates = functools.partial(self._gate, name) if on else None

    def _gate(self, name: str, pathway: str, training: bool) -> Tensor | None:
        if not training or self._memory is None or pathway not in self.batches:
            return None
        return self._memory.gate(name, self.pathways.index(pathway), self.batches[pathway])

    def _stay_inside(self, inside: bool = True) -> None:
        """From here on a pathway's updates stay inside its masks (variant B), or no longer do."""
        for layer in self.layers.values():
            layer.dense_grad = not inside
        if not inside:
            if self._update is not None:
                self._update.detach()
            self._update = None
        elif self._update is None and self._optimizer is not None:
            weights = {name: layer.weight for name, layer in self.layers.items()}
            self._update = MaskedUpdate(self._optimizer, weights)

    def _adapt_gaps(self, event: PruneEvent) -> None:
        """Decide more often what changes much, less often what hardly does."""
        plan = self.plan
        assert plan.churn is not None
        changed = max(event.pruned, event.regrown) / max(1.0, event.density * event.blocks)
        for name in event.decided:
            gap = self._gaps[name][0]
            if changed > plan.churn:
                gap = max(gap // 2, plan.interval // 8, 1)
            elif changed < plan.churn / 2:
                gap = min(gap * 2, plan.interval * 8)
            count = self.steps if plan.masks == "shared" else self.batches[name]
            self._gaps[name] = [gap, count + gap]

    def _trained(self, pathway: str | None) -> str:
        if pathway is None:
            if len(self.pathways) > 1:
                raise ValueError(f"pathway is None, but there are several: name one of {', '.join(self.pathways)}")
            return self.pathways[0]
        if not isinstance(pathway, str) or pathway not in self.batches:
            raise unknown_pathway(pathway, self.pathways)
        return pathway

    def _observe(self, memory: ScoreMemory, pathway: str, step: int) -> None:
        """Gradient scores of this batch enter the averages, of all layers or of none."""
        found = {
            name: block_dots(whole(layer.weight), whole(layer.weight.grad), layer.block)
            for name, layer in self.layers.items()
            if layer.weight.grad is not None
        }
        if not found:
            frozen = not any(layer.weight.requires_grad for layer in self.layers.values())
            raise RuntimeError(
                f"no layer has a gradient at step {step}, and PruningPlan.score = {self.plan.score} reads weight.grad; "
                + (
                    "every sparse layer's weight has requires_grad = False: leave it True, an optimiser that does not "
                    "hold the weight does not move it"
                    if frozen
                    else "call pruner.step after backward and optimizer.step, before zero_grad"
                )
            )
        self._refuse_non_finite(found, step, f"w * g of a batch of pathway {pathway!r}")
        index = self.pathways.index(pathway)
        for name, layer in self.layers.items():
            # A layer that this batch did not use has zero gradient.
            signal = found[name] if name in found else torch.zeros_like(layer.mask(pathway), dtype=torch.float32)
            memory.add(name, index, signal, self.batches[pathway] + 1)
            factor = memory.rescale(name, signal, step)
            if factor is not None:
                scale_blocks(layer, factor)

    def _refuse_non_finite(self, scores: Masks, step: int, what: str) -> None:
        for name, finite in zip(scores, is_finite(list(scores.values())), strict=True):
            if not finite:
                raise FloatingPointError(
                    f"{name}: {what} is NaN or infinite at step {step}; it was not recorded and no mask changed. "
                    "Lower the learning rate, clip gradients, or skip such batches before optimizer.step"
                )

    # --- decisions ----------------------------------------------------------------------------------------------------

    def _due(self, pathway: str) -> tuple[str, ...]:
        """Pathways to decide now."""
        plan = self.plan
        if plan.freeze is not None and self.steps > plan.freeze:
            return ()
        if self.steps in (plan.freeze, plan.schedule_end):
            return self.pathways  # however few batches it had
        if self.steps in plan.appointed:
            return tuple(name for name in self.pathways if self._memory is None or self.batches[name])
        count = self.steps if plan.masks == "shared" else self.batches[pathway]
        if count % plan.interval if plan.churn is None else count < self._gaps[pathway][1]:
            return ()
        return self.pathways if plan.masks == "shared" else (pathway,)

    def _scores(self, name: str, decided: tuple[str, ...]) -> Tensor:
        """Scores `[G, NB, KB]`: one per decided pathway, or one in all for a shared mask."""
        layer = self.layers[name]
        if self._memory is None:
            score = self._magnitude(layer)
            return score.expand(1 if self.plan.masks == "shared" else len(decided), *score.shape)
        scores = [
            self._memory.score(name, self.pathways.index(pathway), self.batches[pathway])
            for pathway in decided
            if self.batches[pathway]
        ]
        if self.plan.masks == "shared":
            return torch.stack(scores).sum(0, keepdim=True)
        if len(scores) < len(decided):
            unseen = next(pathway for pathway in decided if not self.batches[pathway])
            raise ValueError(
                f"pathway {unseen!r} had no batch by step {self.steps}, so its masks cannot be decided by gradient; "
                "train on it, or leave it out of PruningPlan.pathways"
            )
        return torch.stack(scores)

    @torch.no_grad()
    def _magnitude(self, layer: SparseLinear) -> Tensor:
        return magnitude(whole(layer.weight), layer.block, self.plan.score)

    def _decide(self, decided: tuple[str, ...], pathway: str) -> PruneEvent:
        sparsity = self.plan.schedule(self.steps)
        shared = self.plan.masks == "shared"
        scores = {name: self._scores(name, decided) for name in self.layers}
        self._refuse_non_finite(scores, self.steps, "the score of a block")
        before = {}
        for name, layer in self.layers.items():
            old = [layer.mask(each) for each in decided]
            before[name] = functools.reduce(torch.bitwise_or, old)[None] if shared else torch.stack(old)
        after = select(self.plan, scores, before, sparsity)
        if distributed.several_processes():
            distributed.check_same_masks(after, self.steps)
        for name in self.layers:
            masks = after[name].expand(len(decided), *after[name].shape[1:])
            self._apply(name, decided, masks)
            if self._explored is not None:
                for pathway, mask in zip(decided, masks, strict=True):
                    self._explored[name][self.pathways.index(pathway)] |= mask
        return PruneEvent.of(self.steps, pathway, decided, sparsity, before, after)

    def _apply(self, name: str, decided: tuple[str, ...], masks: Tensor) -> None:
        layer = self.layers[name]
        optimizer = self._optimizer if self.plan.moments == "reset" else None
        used = None if optimizer is None else torch.stack(list(layer.masks.values())).any(0)
        if self.plan.masks == "shared" and decided == layer.pathways:
            layer.set_mask_(masks[0])  # one re-pack for all pathways
        else:
            for pathway, mask in zip(decided, masks, strict=True):
                layer.set_mask_(mask, pathway)
        if optimizer is not None and used is not None:
            changed = used ^ torch.stack(list(layer.masks.values())).any(0)
            reset_moments(optimizer, layer.weight, dense_mask(changed, layer))

    def explored(self) -> dict[str, float]:
        """Share of blocks, in [0, 1], that each pathway has kept at some time since the schedule ended; its density
        when no mask has changed since, and before. Source: exploration rate of arXiv 2102.02887, per pathway."""
        masks = self._explored or {name: self._stacked(layer) for name, layer in self.layers.items()}
        kept = torch.stack([mask.flatten(1).sum(1) for mask in masks.values()]).sum(0).tolist()
        blocks = sum(mask[0].numel() for mask in masks.values())
        return {name: count / blocks for name, count in zip(self.pathways, kept, strict=True)}

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model (masks are in its buffers) and the optimiser; plain data and
        tensors."""
        return {
            "plan": self.plan.to_dict(),
            "steps": self.steps,
            "pathways": list(self.pathways),
            "blocks": {name: list(layer.block) for name, layer in self.layers.items()},
            "batches": dict(self.batches),
            "owed": list(self._owed),
            "gaps": {name: list(gap) for name, gap in self._gaps.items()} if self.plan.churn is not None else {},
            "explored": {name: pack_bits(mask.flatten(1)) for name, mask in (self._explored or {}).items()},
            "averages": {name: value.clone() for name, value in self._memory.tensors.items()} if self._memory else {},
            "fingerprints": self._fingerprints(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Load the model's state first: its masks are checked against the saved ones.

        Raises:
            ValueError: another plan, other layers, or masks in the model that are not those of the saved run.
        """
        check_state(state, self.plan, self.pathways, self.layers, self._fingerprints(), self._memory is not None)
        self.steps = check_count("state['steps']", state["steps"], 0)
        self.batches = {name: int(state["batches"][name]) for name in self.pathways}
        explored = {
            name: unpack_bits(bits, self.layers[name].mask().numel()).view(-1, *self.layers[name].mask().shape)
            for name, bits in state.get("explored", {}).items()
        }
        self._explored = explored or None
        for name, (gap, due) in state.get("gaps", {}).items():
            self._gaps[name] = [int(gap), int(due)]
        self._owed = tuple(state.get("owed", ()))
        self._fixed = self.plan.freeze is not None and self.steps >= self.plan.freeze and not self._owed
        if self.plan.after_freeze == "inside":
            self._stay_inside(self._fixed)
        if self._memory is not None:
            self._memory.tensors = {
                name: value.to(self._memory.tensors[name].device, copy=True)
                for name, value in state["averages"].items()
            }
            self._memory.replaced()
            self._set_gates(not self._fixed)

    def _fingerprints(self) -> dict[str, int]:
        hashes = [distributed.fingerprint(self._stacked(layer)) for layer in self.layers.values()]
        return dict(zip(self.layers, torch.stack(hashes).tolist(), strict=True))

    def _stacked(self, layer: SparseLinear) -> Tensor:
        """Masks of the governed pathways, bool `[P, NB, KB]`."""
        return torch.stack([layer.mask(pathway) for pathway in self.pathways])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied layers have left their gates behind: those of a copied or unpickled Pruner ask it."""
        self.__dict__.update(state)
        if not self._fixed and not self._detached and all(layer.gates is None for layer in self.layers.values()):
            self._set_gates(True)

    def detach(self) -> None:
        """Let model and optimiser go: from here on steps are no longer kept inside the pathways (`dense_grad=False`),
        and blocks have no gates."""
        self._detached = True
        self._set_gates(False)
        if self._update is not None:
            self._update.detach()
            self._update = None
