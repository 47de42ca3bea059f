"""Every method against 60 lines of plain PyTorch: the same masks and the same weights after every step.

The reference shares no code with the package: dense products, block sums by index_add, ranking by sorting Python lists.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_pathways as sp
from sparse_pathways import prune
from sparse_pathways.mask import Constant, Cubic

LANGUAGES = ("en", "fr")
BLOCK = (4, 1)
STEPS, TARGET, INTERVAL, FREEZE = 40, 0.6, 3, 28
RISE = Cubic(0.0, TARGET, 0, STEPS // 2)


def mlp():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 8)).double()  # 18 rows: an edge block of 2


def make_batches(steps=STEPS):
    """Unbalanced languages with different targets: "fr" in about one batch of three."""
    draw = torch.Generator().manual_seed(7)
    truth = {name: torch.randn(8, 12, generator=draw, dtype=torch.float64) for name in LANGUAGES}
    for _ in range(steps):
        name = LANGUAGES[int(torch.rand((), generator=draw) < 0.35)]
        x = torch.randn(16, 12, generator=draw, dtype=torch.float64)
        yield name, x, x @ truth[name].T


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=2e-2, momentum=0.9, weight_decay=0.01)


def block_index(weight):
    n, k = torch.meshgrid(torch.arange(weight.shape[0]), torch.arange(weight.shape[1]), indexing="ij")
    return (n // BLOCK[0]) * -(-weight.shape[1] // BLOCK[1]) + k // BLOCK[1]


def block_sum(values, index):
    return torch.zeros(int(index.max()) + 1).index_add(0, index.flatten(), values.flatten().float())


def top(scores, candidates, sparsity):
    keep = round((1 - sparsity) * len(scores))
    values = scores.tolist()
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[sorted(candidates, key=lambda i: (-values[i], i))[:keep]] = True
    return mask


def reference(model, batches, make_optimizer, *, shared, inside, score, fixed=None, cubic=True):
    """Train `model` (Linear, Tanh, Linear), yield ([weights], {language: [block masks, flat]}) after every step.

    shared: one mask. inside: variant B (update and candidates inside the mask, moments of lost blocks zeroed).
    fixed: masks that stay. cubic: False: TARGET from the start.
    """
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    index = [block_index(w) for w in weights]
    masks = fixed or {name: [torch.ones(int(i.max()) + 1, dtype=torch.bool) for i in index] for name in LANGUAGES}
    average = {name: [torch.zeros(int(i.max()) + 1) for i in index] for name in LANGUAGES}
    seen = dict.fromkeys(LANGUAGES, 0)
    optimizer = make_optimizer(model.parameters())
    for step, (name, x, y) in enumerate(batches, 1):
        dense = [m[i] for m, i in zip(masks[name], index, strict=True)]
        used = [w * d if inside else w + (w * d - w).detach() for w, d in zip(weights, dense, strict=True)]
        loss = F.mse_loss(F.linear(torch.tanh(F.linear(x, used[0], biases[0])), used[1], biases[1]), y)
        optimizer.zero_grad()
        loss.backward()
        old = [(w.detach().clone(), copy.deepcopy(dict(optimizer.state[w]))) for w in weights]
        optimizer.step()
        seen[name] += 1
        with torch.no_grad():
            for layer, w in enumerate(weights):
                state = {k: v for k, v in optimizer.state[w].items() if torch.is_tensor(v) and v.shape == w.shape}
                if inside:
                    w[~dense[layer]] = old[layer][0][~dense[layer]]
                    for key, value in state.items():
                        earlier = old[layer][1].get(key)
                        value[~dense[layer]] = 0.0 if earlier is None else earlier[~dense[layer]]
                if score == "gradient":
                    importance = block_sum(w.float() * w.grad.float(), index[layer]).abs()
                    average[name][layer] = 0.98 * average[name][layer] + 0.02 * importance
            s = TARGET * (1 - (1 - min(1, step / (STEPS // 2))) ** 3) if cubic else TARGET
            count = step if shared else seen[name]
            everyone = step == FREEZE or (cubic and step == STEPS // 2)
            if fixed is None and step <= FREEZE and (everyone or count % INTERVAL == 0):
                for layer, w in enumerate(weights):
                    before = torch.stack([masks[n][layer] for n in LANGUAGES]).any(0)
                    for decided in LANGUAGES if shared or everyone else (name,):
                        if score == "magnitude":
                            rank = block_sum(w.float().square(), index[layer]).sqrt()
                        elif shared:
                            rank = sum(average[n][layer] / (1 - 0.98 ** seen[n]) for n in LANGUAGES if seen[n])
                        else:
                            rank = average[decided][layer]
                        among = masks[decided][layer].nonzero().flatten().tolist() if inside else range(len(rank))
                        masks[decided] = [*masks[decided]]
                        masks[decided][layer] = top(rank, among, s)
                    lost = before ^ torch.stack([masks[n][layer] for n in LANGUAGES]).any(0)
                    if inside:
                        for value in optimizer.state[w].values():
                            if torch.is_tensor(value) and value.shape == w.shape:
                                value[lost[index[layer]]] = 0.0
        yield [w.detach().clone() for w in weights], masks


COMMON = dict(schedule=RISE, interval=INTERVAL, freeze=FREEZE)
CASES = {
    "gradual": (
        prune.methods.gradual(LANGUAGES, TARGET, **COMMON),
        dict(shared=True, inside=True, score="magnitude"),
    ),
    "lap-magnitude": (
        prune.methods.lap(LANGUAGES, TARGET, **COMMON),
        dict(shared=True, inside=False, score="magnitude"),
    ),
    "lap-gradient": (
        prune.methods.lap(LANGUAGES, TARGET, score="gradient", **COMMON),
        dict(shared=True, inside=False, score="gradient"),
    ),
    "adaptive": (
        prune.methods.adaptive(LANGUAGES, TARGET, **COMMON),
        dict(shared=False, inside=False, score="magnitude"),
    ),
    "dynamic-magnitude": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, score="magnitude", **COMMON),
        dict(shared=False, inside=False, score="magnitude"),
    ),
    "dynamic-gradient": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, **COMMON),
        dict(shared=False, inside=False, score="gradient"),
    ),
    "dynamic-gradient-constant": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, **{**COMMON, "schedule": Constant(TARGET)}),
        dict(shared=False, inside=False, score="gradient", cubic=False),
    ),
    "dynamic-variant-B": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, score="magnitude", dense_grad=False, **COMMON),
        dict(shared=False, inside=True, score="magnitude"),
    ),
    "asr-pathways": (
        prune.methods.asr_pathways(LANGUAGES, TARGET),
        dict(shared=False, inside=True, score="magnitude"),
    ),
}


@pytest.mark.parametrize("make_optimizer", [adamw, sgd], ids=["adamw", "sgd"])
@pytest.mark.parametrize("method", CASES)
def test_masks_and_weights_equal_the_reference_at_every_step(method, make_optimizer):
    plan, settings = CASES[method]
    model = sp.sparsify_(mlp(), block=BLOCK, pathways=LANGUAGES)
    layers = [model[0], model[2]]
    if method == "asr-pathways":
        draw = torch.Generator().manual_seed(3)
        for layer in layers:
            for name in LANGUAGES:
                layer.set_mask_(sp.topk_mask(torch.rand(layer.mask().shape, generator=draw), TARGET), name)
        settings = {**settings, "fixed": {n: [layer.mask(n).flatten() for layer in layers] for n in LANGUAGES}}
    optimizer = make_optimizer(model.parameters())
    pruner = prune.Pruner(model, plan, optimizer)
    expected = reference(mlp(), make_batches(), make_optimizer, **settings)
    for step, (name, x, y) in enumerate(make_batches(), 1):
        with sp.pathway(model, name):
            loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        pruner.step(name)
        optimizer.zero_grad()
        weights, masks = next(expected)
        for i, layer in enumerate(layers):
            for language in LANGUAGES:
                assert torch.equal(layer.mask(language).flatten(), masks[language][i]), (step, i, language)
            torch.testing.assert_close(layer.weight.detach(), weights[i], rtol=1e-9, atol=1e-11)
    kept = [layer.mask(name).sum().item() for layer in layers for name in LANGUAGES]
    assert kept == [round((1 - TARGET) * layer.mask().numel()) for layer in layers for _ in LANGUAGES]
    if method.startswith("dynamic-gradient"):
        assert float(sp.overlap(model)["total"][0, 1]) < 1.0  # the languages did part
