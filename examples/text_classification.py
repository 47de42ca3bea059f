"""Pathways without speech: which of eleven kinds of sentence is this? English, French, Italian and Dutch share a model.

A classifier of character trigrams at 95 % sparsity: one mask for all languages, one pathway each, and a fourth language
added to a finished model of three by its mask alone. The task is easy: one mask is enough for it, and what there is to
see is the added language. `python examples/text_classification.py`
"""

import json
import random
import re
import zlib
from importlib import resources

import torch
from torch import nn

import sparse_pathways as sp

GRAMMAR = json.loads(resources.files("sparse_pathways.asr").joinpath("sentences.json").read_text(encoding="utf-8"))
LANGUAGES = tuple(GRAMMAR)
FEATURES, CLASSES = 256, max(len(grammar["templates"]) for grammar in GRAMMAR.values())


def batch(language: str, draw: random.Random, count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences as counts of hashed character trigrams `[count, features]`, and the number of their template."""
    grammar = GRAMMAR[language]
    x, labels = torch.zeros(count, FEATURES), torch.empty(count, dtype=torch.long)
    for row in range(count):
        labels[row] = draw.randrange(len(grammar["templates"]))
        text = re.sub(
            r"\{(\w+)\}", lambda slot: draw.choice(grammar["words"][slot[1]]), grammar["templates"][labels[row]]
        )
        for place in range(len(text) - 2):
            x[row, zlib.crc32(text[place : place + 3].encode()) % FEATURES] += 1
    return x, labels


def accuracy(model: nn.Module, language: str) -> float:
    """On 500 new sentences."""
    x, labels = batch(language, random.Random(99), 500)
    with torch.inference_mode(), sp.pathway(model, language):
        return float((model(x).argmax(-1) == labels).float().mean())


def train(model: nn.Module, plan: sp.PruningPlan, steps: int) -> None:
    """One language a batch, in turns."""
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pruner = sp.Pruner(model, plan, optimizer)
    for step in range(steps):
        language = pruner.pathways[step % len(pruner.pathways)]
        x, labels = batch(language, draw)
        with sp.pathway(model, language):
            nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        pruner.step(language)
        optimizer.zero_grad()


def new_model(languages: tuple[str, ...]) -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return sp.sparsify_(model, block=(8, 1), pathways=languages, filter_fn=lambda module, name: name == "0")


def main(steps: int = 800, sparsity: float = 0.95) -> dict[str, float]:
    """Mean accuracy of the four languages, by method; and of the added language."""
    found = {}
    for name, method in (("one mask", sp.methods.lap), ("pathways", sp.methods.dynamic_asr_pathways)):
        model = new_model(LANGUAGES)
        train(model, method(LANGUAGES, sparsity, steps=steps), steps)
        found[name] = sum(accuracy(model, language) for language in LANGUAGES) / len(LANGUAGES)

    *known, added = LANGUAGES
    model = new_model(tuple(known))
    train(model, sp.methods.dynamic_asr_pathways(known, 0.7, steps=steps), steps)
    sp.add_pathway_(model, added)
    found[f"{added}, added, all weights"] = accuracy(model, added)
    pruner = sp.Pruner(model, sp.methods.new_pathway(added, 0.7, steps=steps // 2))
    draw = random.Random(1)
    for _ in range(steps // 2):
        x, labels = batch(added, draw)
        with sp.pathway(model, added):
            nn.functional.cross_entropy(model(x), labels).backward()
        pruner.step(added)
        model.zero_grad()
    found[f"{added}, added, its mask learned"] = accuracy(model, added)
    return found


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3f}")
