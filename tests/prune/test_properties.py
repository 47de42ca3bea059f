"""What holds for every plan, model and run: found by drawing them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import sparse_pathways as sp

LANGUAGES = ("a", "b", "c")
WORKER = Path(__file__).with_name("kill_worker.py")
quick = settings(max_examples=25, deadline=None)


@st.composite
def problems(draw):
    """A model of two layers of any size, blocks of any shape, a method, and the languages of its batches."""
    width = [draw(st.integers(1, 20)) for _ in range(3)]
    block = draw(st.sampled_from([(1, 1), (8, 1), (4, 1), (3, 2), (16, 16)]))
    names = LANGUAGES[: draw(st.integers(1, 3))]
    steps = draw(st.integers(6, 30))
    sparsity = draw(st.sampled_from([0.0, 0.3, 0.5, 0.77, 0.9, 1.0]))
    score = draw(st.sampled_from(["magnitude", "gradient", "movement", "learned"]))
    method = draw(st.sampled_from(["gradual", "adaptive", "lap", "dynamic_asr_pathways"]))
    start = draw(st.sampled_from([0.0, 0.2])) if sparsity > 0.2 else 0.0
    init = "magnitude" if start else "dense"
    plan = getattr(sp.methods, method)(names, sparsity, steps=steps, start=start, score=score, init=init)
    # every language has a batch before any mask can be due, as the scores by gradient need
    batches = [*names, *draw(st.lists(st.sampled_from(names), min_size=steps, max_size=steps))]
    return width, block, names, replace(plan, interval=draw(st.integers(1, 7))), batches


def build(width, block, names):
    torch.manual_seed(0)
    return sp.sparsify_(nn.Sequential(nn.Linear(*width[:2]), nn.Tanh(), nn.Linear(*width[1:])), block, names)


def train(model, plan, batches, seen):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    pruner = sp.Pruner(model, plan, optimizer)
    draw = torch.Generator().manual_seed(1)
    for name in batches:
        x = torch.randn(5, model[0].in_features, generator=draw)
        with sp.pathway(model, name):
            (model(x) - LANGUAGES.index(name)).square().mean().backward()
        optimizer.step()
        seen(pruner.step(name))
        optimizer.zero_grad()
    return pruner


@quick
@given(problems())
def test_density_is_exact_in_every_layer_and_sparsity_never_falls(problem):
    width, block, names, plan, batches = problem
    model, sparsities = build(width, block, names), []

    def seen(event):
        if event is None:
            return
        sparsities.append(event.sparsity)
        assert event.sparsity == plan.schedule(event.step)
        for layer in (model[0], model[2]):
            for name in event.decided:
                keep = round((1 - event.sparsity) * layer.mask().numel())
                assert int(layer.mask(name).sum()) == keep
        assert event.pruned >= 0 and event.regrown >= 0 and 0 <= event.iou <= 1
        assert plan.candidates == "all" or event.regrown == 0

    train(model, plan, batches, seen)
    assert sparsities == sorted(sparsities)
    final = [round((1 - plan.levels[-1]) * layer.mask().numel()) for layer in (model[0], model[2])]
    for name in names:
        assert [int(layer.mask(name).sum()) for layer in (model[0], model[2])] == final


@quick
@given(problems(), st.integers(0, 2), st.integers(0, 99))
def test_nothing_done_to_one_pathway_changes_the_output_of_another(problem, index, seed):
    width, block, names, plan, batches = problem
    model = build(width, block, names)
    train(model, plan, batches, lambda event: None)
    x = torch.randn(3, width[0], generator=torch.Generator().manual_seed(seed))

    def outputs():
        found = {}
        for name in names:
            with sp.pathway(model, name):
                found[name] = model(x)
        return found

    before, victim = outputs(), names[index % len(names)]
    for layer in (model[0], model[2]):
        draw = torch.Generator().manual_seed(seed)
        layer.set_mask_(torch.rand(layer.mask().shape, generator=draw) < 0.5, victim)
    sp.add_pathway_(model, "new", like=victim)
    after = outputs()
    assert all(torch.equal(before[name], after[name]) for name in names if name != victim)
    with sp.pathway(model, "new"):
        assert torch.equal(model(x), after[victim])


def language(name, draw, truth):
    x = torch.randn(32, 24, generator=draw)
    return x, x @ truth[name].T


@pytest.mark.parametrize("score", ["learned", "movement"])
def test_a_new_language_by_its_mask_alone_leaves_the_others_bit_identical(score):
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(8, 24, generator=draw)
    truth = {name: base * (torch.rand(8, 24, generator=draw) < 0.5) for name in LANGUAGES}
    torch.manual_seed(0)
    model = sp.sparsify_(nn.Sequential(nn.Linear(24, 8, bias=False)), (1, 1), ("a", "b"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    plan = sp.methods.dynamic_asr_pathways(("a", "b"), 0.5, steps=400)
    pruner = sp.Pruner(model, plan, optimizer)
    for step in range(400):
        name = ("a", "b")[step % 2]
        x, y = language(name, draw, truth)
        with sp.pathway(model, name):
            F.mse_loss(model(x), y).backward()
        optimizer.step()
        pruner.step(name)
        optimizer.zero_grad()

    def errors(name):
        x, y = language(name, torch.Generator().manual_seed(5), truth)
        with sp.pathway(model, name), torch.no_grad():
            output = model(x)
        return output, float(F.mse_loss(output, y))

    kept = {name: errors(name)[0] for name in ("a", "b")}
    weight = model[0].weight.detach().clone()
    sp.add_pathway_(model, "c")
    dense = errors("c")[1]
    pruner = sp.Pruner(model, sp.methods.new_pathway("c", 0.5, steps=200, score=score))
    for _ in range(200):
        x, y = language("c", draw, truth)
        with sp.pathway(model, "c"):
            F.mse_loss(model(x), y).backward()
        pruner.step("c")
        model.zero_grad()
    assert torch.equal(model[0].weight, weight)
    assert all(torch.equal(errors(name)[0], kept[name]) for name in ("a", "b"))
    assert int(model[0].mask("c").sum()) == model[0].mask("c").numel() // 2
    learned = errors("c")[1]
    shuffled = model[0].mask("c").flatten()[torch.randperm(192, generator=draw)].view(8, 24)
    model[0].set_mask_(shuffled, "c")
    assert learned < 0.7 * min(dense, errors("c")[1])  # the mask knows its language


def test_bad_new_pathways_are_refused():
    model = sp.sparsify_(nn.Linear(8, 8), pathways=("a",))
    with pytest.raises(ValueError, match="names must be distinct"):
        sp.add_pathway_(model, "a")
    with pytest.raises(KeyError, match="'x' is not known"):
        sp.add_pathway_(model, "b", like="x")
    assert sp.pathways(model) == ("a",)
    with pytest.raises(ValueError, match="does not tell blocks that help from blocks that harm"):
        sp.methods.new_pathway("b", steps=10, score="magnitude")
    with pytest.raises(ValueError, match=r"factors of blocks would change the weights of the other pathways"):
        sp.methods.new_pathway("b", steps=10, score=sp.Learned(scale_lr=0.1))
    with pytest.raises(ValueError, match=r"model is packed; unpack_\(model\)"):
        sp.add_pathway_(sp.pack(model), "b")


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [3, 17, 29])
def test_killed_with_sigkill_and_resumed_has_the_same_bits(tmp_path, killed_at):
    """Weights, masks, optimiser and pruner, from the last checkpoint on."""

    def run(folder, *words):
        folder.mkdir(exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, str(WORKER), str(folder), *words], env=environment).returncode

    assert run(tmp_path / "straight") == 0
    assert run(tmp_path / "torn", str(killed_at)) == -9
    assert run(tmp_path / "torn") == 0
    first, second = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("straight", "torn"))

    def flat(value, path=""):
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return {key: leaf for name, one in items for key, leaf in flat(one, f"{path}/{name}").items()}
        return {path: value}

    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal(value, second[path]) if torch.is_tensor(value) else value == second[path]
        assert same, path
