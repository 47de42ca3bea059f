"""Methods of several rounds: a list of phases, run one after the other in a folder that survives interruptions.

Iterative magnitude pruning, lottery tickets and masks made per language are rounds of training between which masks are
decided, weights go back to an earlier point, or masks are gathered from several rounds. A phase says which.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pathways.checks import FormatError, check_count, set_plain
from sparse_pathways.nn import SparseLinear, density, overlap, pathways, sparse_layers
from sparse_pathways.prune.decide import set_initial_masks_
from sparse_pathways.prune.plan import PruningPlan

GIVEN = "given"
END = "end.pt"
REPORT = "report.json"
State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One round of training by one plan.

    Attributes:
        name: distinct among the phases of a method; names the round's folder.
        plan: how masks are decided. Its `pathways` are what the round trains on.
        steps: optimiser steps of the round, with an optimiser of its own.
        start: the phase at whose end this one begins, weights and masks; "given": the model as it was handed over.
        masks: phases whose masks are taken over at the beginning, each those of its own plan's pathways.
        rewind: the phase at whose end the weights are taken from once the initial masks are decided; "given": the
            model as it was handed over; None: no rewinding.
    """

    name: str
    plan: PruningPlan
    steps: int
    start: str = GIVEN
    masks: tuple[str, ...] = ()
    rewind: str | None = None

    def __post_init__(self) -> None:
        plain = isinstance(self.name, str) and self.name.replace("-", "").replace("_", "").isalnum()
        if not plain or self.name == GIVEN:
            raise ValueError(f"Phase.name = {self.name!r}; want letters, digits, - and _, and not {GIVEN!r}")
        if not isinstance(self.plan, PruningPlan):
            raise TypeError(f"Phase.plan of {self.name} is a {type(self.plan).__name__}; want a PruningPlan")
        set_plain(self, "steps", check_count(f"Phase.steps of {self.name}", self.steps, 1, "optimiser steps"))
        last = max(self.plan.appointed)
        if last > self.steps:
            what = "freeze" if last == self.plan.freeze else "schedule ends"
            raise ValueError(
                f"Phase.steps = {self.steps} of {self.name} ends before its plan: {what} at step {last}; give the plan "
                "and the phase the same steps"
            )
        if isinstance(self.masks, str):
            raise TypeError(f"Phase.masks = {self.masks!r} of {self.name}; want a tuple of names, ({self.masks!r},)")
        set_plain(self, "masks", tuple(self.masks))

    @property
    def sources(self) -> tuple[str, ...]:
        """Phases that must be done before this one."""
        return tuple(dict.fromkeys(n for n in (self.start, *self.masks, self.rewind) if n not in (None, GIVEN)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {**values, "plan": self.plan.to_dict(), "masks": list(self.masks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Phase:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown or missing field, or a value that the phase or its plan refuses.
        """
        try:
            return cls(**{**values, "plan": PruningPlan.from_dict(values["plan"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a Phase: {error}") from error


Phases = Sequence[Phase]


def check_phases(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Refuse phases of equal names, and one that needs a phase which does not come before it."""
    seen: dict[str, Phase] = {}
    if isinstance(phases, Phase | PruningPlan) or not isinstance(phases, Iterable):
        raise TypeError(
            f"phases is a {type(phases).__name__}; want a sequence of Phase, such as "
            "(Phase(name=NAME, plan=PLAN, steps=STEPS),)"
        )
    for phase in phases:
        if not isinstance(phase, Phase):
            raise TypeError(f"phases holds a {type(phase).__name__}; want Phase")
        if phase.name in seen:
            raise ValueError(f"phases: two are called {phase.name!r}; want distinct names")
        for source in phase.sources:
            if source not in seen:
                raise ValueError(
                    f"phase {phase.name!r} needs {source!r}, which does not come before it; earlier phases: "
                    f"{', '.join(seen) or 'none'}"
                )
        for source in phase.masks:
            if seen[source].plan.pathways is None:
                raise ValueError(f"phase {phase.name!r} takes masks from {source!r}; name the pathways of that plan")
        seen[phase.name] = phase
    if not seen:
        raise ValueError("phases is empty; want at least one Phase")
    return tuple(seen.values())


def joint(
    source: Phases, plan: PruningPlan, steps: int, *, weights: str = GIVEN, name: str = "joint"
) -> tuple[Phase, ...]:
    """Append joint training that takes its masks from the last phase of every pathway of `source`.

    Args:
        source: phases that made masks: of all pathways at once (those of `imp`, or one with the plan of `lap`) or one
            chain per pathway (those of `lsp`).
        plan: of the joint phase; with `init="current"` it begins with the masks of `source`.
        steps: of the joint phase.
        weights: "given": those of the model as it was handed over; "source": those at the end of `source`, which must
            be one chain then.
        name: of the joint phase.
    """
    phases = check_phases(source)
    used = {start for phase in phases for start in phase.sources}
    last = [phase.name for phase in phases if phase.name not in used]
    if weights not in (GIVEN, "source"):
        raise ValueError(f"weights = {weights!r}; choose one of given, source")
    if weights == "source" and len(last) > 1:
        raise ValueError(f"weights = 'source', but source ends in {len(last)} models ({', '.join(last)}); want 'given'")
    if weights == "source":
        return (*phases, Phase(name=name, plan=plan, steps=steps, start=last[0]))
    return (*phases, Phase(name=name, plan=plan, steps=steps, masks=tuple(last)))


def begin_phase_(
    model: nn.Module, phase: Phase, state_of: Callable[[str], State], pathways_of: Callable[[str], Sequence[str]]
) -> PruningPlan:
    """Bring a model to the beginning of a phase: weights, masks taken over, masks decided, weights rewound.

    Args:
        model: with sparse layers, in any state.
        phase: what begins.
        state_of: state dict of the model at the end of a phase, by its name, and of the model as given ("given").
        pathways_of: the pathways that a phase of `phase.masks` made masks of.

    Returns:
        The plan to train with: the phase's, with initial masks that are there already.
    """
    model.load_state_dict(state_of(phase.start))
    layers = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, SparseLinear)}
    for source in phase.masks:
        take_masks_(layers, state_of(source), pathways_of(source))
    set_initial_masks_(layers, phase.plan.pathways or pathways(model), phase.plan)
    if phase.rewind is not None:
        masks = {name: layer.block_mask.clone() for name, layer in layers.items()}
        model.load_state_dict(state_of(phase.rewind))
        for name, layer in layers.items():
            _copy_bits(layer, masks[name])
    return replace(phase.plan, init="current")


def take_masks_(layers: Mapping[str, SparseLinear], state: State, names: Sequence[str]) -> None:
    """Take the masks of some pathways over from a state dict of the same model."""
    for name, layer in layers.items():
        key = f"{name}.block_mask".lstrip(".")
        if key not in state:
            raise ValueError(f"{name}: the state has no masks ({key}); want that of a model with sparse layers")
        bits = layer.block_mask.clone()
        for pathway in names:
            row = layer.pathways.index(pathway)
            bits[row] = state[key][row].to(bits.device)
        _copy_bits(layer, bits)


@torch.no_grad()
def _copy_bits(layer: SparseLinear, bits: Tensor) -> None:
    layer.block_mask.copy_(bits)  # the layer sees the write and re-packs


def phase_keys(phases: Phases, context: str = "") -> dict[str, str]:
    """Name to key of each phase: a hash of all that its end follows from, its sources and `context` included.

    Phases of different methods with the same settings have the same key: what one has trained, the other can use.
    """
    keys: dict[str, str] = {}
    for phase in check_phases(phases):
        content: dict[str, Any] = {"context": context, "plan": phase.plan.described(), "steps": phase.steps}
        for name in ("start", "masks", "rewind"):  # the sources count by what they are, not by their names
            content[name] = _by_key(getattr(phase, name), keys)
        keys[phase.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return keys


def _by_key(value: Any, keys: Mapping[str, str]) -> Any:
    return [keys[one] for one in value] if isinstance(value, tuple) else keys.get(value, value)


def run_phases(
    model: nn.Module,
    phases: Phases,
    train: Callable[[nn.Module, Phase, Path], None],
    folder: str | os.PathLike[str],
    context: str = "",
) -> nn.Module:
    """Run the phases that are not done yet; run again after an interruption, it goes on where it was.

    Every phase has a folder `NAME-KEY` with its end (`end.pt`, a state dict) and a `report.json`; the key is a hash of
    all settings, so that methods with common phases share them, and changed settings never meet old results.

    Args:
        model: with sparse layers; its state now is the "given" one.
        phases: from `sparse_pathways.methods`, or your own.
        train: `train(model, phase, folder)` trains `phase.steps` optimiser steps with a `Pruner(model, phase.plan,
            optimizer)`; it may keep checkpoints of its own in the folder, to resume within the phase.
        folder: of the whole run.
        context: what else training depends on (data, seed, learning rate): another text, other folders.

    Returns:
        The model at the end of the last phase.

    Raises:
        ValueError: phases that do not fit each other.
        RuntimeError: `train` left masks of another sparsity than that of the phase's plan.
        FormatError: a damaged `end.pt`.
    """
    phases = check_phases(phases)
    given = {name: value.clone() for name, value in model.state_dict().items()}
    keys = phase_keys(phases, f"{context} {_fingerprint(given)}")
    folders = {phase.name: Path(folder) / f"{phase.name}-{keys[phase.name]}" for phase in phases}
    plans = {phase.name: phase.plan for phase in phases}

    def state_of(name: str) -> State:
        return given if name == GIVEN else _read(folders[name] / END)

    for phase in phases:
        place = folders[phase.name]
        if (place / END).is_file():
            continue
        place.mkdir(parents=True, exist_ok=True)
        plan = begin_phase_(model, phase, state_of, lambda name: plans[name].pathways or ())
        train(model, replace(phase, plan=plan), place)
        _check_end(model, phase)
        _write(model, phase, place)
    model.load_state_dict(state_of(phases[-1].name))
    return model


def _check_end(model: nn.Module, phase: Phase) -> None:
    """Refuse to call a phase done that has not reached its sparsity."""
    layers, target = sparse_layers(model), phase.plan.schedule(phase.steps)
    if phase.plan.pattern is not None:  # groups cut off at the end of a row keep more
        return
    for name in phase.plan.pathways or pathways(model):
        found = 1.0 - density(model, name)["total"]
        blocks = sum(layer.mask(name).numel() for layer in layers.values() if isinstance(layer, SparseLinear))
        if abs(found - target) * blocks > len(layers):
            raise RuntimeError(
                f"phase {phase.name!r}: train() left pathway {name!r} at sparsity {found:.4f}, its plan ends at "
                f"{target}; train phase.steps = {phase.steps} optimiser steps, each with pruner.step(pathway) of a "
                f"Pruner(model, phase.plan, optimizer), and let interval = {phase.plan.interval} fit into them"
            )


def _read(path: Path) -> State:
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise FormatError(path, f"cannot be read ({error!r}); delete it to have the phase run again") from error


def _write(model: nn.Module, phase: Phase, place: Path) -> None:
    report = {
        "phase": phase.to_dict(),
        "density": {name: density(model, name) for name in pathways(model)},
        "overlap": overlap(model)["total"].tolist(),
    }
    (place / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial = place / f"{END}.{os.getpid()}.partial"
    torch.save(model.state_dict(), partial)
    partial.replace(place / END)  # last: its presence says that the phase is done


def _fingerprint(state: State) -> str:
    """Hash of tensors, the same on every machine."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
