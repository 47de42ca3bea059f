"""Densities, events, and what a decision or an update may touch."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

import sparse_pathways as sp
from sparse_pathways import prune
from sparse_pathways.mask import Constant, Cubic, Milestones

LANGUAGES = ("en", "fr")

METHODS = {
    "gradual": prune.methods.gradual,
    "adaptive": prune.methods.adaptive,
    "lap": prune.methods.lap,
    "dynamic_asr_pathways": prune.methods.dynamic_asr_pathways,
}


# --- densities and events ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_and_pathway_ends_at_the_exact_density(toy, method, sparsity):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = prune.Pruner(model, METHODS[method](LANGUAGES, sparsity, steps=40), optimizer)
    # "fr" is rare: its own counter never reaches an interval before the masks are fixed.
    toy.train(model, pruner, optimizer, ["en", "en", "en", "fr"] + ["en"] * 36)
    for name in LANGUAGES:
        assert toy.kept(model, name) == toy.target(model, sparsity)


def test_density_follows_the_schedule_and_masks_stay_fixed_after_freeze(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    plan = prune.methods.lap(LANGUAGES, 0.7, schedule=Cubic(0.1, 0.7, 4, 20), interval=2, freeze=25)
    pruner = prune.Pruner(model, plan, optimizer)
    assert toy.kept(model, "en") == toy.kept(model, "fr") == toy.target(model, 0.1)
    events, totals, fixed = [], [], []

    def note(step, name, event):
        totals.append(sum(toy.kept(model, "en")))
        if event is not None:
            events.append(event)
            assert toy.kept(model, "en") == toy.kept(model, "fr") == toy.target(model, plan.schedule(step))
        if step >= 25:
            fixed.append(model[0].mask("en"))

    toy.train(model, pruner, optimizer, toy.turns(40), after=note)
    assert [event.step for event in events] == [*range(2, 26, 2), 25]
    assert totals == sorted(totals, reverse=True)
    assert all(torch.equal(mask, fixed[0]) for mask in fixed)


def test_event_counts_equal_a_recount_and_go_into_json(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    plan = prune.methods.dynamic_asr_pathways(LANGUAGES, 0.6, schedule=Constant(0.6), interval=3, freeze=31)
    pruner = prune.Pruner(model, plan, optimizer)
    state = {"before": {n: [layer.mask(n) for layer in toy.layers_of(model).values()] for n in LANGUAGES}}
    decided = []

    def recount(step, name, event):
        now = {n: [layer.mask(n) for layer in toy.layers_of(model).values()] for n in LANGUAGES}
        old, state["before"] = state["before"], now
        if event is None:
            assert all(torch.equal(a, b) for n in LANGUAGES for a, b in zip(old[n], now[n], strict=True))
            return
        decided.append(event.decided)
        pairs = [pair for n in event.decided for pair in zip(old[n], now[n], strict=True)]
        assert event.pruned == sum(int((a & ~b).sum()) for a, b in pairs)
        assert event.regrown == sum(int((b & ~a).sum()) for a, b in pairs)
        both, either = (sum(int(op(a, b).sum()) for a, b in pairs) for op in (torch.logical_and, torch.logical_or))
        assert event.iou == pytest.approx(both / either)
        assert event.density == pytest.approx(sum(int(b.sum()) for _, b in pairs) / sum(b.numel() for _, b in pairs))
        assert (event.step, event.pathway, event.sparsity) == (step, name, 0.6)
        assert json.loads(json.dumps(asdict(event)))["step"] == step

    toy.train(model, pruner, optimizer, toy.turns(40), after=recount)
    assert ("en",) in decided and ("fr",) in decided and decided[-1] == LANGUAGES


def test_ungoverned_pathways_keep_their_masks(toy):
    model = toy.make_model(("en", "fr", "it"))
    optimizer = toy.adamw(model)
    pruner = prune.Pruner(model, prune.methods.adaptive(("fr",), 0.5, steps=10), optimizer)
    toy.train(model, pruner, optimizer, ["fr"] * 10)
    assert sp.pathways(model) == ("en", "fr", "it")
    assert toy.kept(model, "fr") == toy.target(model, 0.5)
    assert toy.kept(model, "en") == toy.kept(model, "it") == toy.target(model, 0.0)


def test_shared_gradient_scores_are_one_mask_and_own_ones_part(toy):
    masks = {}
    for sharing, method in (("shared", prune.methods.lap), ("own", prune.methods.dynamic_asr_pathways)):
        model = toy.make_model()
        optimizer = toy.adamw(model)
        pruner = prune.Pruner(model, method(LANGUAGES, 0.5, steps=60, score="gradient"), optimizer)
        toy.train(model, pruner, optimizer, toy.turns(60))
        masks[sharing] = [float(sp.overlap(model)["total"][0, 1])]
    assert masks["shared"] == [1.0]
    assert masks["own"][0] < 1.0


def test_equal_scores_keep_the_lower_index(toy):
    model = toy.make_model(("default",))
    with torch.no_grad():
        for layer in toy.layers_of(model).values():
            layer.weight.fill_(0.5)
    prune.Pruner(model, prune.PruningPlan(schedule=Constant(0.75), interval=1, init="magnitude"))
    mask = model[0].mask().flatten()
    assert mask[: int(mask.sum())].all() and int(mask.sum()) == round(0.25 * mask.numel())


def test_milestones_with_any_module_and_no_pathway_argument(toy):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({"a": nn.Linear(9, 8), "b": nn.ModuleList([nn.Linear(8, 9)])})

        def forward(self, x):
            return self.blocks["b"][0](self.blocks["a"](x).relu())

    torch.manual_seed(0)
    model = sp.sparsify_(Odd(), block=(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = prune.methods.adaptive(sparsity=0.7, schedule=Milestones(((0, 0.2), (6, 0.5), (12, 0.7))), interval=2)
    pruner = prune.Pruner(model, plan, optimizer)
    densities = []
    for _ in range(14):
        model(torch.randn(4, 9)).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        densities.append(sp.density(model)["total"])
    assert densities == sorted(densities, reverse=True)
    assert toy.kept(model, "default") == toy.target(model, 0.7)


# --- variant B: updates stay inside the pathway -----------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("make_optimizer", ["adamw", "sgd"])
def test_batches_of_one_pathway_leave_everything_outside_it_bit_identical(toy, make_optimizer, wrapped):
    model = toy.make_model()
    toy.fixed_masks(model)
    optimizer = getattr(toy, make_optimizer)(model)
    if wrapped:
        accelerate = pytest.importorskip("accelerate", reason="accelerate is an optional extra")
        optimizer = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    pruner = prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.5), optimizer)
    toy.train(model, pruner, optimizer, ["fr"] * 5)  # momentum of "fr" is up before the look at "en"
    inner = getattr(optimizer, "optimizer", optimizer)
    x = torch.randn(3, 10)

    def state():
        return [
            {"weight": layer.weight.detach().clone()}
            | {
                k: v.clone()
                for k, v in inner.state[layer.weight].items()
                if v is not None and v.shape == layer.weight.shape
            }
            for layer in toy.layers_of(model).values()
        ]

    before = state()
    toy.train(model, pruner, optimizer, ["en"] * 7, seed=1)
    for layer, old, new in zip(toy.layers_of(model).values(), before, state(), strict=True):
        inside = sp.expand_mask(layer.mask("en"), layer.block, tuple(layer.weight.shape))
        assert set(new) == set(old) and len(new) >= 2
        for key in new:
            assert torch.equal(new[key][~inside], old[key][~inside]), key
            assert not torch.equal(new[key][inside], old[key][inside]), key
    assert model(x).isfinite().all()


def test_variant_a_moves_pruned_weights(toy):
    model = toy.make_model()
    toy.fixed_masks(model)
    optimizer = toy.adamw(model)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=1, freeze=0, dense_grad=True)
    pruner = prune.Pruner(model, plan, optimizer)
    before = model[0].weight.detach().clone()
    toy.train(model, pruner, optimizer, ["en"] * 3)
    outside = ~sp.expand_mask(model[0].mask("en"), model[0].block, tuple(before.shape))
    assert (model[0].weight.detach() != before)[outside].all()


@pytest.mark.parametrize("sharing", ["own", "shared"])
def test_only_kept_blocks_compete(toy, sharing):
    model = toy.make_model()
    toy.fixed_masks(model, 0.4)  # sparser than the schedule at first, and another mask per pathway
    optimizer = toy.adamw(model)
    plan = prune.PruningPlan(
        schedule=Cubic(0.0, 0.6, 0, 20), interval=1, freeze=20, masks=sharing, candidates="kept", dense_grad=False
    )
    pruner = prune.Pruner(model, plan, optimizer)
    allowed = {name: [layer.mask(name) for layer in toy.layers_of(model).values()] for name in LANGUAGES}
    if sharing == "shared":
        union = [a | b for a, b in zip(*allowed.values(), strict=True)]
        allowed = {"en": union, "fr": union}

    def check(step, name, event):
        assert event.regrown == 0
        for language in LANGUAGES:
            for layer, mask in zip(toy.layers_of(model).values(), allowed[language], strict=True):
                assert not (layer.mask(language) & ~mask).any()
                if sharing == "shared" and step == 1:
                    assert torch.equal(layer.mask(language), mask)  # the schedule has nothing to take yet

    toy.train(model, pruner, optimizer, toy.turns(20), after=check)
    assert toy.kept(model, "en") == toy.kept(model, "fr") == toy.target(model, 0.6)


@pytest.mark.parametrize("dense_grad", [True, False])
def test_the_plan_says_whether_pruned_blocks_have_gradients(toy, dense_grad):
    model = toy.make_model()
    toy.fixed_masks(model)
    optimizer = toy.adamw(model)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=1, freeze=0, dense_grad=dense_grad)
    toy.train(model, prune.Pruner(model, plan, optimizer), optimizer, ["en"])
    outside = ~sp.expand_mask(model[2].mask("en"), model[2].block, tuple(model[2].weight.shape))
    assert bool(model[2].weight.grad[outside].any()) is dense_grad


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_moments_of_blocks_that_no_pathway_keeps_any_more(toy, moments):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=6, masks="shared", moments=moments)
    pruner = prune.Pruner(model, plan, optimizer)
    toy.train(model, pruner, optimizer, toy.turns(6))
    for layer in toy.layers_of(model).values():
        gone = ~sp.expand_mask(layer.mask("en"), layer.block, tuple(layer.weight.shape))
        assert gone.any()
        for key in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[layer.weight][key]
            assert bool((value[gone] == 0).all()) is (moments == "reset")
            assert (value[~gone] != 0).any()


def test_a_forgotten_pruner_step_is_refused_and_detach_ends_the_watch(toy):
    model = toy.make_model()
    toy.fixed_masks(model)
    optimizer = toy.adamw(model)
    pruner = prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.5), optimizer)
    model(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was called twice without pruner\.step"):
        optimizer.step()
    pruner.detach()
    optimizer.step()
    optimizer.step()
