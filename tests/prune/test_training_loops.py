"""The Pruner in the loops that people write: mixed precision, accumulation, clipping, EMA, copies, compiled models."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparse_pathways as sp

LANGUAGES = ("en", "fr")
STEPS = 24


def plans():
    m = sp.methods
    return {
        "lap": m.lap(LANGUAGES, 0.6, steps=STEPS),
        "dynamic": m.dynamic_asr_pathways(LANGUAGES, 0.6, steps=STEPS),
        "dynamic-B": m.dynamic_asr_pathways(LANGUAGES, 0.6, steps=STEPS, score="magnitude", dense_grad=False),
    }


def batches(seed=0, steps=STEPS):
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        name = LANGUAGES[step // 2 % 2]
        yield name, torch.randn(8, 10, generator=draw), torch.randn(8, 6, generator=draw) * (1 if name == "en" else -1)


def loop(model, plan, step, optimizer=None):
    """Run `step(name, x, y, optimizer) -> None` over all batches; returns the Pruner."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    pruner = sp.Pruner(model, plan, optimizer)
    for name, x, y in batches():
        with sp.pathway(model, name):
            step(name, x, y, optimizer)
        pruner.step(name)
        optimizer.zero_grad()
    return pruner


def plain(model):
    def step(name, x, y, optimizer):
        (model(x) - y).square().mean().backward()
        optimizer.step()

    return step


def masks(model):
    return {name: layer.masks for name, layer in sp.sparse_layers(model).items()}


def assert_same(first, second, tolerance=None):
    for name, layer in sp.sparse_layers(first).items():
        other = sp.sparse_layers(second)[name]
        assert torch.equal(layer.block_mask, other.block_mask), name
        if tolerance is None:
            assert torch.equal(layer.weight, other.weight), name
        else:
            torch.testing.assert_close(layer.weight, other.weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", plans())
def test_accumulated_micro_batches_are_one_batch(toy, method):
    whole, parts = toy.make_model(), toy.make_model()
    loop(whole, plans()[method], plain(whole))

    def step(name, x, y, optimizer):
        for rows in (slice(0, 3), slice(3, 8)):
            ((parts(x[rows]) - y[rows]).square().mean() * (rows.stop - rows.start) / 8).backward()
        optimizer.step()

    loop(parts, plans()[method], step)
    assert_same(whole, parts, tolerance=1e-4)


@pytest.mark.parametrize("method", plans())
def test_bfloat16_autocast_reaches_the_sparsity_with_finite_float32_weights(toy, method):
    model = toy.make_model()

    def step(name, x, y, optimizer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()

    loop(model, plans()[method], step)
    for layer in toy.layers_of(model).values():
        assert layer.weight.dtype == torch.float32 and layer.weight.isfinite().all()
    assert toy.kept(model, "en") == toy.kept(model, "fr") == toy.target(model, 0.6)


def test_a_grad_scaler_changes_nothing_and_its_skipped_step_is_reported(toy):
    """With `unscale_` the scores see the true gradient; after a skipped step the gradient is infinite, and said so."""
    straight, scaled = toy.make_model(), toy.make_model()
    plan = plans()["dynamic"]
    loop(straight, plan, plain(straight))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(name, x, y, optimizer):
        scaler.scale((scaled(x) - y).square().mean()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    pruner = loop(scaled, plan, step)
    assert_same(straight, scaled, tolerance=1e-5)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    pruner = sp.Pruner(scaled, sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, schedule=sp.Constant(0.6)), optimizer)
    before = masks(scaled)
    scaler.scale((scaled(torch.full((1, 10), 1e30)) * 1e30).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)  # skips
    with pytest.raises(FloatingPointError, match=r"at step 1; it was not recorded and no mask changed"):
        pruner.step("en")
    for name, found in masks(scaled).items():
        assert all(torch.equal(found[language], before[name][language]) for language in LANGUAGES)


def test_clipping_and_a_scheduler_keep_updates_inside_the_pathway(toy):
    model = toy.make_model()
    plan = sp.methods.asr_pathways(LANGUAGES, 0.5)
    toy.fixed_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    pruner = sp.Pruner(model, plan, optimizer)
    for name, x, y in batches():
        before = {key: layer.weight.detach().clone() for key, layer in toy.layers_of(model).items()}
        with sp.pathway(model, name):
            (model(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        pruner.step(name)
        optimizer.zero_grad()
        for key, layer in toy.layers_of(model).items():
            inside = sp.expand_mask(layer.mask(name), layer.block, tuple(layer.weight.shape))
            assert torch.equal(layer.weight[~inside], before[key][~inside])


def test_an_averaged_model_follows_weights_and_takes_masks_over(toy):
    model = toy.make_model()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = sp.Pruner(model, plans()["dynamic"], optimizer)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for number, (name, x, y) in enumerate(batches()):
        with sp.pathway(model, name):
            (model(x) - y).square().mean().backward()
        optimizer.step()
        pruner.step(name)
        optimizer.zero_grad()
        average.update_parameters(model)
        new = [parameter.detach() for parameter in model.parameters()]
        expected = [n.clone() if number == 0 else (e + n) / 2 for e, n in zip(expected, new, strict=True)]
    for name, layer in toy.layers_of(model).items():
        twin = toy.layers_of(average.module)[name]
        assert torch.equal(twin.block_mask, layer.block_mask)
        for language in LANGUAGES:
            assert torch.equal(twin.layout(language).to_mask(), layer.mask(language))
    for parameter, wanted in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted)


@pytest.mark.parametrize("method", plans())
def test_a_deep_copy_of_a_run_goes_its_own_way(toy, method):
    model = toy.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = (model, sp.Pruner(model, plans()[method], optimizer), optimizer)
    toy.train(*run, toy.turns(10))
    twin = copy.deepcopy(run)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    toy.train(*twin, toy.turns(10), seed=3)
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    toy.train(*run, toy.turns(10), seed=3)
    assert_same(model, twin[0])


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_model_pickled_in_the_middle_has_its_masks(toy, how):
    model = toy.make_model()
    loop(model, plans()["dynamic"], plain(model))
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_same(model, twin)
    x = torch.randn(4, 10)
    for name in LANGUAGES:
        with sp.pathway(model, name), sp.pathway(twin, name):
            assert torch.equal(model(x), twin(x))


@pytest.mark.slow
def test_a_compiled_model_sees_every_change_of_masks_and_pathways(toy):
    torch._dynamo.reset()
    eager, traced = toy.make_model(), toy.make_model()
    compiled = torch.compile(traced, backend="aot_eager")
    plan = sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=STEPS, interval=4)
    loop(eager, plan, plain(eager))
    loop(traced, plan, plain(compiled))
    assert_same(eager, traced, tolerance=1e-4)
    torch._dynamo.reset()


def test_a_frozen_layer_keeps_its_weight_and_gets_masks_by_magnitude(toy):
    model = toy.make_model()
    model[0].weight.requires_grad_(False)
    weight = model[0].weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loop(model, plans()["lap"], plain(model), optimizer)
    assert torch.equal(model[0].weight, weight)
    assert toy.kept(model, "en") == toy.target(model, 0.6)


def test_shared_modules_and_nested_names_are_pruned_once(toy):
    shared = nn.Linear(8, 8)
    model = sp.sparsify_(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.ReLU())), (4, 1), LANGUAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = sp.Pruner(model, plans()["dynamic"], optimizer)
    assert list(pruner.layers) == ["0"]
    for name in toy.turns(STEPS):
        with sp.pathway(model, name):
            model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        pruner.step(name)
        optimizer.zero_grad()
    assert model[2][0] is model[0] and int(model[0].mask("en").sum()) == round(0.4 * 16)
