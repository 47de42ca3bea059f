"""Training runs: a dense recogniser from a corpus, and pruning runs that go on from one.

Given the same configuration again, a run goes on from its last checkpoint; a finished one is left as it is.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparse_pathways as sp

from .checkpoint import load_model, restore_model
from .config import PruneConfig, RunConfig, TrainConfig
from .loop import Run
from .model import Recogniser, new, prunable
from .text import Tokenizer

__all__ = ["load_model", "prune", "pruning_plan", "train"]


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
    run = Run(config)
    if run.finished:
        return config.out
    if run.checkpoint is not None:
        model = restore_model(run.checkpoint["model"], run.checkpoint_path)
        plan = sp.PruningPlan.from_dict(run.checkpoint["pruner"]["plan"])
    else:
        model = load_model(config.start)
        plan = pruning_plan(config, model.languages, _ensure_pathways(model, config))
    model.to(run.device)
    optimizer = _adamw(model, config)
    return run.fit(model, optimizer, run.load_corpus(model.languages), sp.Pruner(model, plan, optimizer))


def pruning_plan(config: PruneConfig, languages: tuple[str, ...], start: float) -> Any:
    """The plan of the method that `config` names, for a model whose sparsity is `start` now.

    Raises:
        ValueError: see `prune`.
    """
    if config.method not in sp.methods.__all__:
        raise ValueError(f"method = {config.method!r}; want one of {', '.join(sp.methods.__all__)}")
    if config.method == "asr_pathways":  # fixed masks: nothing to schedule
        return sp.methods.asr_pathways(languages, config.sparsity)
    if config.sparsity < start:
        raise ValueError(
            f"sparsity = {config.sparsity}, but the start model is at {start:.2f} already; want that or more"
        )
    choices: dict[str, Any] = {"steps": config.steps, "start": start}
    choices |= {
        name: getattr(config, name) for name in ("score", "interval", "freeze") if getattr(config, name) is not None
    }
    return getattr(sp.methods, config.method)(languages, config.sparsity, **choices)


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
