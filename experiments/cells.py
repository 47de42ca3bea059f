"""The list: every model that a table or a plot shows. Order is priority: what matters most is trained first.

All cells of a seed share one dense model, all cells of a seed and sparsity the masks they start from. Every joint phase
has the same steps and batches; what a method spends before it is counted beside its errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sparse_pathways as sp
from experiments.stages import LANGUAGES, Cell, Study, check_cells
from sparse_pathways.asr.config import CorpusConfig

FIRST = ("dynamic-long", "lap-long", "dynamic-inside", "dynamic-distil")  # of the options
SECOND = (
    *("dynamic-lap50-wg", "dynamic-learned", "dynamic-hard", "dynamic-scaled", "dynamic-start50", "dynamic-churn"),
    "dynamic-1.4",
)
ALL_SEEDS = ("1.4", "long", "lap-long")  # of the options: as many steps as LSP masks and what follows them
LONG_AVERAGE = sp.Gradient(0.995)

Phases = tuple[sp.Phase, ...]
m = sp.methods


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The cells at one scale.

    Attributes:
        study: corpus and settings of all runs.
        seeds: of the dense models and all that follows; options and sweeps take the first two.
        joint: steps of the joint phase of every multilingual method.
        per_language: steps per language of the pruning runs that make LSP masks.
        pooled: steps of the pruning run that makes LAP masks to start from.
        alone: steps of every monolingual method.
    """

    study: Study
    seeds: tuple[int, ...]
    joint: int
    per_language: int
    pooled: int
    alone: int

    def single(self, plan: sp.PruningPlan, steps: int | None = None) -> Phases:
        """A method of one phase."""
        steps = steps or self.joint
        return (sp.Phase(name="joint", plan=plan, steps=steps),)

    def unpruned(self, languages: tuple[str, ...], steps: int) -> sp.PruningPlan:
        """Training on, with nothing pruned: what the extra steps alone are worth."""
        return m.adaptive(languages, 0.0, schedule=sp.Constant(0.0), interval=1, freeze=0)

    def lsp(self, sparsity: float, **settings: Any) -> Phases:
        """Language-specific masks: a monolingual run per language."""
        return m.lsp(LANGUAGES, sparsity, steps=self.per_language, **settings)

    def lap(self, sparsity: float) -> Phases:
        """A language-agnostic pruning run to start from."""
        return (sp.Phase(name="lap", plan=m.lap(LANGUAGES, sparsity, steps=self.pooled), steps=self.pooled),)

    def dynamic_from(self, source: Phases, start: float, sparsity: float, weights: str, **settings: object) -> Phases:
        """Dynamic ASR Pathways that begins with the masks of `source`."""
        if start == sparsity:
            settings = {
                "schedule": sp.Constant(sparsity),
                "interval": self.joint // 100,
                "freeze": round(0.7 * self.joint),
            } | settings
            plan = m.dynamic_asr_pathways(LANGUAGES, sparsity, **settings)
        else:
            plan = m.dynamic_asr_pathways(LANGUAGES, sparsity, steps=self.joint, start=start, **settings)
        return m.joint(source, plan, self.joint, weights=weights)

    # --- rows: (row, name, phases) for one sparsity -------------------------------------------------------------------

    def lap_row(self, s: float) -> tuple[str, str, Phases]:
        """One shared mask."""
        return "LAP", "lap", self.single(m.lap(LANGUAGES, s, steps=self.joint))

    def pathways_row(self, s: float) -> tuple[str, str, Phases]:
        """The parent's method."""
        plan = m.asr_pathways(LANGUAGES, s)
        return "ASR Pathways, LSP masks", "pathways-lsp", m.joint(self.lsp(s), plan, self.joint)

    def dynamic_row(self, s: float) -> tuple[str, str, Phases]:
        """The language-aware score."""
        return (
            "Dynamic, |w g|",
            "dynamic-wg",
            self.single(m.dynamic_asr_pathways(LANGUAGES, s, steps=self.joint, score="gradient")),
        )

    def dynamic_magnitude_row(self, s: float) -> tuple[str, str, Phases]:
        """The paper's score, from the dense model."""
        plan = m.dynamic_asr_pathways(LANGUAGES, s, steps=self.joint, score="magnitude")
        return "Dynamic, magnitude", "dynamic-magnitude", self.single(plan)

    def dynamic_lap_row(self, start: float, s: float) -> tuple[str, str, Phases]:
        """The paper's method, started from LAP."""
        phases = self.dynamic_from(self.lap(start), start, s, "source", score="magnitude")
        return f"Dynamic from LAP {start:.0%}, magnitude", f"dynamic-lap{round(100 * start)}", phases

    def dynamic_lsp_row(self, start: float, s: float) -> tuple[str, str, Phases]:
        """The paper's method, started from LSP masks, updates and candidates inside the pathway (variant B)."""
        phases = self.dynamic_from(self.lsp(start), start, s, "given", score="magnitude", dense_grad=start == s)
        return f"Dynamic from LSP {start:.0%}, magnitude", f"dynamic-lsp{round(100 * start)}", phases

    # "across": one ranking of the blocks of all layers

    def best_row(self, s: float) -> tuple[str, str, Phases]:
        """The best of the options together, the default of `sparse-pathways prune`."""
        plan = self.wg(s, scope="global", score=LONG_AVERAGE)
        return "Dynamic, |w g|, one ranking, longer average", "dynamic-across", self.single(plan)

    def churn_across_row(self, s: float) -> tuple[str, str, Phases]:
        """Its rival."""
        plan = self.wg(s, scope="global", churn=0.05)
        return "Dynamic, |w g|, one ranking, interval by churn", "dynamic-across-churn", self.single(plan)

    def lap_across_row(self, s: float) -> tuple[str, str, Phases]:
        """One shared mask, ranked likewise."""
        return "LAP, one ranking", "lap-across", self.single(m.lap(LANGUAGES, s, steps=self.joint, scope="global"))

    def pathways_across_row(self, s: float) -> tuple[str, str, Phases]:
        """Fixed pathways, ranked likewise."""
        phases = m.joint(self.lsp(s, scope="global"), m.asr_pathways(LANGUAGES, s), self.joint)
        return "ASR Pathways, LSP masks, one ranking", "pathways-across", phases

    def across_cells(self) -> Iterator[Cell]:
        """90 %, 70 % and a sweep."""
        rows = [self.best_row, self.churn_across_row, self.lap_across_row]
        yield from self.cells_of([row(0.9) for row in (*rows, self.pathways_across_row)], 0.9)
        yield from self.cells_of([row(0.7) for row in rows], 0.7)
        for sparsity in (0.8, 0.95, 0.6, 0.5, 0.3):
            yield from self.cells_of([self.best_row(sparsity)], sparsity, self.seeds[:2])

    def dense_cells(self) -> Iterator[Cell]:
        """What all start from."""
        for seed in self.seeds:
            yield Cell(row="dense", name="dense", phases=(), sparsity=0.0, seed=seed)

    def cells_of(
        self, rows: list[tuple[str, str, Phases]], sparsity: float, seeds: tuple[int, ...] | None = None
    ) -> Iterator[Cell]:
        """Rows by seeds: all rows of a seed before the next seed."""
        for seed in seeds or self.seeds:
            for row, name, phases in rows:
                yield Cell(row=row, name=name, phases=phases, sparsity=sparsity, seed=seed)

    def main_cells(self, sparsity: float, seeds: tuple[int, ...] | None = None) -> Iterator[Cell]:
        """The claim of this package: one shared mask, fixed pathways, dynamic pathways with a language-aware score."""
        yield from self.cells_of(
            [self.lap_row(sparsity), self.dynamic_row(sparsity), self.pathways_row(sparsity)], sparsity, seeds
        )

    def table_b(self) -> Iterator[Cell]:
        """Multilingual, 70 %: the paper's starting points."""
        rows = [self.dynamic_lap_row(start, 0.7) for start in (0.5, 0.7, 0.2)]
        rows += [self.dynamic_lsp_row(start, 0.7) for start in (0.5, 0.7, 0.2)]
        yield from self.cells_of([*rows, self.dynamic_magnitude_row(0.7)], 0.7)

    def table_a(self) -> Iterator[Cell]:
        """Monolingual, 70 %."""
        for seed in self.seeds:
            for language in LANGUAGES:
                own = (language,)
                methods: list[tuple[str, str, float, Phases]] = [
                    ("dense, trained on", "tuned", 0.0, self.single(self.unpruned(own, self.alone), self.alone)),
                    ("IMP", "imp", 0.7, m.imp(own, 0.7, steps=self.alone, levels=4)),
                    ("LTH", "lth", 0.7, m.lth(own, 0.7, steps=self.alone, levels=4)),
                    ("adaptive", "adaptive", 0.7, self.single(m.adaptive(own, 0.7, steps=self.alone), self.alone)),
                ]
                for row, name, sparsity, phases in methods:
                    yield Cell(
                        row=row,
                        name=f"mono-{language}-{name}",
                        phases=phases,
                        sparsity=sparsity,
                        seed=seed,
                        languages=own,
                    )

    def sweep(self) -> Iterator[Cell]:
        """Sparsity against errors."""
        for sparsity in (0.8, 0.95, 0.5, 0.6, 0.3):
            yield from self.cells_of([self.lap_row(sparsity), self.dynamic_row(sparsity)], sparsity, self.seeds[:2])

    def controls(self) -> Iterator[Cell]:
        """What the extra steps, and the score alone, are worth."""
        tuned = ("dense, trained on", "tuned", self.single(self.unpruned(LANGUAGES, self.joint)))
        yield from self.cells_of([tuned], 0.0)
        scored = ("LAP, |w g|", "lap-wg", self.single(m.lap(LANGUAGES, 0.9, steps=self.joint, score="gradient")))
        yield from self.cells_of([scored], 0.9)

    def wg(
        self, s: float = 0.9, steps: int | None = None, after_freeze: str = "same", **settings: Any
    ) -> sp.PruningPlan:
        """The language-aware plan; `settings` of the method."""
        plan = m.dynamic_asr_pathways(LANGUAGES, s, steps=steps or self.joint, **settings)
        return replace(plan, after_freeze=after_freeze)

    def option_cells(self, s: float = 0.9) -> Iterator[Cell]:
        """Table C: one thing changed at a time, at equal steps, then what is longer."""
        plans: dict[str, tuple[str, sp.PruningPlan, int, dict[str, Any]]] = {
            "inside": ("updates inside pathways once fixed", self.wg(after_freeze="inside"), self.joint, {}),
            "distil": ("distilled from dense", self.wg(), self.joint, {"distil": 1.0}),
            "learned": ("scores learned, straight-through", self.wg(score="learned"), self.joint, {}),
            "hard": (
                "scores learned, hard-concrete gates",
                self.wg(score=sp.Learned(gate="hard-concrete")),
                self.joint,
                {},
            ),
            "scaled": (
                "scores learned, and a factor per block",
                self.wg(score=sp.Learned(scale_lr=0.002)),
                self.joint,
                {},
            ),
            "movement": ("movement score", self.wg(score="movement"), self.joint, {}),
            "decay90": ("shorter average (0.9)", self.wg(score=sp.Gradient(0.9)), self.joint, {}),
            "decay995": ("longer average (0.995)", self.wg(score=LONG_AVERAGE), self.joint, {}),
            "often": ("decided 4 x as often", self.wg(interval=self.joint // 400), self.joint, {}),
            "seldom": ("decided a quarter as often", self.wg(interval=self.joint // 25), self.joint, {}),
            "churn": ("interval by churn (5 %)", self.wg(churn=0.05), self.joint, {}),
            "start50": ("start: 50 % by magnitude", self.wg(start=0.5, init="magnitude"), self.joint, {}),
            "global": ("one ranking for all layers", self.wg(scope="global"), self.joint, {}),
            "unstructured": ("single weights (1x1)", self.wg(), self.joint, {"block": [1, 1]}),
            "variant-b": ("updates inside pathways always", self.wg(dense_grad=False), self.joint, {}),
            "late": ("masks fixed at 90 % of the run", self.wg(freeze=round(0.9 * self.joint)), self.joint, {}),
            "1.4": ("1.4 x the steps", self.wg(steps=self.joint + self.pooled), self.joint + self.pooled, {}),
            "long": ("Dynamic, |w g|, twice the steps", self.wg(steps=2 * self.joint), 2 * self.joint, {}),
            "inside-distil": ("inside, distilled", self.wg(after_freeze="inside"), self.joint, {"distil": 1.0}),
        }
        lap_plans = {
            "lap-long": ("LAP, twice the steps", m.lap(LANGUAGES, s, steps=2 * self.joint), 2 * self.joint, {}),
            "lap-distil": (
                "LAP, distilled from dense",
                m.lap(LANGUAGES, s, steps=self.joint),
                self.joint,
                {"distil": 1.0},
            ),
        }
        for seed in self.seeds:
            for name, (row, plan, steps, settings) in {**plans, **lap_plans}.items():
                if seed not in self.seeds[:2] and name not in ALL_SEEDS:
                    continue
                phases = self.single(plan, steps)
                name = name if name.startswith("lap") else f"dynamic-{name}"
                yield Cell(row=row, name=name, phases=phases, sparsity=s, seed=seed, settings=settings)
            if seed not in self.seeds[:2]:
                continue
            final = m.joint(self.single(self.wg()), m.asr_pathways(LANGUAGES, s), self.joint, name="refit")
            fixed = m.joint(self.lsp(s), m.asr_pathways(LANGUAGES, s), self.joint)
            sources = {
                "pathways-refit": ("fixed masks from the end of a dynamic run", final),
                "pathways-lsp-distil": ("ASR Pathways, LSP masks, distilled", fixed),
                "dynamic-lsp50-wg": ("start: LSP masks, 50 %", self.dynamic_from(self.lsp(0.5), 0.5, s, "given")),
                "dynamic-lap50-wg": (
                    "start: LAP mask and weights, 50 %",
                    self.dynamic_from(self.lap(0.5), 0.5, s, "source"),
                ),
            }
            for name, (row, phases) in sources.items():
                settings = {"distil": 1.0} if name.endswith("distil") else {}
                yield Cell(row=row, name=name, phases=phases, sparsity=s, seed=seed, settings=settings)

    def pattern_cells(self) -> Iterator[Cell]:
        """2:4 on single weights, as GPUs have it, beside blocks of the same sparsity (in the sweep)."""
        half = sp.Milestones(((0, 0.0), (self.joint // 4, 0.5)))
        plan = replace(self.wg(0.5, steps=self.joint), schedule=half, scope="2:4")
        row = ("2:4 of single weights", "dynamic-2of4", self.single(plan))
        for seed in self.seeds[:2]:
            yield Cell(row=row[0], name=row[1], phases=row[2], sparsity=0.5, seed=seed, settings={"block": [1, 1]})

    def all_cells(self) -> tuple[Cell, ...]:
        """Every cell, in order of priority."""
        return check_cells(
            [
                *self.dense_cells(),
                *self.main_cells(0.9),
                *(cell for name in FIRST for cell in self.option_cells() if cell.name == name),
                *self.cells_of([self.dynamic_magnitude_row(0.9), self.dynamic_lap_row(0.7, 0.9)], 0.9),
                *self.main_cells(0.7),
                *self.controls(),
                *self.sweep(),
                *self.table_b(),
                *(cell for name in SECOND for cell in self.option_cells() if cell.name == name),
                *self.table_a(),
                *self.option_cells(),
                *self.pattern_cells(),
                *self.across_cells(),
            ]
        )


REDUCED = Comparisons(
    study=Study(
        corpus=CorpusConfig(train=1500, dev=40, test=300),
        dense={"steps": 3000, "eval_every": 500, "checkpoint_every": 200},
        prune={"eval_every": 500, "checkpoint_every": 200},
    ),
    seeds=(0, 1, 2),
    joint=1000,
    per_language=250,
    pooled=400,
    alone=600,
)
"""On two cores, in about ten hours."""

FULL = Comparisons(
    study=Study(
        corpus="Multilingual LibriSpeech",
        dense={
            "steps": 300_000,
            "batch": 32,
            "warmup": 10_000,
            "ctc_only_steps": 10_000,
            "mixed_precision": "bf16",
            "eval_every": 10_000,
            "checkpoint_every": 2_000,
            "model": {"d_model": 512, "heads": 8, "ffn": 2048, "layers": 20, "segment_frames": 16, "stride": 4}
            | {"right_context_frames": 4, "left_context": 30, "dropout": 0.1, "encoding": 1024, "embedding": 512}
            | {"lstm_layers": 3, "predictor_dropout": 0.3, "vocab": 1024},
        },
        prune={
            "batch": 32,
            "warmup": 2_000,
            "mixed_precision": "bf16",
            "eval_every": 10_000,
            "checkpoint_every": 2_000,
        },
    ),
    seeds=(0, 1, 2),
    joint=100_000,
    per_language=25_000,
    pooled=40_000,
    alone=60_000,
)
"""The paper's setting as far as it is known: torchaudio's Emformer RNN-T base, several GPUs through torchrun."""

SCALES = {"reduced": REDUCED, "full": FULL}
