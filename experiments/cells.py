"""The list: every model that a table or a plot shows. Order is priority: what matters most is trained first.

All cells of a seed share one dense model, all cells of a seed and sparsity the masks they start from. Every joint phase
has the same steps and batches; what a method spends before it is counted beside its errors.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sparse_pathways as sp
from experiments.stages import LANGUAGES, Cell, Study, check_cells
from sparse_pathways.asr.config import CorpusConfig

STUDY = Study(
    corpus=CorpusConfig(train=1500, dev=40, test=300),
    dense={"steps": 3000, "eval_every": 500, "checkpoint_every": 200},
    prune={"eval_every": 500, "checkpoint_every": 200},
)
SEEDS = (0, 1, 2)
JOINT = 1000  # steps of the joint phase of every multilingual method
PER_LANGUAGE = 250  # steps per language of the pruning runs that make LSP masks
POOLED = 400  # steps of the pruning run that makes LAP masks to start from
ALONE = 600  # steps of every monolingual method

FIRST = ("dynamic-inside", "dynamic-distil")  # of the options

Phases = tuple[sp.Phase, ...]
m = sp.methods


def single(plan: sp.PruningPlan, steps: int = JOINT) -> Phases:
    """A method of one phase."""
    return (sp.Phase(name="joint", plan=plan, steps=steps),)


def unpruned(languages: tuple[str, ...], steps: int) -> sp.PruningPlan:
    """Training on, with nothing pruned: what the extra steps alone are worth."""
    return m.adaptive(languages, 0.0, schedule=sp.Constant(0.0), interval=1, freeze=0)


def lsp(sparsity: float) -> Phases:
    """Language-specific masks: a monolingual run per language."""
    return m.lsp(LANGUAGES, sparsity, steps=PER_LANGUAGE)


def lap(sparsity: float) -> Phases:
    """A language-agnostic pruning run to start from."""
    return (sp.Phase(name="lap", plan=m.lap(LANGUAGES, sparsity, steps=POOLED), steps=POOLED),)


def dynamic_from(source: Phases, start: float, sparsity: float, weights: str, **settings: object) -> Phases:
    """Dynamic ASR Pathways that begins with the masks of `source`."""
    if start == sparsity:
        settings = {
            "schedule": sp.Constant(sparsity),
            "interval": JOINT // 100,
            "freeze": round(0.7 * JOINT),
        } | settings
        plan = m.dynamic_asr_pathways(LANGUAGES, sparsity, **settings)
    else:
        plan = m.dynamic_asr_pathways(LANGUAGES, sparsity, steps=JOINT, start=start, **settings)
    return m.joint(source, plan, JOINT, weights=weights)


# --- rows: (row, name, phases) for one sparsity -----------------------------------------------------------------------


def lap_row(s: float) -> tuple[str, str, Phases]:
    """One shared mask."""
    return "LAP", "lap", single(m.lap(LANGUAGES, s, steps=JOINT))


def pathways_row(s: float) -> tuple[str, str, Phases]:
    """The parent's method."""
    plan = m.asr_pathways(LANGUAGES, s)
    return "ASR Pathways, LSP masks", "pathways-lsp", m.joint(lsp(s), plan, JOINT)


def dynamic_row(s: float) -> tuple[str, str, Phases]:
    """The language-aware score."""
    return "Dynamic, |w g|", "dynamic-wg", single(m.dynamic_asr_pathways(LANGUAGES, s, steps=JOINT, score="gradient"))


def dynamic_magnitude_row(s: float) -> tuple[str, str, Phases]:
    """The paper's score, from the dense model."""
    plan = m.dynamic_asr_pathways(LANGUAGES, s, steps=JOINT, score="magnitude")
    return "Dynamic, magnitude", "dynamic-magnitude", single(plan)


def dynamic_lap_row(start: float, s: float) -> tuple[str, str, Phases]:
    """The paper's method, started from LAP."""
    phases = dynamic_from(lap(start), start, s, "source", score="magnitude")
    return f"Dynamic from LAP {start:.0%}, magnitude", f"dynamic-lap{round(100 * start)}", phases


def dynamic_lsp_row(start: float, s: float) -> tuple[str, str, Phases]:
    """The paper's method, started from LSP masks, updates and candidates inside the pathway (variant B)."""
    phases = dynamic_from(lsp(start), start, s, "given", score="magnitude", dense_grad=start == s)
    return f"Dynamic from LSP {start:.0%}, magnitude", f"dynamic-lsp{round(100 * start)}", phases


def dense_cells() -> Iterator[Cell]:
    """What all start from."""
    for seed in SEEDS:
        yield Cell(row="dense", name="dense", phases=(), sparsity=0.0, seed=seed)


def cells_of(rows: list[tuple[str, str, Phases]], sparsity: float, seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """Rows by seeds: all rows of a seed before the next seed."""
    for seed in seeds:
        for row, name, phases in rows:
            yield Cell(row=row, name=name, phases=phases, sparsity=sparsity, seed=seed)


def main_cells(sparsity: float, seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """The claim of this package: one shared mask, fixed pathways, dynamic pathways with a language-aware score."""
    yield from cells_of([lap_row(sparsity), dynamic_row(sparsity), pathways_row(sparsity)], sparsity, seeds)


def table_b() -> Iterator[Cell]:
    """Multilingual, 70 %: the paper's starting points."""
    rows = [dynamic_lap_row(start, 0.7) for start in (0.5, 0.7, 0.2)]
    rows += [dynamic_lsp_row(start, 0.7) for start in (0.5, 0.7, 0.2)]
    yield from cells_of([*rows, dynamic_magnitude_row(0.7)], 0.7)


def table_a() -> Iterator[Cell]:
    """Monolingual, 70 %."""
    for seed in SEEDS:
        for language in LANGUAGES:
            own = (language,)
            methods: list[tuple[str, str, float, Phases]] = [
                ("dense, trained on", "tuned", 0.0, single(unpruned(own, ALONE), ALONE)),
                ("IMP", "imp", 0.7, m.imp(own, 0.7, steps=ALONE, levels=4)),
                ("LTH", "lth", 0.7, m.lth(own, 0.7, steps=ALONE, levels=4)),
                ("adaptive", "adaptive", 0.7, single(m.adaptive(own, 0.7, steps=ALONE), ALONE)),
            ]
            for row, name, sparsity, phases in methods:
                yield Cell(
                    row=row, name=f"mono-{language}-{name}", phases=phases, sparsity=sparsity, seed=seed, languages=own
                )


def sweep() -> Iterator[Cell]:
    """Sparsity against errors."""
    for sparsity in (0.8, 0.95, 0.5):
        yield from cells_of([lap_row(sparsity), dynamic_row(sparsity)], sparsity, SEEDS[:2])


def controls() -> Iterator[Cell]:
    """What the extra steps, and the score alone, are worth."""
    tuned = ("dense, trained on", "tuned", single(unpruned(LANGUAGES, JOINT)))
    yield from cells_of([tuned], 0.0)
    scored = ("LAP, |w g|", "lap-wg", single(m.lap(LANGUAGES, 0.9, steps=JOINT, score="gradient")))
    yield from cells_of([scored], 0.9)


def wg(s: float = 0.9, steps: int = JOINT, **settings: Any) -> sp.PruningPlan:
    """The language-aware plan; `settings` of the method, or fields of the plan."""
    fields = {name: settings.pop(name) for name in ("after_freeze", "churn", "scope") if name in settings}
    score = settings.pop("score", "gradient")
    return replace(m.dynamic_asr_pathways(LANGUAGES, s, steps=steps, score=score, **settings), **fields)


def option_cells(seeds: tuple[int, ...] = SEEDS[:2], s: float = 0.9) -> Iterator[Cell]:
    """Table C: one thing changed at a time, at equal steps, then what is longer."""
    plans: dict[str, tuple[str, sp.PruningPlan, int, dict[str, Any]]] = {
        "inside": ("updates inside pathways once fixed", wg(after_freeze="inside"), JOINT, {}),
        "distil": ("distilled from dense", wg(), JOINT, {"distil": 1.0}),
        "learned": ("scores learned, straight-through", wg(score="learned"), JOINT, {}),
        "movement": ("movement score", wg(score="movement"), JOINT, {}),
        "decay90": ("shorter average (0.9)", wg(score=sp.Gradient(0.9)), JOINT, {}),
        "decay995": ("longer average (0.995)", wg(score=sp.Gradient(0.995)), JOINT, {}),
        "often": ("decided 4 x as often", wg(interval=JOINT // 400), JOINT, {}),
        "seldom": ("decided a quarter as often", wg(interval=JOINT // 25), JOINT, {}),
        "churn": ("interval by churn (5 %)", wg(churn=0.05), JOINT, {}),
        "start50": ("start: 50 % by magnitude", wg(start=0.5, init="magnitude"), JOINT, {}),
        "global": ("one ranking for all layers", wg(scope="global"), JOINT, {}),
        "unstructured": ("single weights (1x1)", wg(), JOINT, {"block": [1, 1]}),
        "variant-b": ("updates inside pathways always", wg(dense_grad=False), JOINT, {}),
        "late": ("masks fixed at 90 % of the run", wg(freeze=round(0.9 * JOINT)), JOINT, {}),
        "long": ("twice the steps", wg(steps=2 * JOINT), 2 * JOINT, {}),
        "inside-distil": ("inside, distilled", wg(after_freeze="inside"), JOINT, {"distil": 1.0}),
    }
    lap_plans = {
        "lap-long": ("LAP, twice the steps", m.lap(LANGUAGES, s, steps=2 * JOINT), 2 * JOINT, {}),
        "lap-distil": ("LAP, distilled from dense", m.lap(LANGUAGES, s, steps=JOINT), JOINT, {"distil": 1.0}),
    }
    for seed in seeds:
        for name, (row, plan, steps, settings) in {**plans, **lap_plans}.items():
            phases = single(plan, steps)
            name = name if name.startswith("lap") else f"dynamic-{name}"
            yield Cell(row=row, name=name, phases=phases, sparsity=s, seed=seed, settings=settings)
        final = m.joint(single(wg()), m.asr_pathways(LANGUAGES, s), JOINT, name="refit")
        fixed = m.joint(lsp(s), m.asr_pathways(LANGUAGES, s), JOINT)
        sources = {
            "pathways-refit": ("fixed masks from the end of a dynamic run", final),
            "pathways-lsp-distil": ("ASR Pathways, LSP masks, distilled", fixed),
            "dynamic-lsp50-wg": ("start: LSP masks, 50 %", dynamic_from(lsp(0.5), 0.5, s, "given")),
            "dynamic-lap50-wg": ("start: LAP mask and weights, 50 %", dynamic_from(lap(0.5), 0.5, s, "source")),
        }
        for name, (row, phases) in sources.items():
            settings = {"distil": 1.0} if name.endswith("distil") else {}
            yield Cell(row=row, name=name, phases=phases, sparsity=s, seed=seed, settings=settings)


def pattern_cells() -> Iterator[Cell]:
    """2:4 on single weights, as GPUs have it, beside blocks of the same sparsity (in the sweep)."""
    half = sp.Milestones(((0, 0.0), (JOINT // 4, 0.5)))
    plan = replace(wg(0.5, steps=JOINT), schedule=half, scope="2:4")
    row = ("2:4 of single weights", "dynamic-2of4", single(plan))
    for seed in SEEDS[:2]:
        yield Cell(row=row[0], name=row[1], phases=row[2], sparsity=0.5, seed=seed, settings={"block": [1, 1]})


def all_cells() -> tuple[Cell, ...]:
    """Every cell, in order of priority."""
    return check_cells(
        [
            *dense_cells(),
            *main_cells(0.9, SEEDS[:2]),
            *(cell for name in FIRST for cell in option_cells() if cell.name == name),
            *main_cells(0.9),
            *cells_of([dynamic_magnitude_row(0.9), dynamic_lap_row(0.7, 0.9)], 0.9),
            *main_cells(0.7),
            *controls(),
            *option_cells(),
            *table_b(),
            *table_a(),
            *sweep(),
            *pattern_cells(),
        ]
    )
