"""What a pruning run does, as plain data: a few parts that combine freely."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sparse_pathways.checks import check_names, check_number, check_sparsity, set_plain
from sparse_pathways.mask import Constant, Cubic, Milestones, Schedule
from sparse_pathways.mask.schedule import check_steps
from sparse_pathways.prune.scores import Gradient, Learned, Magnitude, Movement, Score, as_score

CHOICES = {
    "candidates": ("all", "kept"),
    "masks": ("own", "shared"),
    "moments": ("keep", "reset"),
    "init": ("current", "dense", "magnitude", "random"),
    "after_freeze": ("same", "inside"),
}
KINDS: dict[str, type] = {
    "constant": Constant,
    "cubic": Cubic,
    "milestones": Milestones,
    "magnitude": Magnitude,
    "gradient": Gradient,
    "movement": Movement,
    "learned": Learned,
}
KIND_OF = {kind: name for name, kind in KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """How masks are decided while a model trains. The methods of the papers fill one in: `sparse_pathways.methods`.

    Attributes:
        schedule: sparsity by optimiser step, counted over all pathways: `Constant`, `Cubic` or `Milestones`.
        interval: a mask is decided again every `interval` optimiser steps; own masks count the steps of their own
            pathway, a shared mask counts all steps.
        freeze: optimiser step after which masks are fixed; at that step every mask is decided once more, so that all
            have the scheduled sparsity. 0: never decided, the initial masks stay. None: never fixed.
        churn: None: `interval` holds. Else decisions follow how much they change: while one prunes or brings back more
            than this share of the kept blocks of a mask, the mask's interval is halved, while less than half of it,
            doubled, between 1 / 8 and 8 times `interval`.
        score: what ranks the blocks: `Magnitude`, `Gradient`, `Movement` or `Learned`, or their names.
        scope: "layer": every layer has the scheduled sparsity. "global": all layers together have it, their scores are
            compared. "N:M", such as "2:4": of every M neighbouring blocks of a row N are kept; the schedule then knows
            the sparsities 0 and 1 - N / M only.
        floor: with scope "global", the least that a layer keeps, as a share of what it would keep by itself.
        candidates: "all": pruned blocks compete and may come back. "kept": only what is still kept competes.
        masks: "own": one mask per pathway. "shared": one mask, copied to all pathways; `Gradient` scores are summed
            over the pathways.
        pathways: the pathways governed by this plan; others keep their masks. None: all pathways of the model.
        dense_grad: True: straight-through, gradients and updates reach pruned blocks too (variant A; the optimiser's
            momentum and weight decay then act on all weights). False: an update with pathway p leaves every weight
            outside the mask of p, and the optimiser's moments there, bit-identical (variant B). Gradients of pruned
            blocks are zero then, so `Gradient` scores cannot bring a block back.
        moments: optimiser state of weight shape at blocks that enter or leave the union of the layer's masks: "keep"
            or "reset" to zero.
        init: masks at the start: "current": those of the model; "dense": all ones; "magnitude": decided at once from
            the l2 norm of the blocks (or the norm of `score`) at the sparsity of step 0; "random": at once by chance,
            the same for the same names of layers and pathways (a control).
        after_freeze: with `dense_grad`, what happens once masks are fixed: "same"; "inside": from then on as
            `dense_grad=False`, so that a pathway no longer moves weights that only others use.
    """

    schedule: Schedule
    interval: int
    freeze: int | None = None
    churn: float | None = None
    score: Score = field(default_factory=Magnitude)
    scope: str = "layer"
    floor: float = 0.2
    candidates: str = "all"
    masks: str = "own"
    pathways: tuple[str, ...] | None = None
    dense_grad: bool = True
    moments: str = "keep"
    init: str = "current"
    after_freeze: str = "same"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, (Constant, Cubic, Milestones)):
            raise TypeError(
                f"PruningPlan.schedule is a {type(self.schedule).__name__}; want Constant, Cubic or Milestones, "
                "for example Constant(0.7)"
            )
        set_plain(self, "score", as_score(self.score))
        if self.pathways is not None:
            set_plain(self, "pathways", check_names(self.pathways))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"PruningPlan.{name} = {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not isinstance(self.dense_grad, bool):
            raise TypeError(f"PruningPlan.dense_grad = {self.dense_grad!r}; want True (variant A) or False (variant B)")
        self._check_scope()
        self._check_steps()
        if self.churn is not None:
            set_plain(self, "churn", check_number("PruningPlan.churn", self.churn))
            if not 0.0 < self.churn < 1.0:
                raise ValueError(
                    f"PruningPlan.churn = {self.churn}; want a share of the kept blocks in (0, 1), or None"
                )
        if isinstance(self.score, Learned) and self.score.scale_lr and not self.dense_grad:
            raise ValueError(
                f"PruningPlan.score: Learned.scale_lr = {self.score.scale_lr} with dense_grad = False: factors of "
                "blocks move weights outside the pathway; want dense_grad = True, or scale_lr = 0"
            )
        if self.after_freeze == "inside" and not self.freeze:
            raise ValueError(
                f"PruningPlan.after_freeze = 'inside' with freeze = {self.freeze}: there is no step from which masks "
                "are fixed; set freeze, or dense_grad = False"
            )

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) of a scope "N:M"."""
        keep, _, group = self.scope.partition(":")
        return (int(keep), int(group)) if keep.isdecimal() and group.isdecimal() else None

    def _check_scope(self) -> None:
        set_plain(self, "floor", check_sparsity(self.floor, "PruningPlan.floor"))
        if not isinstance(self.scope, str):
            raise TypeError(f"PruningPlan.scope = {self.scope!r}; choose layer, global, or N:M such as 2:4")
        pattern = self.pattern
        if self.scope in ("layer", "global"):
            return
        if pattern is None or not 1 <= pattern[0] <= pattern[1]:
            raise ValueError(
                f"PruningPlan.scope = {self.scope!r}; choose layer, global, or N:M with N <= M such as 2:4"
            )
        target = 1.0 - pattern[0] / pattern[1]
        if isinstance(self.schedule, Cubic) or any(abs(s - target) > 1e-9 and s for s in self.levels):
            raise ValueError(
                f"PruningPlan.scope = {self.scope!r} knows the sparsities 0 and {target}, but schedule = "
                f"{self.schedule}; want Constant({target}) or Milestones(((0, 0.0), (STEP, {target})))"
            )

    def _check_steps(self) -> None:
        set_plain(self, "interval", check_steps("PruningPlan.interval", self.interval, least=1))
        if self.freeze is not None:
            set_plain(self, "freeze", check_steps("PruningPlan.freeze", self.freeze))
            if 0 < self.freeze < self.schedule_end:
                raise ValueError(
                    f"PruningPlan.freeze = {self.freeze} is before the schedule ends at step {self.schedule_end}; "
                    "masks fixed there would miss the final sparsity: raise freeze or end the schedule earlier"
                )
        falls = any(later < earlier for earlier, later in zip(self.levels, self.levels[1:], strict=False))
        if falls and self.candidates == "kept":
            raise ValueError(
                f"PruningPlan.schedule = {self.schedule} lowers the sparsity, but candidates = 'kept' never brings a "
                "block back; want a schedule that rises, or candidates = 'all'"
            )
        if self.freeze == 0 and not isinstance(self.schedule, Constant):
            raise ValueError(
                f"PruningPlan.schedule = {self.schedule} with freeze = 0: masks that are never decided have one "
                "sparsity; want Constant(sparsity) or a later freeze"
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """Sparsities that the schedule passes, in order."""
        match self.schedule:
            case Constant(sparsity):
                return (sparsity,)
            case Cubic(initial, final, _, _):
                return (initial, final)
            case Milestones(levels):
                return tuple(sparsity for _, sparsity in levels)

    @property
    def appointed(self) -> frozenset[int]:
        """Optimiser steps at which every pathway is decided, wherever its interval stands: those of a staircase, the
        end of the schedule, and `freeze`; so that all masks reach the scheduled sparsity."""
        stairs = [step for step, _ in self.schedule.levels] if isinstance(self.schedule, Milestones) else []
        return frozenset(step for step in (*stairs, self.schedule_end, self.freeze) if step is not None)

    @property
    def schedule_end(self) -> int:
        """Last optimiser step at which the scheduled sparsity changes."""
        match self.schedule:
            case Constant():
                return 0
            case Cubic(_, _, _, end):
                return end
            case Milestones(levels):
                return levels[-1][0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: numbers, strings, lists and dicts only."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        for name in ("schedule", "score"):
            values[name] = {"kind": KIND_OF[type(values[name])], **asdict(values[name])}
        if isinstance(self.schedule, Milestones):
            values["schedule"]["levels"] = [list(level) for level in self.schedule.levels]
        values["pathways"] = None if self.pathways is None else list(self.pathways)
        return values

    def described(self) -> dict[str, Any]:
        """`to_dict` without what is at its default: stays the same when a later version adds a part."""
        default = PruningPlan(schedule=self.schedule, interval=self.interval).to_dict()
        needed = ("schedule", "interval")
        return {name: value for name, value in self.to_dict().items() if name in needed or value != default[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningPlan:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown field or kind, a missing field, or a value the plan refuses.
        """
        known = [part.name for part in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"PruningPlan has no field {name!r}; it has {', '.join(known)}")
        for name in ("schedule", "interval"):
            if name not in values:
                raise ValueError(f"PruningPlan.{name} is missing")
        values = dict(values)
        for name in ("schedule", "score"):
            if isinstance(values.get(name), dict):
                values[name] = _part(name, values[name])
        return cls(**values)


def _part(name: str, values: dict[str, Any]) -> Any:
    """Schedule or score from its dict; `kind` says which."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"PruningPlan.{name}.kind = {kind!r}; choose one of {', '.join(KINDS)}")
    known = [part.name for part in fields(KINDS[kind])]
    for part in values:
        if part not in known:
            raise ValueError(f"PruningPlan.{name}: {kind} has no field {part!r}; it has {', '.join(known)}")
    try:
        return KINDS[kind](**values)
    except TypeError as error:
        raise ValueError(f"PruningPlan.{name}: {error}") from error
