import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

import sparse_pathways as sp
from sparse_pathways import prune
from sparse_pathways.mask import Constant, Cubic, Milestones

LANGUAGES = ("en", "fr")


def make_model(languages=LANGUAGES, block=(4, 1)):
    torch.manual_seed(1)
    return sp.sparsify_(nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 6)), block, languages)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


def train(model, pruner, optimizer, names, seed=0, after=lambda step, name, event: None):
    """One optimiser step per name; the batches depend on `seed` alone."""
    draw = torch.Generator().manual_seed(seed)
    for step, name in enumerate(names, 1):
        x, y = torch.randn(8, 10, generator=draw), torch.randn(8, 6, generator=draw)
        with sp.pathway(model, name):
            loss = (model(x) - (y if name == "en" else -y)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step, name, pruner.step(name))


def turns(steps):
    return [LANGUAGES[(step // 2) % 2] for step in range(steps)]


def layers_of(model):
    return sp.sparse_layers(model)


def kept(model, name):
    return [int(layer.mask(name).sum()) for layer in layers_of(model).values()]


def target(model, sparsity):
    return [round((1 - sparsity) * layer.mask().numel()) for layer in layers_of(model).values()]


METHODS = {
    "gradual": prune.methods.gradual,
    "adaptive": prune.methods.adaptive,
    "lap": prune.methods.lap,
    "dynamic_asr_pathways": prune.methods.dynamic_asr_pathways,
}


# --- densities and events ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_and_pathway_ends_at_the_exact_density(method, sparsity):
    model = make_model()
    optimizer = adamw(model)
    pruner = prune.Pruner(model, METHODS[method](LANGUAGES, sparsity, steps=40), optimizer)
    # "fr" is rare: its own counter never reaches an interval before the masks are fixed.
    train(model, pruner, optimizer, ["en", "en", "en", "fr"] + ["en"] * 36)
    for name in LANGUAGES:
        assert kept(model, name) == target(model, sparsity)


def test_density_follows_the_schedule_and_masks_stay_fixed_after_freeze():
    model = make_model()
    optimizer = adamw(model)
    plan = prune.methods.lap(LANGUAGES, 0.7, schedule=Cubic(0.1, 0.7, 4, 20), interval=2, freeze=25)
    pruner = prune.Pruner(model, plan, optimizer)
    assert kept(model, "en") == kept(model, "fr") == target(model, 0.1)
    events, totals, fixed = [], [], []

    def note(step, name, event):
        totals.append(sum(kept(model, "en")))
        if event is not None:
            events.append(event)
            assert kept(model, "en") == kept(model, "fr") == target(model, plan.schedule(step))
        if step >= 25:
            fixed.append(model[0].mask("en"))

    train(model, pruner, optimizer, turns(40), after=note)
    assert [event.step for event in events] == [*range(2, 26, 2), 25]
    assert totals == sorted(totals, reverse=True)
    assert all(torch.equal(mask, fixed[0]) for mask in fixed)


def test_event_counts_equal_a_recount_and_go_into_json():
    model = make_model()
    optimizer = adamw(model)
    plan = prune.methods.dynamic_asr_pathways(LANGUAGES, 0.6, schedule=Constant(0.6), interval=3, freeze=31)
    pruner = prune.Pruner(model, plan, optimizer)
    state = {"before": {n: [layer.mask(n) for layer in layers_of(model).values()] for n in LANGUAGES}}
    decided = []

    def recount(step, name, event):
        now = {n: [layer.mask(n) for layer in layers_of(model).values()] for n in LANGUAGES}
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

    train(model, pruner, optimizer, turns(40), after=recount)
    assert ("en",) in decided and ("fr",) in decided and decided[-1] == LANGUAGES


def test_ungoverned_pathways_keep_their_masks():
    model = make_model(("en", "fr", "it"))
    optimizer = adamw(model)
    pruner = prune.Pruner(model, prune.methods.adaptive(("fr",), 0.5, steps=10), optimizer)
    train(model, pruner, optimizer, ["fr"] * 10)
    assert sp.pathways(model) == ("en", "fr", "it")
    assert kept(model, "fr") == target(model, 0.5)
    assert kept(model, "en") == kept(model, "it") == target(model, 0.0)


def test_shared_gradient_scores_are_one_mask_and_own_ones_part():
    masks = {}
    for sharing, method in (("shared", prune.methods.lap), ("own", prune.methods.dynamic_asr_pathways)):
        model = make_model()
        optimizer = adamw(model)
        pruner = prune.Pruner(model, method(LANGUAGES, 0.5, steps=60, score="gradient"), optimizer)
        train(model, pruner, optimizer, turns(60))
        masks[sharing] = [float(sp.overlap(model)["total"][0, 1])]
    assert masks["shared"] == [1.0]
    assert masks["own"][0] < 1.0


def test_equal_scores_keep_the_lower_index():
    model = make_model(("default",))
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.weight.fill_(0.5)
    prune.Pruner(model, prune.PruningPlan(schedule=Constant(0.75), interval=1, init="magnitude"))
    mask = model[0].mask().flatten()
    assert mask[: int(mask.sum())].all() and int(mask.sum()) == round(0.25 * mask.numel())


def test_milestones_with_any_module_and_no_pathway_argument():
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
    assert kept(model, "default") == target(model, 0.7)


# --- variant B: updates stay inside the pathway -----------------------------------------------------------------------


def fixed_masks(model, sparsity=0.5):
    draw = torch.Generator().manual_seed(11)
    for layer in layers_of(model).values():
        for name in layer.pathways:
            layer.set_mask_(sp.topk_mask(torch.rand(layer.mask().shape, generator=draw), sparsity), name)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("make_optimizer", [adamw, sgd], ids=["adamw", "sgd-momentum"])
def test_batches_of_one_pathway_leave_everything_outside_it_bit_identical(make_optimizer, wrapped):
    model = make_model()
    fixed_masks(model)
    optimizer = make_optimizer(model)
    if wrapped:
        accelerate = pytest.importorskip("accelerate", reason="accelerate is an optional extra")
        optimizer = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    pruner = prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.5), optimizer)
    train(model, pruner, optimizer, ["fr"] * 5)  # momentum of "fr" is up before the look at "en"
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
            for layer in layers_of(model).values()
        ]

    before = state()
    train(model, pruner, optimizer, ["en"] * 7, seed=1)
    for layer, old, new in zip(layers_of(model).values(), before, state(), strict=True):
        inside = sp.expand_mask(layer.mask("en"), layer.block, tuple(layer.weight.shape))
        assert set(new) == set(old) and len(new) >= 2
        for key in new:
            assert torch.equal(new[key][~inside], old[key][~inside]), key
            assert not torch.equal(new[key][inside], old[key][inside]), key
    assert model(x).isfinite().all()


def test_variant_a_moves_pruned_weights():
    model = make_model()
    fixed_masks(model)
    optimizer = adamw(model)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=1, freeze=0, dense_grad=True)
    pruner = prune.Pruner(model, plan, optimizer)
    before = model[0].weight.detach().clone()
    train(model, pruner, optimizer, ["en"] * 3)
    outside = ~sp.expand_mask(model[0].mask("en"), model[0].block, tuple(before.shape))
    assert (model[0].weight.detach() != before)[outside].all()


@pytest.mark.parametrize("sharing", ["own", "shared"])
def test_only_kept_blocks_compete(sharing):
    model = make_model()
    fixed_masks(model, 0.4)  # sparser than the schedule at first, and another mask per pathway
    optimizer = adamw(model)
    plan = prune.PruningPlan(
        schedule=Cubic(0.0, 0.6, 0, 20), interval=1, freeze=20, masks=sharing, candidates="kept", dense_grad=False
    )
    pruner = prune.Pruner(model, plan, optimizer)
    allowed = {name: [layer.mask(name) for layer in layers_of(model).values()] for name in LANGUAGES}
    if sharing == "shared":
        union = [a | b for a, b in zip(*allowed.values(), strict=True)]
        allowed = {"en": union, "fr": union}

    def check(step, name, event):
        assert event.regrown == 0
        for language in LANGUAGES:
            for layer, mask in zip(layers_of(model).values(), allowed[language], strict=True):
                assert not (layer.mask(language) & ~mask).any()
                if sharing == "shared" and step == 1:
                    assert torch.equal(layer.mask(language), mask)  # the schedule has nothing to take yet

    train(model, pruner, optimizer, turns(20), after=check)
    assert kept(model, "en") == kept(model, "fr") == target(model, 0.6)


@pytest.mark.parametrize("dense_grad", [True, False])
def test_the_plan_says_whether_pruned_blocks_have_gradients(dense_grad):
    model = make_model()
    fixed_masks(model)
    optimizer = adamw(model)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=1, freeze=0, dense_grad=dense_grad)
    train(model, prune.Pruner(model, plan, optimizer), optimizer, ["en"])
    outside = ~sp.expand_mask(model[2].mask("en"), model[2].block, tuple(model[2].weight.shape))
    assert bool(model[2].weight.grad[outside].any()) is dense_grad


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_moments_of_blocks_that_no_pathway_keeps_any_more(moments):
    model = make_model()
    optimizer = adamw(model)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=6, masks="shared", moments=moments)
    pruner = prune.Pruner(model, plan, optimizer)
    train(model, pruner, optimizer, turns(6))
    for layer in layers_of(model).values():
        gone = ~sp.expand_mask(layer.mask("en"), layer.block, tuple(layer.weight.shape))
        assert gone.any()
        for key in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[layer.weight][key]
            assert bool((value[gone] == 0).all()) is (moments == "reset")
            assert (value[~gone] != 0).any()


def test_a_forgotten_pruner_step_is_refused_and_detach_ends_the_watch():
    model = make_model()
    fixed_masks(model)
    optimizer = adamw(model)
    pruner = prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.5), optimizer)
    model(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was called twice without pruner\.step"):
        optimizer.step()
    pruner.detach()
    optimizer.step()
    optimizer.step()


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 9, 20, 33])
@pytest.mark.parametrize(
    "make_plan",
    [
        lambda: prune.methods.gradual(LANGUAGES, 0.6, steps=40),
        lambda: prune.methods.lap(LANGUAGES, 0.6, steps=40, score="gradient"),
        lambda: prune.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=40),
    ],
    ids=["gradual", "lap-gradient", "dynamic"],
)
def test_a_resumed_run_has_the_same_bits(make_plan, stop, tmp_path):
    def start():
        model = make_model()
        optimizer = adamw(model)
        return model, prune.Pruner(model, make_plan(), optimizer), optimizer

    straight = start()
    train(*straight, turns(40)[:stop], seed=1)
    torch.save([part.state_dict() for part in straight], tmp_path / "run.pt")

    resumed = start()
    with torch.no_grad():
        resumed[0][0].weight.mul_(3)  # whatever a fresh process starts from
    for part, state in zip(resumed, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)

    events = {}
    for which, parts in (("straight", straight), ("resumed", resumed)):
        events[which] = []
        train(*parts, turns(40)[stop:], seed=2, after=lambda step, name, event, to=events[which]: to.append(event))
    assert events["straight"] == events["resumed"]
    assert_same_bits(*([part.state_dict() for part in parts] for parts in (straight, resumed)))


def assert_same_bits(first, second, path=""):
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same_bits(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same_bits(*pair, f"{path}.{index}")
    else:
        assert torch.equal(first, second) if torch.is_tensor(first) else first == second, path


def test_state_dict_is_a_copy():
    model = make_model()
    optimizer = adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES), optimizer)
    train(model, pruner, optimizer, turns(4))
    state = pruner.state_dict()
    frozen = copy.deepcopy(state)
    train(model, pruner, optimizer, turns(4))
    assert all(torch.equal(state["averages"][k], frozen["averages"][k]) for k in frozen["averages"])
    assert state["steps"] == frozen["steps"] == 4


def saved_run():
    model = make_model()
    optimizer = adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=20), optimizer)
    train(model, pruner, optimizer, turns(20))
    return pruner.state_dict()


def test_masks_of_another_run_are_refused():
    state = saved_run()
    pruner = prune.Pruner(make_model(), prune.PruningPlan.from_dict(state["plan"]))
    with pytest.raises(
        ValueError, match=r"^0: the model's masks are not those of the saved run; make the Pruner, then"
    ):
        pruner.load_state_dict(state)
    assert pruner.steps == 0


def test_another_plan_is_refused():
    pruner = prune.Pruner(make_model(), prune.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=20, interval=3))
    with pytest.raises(ValueError, match=r"PruningPlan\.interval is 3, in the saved state 1"):
        pruner.load_state_dict(saved_run())


def test_another_model_is_refused():
    state = saved_run()
    model = nn.Sequential(make_model(), nn.Identity())
    pruner = prune.Pruner(model, prune.PruningPlan.from_dict(state["plan"]))
    with pytest.raises(ValueError, match=r"0\.0: a layer of the model only"):
        pruner.load_state_dict(state)


# --- bad numbers and bad use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_bad_gradient_is_reported_and_enters_nothing(poison):
    model = make_model()
    optimizer = adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, 0.5, interval=1), optimizer)
    train(model, pruner, optimizer, turns(5))
    before = pruner.state_dict()
    masks = [layer.masks for layer in layers_of(model).values()]
    model[2].weight.grad[3, 7] = poison
    with pytest.raises(FloatingPointError, match=r"^2: w \* g of a batch of pathway 'en' is NaN or infinite at step 6"):
        pruner.step("en")
    after = pruner.state_dict()
    assert all(torch.equal(before["averages"][k], after["averages"][k]) for k in before["averages"])
    assert {k: v for k, v in before.items() if k != "averages"} == {k: v for k, v in after.items() if k != "averages"}
    for layer, old in zip(layers_of(model).values(), masks, strict=True):
        assert all(torch.equal(layer.mask(name), old[name]) for name in LANGUAGES)
    optimizer.zero_grad()
    train(model, pruner, optimizer, turns(5), seed=4)
    assert all(value.isfinite().all() for value in pruner.state_dict()["averages"].values())


def test_a_nan_weight_is_reported_and_changes_no_mask():
    model = make_model()
    pruner = prune.Pruner(model, prune.methods.lap(LANGUAGES, 0.5, schedule=Cubic(0, 0.5, 0, 4), interval=2))
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    assert pruner.step("en") is None
    with pytest.raises(FloatingPointError, match=r"^2: the score of a block is NaN or infinite at step 2"):
        pruner.step("en")
    assert kept(model, "en") == target(model, 0.0)


def test_gradients_that_are_gone_are_reported():
    model = make_model()
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES))
    with pytest.raises(RuntimeError, match=r"no layer has a gradient at step 1.*before zero_grad"):
        pruner.step("en")
    assert pruner.steps == 0


def test_a_layer_that_a_batch_does_not_use_has_zero_gradient():
    model = make_model()
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    pruner.step("en")
    averages = pruner.state_dict()["averages"]
    assert averages["0"][0].any() and not averages["2"].any()


def test_a_pathway_without_batches_cannot_be_decided_by_gradient():
    model = make_model()
    optimizer = adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, steps=20), optimizer)
    with pytest.raises(RuntimeError, match=r"pathway 'fr' had no batch by step 10"):
        train(model, pruner, optimizer, ["en"] * 20)


PLAIN = prune.PruningPlan(schedule=Constant(0.5), interval=10)
BAD_USE = [
    ("no-layers", lambda: prune.Pruner(nn.Linear(4, 4), PLAIN), ValueError, r"no SparseLinear; call sparsify_"),
    (
        "unknown-pathway",
        lambda: prune.Pruner(make_model(), prune.methods.lap(("en", "de"))),
        ValueError,
        r"PruningPlan\.pathways: 0 has no pathway 'de', only en, fr",
    ),
    (
        "step-unknown",
        lambda: prune.Pruner(make_model(), PLAIN).step("de"),
        KeyError,
        r"pathway = 'de' is not known; choose one of en, fr",
    ),
    (
        "step-unnamed",
        lambda: prune.Pruner(make_model(), PLAIN).step(),
        ValueError,
        r"pathway is None, but there are several: name one of en, fr",
    ),
    (
        "no-optimizer",
        lambda: prune.Pruner(make_model(), prune.methods.gradual()),
        ValueError,
        r"optimizer is None, but PruningPlan\.dense_grad = False acts on it",
    ),
    (
        "not-an-optimizer",
        lambda: prune.Pruner(make_model(), PLAIN, "adam"),
        TypeError,
        r"optimizer is a str; want a torch\.optim\.Optimizer",
    ),
    (
        "foreign-optimizer",
        lambda: prune.Pruner(make_model(), PLAIN, adamw(make_model())),
        ValueError,
        r"optimizer does not hold 0\.weight; make the optimiser from model\.parameters\(\)",
    ),
]


@pytest.mark.parametrize("use, error, message", [case[1:] for case in BAD_USE], ids=[case[0] for case in BAD_USE])
def test_bad_use_is_named(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_fixed_masks_that_were_never_set_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"pathway 'en' has sparsity 0\.0000, PruningPlan\.schedule says 0\.7"):
        prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.7), adamw(model))


def test_masks_sparser_than_the_target_are_refused_when_nothing_comes_back():
    model = make_model()
    fixed_masks(model, 0.9)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=5, candidates="kept")
    with pytest.raises(ValueError, match=r"^0: pathway 'en' keeps 4 blocks, fewer than the 20 of sparsity 0\.5"):
        prune.Pruner(model, plan)
