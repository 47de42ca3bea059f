"""Parts of a plan beyond the paper's methods: scopes, patterns, intervals that follow the churn, initial masks."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparse_pathways as sp

LANGUAGES = ("en", "fr")


def run(toy, plan, steps=40, model=None):
    model = toy.make_model() if model is None else model
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, plan, optimizer)
    events = []
    toy.train(model, pruner, optimizer, toy.turns(steps), after=lambda step, name, event: events.append(event))
    return model, pruner, [event for event in events if event is not None]


def test_global_scope_meets_the_sparsity_over_all_layers_and_its_floor_in_each(toy):
    plan = replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.7, steps=40), scope="global", floor=0.5)
    model, _, _ = run(toy, plan)
    sizes = [layer.mask().numel() for layer in toy.layers_of(model).values()]
    for name in LANGUAGES:
        kept = toy.kept(model, name)
        assert sum(kept) == round(0.3 * sum(sizes))
        assert all(k >= round(0.15 * size) for k, size in zip(kept, sizes, strict=True))
    assert toy.kept(model, "en") != toy.target(model, 0.7)  # layers differ


@pytest.mark.parametrize("candidates", ["all", "kept"])
def test_two_of_four_in_every_row(toy, candidates):
    schedule = sp.Milestones(((0, 0.0), (8, 0.5)))
    plan = sp.PruningPlan(schedule=schedule, interval=4, scope="2:4", candidates=candidates)
    model = toy.make_model(block=(1, 1))
    model, _, events = run(toy, plan, model=model)
    assert events[0].density == 1.0
    for name in LANGUAGES:
        groups = model[2].mask(name).unflatten(1, (-1, 4))
        assert (groups.sum(-1) == 2).all()
        tail = model[0].mask(name)  # ten inputs: a last group of two keeps both
        assert (tail[:, :8].unflatten(1, (-1, 4)).sum(-1) == 2).all() and tail[:, 8:].all()


def test_single_weights_are_blocks_too(toy):
    model = toy.make_model(block=(1, 1))
    model, _, _ = run(toy, sp.methods.dynamic_asr_pathways(LANGUAGES, 0.8, steps=40), model=model)
    for layer in toy.layers_of(model).values():
        assert layer.mask("en").shape == layer.weight.shape
        assert int(layer.mask("en").sum()) == round(0.2 * layer.weight.numel())


@pytest.mark.parametrize("score", ["magnitude", "gradient", "movement", "learned"])
@pytest.mark.parametrize("masks", ["own", "shared"])
def test_every_score_ranks_own_and_shared_masks(toy, score, masks):
    method = sp.methods.dynamic_asr_pathways if masks == "own" else sp.methods.lap
    model, _, _ = run(toy, method(LANGUAGES, 0.6, steps=40, score=score))
    assert toy.kept(model, "en") == toy.kept(model, "fr") == toy.target(model, 0.6)
    overlap = float(sp.overlap(model)["total"][0, 1])
    assert overlap == 1.0 if masks == "shared" or score == "magnitude" else overlap < 1.0


def test_movement_keeps_what_training_pushes_away_from_zero():
    layer = sp.SparseLinear(4, 2, bias=False, block=(1, 1), pathways=("a",))
    plan = sp.methods.adaptive(("a",), 0.5, schedule=sp.Constant(0.5), interval=3, score="movement")
    pruner = sp.Pruner(layer, plan, torch.optim.SGD(layer.parameters(), lr=0.0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[9.0, 9.0, 0.1, 0.1], [9.0, 9.0, 0.1, 0.1]]))
    grown = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])  # descent shrinks the large, grows the small
    for _ in range(3):
        layer.weight.grad = grown.clone()
        event = pruner.step("a")
    assert event is not None and layer.mask("a").int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("masks", ["own", "shared"])
def test_the_interval_follows_the_churn(toy, masks):
    method = sp.methods.dynamic_asr_pathways if masks == "own" else sp.methods.lap
    common = dict(schedule=sp.Constant(0.5), interval=4, score="magnitude", init="magnitude")
    calm = replace(method(LANGUAGES, 0.5, **common), churn=0.9)
    model = toy.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # nothing changes
    pruner, steps = sp.Pruner(model, calm, optimizer), []
    names = ["en"] * 100
    toy.train(model, pruner, optimizer, names, after=lambda step, name, event: steps.append(step) if event else None)
    assert steps == [4, 12, 28, 60, 92]  # 4, doubled to 8, 16, 32 = 8 x 4, and no more
    restless = replace(calm, churn=1e-9, score=sp.Gradient(0.0))
    pruner, steps = sp.Pruner(toy.make_model(), restless, None), []
    model = toy.make_model()
    pruner = sp.Pruner(model, restless, None)
    toy.train(model, pruner, toy.sgd(model), ["en"] * 12, after=lambda s, n, event: steps.append(s) if event else None)
    if masks == "own":
        assert steps == [4, 6, 7, 8, 9, 10, 11, 12]


def test_a_schedule_that_prunes_keeps_the_interval_short(toy):
    """Blocks that go count like blocks that come: else a steep schedule would be followed in a few large leaps."""
    model = toy.make_model()
    plan = replace(sp.methods.gradual(LANGUAGES, 0.7, steps=64, interval=8), churn=0.05)
    pruner, steps = sp.Pruner(model, plan, optimizer := toy.sgd(model)), []
    toy.train(model, pruner, optimizer, ["en"] * 32, after=lambda s, n, event: steps.append(s) if event else None)
    assert steps[:6] == [8, 12, 14, 15, 16, 17] and len(steps) > 10, steps  # towards the end of the ramp less is pruned


def test_explored_blocks_are_those_kept_since_the_schedule_ended(toy):
    plan = replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=40), interval=2)
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, plan, optimizer)
    assert pruner.explored() == {"en": 1.0, "fr": 1.0}  # the density of now, before the schedule has ended
    ever: dict = {}

    def follow(step, name, event):
        if step < plan.schedule_end:
            return
        for layer_name, layer in toy.layers_of(model).items():
            for language in LANGUAGES:
                mask = layer.mask(language)
                ever[layer_name, language] = ever.get((layer_name, language), mask) | mask

    toy.train(model, pruner, optimizer, toy.turns(40), after=follow)
    for language in LANGUAGES:
        share = sum(int(ever[name, language].sum()) for name in toy.layers_of(model))
        blocks = sum(layer.mask().numel() for layer in toy.layers_of(model).values())
        assert pruner.explored()[language] == share / blocks > 0.4
    again = sp.Pruner(model, plan, optimizer, state=pruner.state_dict())
    assert again.explored() == pruner.explored()


def test_random_masks_are_a_matter_of_names_alone(toy):
    plan = sp.PruningPlan(schedule=sp.Constant(0.5), interval=1, freeze=0, init="random")
    first, second = toy.make_model(), toy.make_model(("fr", "en"))
    for model in (first, second):
        sp.Pruner(model, plan, None)
    for name in LANGUAGES:
        assert toy.kept(first, name) == toy.target(first, 0.5)
        assert torch.equal(first[0].mask(name), second[0].mask(name))
    assert not torch.equal(first[0].mask("en"), first[0].mask("fr"))
    assert not torch.equal(first[0].mask("en").flatten()[:40], first[2].mask("en").flatten()[:40])
    sp.Pruner(first, replace(plan, masks="shared"), None)
    assert torch.equal(first[0].mask("en"), first[0].mask("fr"))


def test_once_masks_are_fixed_a_pathway_moves_its_own_weights_only(toy):
    plan = replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=40), after_freeze="inside")
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, plan, optimizer)
    toy.train(model, pruner, optimizer, toy.turns(plan.freeze))
    before = {name: layer.weight.detach().clone() for name, layer in toy.layers_of(model).items()}
    toy.train(model, pruner, optimizer, ["en"] * 5, seed=3)
    for name, layer in toy.layers_of(model).items():
        inside = sp.expand_mask(layer.mask("en"), layer.block, tuple(layer.weight.shape))
        assert torch.equal(layer.weight[~inside], before[name][~inside])
        assert not torch.equal(layer.weight[inside], before[name][inside])
    with pytest.raises(ValueError, match=r"optimizer is None, but PruningPlan\.after_freeze = 'inside' acts"):
        sp.Pruner(toy.make_model(), plan, None)


@pytest.mark.parametrize("stop", [7, 28, 33])
@pytest.mark.parametrize(
    "change",
    [
        dict(score=sp.Learned(0.05)),
        dict(score=sp.Learned(0.05, gate="hard-concrete", scale_lr=0.01)),
        dict(score=sp.Movement(0.9), scope="global"),
        dict(churn=0.05),
        dict(after_freeze="inside"),
    ],
    ids=["learned", "gates", "movement-global", "churn", "inside"],
)
def test_a_resumed_run_has_the_same_bits(toy, change, stop, tmp_path):
    plan = replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=40), **change)

    def start():
        model = toy.make_model()
        optimizer = toy.adamw(model)
        return model, sp.Pruner(model, plan, optimizer), optimizer

    straight, resumed = start(), start()
    toy.train(*straight, toy.turns(40)[:stop], seed=1)
    torch.save([part.state_dict() for part in straight], tmp_path / "run.pt")
    for part, state in zip(resumed, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    events = {}
    for which, parts in (("straight", straight), ("resumed", resumed)):
        seen = events[which] = []
        toy.train(*parts, toy.turns(40)[stop:], seed=2, after=lambda step, name, event, to=seen: to.append(event))
    assert events["straight"] == events["resumed"]
    for part in (0, 2):
        for one, two in zip(nn.ParameterList(straight[0].parameters()), resumed[0].parameters(), strict=True):
            assert torch.equal(one, two)
            for key, value in straight[2].state[one].items():
                assert torch.equal(value, resumed[2].state[two][key]), (part, key)
    for one, two in zip(toy.layers_of(straight[0]).values(), toy.layers_of(resumed[0]).values(), strict=True):
        assert torch.equal(one.block_mask, two.block_mask)


GATED = sp.Learned(gate="hard-concrete", scale_lr=0.02)


def gated_plan(**change):
    return replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=40, score=GATED), **change)


def test_gates_are_drawn_in_training_alone_and_are_gone_with_fixed_masks(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, gated_plan(), optimizer)
    x = torch.randn(4, 10)
    start = model[0].weight.detach().clone()
    seen, evaluated = [], []

    def look(step, name, event):
        if step == pruner.plan.freeze - 1:
            with sp.pathway(model, name):
                evaluated.extend([model.eval()(x), model(x)])
                seen.extend([model.train()(x), model(x)])  # the same batch has the same gates

    toy.train(model, pruner, optimizer, toy.turns(pruner.plan.freeze - 1), after=look)
    assert torch.equal(*seen) and torch.equal(*evaluated)
    assert (seen[0] - evaluated[0]).abs().max() > 1e-3
    layer = model[0]
    drawn = layer.gates("en", True)
    assert layer.gates("en", False) is None
    assert 0.0 <= drawn.min() < 0.9 and drawn.max() == 1.0
    factor = pruner._memory.tensors["0:scale"][0]
    assert (factor - 1.0).abs().max() > 0.01 and not torch.equal(layer.weight, start)
    toy.train(model, pruner, optimizer, ["en"], seed=3)
    assert layer.gates is None
    fixed = pruner._memory.tensors["0:scale"][0].clone()
    toy.train(model, pruner, optimizer, ["en"] * 3, seed=4)
    assert torch.equal(fixed, pruner._memory.tensors["0:scale"][0])  # with the masks, the factors stay


def test_factors_belong_to_the_weight(toy):
    """Whatever is made of the model in mid-run computes what the model does, and other pathways see no jump."""
    plan = gated_plan(score=sp.Learned(scale_lr=0.02), pathways=("en",))
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, plan, optimizer)
    x = torch.randn(4, 10)
    jumps = []

    def other(step, name, event):
        with sp.pathway(model, "fr"):
            jumps.append(model(x).detach())

    toy.train(model, pruner, optimizer, ["en"] * 30, after=other)
    moves = [float((b - a).abs().max()) for a, b in itertools.pairwise(jumps)]
    assert max(moves[plan.freeze - 2 : plan.freeze + 1]) < 3 * sorted(moves)[len(moves) // 2] + 1e-6
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(sp.pack(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_forget_their_gates(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, gated_plan(), optimizer)
    layers = toy.layers_of(model).values()
    assert all(layer.gates is not None for layer in layers)
    assert all(layer.gates is None for layer in toy.layers_of(copy.deepcopy(model)).values())
    copied = copy.deepcopy((model, optimizer, pruner))
    assert all(layer.gates.args and layer.gates.func.__self__ is copied[2] for layer in copied[2].layers.values())
    toy.train(*(copied[0], copied[2], copied[1]), toy.turns(40), seed=2)
    toy.train(model, pruner, optimizer, toy.turns(40), seed=2)
    assert all(layer.gates is None for layer in layers)  # masks are fixed
    for one, two in zip(model.parameters(), copied[0].parameters(), strict=True):
        assert torch.equal(one, two)
    again = sp.Pruner(model, gated_plan(), toy.adamw(model))
    again.detach()
    assert all(layer.gates is None for layer in layers)


def test_the_gates_of_an_lstm():
    torch.manual_seed(0)
    model = sp.sparsify_(nn.ModuleList([nn.LSTM(8, 16, batch_first=True)]), (8, 1), LANGUAGES)
    pruner = sp.Pruner(model, gated_plan(), torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(2, 5, 8)
    plain = model.eval()[0](x)[0]
    assert (model.train()[0](x)[0] - plain).abs().max() > 1e-4
    model[0](x)[0].square().mean().backward()
    before = {name: pruner._memory.tensors[name].clone() for name in pruner.layers}
    pruner.step("en")
    for name, value in before.items():
        moved = (pruner._memory.tensors[name] - value)[:, 0].abs().amax((1, 2))
        assert moved[0] > 1e-3 and moved[1] == 0.0


def test_two_pruners_do_not_draw_for_one_model(toy):
    model = toy.make_model()
    first = sp.Pruner(model, gated_plan(), toy.adamw(model))
    with pytest.raises(ValueError, match=r"0: another Pruner draws the gates of its blocks; call its detach\(\) first"):
        sp.Pruner(model, gated_plan(), toy.adamw(model))
    copy.copy(first)
    assert all(layer.gates.func.__self__ is first for layer in first.layers.values())
    first.detach()
    assert all(layer.gates is None for layer in copy.deepcopy(first).layers.values())
    sp.Pruner(model, gated_plan(), toy.adamw(model)).detach()


@pytest.mark.parametrize("change", [{}, dict(score="gradient", after_freeze="inside")], ids=["scale", "inside"])
def test_layers_that_share_a_weight_are_refused_where_they_must(toy, change):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sp.sparsify_(model, (4, 1), LANGUAGES)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        sp.Pruner(model, gated_plan(**change), toy.adamw(model))


def test_a_decision_that_fails_is_made_at_the_next_step(toy):
    plan = replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=20), after_freeze="inside")
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, plan, optimizer)
    toy.train(model, pruner, optimizer, ["en"] * 9)
    with pytest.raises(ValueError, match="pathway 'fr' had no batch by step 10"):
        toy.train(model, pruner, optimizer, ["en"], seed=1)
    again = toy.make_model()
    again.load_state_dict(model.state_dict())
    again_optimizer = toy.adamw(again)
    resumed = sp.Pruner(again, plan, again_optimizer, state=pruner.state_dict())
    for one, parts in ((pruner, (model, pruner, optimizer)), (resumed, (again, resumed, again_optimizer))):
        events = []
        toy.train(*parts, ["fr"], seed=2, after=lambda step, name, event, to=events: to.append(event))
        assert events[0].decided == LANGUAGES and one.steps == 11
        assert toy.kept(parts[0], "fr") == toy.kept(parts[0], "en") == toy.target(parts[0], 0.6)


def test_an_earlier_state_undoes_what_followed_the_freeze(toy):
    plan = replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=20), after_freeze="inside")
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, plan, optimizer)
    toy.train(model, pruner, optimizer, toy.turns(8))
    weights, state = copy.deepcopy(model.state_dict()), pruner.state_dict()
    toy.train(model, pruner, optimizer, toy.turns(20)[8:])
    assert not model[0].dense_grad and pruner._update is not None
    model.load_state_dict(weights)
    pruner.load_state_dict(state)
    assert model[0].dense_grad and pruner._update is None and not pruner._fixed


def test_a_state_of_an_older_version_and_of_nobody(toy):
    model = toy.make_model()
    pruner = sp.Pruner(model, gated_plan(score="learned"), toy.adamw(model))
    state = pruner.state_dict()
    del state["plan"]["score"]["gate"], state["plan"]["score"]["scale_lr"], state["plan"]["after_freeze"], state["owed"]
    pruner.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state is not what Pruner\.state_dict\(\) gave"):
        pruner.load_state_dict({})


def test_a_weight_that_is_not_finite_is_named_at_once(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = sp.Pruner(model, sp.methods.lap(LANGUAGES, 0.5, steps=40), optimizer)
    toy.train(model, pruner, optimizer, ["en"] * 2)
    with torch.no_grad():
        model[2].weight[1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^2: a weight after a batch of pathway 'en' is NaN .* at step 3"):
        pruner.step("en")


def test_phases_are_no_plan(toy):
    model = toy.make_model()
    with pytest.raises(TypeError, match=r"plan is a tuple; want a PruningPlan; phases, as those of"):
        sp.Pruner(model, sp.methods.imp(LANGUAGES, 0.5, steps=20, levels=2))


def test_a_stair_decides_the_pathways_that_have_had_batches(toy):
    schedule = sp.Milestones(((2, 0.2), (8, 0.5)))
    plan = sp.PruningPlan(schedule=schedule, interval=50, score="gradient", pathways=LANGUAGES)
    model = toy.make_model()
    pruner, decided = sp.Pruner(model, plan, optimizer := toy.sgd(model)), []
    names = ["en"] * 4 + ["fr"] * 6
    toy.train(
        model, pruner, optimizer, names, after=lambda s, n, event: decided.append(event.decided) if event else None
    )
    assert decided == [("en",), LANGUAGES]
    assert toy.kept(model, "fr") == toy.target(model, 0.5)


def test_kept_blocks_of_all_layers_that_are_too_few_are_refused(toy):
    model = toy.make_model()
    toy.fixed_masks(model, 0.75)
    plan = replace(sp.methods.gradual(LANGUAGES, 0.5, steps=20, scope="global"), init="current")
    with pytest.raises(ValueError, match=r"pathway 'en' keeps 18 of 72 blocks, fewer than sparsity 0\.5 leaves"):
        sp.Pruner(model, plan, toy.sgd(model))
