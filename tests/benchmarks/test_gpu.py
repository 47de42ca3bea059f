"""The GPU benchmark on a machine without one: every script runs through, and a part that hangs loses only itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

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
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert {row["part"] for row in rows} == {part.name for part in run.PARTS} - {
        "build",
        "tests",
        "sanitizer",
        "racecheck",
    }
    assert {row["triton"] for row in rows if "triton" in row} == {triton.__version__}
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


def test_a_part_that_hangs_or_crashes_is_no_missing_device(run, monkeypatch, tmp_path, capsys):
    for script, why in (("import time; time.sleep(60)", "stopped after its 5 s"), ("1 / 0", "failed: exit code 1")):
        monkeypatch.setattr(run, "command", lambda *a, script=script: [sys.executable, "-c", script])
        monkeypatch.setattr(run, "PARTS", tuple(part._replace(seconds=5) for part in run.PARTS))
        assert main_of(run, monkeypatch, tmp_path / "out") == 1
        said = capsys.readouterr().out
        assert why in said and "no CUDA device" not in said


def test_an_interpreter_that_cannot_run_says_so_in_a_line(run, tmp_path):
    """As Triton 3.6's beside numpy 2.4: its calls of `int` on an array of one element fail."""
    broken = "import sys, part, triton.runtime.interpreter as i; i._patch_lang_tensor = None; part.try_interpreter()"
    done = subprocess.run(
        [sys.executable, "-c", broken], env=run.environment(dry=True), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "needs numpy < 2.4" in done.stderr.splitlines()[-1]


def test_files_of_others_in_the_folder_stay(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "command", lambda *a: [sys.executable, "-c", "pass"])
    others = [tmp_path / "thesis.tex", tmp_path / "data.jsonl", tmp_path / "runs" / "results.json"]
    others[2].parent.mkdir()
    for path in (*others, tmp_path / "forward.jsonl"):
        path.write_text('{"mine": 1}\n')
    assert main_of(run, monkeypatch, tmp_path, "--parts", "ceilings") == 0
    assert all(path.read_text() == '{"mine": 1}\n' for path in others)
    assert not (tmp_path / "forward.jsonl").exists(), "rows of an earlier run"
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_the_callers_path_comes_after_the_checkout(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/torch", "/triton"]))
    assert run.environment(False)["PYTHONPATH"].split(os.pathsep) == [str(GPU), str(run.ROOT), "/torch", "/triton"]
    monkeypatch.delenv("PYTHONPATH")
    assert run.environment(True)["PYTHONPATH"].split(os.pathsep) == [str(GPU), str(run.ROOT)]


def test_a_rival_that_refuses_the_bias_is_left_out(run, tmp_path):
    script = """if True:
        import json, parts, torch
        linear = parts.F.linear

        def without_bias(x, weight, bias=None):
            if weight.layout == torch.sparse_bsr and bias is not None:
                raise RuntimeError("takes no bias")
            return linear(x, weight, bias)

        parts.F.linear = without_bias
        print(json.dumps(next(parts.rivals())))
    """
    done = subprocess.run(
        [sys.executable, "-c", script], env=run.environment(dry=True), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout)
    assert "takes no bias" in row["refused"]["torch BSR"] and "torch BSR" not in row["times"]


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
