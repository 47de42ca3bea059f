"""Resume with the same bits; bad numbers and bad use are named."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from sparse_pathways import prune
from sparse_pathways.mask import Constant, Cubic
from sparse_pathways.prune.scores import is_finite

LANGUAGES = ("en", "fr")


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
def test_a_resumed_run_has_the_same_bits(toy, make_plan, stop, tmp_path):
    def start():
        model = toy.make_model()
        optimizer = toy.adamw(model)
        return model, prune.Pruner(model, make_plan(), optimizer), optimizer

    straight = start()
    toy.train(*straight, toy.turns(40)[:stop], seed=1)
    torch.save([part.state_dict() for part in straight], tmp_path / "run.pt")

    resumed = start()
    with torch.no_grad():
        resumed[0][0].weight.mul_(3)  # whatever a fresh process starts from
    for part, state in zip(resumed, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)

    events = {}
    for which, parts in (("straight", straight), ("resumed", resumed)):
        events[which] = []
        toy.train(
            *parts, toy.turns(40)[stop:], seed=2, after=lambda step, name, event, to=events[which]: to.append(event)
        )
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


def test_state_dict_is_a_copy(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES), optimizer)
    toy.train(model, pruner, optimizer, toy.turns(4))
    state = pruner.state_dict()
    frozen = copy.deepcopy(state)
    toy.train(model, pruner, optimizer, toy.turns(4))
    assert all(torch.equal(state["averages"][k], frozen["averages"][k]) for k in frozen["averages"])
    assert state["steps"] == frozen["steps"] == 4


def saved_run(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=20), optimizer)
    toy.train(model, pruner, optimizer, toy.turns(20))
    return pruner.state_dict()


def test_masks_of_another_run_are_refused(toy):
    state = saved_run(toy)
    pruner = prune.Pruner(toy.make_model(), prune.PruningPlan.from_dict(state["plan"]))
    with pytest.raises(
        ValueError, match=r"^0: the model's masks are not those of the saved run; make the Pruner, then"
    ):
        pruner.load_state_dict(state)
    assert pruner.steps == 0


def test_another_plan_is_refused(toy):
    pruner = prune.Pruner(toy.make_model(), prune.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=20, interval=3))
    with pytest.raises(ValueError, match=r"PruningPlan\.interval is 3, in the saved state 1"):
        pruner.load_state_dict(saved_run(toy))


def test_another_model_is_refused(toy):
    state = saved_run(toy)
    model = nn.Sequential(toy.make_model(), nn.Identity())
    pruner = prune.Pruner(model, prune.PruningPlan.from_dict(state["plan"]))
    with pytest.raises(ValueError, match=r"0\.0: a layer of the model only"):
        pruner.load_state_dict(state)


# --- bad numbers and bad use ------------------------------------------------------------------------------------------


def test_sums_that_overflow_are_not_taken_for_scores_that_do():
    large = torch.full((4,), 3e38)
    assert is_finite([large, torch.ones(2), torch.tensor([math.inf, -math.inf]), torch.tensor([math.nan])]) == [
        True,
        True,
        False,
        False,
    ]
    assert is_finite([]) == []


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_bad_gradient_is_reported_and_enters_nothing(toy, poison):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, 0.5, interval=1), optimizer)
    toy.train(model, pruner, optimizer, toy.turns(5))
    before = pruner.state_dict()
    masks = [layer.masks for layer in toy.layers_of(model).values()]
    model[2].weight.grad[3, 7] = poison
    with pytest.raises(FloatingPointError, match=r"^2: w \* g of a batch of pathway 'en' is NaN or infinite at step 6"):
        pruner.step("en")
    after = pruner.state_dict()
    (old, shape), (new, new_shape) = tree_flatten(before), tree_flatten(after)
    assert shape == new_shape
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(old, new, strict=True))
    for layer, old in zip(toy.layers_of(model).values(), masks, strict=True):
        assert all(torch.equal(layer.mask(name), old[name]) for name in LANGUAGES)
    optimizer.zero_grad()
    toy.train(model, pruner, optimizer, toy.turns(5), seed=4)
    assert all(value.isfinite().all() for value in pruner.state_dict()["averages"].values())


def test_a_nan_weight_is_reported_and_changes_no_mask(toy):
    model = toy.make_model()
    pruner = prune.Pruner(model, prune.methods.lap(LANGUAGES, 0.5, schedule=Cubic(0, 0.5, 0, 4), interval=2))
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"^2: a weight after a batch of pathway 'en' is NaN .* at step 1"):
        pruner.step("en")
    assert pruner.steps == 0
    assert toy.kept(model, "en") == toy.target(model, 0.0)


def test_gradients_that_are_gone_are_reported(toy):
    model = toy.make_model()
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES))
    with pytest.raises(RuntimeError, match=r"no layer has a gradient at step 1.*before zero_grad"):
        pruner.step("en")
    assert pruner.steps == 0


def test_a_layer_that_a_batch_does_not_use_has_zero_gradient(toy):
    model = toy.make_model()
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    pruner.step("en")
    averages = pruner.state_dict()["averages"]
    assert averages["0"][0].any() and not averages["2"].any()


def test_a_pathway_without_batches_cannot_be_decided_by_gradient(toy):
    model = toy.make_model()
    optimizer = toy.adamw(model)
    pruner = prune.Pruner(model, prune.methods.dynamic_asr_pathways(LANGUAGES, steps=20), optimizer)
    with pytest.raises(ValueError, match=r"pathway 'fr' had no batch by step 10"):
        toy.train(model, pruner, optimizer, ["en"] * 20)


PLAIN = prune.PruningPlan(schedule=Constant(0.5), interval=10)
BAD_USE = [
    ("no-layers", lambda toy: prune.Pruner(nn.Linear(4, 4), PLAIN), ValueError, r"no SparseLinear; call sparsify_"),
    (
        "unknown-pathway",
        lambda toy: prune.Pruner(toy.make_model(), prune.methods.lap(("en", "de"))),
        ValueError,
        r"PruningPlan\.pathways: 0 has no pathway 'de', only en, fr",
    ),
    (
        "step-unknown",
        lambda toy: prune.Pruner(toy.make_model(), PLAIN).step("de"),
        KeyError,
        r"pathway = 'de' is not known; choose one of en, fr",
    ),
    (
        "step-unnamed",
        lambda toy: prune.Pruner(toy.make_model(), PLAIN).step(),
        ValueError,
        r"pathway is None, but there are several: name one of en, fr",
    ),
    (
        "no-optimizer",
        lambda toy: prune.Pruner(toy.make_model(), prune.methods.gradual()),
        ValueError,
        r"optimizer is None, but PruningPlan\.dense_grad = False acts on it",
    ),
    (
        "not-an-optimizer",
        lambda toy: prune.Pruner(toy.make_model(), PLAIN, "adam"),
        TypeError,
        r"optimizer is a str; want a torch\.optim\.Optimizer",
    ),
    (
        "foreign-optimizer",
        lambda toy: prune.Pruner(toy.make_model(), PLAIN, toy.adamw(toy.make_model())),
        ValueError,
        r"optimizer does not hold 0\.weight; want one optimiser of all sparse layers, made from model\.parameters\(\)",
    ),
]


@pytest.mark.parametrize("use, error, message", [case[1:] for case in BAD_USE], ids=[case[0] for case in BAD_USE])
def test_bad_use_is_named(toy, use, error, message):
    with pytest.raises(error, match=message):
        use(toy)


def test_fixed_masks_that_were_never_set_are_refused(toy):
    model = toy.make_model()
    with pytest.raises(ValueError, match=r"pathway 'en' has sparsity 0\.0000, PruningPlan\.schedule says 0\.7"):
        prune.Pruner(model, prune.methods.asr_pathways(LANGUAGES, 0.7), toy.adamw(model))


def test_masks_sparser_than_the_target_are_refused_when_nothing_comes_back(toy):
    model = toy.make_model()
    toy.fixed_masks(model, 0.9)
    plan = prune.PruningPlan(schedule=Constant(0.5), interval=5, candidates="kept")
    with pytest.raises(ValueError, match=r"^0: pathway 'en' keeps 4 blocks, fewer than the 20 of sparsity 0\.5"):
        prune.Pruner(model, plan)
