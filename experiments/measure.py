"""One cell's result: errors per utterance, masks, and how training went. Small enough to be kept in git."""

import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jiwer
import torch

import sparse_pathways as sp
from experiments.stages import Cell, Stage
from sparse_pathways.asr.batches import Corpus
from sparse_pathways.asr.checkpoint import load_model
from sparse_pathways.asr.evaluate import Example, evaluate
from sparse_pathways.asr.model import Recogniser
from sparse_pathways.asr.text import normalise

FORMAT = 1
COST = "cost.json"
POINTS = 40  # of a curve, at most


def test_examples(data: Path, languages: tuple[str, ...]) -> list[Example]:
    """The test split, features from the file beside the manifest."""
    corpus = Corpus(data, "test", languages, progress=False)
    return [
        Example(u.language, normalise(u.text, u.language), torch.empty(0), corpus.features[i])
        for i, u in enumerate(corpus.utterances)
        if u.language in languages
    ]


def errors_of(model: Recogniser, examples: list[Example]) -> dict[str, dict[str, Any]]:
    """Per language: word error rate, and errors and words of every utterance in the order of the examples."""
    found = {}
    for language, result in evaluate(model, examples).items():
        own = [example.reference for example in examples if example.language == language]
        counts = [
            jiwer.process_words(reference, hypothesis)
            for reference, hypothesis in zip(own, result["hypotheses"], strict=True)
        ]
        found[language] = {
            "wer": round(result["wer"], 6),
            "deletions": result["deletions"],
            "errors": [one.substitutions + one.deletions + one.insertions for one in counts],
            "words": [len(reference.split()) for reference in own],
        }
    return found


@contextlib.contextmanager
def swapped_masks(model: Recogniser) -> Iterator[None]:
    """Every language with the mask of the language before it."""
    layers = [layer for layer in sp.sparse_layers(model).values() if isinstance(layer, sp.SparseLinear)]
    for layer in layers:
        layer.block_mask.copy_(layer.block_mask.roll(1, 0))
    try:
        yield
    finally:
        for layer in layers:
            layer.block_mask.copy_(layer.block_mask.roll(-1, 0))


def masks_of(model: Recogniser, languages: tuple[str, ...]) -> dict[str, Any]:
    """Density per pathway, overlap between pathways, share of blocks in any and in all of them, dead output rows."""
    layers = [layer for layer in sp.sparse_layers(model).values() if isinstance(layer, sp.SparseLinear)]
    union = core = blocks = dead = rows = 0
    for layer in layers:
        masks = torch.stack([layer.mask(language) for language in languages])
        union += int(masks.any(0).sum())
        core += int(masks.all(0).sum())
        blocks += masks[0].numel()
        dead += int((~masks.any(0).any(1)).sum())
        rows += masks.shape[1]
    overlap = sp.overlap(model)["total"]
    names = sp.pathways(model)
    chosen = [names.index(language) for language in languages]
    return {
        "density": {language: round(sp.density(model, language)["total"], 5) for language in languages},
        "overlap": [[round(float(overlap[a, b]), 4) for b in chosen] for a in chosen],
        "union": round(union / blocks, 5),
        "core": round(core / blocks, 5),
        "dead_rows": round(dead / rows, 5),
        "prunable": blocks * layers[0].block[0] * layers[0].block[1],
    }


def _thin(points: list[Any]) -> list[Any]:
    """At most `POINTS` of a curve, its last point among them."""
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


def history_of(folder: Path) -> dict[str, list[Any]]:
    """Curves of one stage: [step, loss], [step, overlap], [step, dev word error rate], and of its decisions
    [step, density, IoU of the masks before and after]."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "loss": _thin([[one["step"], round(one["loss"], 3)] for one in lines if "loss" in one]),
        "overlap": _thin([[one["step"], round(one["overlap"], 4)] for one in lines if "overlap" in one]),
        "dev": [[one["step"], round(one["wer_mean"], 4)] for one in lines if "wer_mean" in one],
        "decisions": _thin(
            [
                [one["step"], round(one["event"]["density"], 4), round(one["event"]["iou"], 4)]
                for one in lines
                if "event" in one
            ]
        ),
    }


def cost_of(stages: list[Stage], runs: Path) -> dict[str, Any]:
    """Optimiser steps and CPU seconds (all threads) of the dense model, of all later stages, and of the last one."""
    costs = [json.loads((stage.folder(runs) / COST).read_text()) for stage in stages]
    return {
        "dense_steps": stages[0].config["steps"],
        "steps": sum(stage.config["steps"] for stage in stages[1:]),
        "last_steps": stages[-1].config["steps"],
        "dense_cpu_s": round(costs[0]["cpu_s"]),
        "cpu_s": round(sum(cost["cpu_s"] for cost in costs[1:])),
    }


def measure(cell: Cell, stages: list[Stage], runs: Path, data: Path) -> dict[str, Any]:
    """Everything that tables and plots read about a cell."""
    folder = stages[-1].folder(runs)
    model = load_model(folder)
    examples = test_examples(data, cell.languages)
    errors = errors_of(model, examples)
    result: dict[str, Any] = {
        "format": FORMAT,
        "key": stages[-1].key,
        "row": cell.row,
        "name": cell.name,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "languages": list(cell.languages),
        "settings": cell.settings,
        "phases": [phase.to_dict() for phase in cell.phases],
        "cost": cost_of(stages, runs),
        "parameters": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("ctc.")),
        "wer_mean": round(statistics.fmean(one["wer"] for one in errors.values()), 6),
        "test": errors,
        "history": history_of(folder),
    }
    if any(isinstance(module, sp.SparseLinear) for module in model.modules()):
        result["masks"] = masks_of(model, cell.languages)
        distinct = min(min(row) for row in result["masks"]["overlap"]) < 1.0
        if distinct and len(cell.languages) == len(sp.pathways(model)):
            with swapped_masks(model):
                swapped = errors_of(model, examples)
            result["swapped_wer"] = {language: one["wer"] for language, one in swapped.items()}
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """A line per entry; written whole or not at all."""
    lines = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in result.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    partial.replace(path)
