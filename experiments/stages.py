"""What has to be trained for the cells, and in which order: every stage once, however many cells need it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sparse_pathways as sp
from sparse_pathways.asr.config import CorpusConfig, ModelConfig, PruneConfig, TrainConfig

LANGUAGES = ("en", "fr", "it", "nl")
NOT_SETTINGS = {"workers"}  # of a corpus: same sound whatever they are


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all cells of a list have in common.

    Attributes:
        corpus: the speech, synthesised when a run finds none; or the name of a corpus that is imported by hand.
        dense: settings of `TrainConfig` for the dense models, one per seed.
        prune: settings of `PruneConfig` for every later stage.
    """

    corpus: CorpusConfig | str
    dense: dict[str, Any]
    prune: dict[str, Any] = field(default_factory=dict)

    @property
    def corpus_key(self) -> str:
        """Hash of the corpus."""
        if isinstance(self.corpus, str):
            return _hash(self.corpus)
        return _hash({name: value for name, value in asdict(self.corpus).items() if name not in NOT_SETTINGS})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measured model.

    Attributes:
        row: the method, as tables call it.
        name: of the result file, without sparsity and seed.
        phases: what follows the dense model; none: the dense model itself.
        sparsity: of its masks.
        seed: of the dense model, and of all later batches.
        languages: what it is measured on.
        settings: of `PruneConfig`, beside those of the study.
    """

    row: str
    name: str
    phases: tuple[sp.Phase, ...]
    sparsity: float
    seed: int
    languages: tuple[str, ...] = LANGUAGES
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the result file: unique in a list."""
        return f"{self.name}-{round(100 * self.sparsity)}-s{self.seed}"


@dataclass(frozen=True)
class Stage:
    """One training run. Its folder is named by its key, a hash of all that it follows from."""

    key: str
    title: str
    config: dict[str, Any]
    phase: sp.Phase | None  # None: the dense model
    models: dict[str, str] = field(default_factory=dict)  # "given" and phases that it needs, to keys

    def folder(self, runs: Path) -> Path:
        """Where it is trained."""
        return runs / f"{self.title}-{self.key}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def dense_stage(study: Study, seed: int) -> Stage:
    """The dense model that all cells of a seed start from."""
    config = {**study.dense, "seed": seed}
    return Stage(_hash({"corpus": study.corpus_key, "dense": config}), f"dense-s{seed}", config, None)


def stages_of(study: Study, cell: Cell) -> list[Stage]:
    """The stages of a cell in order; the last one is the model to measure."""
    dense = dense_stage(study, cell.seed)
    if not cell.phases:
        return [dense]
    config = {**study.prune, **cell.settings, "seed": cell.seed}
    context = json.dumps({"given": dense.key, "train": config}, sort_keys=True)
    keys = sp.phase_keys(cell.phases, context)
    stages = [dense]
    for phase in cell.phases:
        models = {sp.GIVEN: dense.key, **{name: keys[name] for name in phase.sources}}
        title = f"{cell.title}-{phase.name}" if len(cell.phases) > 1 else cell.title
        stages.append(Stage(keys[phase.name], title, {**config, "steps": phase.steps}, phase, models))
    return stages


def all_stages(study: Study, cells: Iterable[Cell]) -> dict[str, Stage]:
    """Every stage of the cells by key, each once, in the order in which cells need them."""
    stages: dict[str, Stage] = {}
    for cell in cells:
        for stage in stages_of(study, cell):
            stages.setdefault(stage.key, stage)
    return stages


def run_config(
    stage: Stage, stages: dict[str, Stage], runs: Path, data: Path, threads: int
) -> TrainConfig | PruneConfig:
    """The configuration of the library that a stage is run with."""
    common = {"data": data, "out": stage.folder(runs), "threads": threads, "progress": False, **stage.config}
    if stage.phase is None:
        model = ModelConfig(**common.pop("model", {}))
        return TrainConfig(model=model, **common)
    return PruneConfig(start=stages[stage.models[sp.GIVEN]].folder(runs), **common)


def needs(stage: Stage) -> Iterator[str]:
    """Keys of the stages that must be done first."""
    yield from stage.models.values()


def check_cells(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Refuse two cells of one title."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.title in seen and cell != seen[cell.title]:
            raise ValueError(f"two cells are called {cell.title!r}; want distinct names")
        seen[cell.title] = cell
    return tuple(seen.values())
