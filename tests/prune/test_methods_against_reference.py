"""Every method against 60 lines of plain PyTorch: the same masks and the same weights after every step.

The reference shares no code with the package: dense products, block sums by index_add, ranking by sorting Python lists.
"""

import copy
import dataclasses
import zlib

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


def make_batches(steps=STEPS, languages=LANGUAGES, seed=7):
    """Unbalanced languages with different targets: "fr" in about one batch of three."""
    draw = torch.Generator().manual_seed(seed)
    truth = {name: torch.randn(8, 12, generator=draw, dtype=torch.float64) for name in LANGUAGES}
    for _ in range(steps):
        name = LANGUAGES[int(torch.rand((), generator=draw) < 0.35)] if len(languages) > 1 else languages[0]
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


def hard_concrete(scores, module, language, batch):
    """Gates of arXiv 1712.01312, equations 10 and 11, of logits 2 above the scores."""
    seed = zlib.crc32(f"{module}/{LANGUAGES.index(language)}/{batch}".encode())
    u = torch.empty_like(scores).uniform_(1e-6, 1 - 1e-6, generator=torch.Generator().manual_seed(seed))
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + scores + 2) / (2 / 3))
    return torch.clamp(s * 1.2 - 0.1, 0, 1)


def reference(
    model,
    batches,
    make_optimizer,
    *,
    shared,
    inside,
    score,
    fixed=None,
    cubic=True,
    masks=None,
    begin=0.0,
    after=False,
    hard=False,
    scale_lr=0.0,
):
    """Train `model` (Linear, Tanh, Linear), yield ([weights], {language: [block masks, flat]}) after every step.

    shared: one mask. inside: variant B (update and candidates inside the mask, moments of lost blocks zeroed).
    fixed: masks that stay. cubic: False: TARGET from the start. masks, begin: those to begin with, and their sparsity.
    after: updates inside the mask once masks are fixed. hard: hard-concrete gates. scale_lr: of a factor per block.
    """
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    index = [block_index(w) for w in weights]
    full = {name: [torch.ones(int(i.max()) + 1, dtype=torch.bool) for i in index] for name in LANGUAGES}
    masks = dict(fixed or masks or full)
    average = {name: [torch.zeros(int(i.max()) + 1) for i in index] for name in LANGUAGES}
    if score == "learned":  # scores from relative magnitudes, trained by Adam
        norms = [block_sum(w.detach().float().square(), i).sqrt() for w, i in zip(weights, index, strict=True)]
        average = {name: [(n / n.mean()).requires_grad_() for n in norms] for name in LANGUAGES}
        adam = {name: torch.optim.Adam(average[name], lr=0.05, betas=(0.9, 0.98), eps=1e-12) for name in LANGUAGES}
    seen = dict.fromkeys(LANGUAGES, 0)
    scales = [torch.ones(int(i.max()) + 1, requires_grad=True) for i in index]
    scaling = torch.optim.Adam(scales, lr=scale_lr, betas=(0.9, 0.98), eps=1e-12)
    optimizer = make_optimizer(model.parameters())
    for step, (name, x, y) in enumerate(batches, 1):
        dense = [m[i] for m, i in zip(masks[name], index, strict=True)]
        inside = inside or (after and step > FREEZE)
        gates = [torch.ones_like(scale) for scale in scales]
        if hard and step <= FREEZE:
            gates = [
                hard_concrete(s, module, name, seen[name]) for module, s in zip((0, 2), average[name], strict=True)
            ]
        factors = [(g * s).detach()[i] for g, s, i in zip(gates, scales, index, strict=True)]
        gated = [w * f.to(w.dtype) for w, f in zip(weights, factors, strict=True)]
        used = [w * d if inside else w + (w * d - w).detach() for w, d in zip(gated, dense, strict=True)]
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
                elif score == "movement":
                    average[name][layer] -= block_sum(w.float() * w.grad.float(), index[layer])
                elif score == "learned" and step <= FREEZE:
                    moved = block_sum(w.float() * w.grad.float(), index[layer])
                    scales[layer].grad = moved / scales[layer].detach()
                    average[name][layer].grad = moved
                    if hard:
                        gate = gates[layer]
                        through = torch.where(gate > 0, moved / gate, 0.0).detach()
                        (average[name][layer].grad,) = torch.autograd.grad(gate, average[name][layer], through)
            if score == "learned" and step <= FREEZE:
                adam[name].step()
            if scale_lr and step <= FREEZE:
                scaling.step()
            s = TARGET + (begin - TARGET) * (1 - min(1, step / (STEPS // 2))) ** 3 if cubic else TARGET
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
            if scale_lr and step == FREEZE:  # the factors become part of the weights
                for w, scale, i in zip(weights, scales, index, strict=True):
                    w *= scale[i].to(w.dtype)
                    scale.fill_(1.0)
        yield [w.detach().clone() for w in weights], dict(masks)


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
