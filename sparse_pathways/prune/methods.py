"""The pruning methods of the papers: each is one function that fills in a `PruningPlan`.

Common arguments:
    pathways: names of the pathways to prune (of languages, say); None: all pathways of the model.
    sparsity: share of blocks removed at the end, in [0, 1]; of every layer, or with scope "global" of all together.
    steps: optimiser steps of the whole run. Given, the sparsity rises from `start` over the first half (cubic), and the
        masks are fixed after 70 % of the run. None: `sparsity` from the first decision on, masks never fixed.
    start: sparsity at step 0.
    schedule, interval, churn, freeze, scope, score, init: as in `PruningPlan`, in place of what follows from `steps`.
    dense_grad: True: variant A, gradients reach pruned blocks, all blocks compete at every decision. False: variant B,
        updates stay inside the pathway, only kept blocks compete, the optimiser forgets a block that is given up.

Sections are those of Dynamic ASR Pathways (arXiv 2309.13018); its parent is Learning ASR Pathways (arXiv 2209.05735).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from sparse_pathways.checks import check_count, check_names, check_number, check_sparsity
from sparse_pathways.mask import Constant, Cubic, Schedule
from sparse_pathways.mask.schedule import check_steps
from sparse_pathways.prune.phases import GIVEN, Phase, joint
from sparse_pathways.prune.plan import PruningPlan
from sparse_pathways.prune.scores import Learned, Magnitude, Movement, Score, as_score

__all__ = [
    "adaptive",
    "asr_pathways",
    "dynamic_asr_pathways",
    "gradual",
    "imp",
    "joint",
    "lap",
    "lsp",
    "lth",
    "new_pathway",
]


def gradual(
    pathways: Iterable[str] | None = None,
    sparsity: float = 0.7,
    *,
    steps: int | None = None,
    start: float = 0.0,
    schedule: Schedule | None = None,
    interval: int | None = None,
    freeze: int | None = None,
    scope: str = "layer",
    score: Score | str = "magnitude",
    init: str = "magnitude",
) -> PruningPlan:
    """Gradual magnitude pruning: one mask that only shrinks, updates stay inside it (variant B).

    Source: arXiv 1710.01878; the fixed-mask baseline beside iterative magnitude pruning.
    """
    return PruningPlan(
        **_timing(sparsity, steps, start, schedule, interval, freeze, decisions=25),
        **_variant(dense_grad=False),
        scope=scope,
        score=as_score(score),
        masks="shared",
        pathways=_names(pathways),
        init=init,
    )


def adaptive(
    pathways: Iterable[str] | None = None,
    sparsity: float = 0.7,
    *,
    steps: int | None = None,
    start: float = 0.0,
    schedule: Schedule | None = None,
    interval: int | None = None,
    freeze: int | None = None,
    scope: str = "layer",
    score: Score | str = "magnitude",
    init: str = "magnitude",
    dense_grad: bool = True,
) -> PruningPlan:
    """Adaptive masking, monolingual: the mask is decided again while training, also at constant sparsity.

    Source: Dynamic ASR Pathways, monolingual pruning with adaptive masking. As `gradual`, but every block competes at
    every decision and pruned blocks keep moving.
    """
    return PruningPlan(
        **_timing(sparsity, steps, start, schedule, interval, freeze, decisions=25),
        **_variant(dense_grad),
        scope=scope,
        score=as_score(score),
        masks="own",
        pathways=_names(pathways),
        init=init,
    )


def lap(
    pathways: Iterable[str] | None = None,
    sparsity: float = 0.7,
    *,
    steps: int | None = None,
    start: float = 0.0,
    schedule: Schedule | None = None,
    interval: int | None = None,
    freeze: int | None = None,
    scope: str = "layer",
    score: Score | str = "magnitude",
    init: str = "magnitude",
    dense_grad: bool = True,
) -> PruningPlan:
    """Language-agnostic pruning: one mask for all pathways, decided on the pooled data.

    Source: Learning ASR Pathways and Dynamic ASR Pathways, language-agnostic pruning. As `adaptive`, but one mask is
    copied to all pathways. With `score="gradient"` the scores of the pathways are summed.
    """
    return PruningPlan(
        **_timing(sparsity, steps, start, schedule, interval, freeze, decisions=25),
        **_variant(dense_grad),
        scope=scope,
        score=as_score(score),
        masks="shared",
        pathways=_names(pathways),
        init=init,
    )


def imp(
    pathways: Iterable[str] | None = None,
    sparsity: float = 0.7,
    *,
    steps: int,
    levels: int = 4,
    last: float = 0.5,
    norm: str = "l2",
    prefix: str = "imp",
) -> tuple[Phase, ...]:
    """Iterative magnitude pruning: prune the smallest kept blocks, re-train with the mask fixed, `levels` times.

    Source: Dynamic ASR Pathways, iterative magnitude pruning (after arXiv 1506.02626). Every level removes the same
    share of what is left: at 70 % and 6 levels about 18 %.

    Args:
        pathways: one mask for all of them (language-agnostic); one name: a monolingual model.
        sparsity: share of blocks removed at the end, per layer.
        steps: optimiser steps of all rounds together.
        levels: rounds.
        last: share of the steps that the last round, at the final sparsity, gets; the others share the rest.
        norm: of a block, what it is ranked by.
        prefix: of the phases' names.
    """
    names, shares = _names(pathways), _round_steps(steps, levels, last)
    phases: list[Phase] = []
    for level, share in enumerate(shares, 1):
        plan = _fixed(names, _level(sparsity, level, levels), norm)
        start = phases[-1].name if phases else GIVEN
        phases.append(Phase(name=f"{prefix}-{level}", plan=plan, steps=share, start=start))
    return tuple(phases)


def lth(
    pathways: Iterable[str] | None = None,
    sparsity: float = 0.7,
    *,
    steps: int,
    levels: int = 4,
    last: float = 0.5,
    rewind_steps: int = 0,
    norm: str = "l2",
    prefix: str = "lth",
) -> tuple[Phase, ...]:
    """Lottery ticket: as `imp`, but before each re-training the kept weights go back to where they began.

    Source: Dynamic ASR Pathways, lottery ticket hypothesis with rewinding (after arXiv 1803.03635; rewinding to an
    early point: 1912.05671). The first round trains dense; level k prunes what round k - 1 left.

    Args:
        pathways, sparsity, levels, last, norm, prefix: as for `imp`.
        steps: optimiser steps of all rounds together, that of the dense one included.
        rewind_steps: 0: weights go back to the model as given; else to that model after so many dense steps, which
            come on top of `steps`.
    """
    names, shares = _names(pathways), _round_steps(steps, levels, last, before=1)
    phases: list[Phase] = []
    point = GIVEN
    if check_steps("rewind_steps", rewind_steps):
        point = f"{prefix}-point"
        phases.append(Phase(name=point, plan=_fixed(names, 0.0, norm), steps=rewind_steps))
    for level, share in enumerate(shares):
        earlier = phases[-1].name if level else point
        rewind = point if level else None
        plan = _fixed(names, _level(sparsity, level, levels), norm)
        phases.append(Phase(name=f"{prefix}-{level}", plan=plan, steps=share, start=earlier, rewind=rewind))
    return tuple(phases)


def lsp(
    pathways: Iterable[str], sparsity: float = 0.7, *, steps: int, source: str = "gradual", **settings: Any
) -> tuple[Phase, ...]:
    """Language-specific pruning: one monolingual pruning run per pathway, all from the model as given.

    Source: Learning ASR Pathways and Dynamic ASR Pathways, language-specific pruning. Ends in one model per pathway;
    `joint(lsp(...), asr_pathways(...), steps)` trains their masks in one model.

    Args:
        pathways: names.
        sparsity: share of blocks removed at the end, per layer.
        steps: optimiser steps per pathway.
        source: "gradual", "imp", "lth" or "adaptive": how each mask is made.
        settings: of that method.
    """
    phases: list[Phase] = []
    sources: dict[str, Callable[..., Any]] = {"gradual": gradual, "imp": imp, "lth": lth, "adaptive": adaptive}
    if source not in sources:
        raise ValueError(f"source = {source!r}; choose one of {', '.join(sources)}")
    own = ("pathways", "sparsity", "steps", "prefix")  # set here
    accepted = [name for name in inspect.signature(sources[source]).parameters if name not in own]
    if unknown := [name for name in settings if name not in accepted]:
        raise ValueError(f"{unknown[0]} is no setting of source = {source!r}; it takes {', '.join(accepted)}")
    for name in check_names(pathways):
        if source in ("imp", "lth"):
            phases += sources[source]((name,), sparsity, steps=steps, prefix=f"{source}-{name}", **settings)
        else:
            plan = sources[source]((name,), sparsity, steps=steps, **settings)
            phases.append(Phase(name=f"{source}-{name}", plan=plan, steps=steps))
    return tuple(phases)


def asr_pathways(pathways: Iterable[str] | None = None, sparsity: float = 0.7) -> PruningPlan:
    """ASR Pathways: the masks that the model already has, fixed; joint training, each batch updates its own pathway.

    Source: Learning ASR Pathways, multilingual training of pathways. `sparsity` is that of the masks, and is checked:
    decide or load them first, one run per language or `SparseLinear.set_mask_`.
    """
    return PruningPlan(
        schedule=Constant(sparsity),
        interval=1,
        freeze=0,
        **_variant(dense_grad=False),
        masks="own",
        pathways=_names(pathways),
        init="current",
    )


def dynamic_asr_pathways(
    pathways: Iterable[str] | None = None,
    sparsity: float = 0.7,
    *,
    steps: int | None = None,
    start: float = 0.0,
    schedule: Schedule | None = None,
    interval: int | None = None,
    churn: float | None = None,
    freeze: int | None = None,
    scope: str = "layer",
    score: Score | str = "gradient",
    init: str = "current",
    dense_grad: bool = True,
) -> PruningPlan:
    """Dynamic ASR Pathways: joint training in which each batch also adapts the mask of its own pathway.

    Source: Dynamic ASR Pathways, multilingual training with adaptive masking. As `asr_pathways`, but mask p is decided
    again every `interval` batches of p. `init="current"` starts from the masks of the model: all ones after
    `sparsify_`, or those of an earlier `lap` run (`start` = their sparsity). The paper ranks by magnitude; the default
    here is the pathway's own gradient score, since the magnitude of one shared weight is the same for every pathway.
    """
    return PruningPlan(
        **_timing(sparsity, steps, start, schedule, interval, freeze, decisions=100),
        **_variant(dense_grad),
        churn=churn,
        scope=scope,
        score=as_score(score),
        masks="own",
        pathways=_names(pathways),
        init=init,
    )


def new_pathway(
    name: str,
    sparsity: float = 0.7,
    *,
    steps: int,
    interval: int | None = None,
    score: Score | str = "movement",
    init: str = "current",
) -> PruningPlan:
    """A new pathway in a finished model, by its mask alone: weights stay, so the others' outputs stay bit-identical.

    Source: "any number of pathways" among what Dynamic ASR Pathways leaves for later; masks for fixed weights:
    arXiv 1911.13299. Train it without an optimiser: `loss.backward(); pruner.step(name); model.zero_grad()`.

    Args:
        name: of the pathway, added by `add_pathway_`.
        sparsity: share of blocks removed at the end, per layer; reached after half of the steps.
        steps: batches of the new pathway.
        interval: batches between two decisions; None: 1 % of the steps.
        score: "movement" or "learned": they tell blocks that help from blocks that harm. `Gradient` does not, and with
            weights that stay harmful blocks are never mended.
        init: as in `PruningPlan`.
    """
    if not isinstance(as_score(score), Movement | Learned):
        raise ValueError(
            f"score = {score!r} does not tell blocks that help from blocks that harm; choose movement, learned"
        )
    if isinstance(score, Learned) and score.scale_lr:
        raise ValueError(
            f"score = {score}: factors of blocks would change the weights of the other pathways; scale_lr = 0"
        )
    return PruningPlan(
        **_timing(sparsity, steps, 0.0, None, interval, None, decisions=100),
        **_variant(dense_grad=True),
        score=as_score(score),
        masks="own",
        pathways=(name,),
        init=init,
    )


def _names(pathways: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if pathways is None else check_names(pathways)


def _fixed(names: tuple[str, ...] | None, sparsity: float, norm: str) -> PruningPlan:
    """One round of iterative pruning: a mask decided at once among what is kept, and then fixed (variant B)."""
    return PruningPlan(
        schedule=Constant(sparsity),
        interval=1,
        freeze=0,
        **_variant(dense_grad=False),
        score=Magnitude(norm),
        masks="shared",
        pathways=names,
        init="magnitude",
    )


def _level(sparsity: float, level: int, levels: int) -> float:
    """Sparsity after `level` of `levels` rounds that each remove the same share of what is left."""
    sparsity = check_sparsity(sparsity)
    return sparsity if level == levels else 1.0 - (1.0 - sparsity) ** (level / levels)


def _round_steps(steps: int, levels: int, last: float, before: int = 0) -> list[int]:
    """Steps of each round, `before` rounds in front of the levels: `last` of them for the last one, the rest in equal
    parts."""
    steps, rounds = check_steps("steps", steps, least=1), check_count("levels", levels, 1, "rounds") + before
    if not 0.0 < check_number("last", last) <= 1.0:
        raise ValueError(f"last = {last}; want a share of the steps in (0, 1]")
    if rounds == 1:
        return [steps]
    earlier = round(steps * (1.0 - last)) // (rounds - 1)
    if earlier < 1:
        raise ValueError(
            f"steps = {steps} do not go round {rounds} rounds with last = {last}; want more, or fewer levels"
        )
    return [earlier] * (rounds - 1) + [steps - earlier * (rounds - 1)]


def _variant(dense_grad: bool) -> dict[str, Any]:
    """The two readings of the paper: A, pruned blocks keep moving and may return; B, a pathway touches only its own."""
    if not isinstance(dense_grad, bool):
        raise TypeError(f"dense_grad = {dense_grad!r}; want True (variant A) or False (variant B)")
    if dense_grad:
        return {"dense_grad": True, "candidates": "all", "moments": "keep"}
    return {"dense_grad": False, "candidates": "kept", "moments": "reset"}


def _timing(
    sparsity: float,
    steps: int | None,
    start: float,
    schedule: Schedule | None,
    interval: int | None,
    freeze: int | None,
    decisions: int,
) -> dict[str, Any]:
    """Schedule, interval and freeze; what is not given follows from `steps`: one decision per `steps / decisions`."""
    sparsity, start = check_sparsity(sparsity), check_sparsity(start, "start")
    if steps is not None:
        steps = check_steps("steps", steps)
    if steps is not None and steps < 2:
        raise ValueError(f"steps = {steps}; want at least 2 optimiser steps, or None with a schedule of your own")
    if start and (steps is None or schedule is not None):
        raise ValueError(f"start = {start} shapes the schedule made from steps; give steps and no schedule")
    if schedule is None:
        schedule = Constant(sparsity) if steps is None else Cubic(start, sparsity, 0, steps // 2)
    elif schedule(sys.maxsize) != sparsity:
        raise ValueError(f"sparsity = {sparsity}, but {schedule} ends at {schedule(sys.maxsize)}; make them equal")
    if interval is None:
        interval = 100 if steps is None else max(1, steps // decisions)
    if freeze is None and steps is not None:
        freeze = round(0.7 * steps)
    return {"schedule": schedule, "interval": interval, "freeze": freeze}
