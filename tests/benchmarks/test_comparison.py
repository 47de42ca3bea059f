"""The arithmetic behind the tables of `make bench`, on made-up times."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "comparison.py"


@pytest.fixture(scope="module")
def comparison():
    spec = importlib.util.spec_from_file_location("comparison", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def turns(comparison):
    """Dense "a" takes 40 us, "b" 20; sparse takes 10, 5 and 4 us in turns when b takes 20, 20 and 40."""
    suite = comparison.Suite("linear", "a call", "hot")
    times = {"a": [40e-6, 40e-6, 40e-6], "b": [20e-6, 20e-6, 40e-6], "sparse": [10e-6, 5e-6, 4e-6]}
    return [
        comparison.Turn(suite, "512x512", name, name != "sparse", times[name][turn], times[name][turn] / 2)
        for turn in range(3)
        for name in times
    ]


def test_ratio_is_within_turns_against_the_best_dense(comparison, turns):
    (row,) = comparison.compare(turns)
    assert (row.contender, row.best_dense) == ("sparse", "b")
    assert row.all_dense_us == pytest.approx({"a": 40, "b": 20})
    assert (row.dense_us, row.sparse_us) == pytest.approx((20, 5))
    assert row.ratio == pytest.approx(4)  # of 2, 4 and 10
    assert row.ratio_quartiles == pytest.approx((2, 10))
    assert row.ratio_of_fastest == pytest.approx(10 / 2)


def test_a_group_without_a_dense_contender_has_no_row(comparison, turns):
    assert comparison.compare([turn for turn in turns if not turn.dense]) == []


def test_a_losing_contender_is_marked(comparison, turns):
    slow = [comparison.Turn(t.suite, t.group, "slow", False, 80e-6, 80e-6) for t in turns if t.contender == "a"]
    lines = comparison.table(comparison.compare(turns + slow))
    assert [line.endswith("slower than dense") for line in lines] == [False, True, False]


def test_json_names_circumstances_and_all_dense_contenders(comparison, turns, tmp_path):
    about = comparison.circumstances(2, {"cpu": "a cpu", "cpu_backend": "avx2"})
    path = tmp_path / "results" / "linear.json"
    comparison.write(path, turns[0].suite, about, comparison.compare(turns))
    stored = json.loads(path.read_text())
    assert stored["suite"] == {"name": "linear", "call": "a call", "weights": "hot"}
    assert (stored["cpu"], stored["isa"], stored["threads"]) == ("a cpu", "avx2", 2)
    assert stored["rows"][0]["all_dense_us"] == {"a": 40.0, "b": 20.0}
    assert stored["rows"][0]["ratio"] == 4.0
