"""Densities, events, and what a decision or an update may touch."""

import json
import warnings
from dataclasses import asdict, replace

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
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was called twice without a step of every Pruner"):
        optimizer.step()
    pruner.detach()
    optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("how", ["before the optimiser", "with another optimiser"])
def test_a_step_that_nothing_was_kept_inside_of_is_refused(toy, how):
    """Else the pathway's update would pass unseen, and reach weights of the others."""
    model = toy.make_model()
    toy.fixed_masks(model)
    optimizer, other = toy.adamw(model), toy.adamw(model)
    pruner = prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.5), optimizer)
    model(torch.randn(2, 10)).sum().backward()
    if how == "with another optimiser":
        other.step()
    with pytest.raises(RuntimeError, match=r"the optimizer given to Pruner has made no step since"):
        pruner.step("en")


@pytest.mark.parametrize("method", ["lap", "asr_pathways"])
def test_a_nan_is_reported_also_when_masks_are_fixed(toy, method):
    model = toy.make_model()
    toy.fixed_masks(model)
    plan = {
        "lap": prune.methods.lap(LANGUAGES, 0.5, steps=8),
        "asr_pathways": prune.methods.asr_pathways(LANGUAGES, 0.5),
    }
    optimizer = toy.sgd(model)
    pruner = prune.Pruner(model, plan[method], optimizer)
    toy.train(model, pruner, optimizer, toy.turns(8))  # lap: fixed at step 6
    model(torch.full((2, 10), torch.nan)).sum().backward()
    optimizer.step()
    with pytest.raises(
        FloatingPointError, match=r"0: a weight after a batch of pathway 'en' is NaN or infinite at step 9"
    ):
        pruner.step("en")


def test_every_step_of_a_staircase_is_a_decision(toy):
    model = toy.make_model()
    schedule = sp.Milestones(((5, 0.25), (11, 0.5)))
    plan = prune.methods.adaptive(LANGUAGES, 0.5, schedule=schedule, interval=100)
    optimizer, events = toy.sgd(model), []
    pruner = prune.Pruner(model, plan, optimizer)
    toy.train(model, pruner, optimizer, toy.turns(20), after=lambda step, name, event: events.append(event))
    assert [(event.step, event.decided, event.sparsity) for event in events if event] == [
        (5, LANGUAGES, 0.25),
        (11, LANGUAGES, 0.5),
    ]


def test_a_shared_mask_starts_as_one(toy):
    model = toy.make_model()
    toy.fixed_masks(model, 0.3)
    with pytest.raises(ValueError, match=r"0: its pathways have different masks, PruningPlan.masks = 'shared'"):
        plan = replace(prune.methods.imp(LANGUAGES, 0.3, steps=4, levels=1)[0].plan, init="current")
        prune.Pruner(model, plan, toy.sgd(model))
    plan = prune.methods.imp(LANGUAGES, 0.6, steps=4, levels=1)[0].plan
    prune.Pruner(model, plan, toy.sgd(model))
    for layer in toy.layers_of(model).values():
        assert torch.equal(layer.mask("en"), layer.mask("fr"))
    assert toy.kept(model, "en") == toy.target(model, 0.6)


def test_a_layer_that_loses_all_its_blocks_is_named():
    model = sp.sparsify_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1)), (16, 16))
    with pytest.warns(UserWarning, match=r"1: none of its 1 blocks of \(16, 16\) is left at sparsity 0\.7"):
        prune.Pruner(model, prune.methods.lap(sparsity=0.7))


def test_gates_of_another_pruner_are_refused(toy):
    model = toy.make_model()
    score = sp.Learned(gate="hard-concrete")
    first = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, steps=20, score=score))
    with pytest.raises(ValueError, match=r"0: another Pruner draws the gates of its blocks; call its detach\(\) first"):
        prune.Pruner(model, prune.methods.lap(LANGUAGES))
    first.detach()
    prune.Pruner(model, prune.methods.lap(LANGUAGES))


def test_states_that_do_not_fit_are_named(toy):
    def make(names, block=(4, 1), plan=None):
        model = sp.sparsify_(nn.Sequential(nn.Linear(16, 16)), block, names)
        return prune.Pruner(model, plan or prune.methods.dynamic_asr_pathways(steps=20))

    state = make(LANGUAGES).state_dict()
    with pytest.raises(ValueError, match="the state is of the pathways en, fr; the Pruner governs fr, en"):
        make(LANGUAGES[::-1]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"0: the saved run had blocks \(4, 1\), the model has \(1, 4\)"):
        make(LANGUAGES, (1, 4)).load_state_dict(state)
    for change, reason in [({"steps": -3}, "want at least 0"), ({"averages": None}, "state has no 'averages'")]:
        bad = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=reason):
            make(LANGUAGES).load_state_dict(bad)


def test_weights_that_get_no_gradient_are_explained(toy):
    model = toy.make_model()
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, steps=20))
    model(torch.randn(2, 10)).sum().backward()
    with pytest.raises(RuntimeError, match="every sparse layer's weight has requires_grad = False: leave it True"):
        pruner.step("en")
    with pytest.raises(KeyError, match="is not known"):
        pruner.step(["en"])
    with pytest.raises(TypeError, match=r"model is a NoneType; want an nn.Module"):
        prune.Pruner(None, prune.methods.lap())


def test_what_is_pruned_for_good_may_be_anything(toy):
    """Pruned values are never read: not by a product, and not by the Pruner."""
    model = toy.make_model()
    toy.fixed_masks(model)
    layer = model[0]
    unused = ~sp.expand_mask(layer.mask("en") | layer.mask("fr"), layer.block, tuple(layer.weight.shape))
    with torch.no_grad():
        layer.weight[unused] = torch.nan
    optimizer = toy.sgd(model)
    pruner = prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.5), optimizer)
    toy.train(model, pruner, optimizer, toy.turns(4))
    assert unused.any() and model(torch.ones(1, 10)).isfinite().all()


def test_fixed_masks_do_not_warn_of_what_would_be_pruned():
    model = sp.sparsify_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)), (8, 64), ("a",))
    model[0].set_mask_(torch.arange(8)[:, None] < 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune.Pruner(model, prune.methods.asr_pathways(("a",), 5 / 9), torch.optim.SGD(model.parameters(), lr=0.1))
