"""The GPU benchmark on a machine without one: every script runs through, and a part that hangs loses only itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def run():
    spec = importlib.util.spec_from_file_location("gpu_run", GPU / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main_of(run, monkeypatch, out, *options) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), *options])
    return run.main()


def test_every_measuring_part_in_a_dry_run(run, tmp_path):
    environment = run.environment(dry=True) | {"SPARSE_PATHWAYS_SCHEDULES": str(tmp_path)}
    for name in ("environment", "all"):
        arguments = [sys.executable, str(GPU / "part.py"), name, str(tmp_path / f"{name}.jsonl")]
        subprocess.run(arguments, env=environment, check=True, timeout=600)
    rows = run.rows_of(tmp_path)
    assert {row["part"] for row in rows} == {part.name for part in run.PARTS} - {"build", "tests", "sanitizer"}
    assert all(row["ratio"] > 0 for row in rows if "times" in row)
    run.print_rows(rows)
    assert (tmp_path / "pretended-device.json").exists()  # what tuning found


@pytest.mark.skipif(not os.environ.get("SPARSE_PATHWAYS_PROVE"), reason="part of `make prove`")
def test_the_device_tests_in_a_dry_run(run, tmp_path):
    """A typo in a test that only a device runs would cost a lease."""
    arguments = run.command("tests", tmp_path, True)
    done = subprocess.run(
        arguments, env=run.environment(dry=True), cwd=run.ROOT, timeout=900, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_without_a_device_it_says_so(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        run, "environment", lambda dry: os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(GPU)}
    )
    assert main_of(run, monkeypatch, tmp_path / "out") == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_a_part_that_hangs_or_crashes_loses_only_its_rest(run, monkeypatch, tmp_path, capsys):
    row = json.dumps({"part": "tune", "name": "first", "best": []})
    scripts = {
        "environment": "pass",
        "ceilings": f"import time; open(FILE, 'w').write({row!r} + chr(10) + '{{\"cut'); time.sleep(60)",
        "forward": "raise SystemExit('broken on purpose')",
        "training": f"open(FILE, 'w').write({row!r})",
    }

    def command(name, out, dry):
        file = f"FILE = {str(out / name) + '.jsonl'!r}\n"
        return [sys.executable, "-c", file + scripts[name]] if name in scripts else None

    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(run, "PARTS", tuple(part._replace(seconds=5) for part in run.PARTS))
    assert main_of(run, monkeypatch, tmp_path / "out", "--dry-run") == 1
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    outcomes = {part["part"]: part["outcome"] for part in result["parts"]}
    assert outcomes["ceilings"] == "stopped after its 5 s"
    assert outcomes["forward"] == "failed: exit code 1"
    assert outcomes["training"] == "ok"
    assert outcomes["tests"].startswith("skipped")
    assert len(result["rows"]) == 2
    assert "broken on purpose" in capsys.readouterr().out


def test_no_time_left(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "command", lambda *a: [sys.executable, "-c", "pass"])
    assert run.run_part(run.PARTS[2], tmp_path, 3.0, True)["outcome"] == "skipped: no time left"


def test_the_model_prints_a_line_per_kernel_and_shape(tmp_path):
    out = tmp_path / "model.json"
    done = subprocess.run(
        [sys.executable, str(GPU / "model.py"), "--out", str(out)], check=True, capture_output=True, text=True
    )
    rows = json.loads(out.read_text())
    assert "not measured" in done.stdout and all(row["source"] == "model" for row in rows)
    assert {tuple(row["block"]) for row in rows} >= {(16, 16), (32, 32), (64, 64)}
    assert {row["sparsity"] for row in rows} == {0.5, 0.7, 0.8, 0.9}
    assert all(row["ratio"] < 1 for row in rows if row["path"] == "dense")
