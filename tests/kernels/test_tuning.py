"""Tables of schedules: found, kept, shipped, refused. No device: the clock and the device's name are made up."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from sparse_pathways.kernels import tuning
from sparse_pathways.kernels.schedule import Schedule, rule

DEVICE = "NVIDIA Test 80GB"
NAME = tuning.key("product", 1000, (64, 64), torch.bfloat16)
OTHER = Schedule(64, 32, 64, 8, 4)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Empty folders for the user's tables and the shipped ones, and a device."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def schedule(m=1000, device="cuda"):
    return tuning.schedule("product", m, (64, 64), torch.bfloat16, torch.device(device))


def test_the_rule_where_no_table_is(tables):
    assert schedule() == rule(1000, 64, 64, torch.bfloat16)
    assert tuning.origin("product", 1000, (64, 64), torch.bfloat16, DEVICE) == "rule"


def test_what_was_tuned_is_used_and_beats_what_is_shipped(tables):
    (tables / "shipped").mkdir()
    shipped = {"schedules": {NAME: [128, 64, 64, 4, 2]}}
    (tables / "shipped" / tuning.file_name(DEVICE)).write_text(json.dumps(shipped))
    tuning._table.cache_clear()
    assert schedule() == Schedule(128, 64, 64, 4, 2)
    assert tuning.origin("product", 1000, (64, 64), torch.bfloat16, DEVICE) == "shipped"
    path = tuning.write(DEVICE, {NAME: OTHER})
    assert schedule() == schedule(m=1024) == OTHER
    assert schedule(m=1025) != OTHER
    assert schedule(device="cpu") == rule(1000, 64, 64, torch.bfloat16)
    assert tuning.origin("product", 1000, (64, 64), torch.bfloat16, DEVICE) == "tuned here"
    assert json.loads(path.read_text())["device"] == DEVICE
    tuning.write(DEVICE, {tuning.key("dw", 1, (16, 16), torch.float16): OTHER._replace(tile_out=16, tile_red=16)})
    assert schedule() == OTHER  # entries are added, not replaced


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no table of schedules"),
        ("{}", "schedules"),
        (json.dumps({"schedules": {NAME: [128, 64, 64, 4]}}), "five numbers"),
        (json.dumps({"schedules": {NAME: [128, 48, 64, 4, 3]}}), "does not cut"),
        (json.dumps({"schedules": {NAME: [128, 128, 64, 4, 3]}}), "does not cut"),
        (json.dumps({"schedules": {"product 16x16": [16, 16, 16, 4, 3]}}), "names no product"),
    ],
)
def test_a_bad_table_is_named_and_not_used(tables, text, message):
    (tables / "user").mkdir()
    (tables / "user" / tuning.file_name(DEVICE)).write_text(text)
    with pytest.warns(UserWarning, match=message):
        assert schedule() == rule(1000, 64, 64, torch.bfloat16)


def test_tune_keeps_the_fastest_that_is_right(tables):
    tried = tuning.candidates("product", 1000, (64, 64), torch.bfloat16)
    wrong, large, fast = tried[1], tried[2], tried[3]
    right = torch.arange(12.0).view(3, 4)

    def run(one):
        if one == large:
            raise tuning.triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return right + (one == wrong)

    best, outcome = tuning.tune(NAME, run, tried, DEVICE, time_ms=lambda call: 1.0 if call.args[0] == fast else 2.0)
    assert best == fast == schedule()
    assert "wrong" in outcome[wrong] and "too large" in outcome[large]
    assert set(outcome) == set(tried)


@pytest.mark.parametrize("kind", tuning.KINDS)
@pytest.mark.parametrize("block", [(16, 16), (128, 128), (16, 256)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("m", [1, 16384])
def test_every_candidate_is_legal(kind, block, m):
    tried = tuning.candidates(kind, m, block, torch.bfloat16)
    assert tried[0] == tuning.RULES[kind](m, *block, torch.bfloat16)
    assert {one.num_stages for one in tried} >= {2, 3, 4}
    for one in tried:
        assert tuning._legal(tuning.key(kind, m, block, torch.bfloat16), list(one)) == one


def test_candidates_give_one_result(interpreted, problem):
    """What tuning chooses among computes the same product: the part the interpreter can show."""
    case = problem((40, 128, 64), (64, 32), torch.float16)
    for one in {
        one._replace(num_warps=4, num_stages=2) for one in tuning.candidates("product", 40, (64, 32), case.dtype)
    }:
        case.forward().check(interpreted("bcsr_linear.bcsr_linear", **case.forward_arguments(), schedule=one))
    for one in {one._replace(num_warps=4, num_stages=2) for one in tuning.candidates("dw", 40, (64, 32), case.dtype)}:
        case.dw().check(interpreted("bcsr_linear_dw.bcsr_linear_dw", **case.dw_arguments(True), schedule=one))
