"""Training runs: a dense recogniser from a corpus, and pruning runs that go on from one.

Given the same configuration again, a run goes on from its last checkpoint; a finished one is left as it is.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparse_pathways as sp

from .checkpoint import CHECKPOINT, MODEL, load_model, model_content, restore_model, write
from .config import PruneConfig, RunConfig, TrainConfig
from .loop import Run, read_description
from .model import Recogniser, new, prunable
from .text import Tokenizer

NOT_ALONE = ("joint", "new_pathway")  # of sp.methods: they need more than a trained model
BEST: dict[str, dict[str, Any]] = {  # experiments/results.md
    "dynamic_asr_pathways": {"scope": "global", "score": sp.Gradient(0.995)}
}

__all__ = ["load_model", "prune", "prune_phase", "pruning_method", "train"]


def train(config: TrainConfig) -> Path:
    """Train a dense recogniser; returns the run folder.

    Raises:
        ValueError: `config.out` holds a run with another configuration.
        sp.FormatError: the corpus or the checkpoint is missing or damaged.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    run = Run(config)
    if run.finished:
        return config.out
    corpus = run.load_corpus()
    if run.checkpoint is not None:
        model = restore_model(run.checkpoint["model"], run.checkpoint_path)
    else:
        torch.manual_seed(config.seed)
        model = new(config.model, Tokenizer.train(corpus.texts(), config.model.vocab), corpus.languages)
        for buffer, value in zip((model.mean, model.inv_std), corpus.features.statistics(), strict=True):
            buffer.copy_(value)
    model.to(run.device)
    return run.fit(model, _adamw(model, config), corpus, ctc_only_steps=config.ctc_only_steps)


def prune(config: PruneConfig) -> Path:
    """Prune a trained recogniser while training it on, with one pathway per language; returns the run folder.

    Raises:
        ValueError: an unknown method or score, a sparsity below that of the start model, a block that is not that of a
            start model which is pruned already, languages that the corpus lacks; and as `train`.
        sp.FormatError: the start model, the corpus or the checkpoint is missing or damaged.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    if (Path(config.out) / CHECKPOINT).is_file():  # of a method of one phase: it needs its start no more
        phase = sp.Phase.from_dict(read_description(config.out)["phase"])
        return prune_phase(config, phase, {})
    model = load_model(config.start)
    method = pruning_method(config, model.languages, _ensure_pathways(model, config))
    if isinstance(method, sp.PruningPlan):
        return prune_phase(config, sp.Phase(name="prune", plan=method, steps=config.steps), {sp.GIVEN: config.start})
    return _prune_in_phases(config, method)


def _prune_in_phases(config: PruneConfig, phases: Sequence[sp.Phase]) -> Path:
    """Every phase in a folder of its own within `config.out`; the model of the last one is the run's.

    Masks made one language at a time (lsp) are gathered in the start model: `method="asr_pathways"` can go on from it.
    """
    folders = {sp.GIVEN: Path(config.start)}
    for phase in phases:
        folders[phase.name] = Path(config.out) / phase.name
        prune_phase(replace(config, out=folders[phase.name], steps=phase.steps), phase, folders)
    if (Path(config.out) / MODEL).is_file():
        return config.out
    gathered = sp.methods.joint(phases, sp.methods.asr_pathways(None, config.sparsity), 1)[-1]
    if len(gathered.masks) > 1:
        model, _ = _begun(config, gathered, folders)
    else:
        model = load_model(folders[phases[-1].name])
    write(Path(config.out) / MODEL, model_content(model))
    return config.out


def prune_phase(config: PruneConfig, phase: sp.Phase, models: Mapping[str, Path]) -> Path:
    """Train one phase of a method, on the languages of its plan; returns the run folder, `config.out`.

    Args:
        config: of the run; its method, score, sparsity, interval and freeze are not read, the phase has a plan.
        phase: what to do, for `phase.steps` = `config.steps` steps.
        models: run folder of every phase that this one needs, and of the "given" model, dense or pruned.

    Raises:
        As `prune`.
    """
    run = Run(config, phase)
    if run.finished:
        return config.out
    if run.checkpoint is not None:
        model = restore_model(run.checkpoint["model"], run.checkpoint_path)
        plan = sp.PruningPlan.from_dict(run.checkpoint["pruner"]["plan"])
    else:
        model, plan = _begun(config, phase, models)
    model.to(run.device)
    optimizer = _adamw(model, config)
    corpus = run.load_corpus(plan.pathways or model.languages)
    teacher = load_model(config.start) if config.distil else None
    return run.fit(model, optimizer, corpus, sp.Pruner(model, plan, optimizer), teacher=teacher)


def _begun(config: PruneConfig, phase: sp.Phase, models: Mapping[str, Path]) -> tuple[Recogniser, sp.PruningPlan]:
    """The model at the beginning of a phase, and the plan to go on with."""
    model = load_model(models[sp.GIVEN])
    _ensure_pathways(model, config)
    given = {name: value.clone() for name, value in model.state_dict().items()}

    def state_of(name: str) -> Mapping[str, Tensor]:
        return given if name == sp.GIVEN else load_model(models[name]).state_dict()

    def pathways_of(name: str) -> Sequence[str]:
        return read_description(models[name])["phase"]["plan"]["pathways"] or model.languages

    return model, sp.begin_phase_(model, phase, state_of, pathways_of)


def pruning_method(
    config: PruneConfig, languages: tuple[str, ...], start: float
) -> sp.PruningPlan | tuple[sp.Phase, ...]:
    """The plan or phases of the method that `config` names, for a model whose sparsity is `start` now.

    Raises:
        ValueError: see `prune`.
    """
    if config.method not in sp.methods.__all__ or config.method in NOT_ALONE:
        known = ", ".join(name for name in sp.methods.__all__ if name not in NOT_ALONE)
        raise ValueError(f"method = {config.method!r}; want one of {known}")
    if config.source is None:
        return _method(config, languages, start)
    masks = config.sparsity if config.source_sparsity is None else config.source_sparsity
    scope = config.scope or "layer"
    if config.source == "lsp":
        phases = sp.methods.lsp(languages, masks, steps=config.source_steps, scope=scope)
    else:
        plan = sp.methods.lap(languages, masks, steps=config.source_steps, scope=scope)
        phases = (sp.Phase(name="lap", plan=plan, steps=config.source_steps),)
    joint = _method(config, languages, masks)
    if not isinstance(joint, sp.PruningPlan):
        raise ValueError(f"method = {config.method!r} makes masks of its own; want one of one round with source")
    weights = "source" if config.source == "lap" else sp.GIVEN
    return sp.methods.joint(phases, joint, config.steps, weights=weights)


def _method(config: PruneConfig, languages: tuple[str, ...], start: float) -> sp.PruningPlan | tuple[sp.Phase, ...]:
    method = getattr(sp.methods, config.method)
    accepted = inspect.signature(method).parameters
    if config.freeze is not None and config.freeze > config.steps:
        raise ValueError(f"freeze = {config.freeze} is after the last of steps = {config.steps}")
    if config.method == "asr_pathways":  # fixed masks: nothing to schedule
        if config.scope is not None and config.source is None:
            raise ValueError("scope is no argument of method 'asr_pathways', whose masks are there already")
        return method(languages, config.sparsity)
    if config.sparsity < start:
        raise ValueError(
            f"sparsity = {config.sparsity}, but the start model is at {start:.2f} already; want that or more"
        )
    choices: dict[str, Any] = {"steps": config.steps, **BEST.get(config.method, {})}
    if "start" in accepted:
        choices["start"] = start
    for name in ("score", "scope", "interval", "freeze"):
        if getattr(config, name) is not None:
            choices[name] = getattr(config, name)
    for name in choices | config.options:
        if name not in accepted and config.method != "lsp":
            raise ValueError(
                f"{name} is no argument of method {config.method!r}; it takes {', '.join([*accepted][2:])}"
            )
    return method(languages, config.sparsity, **choices | config.options)


def _ensure_pathways(model: Recogniser, config: PruneConfig) -> float:
    """Give a dense model one pathway per language; returns the model's sparsity."""
    layers = [module for module in model.modules() if isinstance(module, sp.SparseLinear)]
    if not layers:
        sp.sparsify_(model, config.block, model.languages, prunable)
        return 0.0
    if layers[0].block != tuple(config.block):
        raise ValueError(f"block = {config.block}, but the start model is pruned in blocks of {layers[0].block}")
    if layers[0].pathways != model.languages:
        raise ValueError(
            f"start = {config.start}: the model has pathways {layers[0].pathways} for languages {model.languages}"
        )
    return round(1.0 - sp.density(model)["total"], 3)


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
