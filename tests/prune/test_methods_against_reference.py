"""Every method against 60 lines of plain PyTorch: the same masks and the same weights after every step.

The reference shares no code with the package: dense products, block sums by index_add, ranking by sorting Python lists.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from plain_methods import (
    BLOCK,
    FREEZE,
    INTERVAL,
    LANGUAGES,
    RISE,
    STEPS,
    TARGET,
    adamw,
    block_index,
    block_sum,
    make_batches,
    mlp,
    reference,
    sgd,
    top,
)

import sparse_pathways as sp
from sparse_pathways import prune
from sparse_pathways.mask import Constant, Cubic

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
    "dynamic-movement": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, score="movement", **COMMON),
        dict(shared=False, inside=False, score="movement"),
    ),
    "dynamic-learned": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, score="learned", **COMMON),
        dict(shared=False, inside=False, score="learned"),
    ),
    "dynamic-hard-concrete": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, score=sp.Learned(gate="hard-concrete"), **COMMON),
        dict(shared=False, inside=False, score="learned", hard=True),
    ),
    "dynamic-scaled": (
        prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, score=sp.Learned(scale_lr=0.01), **COMMON),
        dict(shared=False, inside=False, score="learned", scale_lr=0.01),
    ),
    "dynamic-hard-concrete-scaled": (
        prune.methods.dynamic_asr_pathways(
            LANGUAGES, TARGET, score=sp.Learned(gate="hard-concrete", scale_lr=0.01), **COMMON
        ),
        dict(shared=False, inside=False, score="learned", hard=True, scale_lr=0.01),
    ),
    "dynamic-inside-after-freeze": (
        dataclasses.replace(prune.methods.dynamic_asr_pathways(LANGUAGES, TARGET, **COMMON), after_freeze="inside"),
        dict(shared=False, inside=False, score="gradient", after=True),
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
            exact = not (settings.get("hard") or settings.get("scale_lr"))  # gates and factors are float32
            close = dict(rtol=1e-9, atol=1e-11) if exact else dict(rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(layer.weight.detach(), weights[i], **close)
    kept = [layer.mask(name).sum().item() for layer in layers for name in LANGUAGES]
    assert kept == [round((1 - TARGET) * layer.mask().numel()) for layer in layers for _ in LANGUAGES]
    if method.startswith("dynamic-gradient"):
        assert float(sp.overlap(model)["total"][0, 1]) < 1.0  # the languages did part


# --- methods of several rounds --------------------------------------------------------------------------------------

ROUND = 12  # steps


def smallest_out(model, masks, sparsity):
    """Prune the smallest kept blocks of every layer to `sparsity`; one mask for all languages."""
    pruned = []
    for kept, w in zip(masks, (model[0].weight, model[2].weight), strict=True):
        rank = block_sum(w.detach().float().square(), block_index(w)).sqrt()
        pruned.append(top(rank, kept.nonzero().flatten().tolist(), sparsity))
    return pruned


def reference_rounds(model, sparsities, languages, *, rewind, make_optimizer=adamw):
    """Prune to each of `sparsities`, re-train with the mask fixed; yields after every step, leaves masks in `model`."""
    start = copy.deepcopy(model.state_dict())
    masks = [torch.ones(int(block_index(model[i].weight).max()) + 1, dtype=torch.bool) for i in (0, 2)]
    for level, sparsity in enumerate(sparsities):
        masks = smallest_out(model, masks, sparsity)
        if rewind and level:
            model.load_state_dict(start)
        fixed = dict.fromkeys(LANGUAGES, masks)
        batches = make_batches(ROUND, languages)
        yield from reference(model, batches, make_optimizer, shared=True, inside=True, score="magnitude", fixed=fixed)
    model.masks = masks


def levels(sparsity, count):
    return [1 - (1 - sparsity) ** (level / count) for level in range(1, count)] + [sparsity]


def record(phases, tmp_path):
    """Run `phases` with the library; (phase name, [weights], {language: [masks]}) after every step."""
    seen = []

    def train(model, phase, folder):
        optimizer = adamw(model.parameters())
        pruner = prune.Pruner(model, phase.plan, optimizer)
        for name, x, y in make_batches(phase.steps, phase.plan.pathways):
            with sp.pathway(model, name):
                loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            pruner.step(name)
            optimizer.zero_grad()
            layers = (model[0], model[2])
            masks = {n: [layer.mask(n).flatten() for layer in layers] for n in LANGUAGES}
            seen.append((phase.name, [layer.weight.detach().clone() for layer in layers], masks))
        pruner.detach()

    model = sp.sparsify_(mlp(), block=BLOCK, pathways=LANGUAGES)
    sp.run_phases(model, phases, train, tmp_path)
    return seen


def assert_equal(seen, expected, languages=LANGUAGES):
    expected = list(expected)
    assert len(seen) == len(expected)
    for step, ((phase, weights, masks), (w, m)) in enumerate(zip(seen, expected, strict=True)):
        for i in range(2):
            for name in languages:
                assert torch.equal(masks[name][i], m[name][i]), (phase, step, i, name)
            torch.testing.assert_close(weights[i], w[i], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("languages", [("fr",), LANGUAGES], ids=["monolingual", "pooled"])
@pytest.mark.parametrize("method", ["imp", "lth", "lth-early"])
def test_iterative_pruning_equals_the_reference_at_every_step(method, languages, tmp_path):
    settings = dict(steps=3 * ROUND, levels=3, last=1 / 3)
    if method == "imp":
        phases = sp.methods.imp(languages, TARGET, **settings)
        expected = reference_rounds(mlp(), levels(TARGET, 3), languages, rewind=False)
    else:
        early = ROUND if method == "lth-early" else 0
        settings = dict(steps=4 * ROUND, levels=3, last=1 / 4, rewind_steps=early)
        phases = sp.methods.lth(languages, TARGET, **settings)
        model = mlp()
        warm_up = list(reference_rounds(model, [0.0], languages, rewind=False)) if early else []
        expected = [*warm_up, *reference_rounds(model, [0.0, *levels(TARGET, 3)], languages, rewind=True)]
    assert_equal(record(phases, tmp_path), expected, languages)


@pytest.mark.parametrize("begin", [TARGET, 0.3], ids=["at-target", "below"])
@pytest.mark.parametrize("method", ["asr-pathways", "dynamic-magnitude-B", "dynamic-gradient"])
def test_pathways_from_language_specific_masks_equal_the_reference_at_every_step(method, begin, tmp_path):
    """Each language's mask by rounds of its own from the model as given, then one joint run from that model."""
    if method == "asr-pathways":
        begin, plan = TARGET, sp.methods.asr_pathways(LANGUAGES, TARGET)
        settings = dict(inside=True, score="magnitude")
    else:
        schedule = RISE if begin < TARGET else Constant(TARGET)
        schedule = Cubic(begin, TARGET, 0, STEPS // 2) if begin < TARGET else schedule
        inside, score = method.endswith("B"), method.split("-")[1]
        common = dict(COMMON, schedule=schedule, score=score, dense_grad=not inside)
        plan = sp.methods.dynamic_asr_pathways(LANGUAGES, TARGET, **common)
        settings = dict(inside=inside, score=score, cubic=begin < TARGET, begin=begin)
    phases = sp.methods.lsp(LANGUAGES, begin, steps=2 * ROUND, source="imp", levels=2)
    phases = sp.methods.joint(phases, plan, STEPS)
    masks, expected = {}, []
    for name in LANGUAGES:
        alone = mlp()
        expected += reference_rounds(alone, levels(begin, 2), (name,), rewind=False)
        masks[name] = alone.masks
    start = {"fixed" if method == "asr-pathways" else "masks": masks}
    together = list(reference(mlp(), make_batches(), adamw, shared=False, **settings, **start))
    seen = record(phases, tmp_path)
    assert [entry[0] for entry in seen[-STEPS:]] == ["joint"] * STEPS
    assert_equal(seen[-STEPS:], together)
    for part, name in ((seen[: 2 * ROUND], "en"), (seen[2 * ROUND : 4 * ROUND], "fr")):
        index = LANGUAGES.index(name)
        assert_equal(part, expected[index * 2 * ROUND : (index + 1) * 2 * ROUND], (name,))
    assert any(not torch.equal(masks["en"][i], masks["fr"][i]) for i in range(2))


@pytest.mark.parametrize("score", ["magnitude", "gradient"])
def test_dynamic_from_a_pooled_mask_equals_the_reference_at_every_step(score, tmp_path):
    """LAP to 30 %, then pathways from its weights and masks to the target."""
    begin = 0.3
    first = sp.Phase(
        name="lap", plan=sp.methods.lap(LANGUAGES, begin, schedule=Constant(begin), interval=3), steps=ROUND
    )
    schedule = Cubic(begin, TARGET, 0, STEPS // 2)
    plan = sp.methods.dynamic_asr_pathways(LANGUAGES, TARGET, **{**COMMON, "schedule": schedule}, score=score)
    seen = record(sp.methods.joint([first], plan, STEPS, weights="source"), tmp_path)
    model = mlp()
    masks = dict.fromkeys(LANGUAGES, smallest_out(model, [torch.ones(60).bool(), torch.ones(36).bool()], begin))
    optimizer = adamw(model.parameters())
    for step, (name, x, y) in enumerate(make_batches(ROUND), 1):
        weights = [model[0].weight, model[2].weight]
        dense = [m[block_index(w)] for m, w in zip(masks[name], weights, strict=True)]
        used = [w + (w * d - w).detach() for w, d in zip(weights, dense, strict=True)]
        output = F.linear(torch.tanh(F.linear(x, used[0], model[0].bias)), used[1], model[2].bias)
        optimizer.zero_grad()
        F.mse_loss(output, y).backward()
        optimizer.step()
        if step % 3 == 0:
            everything = [torch.ones_like(m) for m in masks[name]]
            masks = dict.fromkeys(LANGUAGES, smallest_out(model, everything, begin))
        assert all(torch.equal(seen[step - 1][2][n][i], masks[n][i]) for n in LANGUAGES for i in range(2))
        torch.testing.assert_close(seen[step - 1][1][0], weights[0].detach(), rtol=1e-9, atol=1e-11)
    settings = dict(shared=False, inside=False, score=score, masks=masks, begin=begin)
    assert_equal(seen[ROUND:], reference(model, make_batches(), adamw, **settings))
