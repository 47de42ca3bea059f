"""The whole path by command line, in small: speech made, model trained, pruned, packed, heard, measured, reported."""

import json

import pytest
import soundfile

from sparse_pathways.cli import main

SIZES = "d_model=32 heads=2 ffn=64 layers=1 encoding=32 embedding=32 vocab=48"
SHORT = ["--batch", "4", "--threads", "1", "--eval_every", "100", "--progress", "false"]


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with data, a dense run, a pruned run and a packed file; the models have learnt nothing."""
    folder = tmp_path_factory.mktemp("runs")
    run("data", "synthetic", "--out", folder / "data", "--languages", "[en, fr]", "--train", 8, "--dev", 2, "--test", 3)
    sizes = [f"--model.{size}" for size in SIZES.split()]
    run(
        "train",
        "--data",
        folder / "data",
        "--out",
        folder / "dense",
        "--steps",
        6,
        "--ctc_only_steps",
        2,
        *sizes,
        *SHORT,
    )
    start = ["prune", "--data", folder / "data", "--start", folder / "dense", "--steps", 6, *SHORT]
    run(*start, "--out", folder / "lap50", "--method", "lap", "--sparsity", 0.5)
    run(*start, "--out", folder / "dynamic50", "--sparsity", 0.5)
    run("pack", folder / "dynamic50", "--out", folder / "model.safetensors")
    return folder


def test_pack_prints_sizes_and_densities(runs, capsys):
    out = runs / "again" / "model.safetensors"
    run("pack", runs / "dynamic50", "--out", out)
    text = capsys.readouterr().out
    assert out.stat().st_size == (runs / "model.safetensors").stat().st_size
    assert "dense fp32" in text and "en  density 0.50" in text and "fr  density 0.50" in text


def test_a_dense_run_is_not_packed(runs, capsys):
    assert main(["pack", str(runs / "dense"), "--out", str(runs / "no.safetensors")]) == 2
    assert "dense model" in capsys.readouterr().err
    assert not (runs / "no.safetensors").exists()


@pytest.mark.parametrize("model", ["model.safetensors", "dense", "dynamic50/model.pt"])
def test_transcribe_any_form_of_a_model(runs, tmp_path, capsys, model):
    source = next((runs / "data").rglob("*.flac"))
    samples, rate = soundfile.read(source)
    path = tmp_path / "some.wav"
    soundfile.write(path, samples[::2], rate // 2)
    run("transcribe", runs / model, "--language", "fr", path)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_bad_file_among_good_ones(runs, tmp_path, capsys):
    good, bad = next((runs / "data").rglob("*.flac")), tmp_path / "bad.wav"
    bad.write_bytes(b"no sound")
    assert (
        main(["transcribe", str(runs / "model.safetensors"), "--language", "en", str(good), str(bad), str(good)]) == 2
    )
    captured = capsys.readouterr()
    assert [line.startswith(f"{good}: ") for line in captured.out.splitlines()] == [True, True]
    assert captured.err.count("\n") == 1 and str(bad) in captured.err


def test_beam(runs, capsys):
    run(
        "transcribe", runs / "model.safetensors", "--language", "en", "--beam", 3, next((runs / "data").rglob("*.flac"))
    )
    assert capsys.readouterr().out.count("\n") == 1


def test_bench_prints_every_layer(runs, capsys):
    run("bench", runs / "model.safetensors", "--rows", 1, 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "layer N x K density rows F.linear us oneDNN us packed us speed-up".split()
    assert len([line for line in lines if line.endswith("x")]) == 2 * 7  # five layers of the Emformer, two of the LSTM
    assert "one thread" in lines[-1]


def test_evaluate_and_report(runs, capsys):
    out = runs / "results.json"
    names = [f"{name}={runs / name}" for name in ("dense", "lap50", "dynamic50")]
    run("evaluate", *names, "--data", runs / "data", "--out", out, "--timed", 1, "--repeats", 1, "--rows", 1)
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in ("dense", "lap50", "dynamic50"))
    results = json.loads(out.read_text())
    dense, lap, dynamic = results["models"]
    assert [model["kind"] for model in results["models"]] == ["dense", "shared", "pathways"]
    assert set(dense["latency"]) >= {"dense"} and set(lap["latency"]) == {"masked", "packed"}
    assert dynamic["agreement"] == 1.0 and dynamic["profile"]["calls"] > 0
    assert dynamic["density"] == pytest.approx({"en": 0.5, "fr": 0.5}, abs=0.01)
    assert lap["overlap"] == [[1.0, 1.0], [1.0, 1.0]] and 0 < dynamic["overlap"][0][1] < 1
    assert results["corpus"]["utterances"] == {"en": 3, "fr": 3}
    assert [set(one["texts"]) for one in results["transcripts"]] == [{"dense", "lap50", "dynamic50"}] * 2
    assert dynamic["bytes"] == (runs / "model.safetensors").stat().st_size and len(results["speed"]) == 7

    run("report", runs)
    page = (runs / "report.html").read_text()
    assert page.count("<img") == 6 and "dynamic50" in page

    readme = runs / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    run("report", runs, "--readme", readme)
    assert "| dynamic50 |" in readme.read_text()
