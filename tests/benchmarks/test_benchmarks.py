"""The benchmark suite runs, refuses wrong products, and its arithmetic is right; nothing here looks at a clock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_tiny_run_of_every_suite_gives_a_page(tmp_path):
    pytest.importorskip("matplotlib")
    grid = ["--shapes", "512x256", "--rows", "1", "9", "--sparsities", "0.7", "--turns", "1", "--seconds", "0.01"]
    done = run("benchmarks", "linear", "lstm", "model", "train", "--layers", "1", *grid, "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    linear = json.loads((tmp_path / "linear_l2.json").read_text())
    assert [(row["dtype"], row["m"]) for row in linear["rows"]] == [
        (dtype, m) for dtype in ("float32", "bfloat16", "int8") for m in (1, 9)
    ]
    for row in linear["rows"]:
        assert row["best_dense"] in row["dense"]
        assert row["gflops"] == pytest.approx(2 * row["m"] * 512 * 256 * 0.3 / row["fastest_sparse_us"] / 1e3, rel=0.01)
    assert linear["about"]["env"]["torch"] == torch.__version__
    train = json.loads((tmp_path / "train.json").read_text())
    assert [(row["m"], row["gradient"]) for row in train["rows"]] == [(m, g) for m in (1, 9) for g in ("kept", "all")]
    model = json.loads((tmp_path / "model.json").read_text())
    assert {row["contender"] for row in model["rows"]} >= {"F.linear", "packed 70 %", "torch int8"}
    assert all(row["groups"]["products"] > 0 for row in model["rows"])
    pages = []
    for _ in range(2):
        drawn = run("benchmarks.page", str(tmp_path))
        assert drawn.returncode == 0, drawn.stderr
        pages.append((tmp_path / "index.html").read_bytes())
    assert pages[0] == pages[1]
    assert b"Cells where sparse loses" in pages[0]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_dense_products_pass_and_a_wrong_one_does_not(dtype):
    from benchmarks import dense, workload

    weight, bias = torch.randn(64, 96), torch.randn(64)
    x = torch.randn(5, 96)
    if dtype == torch.bfloat16:
        weight, bias, x = weight.bfloat16(), bias.bfloat16(), x.bfloat16()
    answer = workload.answer(x, weight, None, bias, dtype)
    with torch.inference_mode():
        products = {name: make(weight, bias, 5)(x) for name, make in dense.available(dtype).items()}
    assert products
    for name, y in products.items():
        answer.check(name, y)
        for wrong in (y.roll(1, 0), y + 5, torch.where(y == y.max(), torch.nan, y)):
            with pytest.raises(ArithmeticError, match=name):
                answer.check(name, wrong)


def test_pruned_weights_count_in_the_answer():
    from benchmarks import workload

    weight, bias, x = torch.ones(8, 4), torch.zeros(8), torch.ones(1, 4)
    kept = torch.tensor([True, False, True, False]).expand(8, 4)
    assert workload.answer(x, weight, kept, bias, torch.float32).exact.tolist() == [[2.0] * 8]


def test_ratio_is_within_turns_against_the_best_dense():
    from benchmarks import duel

    times = {"a": [40e-6] * 3, "b": [20e-6, 20e-6, 40e-6], "sparse": [10e-6, 5e-6, 4e-6]}
    (verdict,) = duel.judge(times, ["a", "b"])
    assert (verdict.name, verdict.best_dense) == ("sparse", "b")
    assert (verdict.dense_us, verdict.sparse_us) == pytest.approx((20, 5))
    assert verdict.ratio == pytest.approx(4)  # of 2, 4 and 10
    assert verdict.quartiles == pytest.approx((2, 10))
    assert verdict.ratio_of_fastest == pytest.approx(20 / 4)


def test_turns_call_every_contender_and_rotate_weights():
    from benchmarks import duel

    seen = []
    products = [lambda x, name=name: seen.append(name) for name in "abc"]
    contenders = [
        duel.Contender("one", True, duel.rotating(products, None), rotation=3),
        duel.Contender("graph", False, lambda: None, products=4),
    ]
    times = duel.duel(contenders, seconds=0, turns=2)
    assert {name: len(values) for name, values in times.items()} == {"one": 2, "graph": 2}
    assert seen[:6] == list("abcabc")


def test_goals_judge_the_mean_and_the_lowest_cell():
    from benchmarks import goals

    def row(n, m, ratio, share):
        cell = {"n": n, "k": 512, "m": m, "dtype": "float32", "sparsity": 0.7, "ratio": ratio}
        return cell | {"peak_share": share, "bandwidth_share": 0.9}

    found = goals.linear([row(512, 1, 0.5, 0.1), row(512, 32, 32.0, 0.9), row(1024, 32, 4.0, 0.8)], "l2")
    mean, slowest, peak = found
    assert mean["value"] == pytest.approx(4.0) and mean["reached"]
    assert slowest["value"] == 0.5 and not slowest["reached"] and "1 cells" in slowest["note"]
    assert peak["value"] == 0.8 and not peak["reached"] and "1024x512 M=32" in peak["note"]
    (*_, bandwidth) = goals.linear([row(512, 1, 3.0, 0.1)], "l3")
    assert bandwidth["value"] == 0.9 and bandwidth["reached"]


def test_the_goal_of_training_is_judged_by_the_slowest_cell():
    from benchmarks import goals

    def row(m, gradient, ratio):
        return {"n": 512, "k": 512, "m": m, "sparsity": 0.7, "gradient": gradient, "ratio": ratio}

    rows = [row(4, "kept", 0.5), row(16, "kept", 2.0), row(64, "kept", 8.0), row(16, "all", 0.9)]
    everything, kept = goals.train(rows)
    assert kept["value"] == 2.0 and kept["reached"] and "512x512 M=16; geometric mean 4.00x" in kept["note"]
    assert everything["value"] == 0.9 and not everything["reached"] and "all weights" in everything["what"]


def test_ceilings_name_what_this_machine_lacks():
    from benchmarks import ceilings

    limits = ceilings.summary([{"float32": 2e9, "int8": None}, {"float32": 4e9, "int8": None}])
    assert limits == {"float32": {"median": 3.0, "lowest": 2.0, "highest": 4.0}, "int8": None}


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::addmm", "products"),
        ("sparse_pathways::bcsr_linear", "products"),
        ("sparse_pathways::lstm_cell", "LSTM"),
        ("quantized::linear_dynamic", "products"),
        ("aten::bmm", "attention"),
        ("aten::native_layer_norm", "layer norm"),
        ("aten::cat", "copies"),
        ("aten::view", "views and allocation"),
    ],
)
def test_operators_are_grouped(operator, group):
    pytest.importorskip("torchaudio")
    from benchmarks import model

    assert model.group_of(operator) == group
