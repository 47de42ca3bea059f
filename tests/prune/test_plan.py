import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from sparse_pathways.mask import Constant, Cubic, Milestones
from sparse_pathways.prune import Gradient, Learned, Magnitude, Movement, PruningPlan, methods

PLANS = {
    "constant": PruningPlan(schedule=Constant(0.7), interval=10),
    "milestones": PruningPlan(schedule=Milestones(((0, 0.2), (100, 0.5), (200, 0.7))), interval=7, freeze=300),
    "freeze-at-the-end": PruningPlan(schedule=Cubic(0.0, 0.7, 0, 100), interval=7, freeze=100),
    "norm": PruningPlan(schedule=Constant(0.7), interval=10, score=Magnitude("l1"), init="magnitude"),
    "gradual": methods.gradual(sparsity=0.9, steps=1000),
    "adaptive": methods.adaptive(("it",), 0.7, schedule=Milestones(((0, 0.5), (50, 0.7))), interval=10, freeze=80),
    "lap": methods.lap(("en", "fr"), 0.9, steps=1000, start=0.2),
    "asr_pathways": methods.asr_pathways(("en", "fr"), 0.9),
    "dynamic": methods.dynamic_asr_pathways(["en", "fr"], sparsity=0.7, score=Gradient(0.9), steps=400),
    "movement": methods.dynamic_asr_pathways(["en", "fr"], sparsity=0.7, score=Movement(0.99), steps=400),
    "learned": methods.dynamic_asr_pathways(["en", "fr"], sparsity=0.7, score="learned", steps=400),
    "two-of-four": PruningPlan(schedule=Milestones(((0, 0.0), (9, 0.5))), interval=3, scope="2:4"),
    "global-churn": PruningPlan(schedule=Constant(0.5), interval=3, scope="global", floor=0.1, churn=0.05, freeze=9),
    "dynamic-B": methods.dynamic_asr_pathways(["en", "fr"], score="magnitude", dense_grad=False),
}


@pytest.mark.parametrize("name", PLANS)
def test_json_round_trip(name):
    plan = PLANS[name]
    restored = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert restored == plan
    assert hash(restored) == hash(plan)
    assert restored.to_dict() == plan.to_dict()


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLANS["constant"].interval = 3


GOOD = dict(schedule=Constant(0.7), interval=10)
BAD = [
    ("schedule-number", dict(schedule=0.7), TypeError, r"PruningPlan\.schedule is a float; want Constant"),
    ("interval-zero", dict(interval=0), ValueError, r"PruningPlan\.interval = 0; want at least 1"),
    ("interval-share", dict(interval=0.5), TypeError, r"PruningPlan\.interval = 0\.5; want a whole number"),
    ("interval-bool", dict(interval=True), TypeError, r"PruningPlan\.interval = True; want a whole number"),
    ("freeze-negative", dict(freeze=-1), ValueError, r"PruningPlan\.freeze = -1; want at least 0"),
    (
        "freeze-before-end",
        dict(schedule=Cubic(0, 0.7, 0, 100), freeze=99),
        ValueError,
        r"freeze = 99 is before the schedule ends at step 100.*raise freeze",
    ),
    ("freeze-zero-rising", dict(schedule=Cubic(0, 0.7, 0, 100), freeze=0), ValueError, r"schedule = Cubic.*Constant"),
    ("score-name", dict(score="taylor"), ValueError, r"score = 'taylor'; choose one of magnitude, gradient"),
    ("score-type", dict(score=3), TypeError, r"score is a int; want one of"),
    ("scope", dict(scope="model"), ValueError, r"PruningPlan\.scope = 'model'; choose layer, global, or N:M"),
    ("scope-pattern", dict(scope="4:2"), ValueError, r"PruningPlan\.scope = '4:2'; choose layer, global, or N:M"),
    (
        "pattern-sparsity",
        dict(scope="2:4"),
        ValueError,
        r"'2:4' knows the sparsities 0 and 0\.5, but",
    ),
    ("floor", dict(scope="global", floor=20), ValueError, r"PruningPlan\.floor = 20; want a share between 0 and 1"),
    (
        "churn",
        dict(churn=5),
        ValueError,
        r"PruningPlan\.churn = 5\.0; want a share of the kept blocks",
    ),
    (
        "after_freeze",
        dict(after_freeze="inside"),
        ValueError,
        r"after_freeze = 'inside' with freeze = None",
    ),
    (
        "scale-inside",
        dict(score=Learned(scale_lr=0.1), dense_grad=False),
        ValueError,
        r"Learned\.scale_lr = 0\.1 with dense_grad = False: .* want dense_grad = True, or scale_lr = 0",
    ),
    ("after_freeze-name", dict(after_freeze="B"), ValueError, r"PruningPlan\.after_freeze = 'B'; choose one of same"),
    ("churn-string", dict(churn="0.1"), TypeError, r"PruningPlan\.churn = '0\.1'; want a number"),
    ("scope-tuple", dict(scope=(2, 4)), TypeError, r"PruningPlan\.scope = \(2, 4\); choose layer, global, or N:M"),
    ("scope-digit", dict(scope="\u00b2:4"), ValueError, r"choose layer, global, or N:M"),
    ("candidates", dict(candidates="some"), ValueError, r"PruningPlan\.candidates = 'some'; choose one of all, kept"),
    ("masks", dict(masks="both"), ValueError, r"PruningPlan\.masks = 'both'; choose one of own, shared"),
    ("moments", dict(moments="forget"), ValueError, r"PruningPlan\.moments = 'forget'; choose one of keep, reset"),
    ("init", dict(init="luck"), ValueError, r"PruningPlan\.init = 'luck'; choose one of current, dense"),
    ("dense_grad", dict(dense_grad="A"), TypeError, r"PruningPlan\.dense_grad = 'A'; want True .* or False"),
    ("pathways-string", dict(pathways="en"), TypeError, r"pathways = 'en'; want a sequence"),
    ("pathways-twice", dict(pathways=("en", "en")), ValueError, r"names must be distinct"),
    (
        "kept-falling",
        dict(schedule=Milestones(((0, 0.7), (10, 0.5))), candidates="kept"),
        ValueError,
        r"PruningPlan\.schedule = .* lowers the sparsity.*candidates = 'all'",
    ),
]


@pytest.mark.parametrize("change, error, message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_fields_are_named(change, error, message):
    with pytest.raises(error, match=message):
        PruningPlan(**{**GOOD, **change})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Constant(70), r"Constant\.sparsity = 70; want a share"),
        (lambda: Cubic(0, 0.7, 100, 50), r"Cubic\.begin = 100, end = 50; want 0 <= begin <= end"),
        (lambda: Magnitude("max"), r"Magnitude\.norm = 'max'; choose one of l1, l2"),
        (lambda: Gradient(1.0), r"Gradient\.decay = 1\.0; want 0 <= decay < 1"),
        (lambda: Learned(gate="soft"), r"Learned\.gate = 'soft'; choose one of straight-through, hard-concrete"),
        (lambda: Learned(scale_lr=-1.0), r"Learned\.scale_lr = -1\.0; want 0"),
        (lambda: methods.lap(sparsity=70), r"sparsity = 70; want a share"),
        (lambda: methods.lap(steps=1), r"steps = 1; want at least 2"),
        (lambda: methods.lap(start=0.5), r"start = 0\.5 shapes the schedule made from steps"),
        (lambda: methods.lap(schedule=Constant(0.9)), r"sparsity = 0\.7, but .* ends at 0\.9; make them equal"),
    ],
    ids=[
        "constant",
        "cubic",
        "norm",
        "decay",
        "gate",
        "scale",
        "method-sparsity",
        "method-steps",
        "method-start",
        "method-schedule",
    ],
)
def test_bad_parts_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Milestones((0, 0.5)), r"Milestones\.levels = \(0, 0\.5\); want \(\(step, sparsity\), \.\.\.\)"),
        (lambda: Milestones(((0, "0.5"),)), r"Milestones\.levels = '0\.5'; want a number between 0 and 1"),
        (lambda: Milestones(((0, True),)), r"Milestones\.levels = True; want a number between 0 and 1"),
        (lambda: Gradient("0.9"), r"Gradient\.decay = '0\.9'; want a number"),
        (lambda: Learned(lr="0.1"), r"Learned\.lr = '0\.1'; want a number"),
        (lambda: methods.lap(3), r"pathways = 3; want a sequence of names"),
    ],
)
def test_bad_types_of_parts_are_named(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_numpy_numbers_become_plain_ones():
    """A plan is part of every checkpoint, which is read by torch.load(weights_only=True)."""
    share, count = np.linspace(0.5, 0.9, 3)[1], np.int64(3)
    plan = PruningPlan(
        schedule=Milestones(((count, share),)), interval=count, freeze=np.int32(9), churn=np.float64(0.1),
        score=Learned(np.float64(0.1), scale_lr=np.float32(0.5)), floor=np.float64(0.3),
    )  # fmt: skip
    for one in (plan, methods.lap(("en",), share, steps=np.int64(40), start=np.float64(0.25))):
        torch.save(one.to_dict(), file := io.BytesIO())
        file.seek(0)
        assert PruningPlan.from_dict(torch.load(file, weights_only=True)) == one
        assert PruningPlan.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(speed=1), r"PruningPlan has no field 'speed'; it has schedule, interval"),
        (dict(schedule={"kind": "linear"}), r"PruningPlan\.schedule\.kind = 'linear'; choose one of constant, cubic"),
        (dict(schedule={"kind": "cubic", "rate": 1}), r"PruningPlan\.schedule: cubic has no field 'rate'"),
        (dict(schedule={"kind": "cubic", "final": 1}), r"PruningPlan\.schedule: .*missing"),
    ],
    ids=["field", "kind", "part", "missing-part"],
)
def test_bad_dicts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_dict({**PLANS["constant"].to_dict(), **change})


def test_missing_field_is_named():
    values = PLANS["constant"].to_dict()
    del values["interval"]
    with pytest.raises(ValueError, match=r"PruningPlan\.interval is missing"):
        PruningPlan.from_dict(values)


def test_methods_follow_from_steps():
    plan = methods.dynamic_asr_pathways(("en", "fr"), 0.9, steps=1000)
    assert (plan.schedule, plan.interval, plan.freeze) == (Cubic(0.0, 0.9, 0, 500), 10, 700)
    assert (plan.masks, plan.score, plan.candidates, plan.dense_grad) == ("own", Gradient(0.98), "all", True)
    shared = methods.lap(("en", "fr"), 0.9, steps=1000)
    assert (shared.schedule, shared.interval, shared.freeze) == (plan.schedule, 40, 700)
    assert (shared.masks, shared.score) == ("shared", Magnitude("l2"))
