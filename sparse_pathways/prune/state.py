"""What a saved run has to be to go on here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_pathways.nn import SparseLinear
from sparse_pathways.prune.plan import PruningPlan


def check_state(
    state: Any,
    plan: PruningPlan,
    pathways: tuple[str, ...],
    layers: Mapping[str, SparseLinear],
    fingerprints: Mapping[str, int],
    learns: bool,
) -> None:
    """Refuse a `Pruner.state_dict()` of another plan, other pathways, layers or blocks, or other masks.

    Args:
        state: what was saved.
        plan: that of the Pruner.
        pathways: governed by it.
        layers: of the model, by name.
        fingerprints: of their masks now.
        learns: the score needs its averages.

    Raises:
        ValueError: names what differs.
    """
    if not isinstance(state, dict) or "plan" not in state or "fingerprints" not in state:
        raise ValueError("state is not what Pruner.state_dict() gave: it has no plan or no fingerprints")
    needed = ("steps", "batches", *(("averages",) if learns else ()))
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"state has no {missing[0]!r}; want all of what Pruner.state_dict() gave")
    here = plan.to_dict()
    for field, value in PruningPlan.from_dict(state["plan"]).to_dict().items():  # also one of an older version
        if here.get(field) != value:
            raise ValueError(
                f"PruningPlan.{field} is {here.get(field)!r}, in the saved state {value!r}; make the Pruner with "
                "PruningPlan.from_dict(state['plan'])"
            )
    names = tuple(state.get("pathways", pathways))
    if names != pathways:
        raise ValueError(
            f"the state is of the pathways {', '.join(names)}; the Pruner governs {', '.join(pathways)}: name those in "
            "PruningPlan.pathways, in that order"
        )
    saved, blocks = state["fingerprints"], state.get("blocks", {})
    for name in [*layers, *saved]:
        if name not in saved or name not in layers:
            raise ValueError(f"{name}: a layer of the {'model' if name in layers else 'saved state'} only")
        block = layers[name].block
        if tuple(blocks.get(name, block)) != block:
            raise ValueError(f"{name}: the saved run had blocks {tuple(blocks[name])}, the model has {block}")
        if fingerprints[name] != saved[name]:
            raise ValueError(
                f"{name}: the model's masks are not those of the saved run; make the Pruner, then load the model's "
                "state, then the pruner's"
            )
