"""Methods of several rounds: resumed after an interruption, shared between methods, refused when they do not fit."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparse_pathways as sp

LANGUAGES = ("en", "fr")


class Trainer:
    """A `train` for run_phases that counts its calls, and breaks off at a given step of all."""

    def __init__(self, toy, breaks_at=None):
        self.toy, self.breaks_at, self.steps, self.calls = toy, breaks_at, 0, []

    def __call__(self, model, phase, folder):
        self.calls.append(phase.name)
        optimizer = self.toy.adamw(model)
        pruner = sp.Pruner(model, phase.plan, optimizer)
        names = [name for _ in range(phase.steps) for name in phase.plan.pathways][: phase.steps]
        self.toy.train(model, pruner, optimizer, names, after=self.count)
        pruner.detach()

    def count(self, step, name, event):
        self.steps += 1
        if self.steps == self.breaks_at:
            raise KeyboardInterrupt


def pathways_from_lsp(sparsity=0.5):
    masks = sp.methods.lsp(LANGUAGES, sparsity, steps=8, source="lth", levels=2)
    return sp.methods.joint(masks, sp.methods.asr_pathways(LANGUAGES, sparsity), 6)


@pytest.mark.parametrize("breaks_at", [1, 5, 9, 17, 21])
def test_interrupted_and_run_again_ends_in_the_same_bits(toy, tmp_path, breaks_at):
    straight = sp.run_phases(toy.make_model(), pathways_from_lsp(), Trainer(toy), tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        sp.run_phases(toy.make_model(), pathways_from_lsp(), Trainer(toy, breaks_at), tmp_path / "torn")
    second = Trainer(toy)
    again = sp.run_phases(toy.make_model(), pathways_from_lsp(), second, tmp_path / "torn")
    assert len(second.calls) < len(pathways_from_lsp()) or breaks_at == 1
    for name, value in straight.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    third = Trainer(toy)
    sp.run_phases(toy.make_model(), pathways_from_lsp(), third, tmp_path / "torn")
    assert third.calls == []


def test_methods_share_phases_and_other_settings_do_not_meet_them(toy, tmp_path):
    sp.run_phases(toy.make_model(), pathways_from_lsp(), Trainer(toy), tmp_path)
    masks = sp.methods.lsp(LANGUAGES, 0.5, steps=8, source="lth", levels=2)
    settings = dict(schedule=sp.Constant(0.5), interval=2, dense_grad=False, score="magnitude")
    other = sp.methods.joint(masks, sp.methods.dynamic_asr_pathways(LANGUAGES, 0.5, **settings), 6)
    trainer = Trainer(toy)
    sp.run_phases(toy.make_model(), other, trainer, tmp_path)
    assert trainer.calls == ["joint"]
    for changed in (
        lambda: sp.run_phases(toy.make_model(), other, trainer, tmp_path, context="lr 0.1"),
        lambda: sp.run_phases(toy.make_model(block=(2, 1)), other, trainer, tmp_path),
    ):
        trainer.calls = []
        changed()
        assert trainer.calls == [phase.name for phase in other]


def test_masks_come_from_their_rounds_and_the_report_says_what_they_are(toy, tmp_path):
    model = sp.run_phases(toy.make_model(), pathways_from_lsp(), Trainer(toy), tmp_path)
    keys = {path.parent.name.rpartition("-")[0]: path for path in tmp_path.glob("*/end.pt")}
    assert set(keys) == {phase.name for phase in pathways_from_lsp()}
    for number, name in enumerate(LANGUAGES):
        own = torch.load(keys[f"lth-{name}-2"], weights_only=True)
        for layer_name, layer in toy.layers_of(model).items():
            assert torch.equal(layer.block_mask[number], own[f"{layer_name}.block_mask"][number])
    report = json.loads((keys["joint"].parent / "report.json").read_text())
    assert report["density"]["en"]["total"] == pytest.approx(0.5, abs=0.02)
    assert sp.Phase.from_dict(report["phase"]) == pathways_from_lsp()[-1]


def test_a_ticket_starts_from_the_weights_it_was_given(toy, tmp_path):
    phases = sp.methods.lth(LANGUAGES, 0.5, steps=8, levels=2)
    given = {name: layer.weight.detach().clone() for name, layer in toy.layers_of(toy.make_model()).items()}
    begun = []

    def train(model, phase, folder):
        begun.append({name: layer.weight.detach().clone() for name, layer in toy.layers_of(model).items()})
        Trainer(toy)(model, phase, folder)

    sp.run_phases(toy.make_model(), phases, train, tmp_path)
    assert len(begun) == 3
    for weights in begun:
        assert all(torch.equal(weights[name], given[name]) for name in given)


def test_levels_remove_the_same_share_of_what_is_left():
    phases = sp.methods.imp(("en",), 0.7, steps=600, levels=6, last=0.5)
    kept = [1 - phase.plan.schedule.sparsity for phase in phases]
    assert kept[-1] == pytest.approx(0.3)
    assert [b / a for a, b in zip([1.0, *kept], kept, strict=False)] == pytest.approx([0.3 ** (1 / 6)] * 6)
    assert [phase.steps for phase in phases] == [60] * 5 + [300]
    assert sum(phase.steps for phase in sp.methods.lth(("en",), 0.7, steps=601, levels=6)) == 601


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: sp.methods.imp(("en",), 0.7, steps=3, levels=6), "do not go round 6 rounds"),
        (lambda: sp.methods.imp(("en",), 0.7, steps=60, levels=0), "levels = 0; want at least 1"),
        (lambda: sp.methods.lth(("en",), 0.7, steps=60, rewind_steps=-1), "rewind_steps = -1; want at least 0"),
        (lambda: sp.methods.imp(("en",), 0.7, steps=60, last=0.0), r"last = 0.0; want a share of the steps"),
        (lambda: sp.methods.imp(("en",), 70, steps=60), "want a share between 0 and 1"),
        (lambda: sp.methods.lsp(("en",), 0.7, steps=60, source="prune"), "choose one of gradual, imp, lth, adaptive"),
        (lambda: sp.methods.lth(("en",), 0.7, steps=60, levels=0), "levels = 0; want at least 1"),
        (lambda: replace(pathways_from_lsp()[0], steps=0), "Phase.steps of lth-en-0 = 0; want at least 1"),
        (lambda: sp.Phase(name="a", plan=sp.methods.lap(steps=100), steps=60), "before its plan: freeze at step 70"),
        (
            lambda: sp.Phase(name="a", plan=sp.methods.adaptive(schedule=sp.Cubic(0, 0.7, 0, 90)), steps=60),
            "ends before its plan: schedule ends at step 90",
        ),
        (lambda: replace(pathways_from_lsp()[0], name="given"), "Phase.name = 'given'"),
        (lambda: sp.phase_keys([]), "phases is empty"),
        (lambda: sp.phase_keys(pathways_from_lsp()[1:]), "needs 'lth-en-0', which does not come before it"),
        (lambda: sp.phase_keys([pathways_from_lsp()[0]] * 2), "two are called 'lth-en-0'"),
        (
            lambda: sp.methods.joint(pathways_from_lsp()[:-1], sp.methods.asr_pathways(), 5, weights="source"),
            "source ends in 2 models",
        ),
        (lambda: sp.methods.joint(pathways_from_lsp(), sp.methods.asr_pathways(), 5, weights="x"), "one of given"),
        (lambda: sp.Phase.from_dict({"name": "a"}), "not a Phase"),
    ],
)  # fmt: skip
def test_bad_phases_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: sp.Phase(name="a", plan="lap", steps=3), "Phase.plan of a is a str; want a PruningPlan"),
        (lambda: sp.Phase(name="a", plan=sp.methods.lap(), steps=True), "Phase.steps of a = True; want a whole number"),
        (lambda: sp.Phase(name="a", plan=sp.methods.lap(), steps=3, masks="b"), "Phase.masks = 'b' of a; want"),
        (lambda: sp.methods.imp(steps="100"), "steps = '100'; want a whole number of optimiser steps"),
        (lambda: sp.methods.imp(steps=100.0), "steps = 100.0; want a whole number of optimiser steps"),
        (lambda: sp.methods.imp(steps=100, levels=True), "levels = True; want a whole number of rounds"),
        (lambda: sp.methods.imp(steps=100, last="x"), "last = 'x'; want a number"),
        (lambda: sp.methods.lth(steps=100, rewind_steps=True), "rewind_steps = True; want a whole number"),
        (lambda: sp.methods.lsp(None, steps=100), "pathways = None; want a sequence of names"),
        (lambda: sp.methods.lap(dense_grad="False"), "dense_grad = 'False'; want True"),
        (lambda: sp.methods.joint(sp.methods.lap(), sp.methods.asr_pathways(), 5), "phases is a PruningPlan; want"),
        (lambda: sp.run_phases(nn.Linear(2, 2), [sp.methods.lap()], None, "x"), "phases holds a PruningPlan; want"),
    ],
)  # fmt: skip
def test_bad_types_are_refused(make, reason):
    with pytest.raises(TypeError, match=reason):
        make()


def test_a_phase_that_was_not_trained_is_not_called_done(toy, tmp_path):
    phases = sp.methods.lsp(LANGUAGES, 0.5, steps=8)
    with pytest.raises(RuntimeError, match=r"phase 'gradual-en': train\(\) left pathway 'en' at sparsity 0\.0000"):
        sp.run_phases(toy.make_model(), phases, lambda model, phase, folder: None, tmp_path)
    assert not list(tmp_path.glob("*/end.pt"))


@pytest.mark.parametrize("change", ["block", "order"])
def test_other_blocks_or_names_never_meet_old_results(toy, tmp_path, change):
    """(4, 1) and (1, 4) of 16 x 16 weights have equally many blocks."""

    def make(block, names):
        torch.manual_seed(0)
        return sp.sparsify_(nn.Sequential(nn.Linear(16, 16)), block, names)

    trained = []

    def train(model, phase, folder):
        trained.append(phase.name)
        for layer in sp.sparse_layers(model).values():
            for name in phase.plan.pathways:
                layer.set_mask_(torch.arange(64).view(layer.mask().shape) % 2 == LANGUAGES.index(name), name)

    def phases(names):
        plan = sp.PruningPlan(schedule=sp.Constant(0.5), interval=1, pathways=names)
        return [sp.Phase(name="one", plan=plan, steps=1)]

    sp.run_phases(make((4, 1), LANGUAGES), phases(LANGUAGES), train, tmp_path)
    names = LANGUAGES if change == "block" else LANGUAGES[::-1]
    sp.run_phases(make((1, 4) if change == "block" else (4, 1), names), phases(LANGUAGES), train, tmp_path)
    assert trained == ["one", "one"]


def test_a_damaged_end_is_named(toy, tmp_path):
    phases = sp.methods.imp(LANGUAGES, 0.5, steps=8, levels=2)
    sp.run_phases(toy.make_model(), phases, Trainer(toy), tmp_path)
    end = next(tmp_path.glob("imp-2-*/end.pt"))
    end.write_bytes(end.read_bytes()[:100])
    with pytest.raises(sp.FormatError, match="delete it to have the phase run again"):
        sp.run_phases(toy.make_model(), phases, Trainer(toy), tmp_path)
