"""The runner survives any kill, stages are shared and named by their settings, tables follow from the results alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
pytest.importorskip("torchaudio")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(HERE))


def start(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(HERE / "tiny_study.py"), str(folder), "run"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_all(folder, process):
    """SIGKILL for the runner and everything it started."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if str(folder) in words and "tiny_study.py" in " ".join(words):
            os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.slow
def test_killed_twice_and_started_again_gives_the_same_models(tmp_path):
    straight, torn = tmp_path / "straight", tmp_path / "torn"
    assert start(straight).wait() == 0
    torn.mkdir()
    shutil.copytree(straight / "data", torn / "data")
    for seconds in (6.0, 10.0):
        process = start(torn)
        time.sleep(seconds)
        kill_all(torn, process)
    assert start(torn).wait() == 0
    models = sorted(path.relative_to(straight) for path in straight.glob("*/model.pt"))
    assert len(models) == 4  # dense, two masks and their joint run
    for path in models:
        first, second = (torch.load(folder / path, weights_only=True)["state"] for folder in (straight, torn))
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), (path, name)
    for path in sorted((straight / "results").glob("*.json")):
        one, two = (json.loads((folder / "results" / path.name).read_text()) for folder in (straight, torn))
        assert {**one, "cost": None} == {**two, "cost": None}
        assert one["cost"]["steps"] == two["cost"]["steps"]
    fixed = json.loads((straight / "results" / "fixed-80-s0.json").read_text())
    assert fixed["cost"]["steps"] == 16 and set(fixed["swapped_wer"]) == {"en", "fr"}


WORDS = ("one two three", "turn on the lamp", "call mark at nine"), ("un deux trois", "allume la lampe", "appelle marc")


def make_mls(root):
    """Folders in the layout of Multilingual LibriSpeech: English and French, eight clips of a second to train on."""
    for folder, sentences in zip(("mls_english", "mls_french"), WORDS, strict=True):
        for split, count in (("train", 8), ("dev", 2), ("test", 2)):
            base = root / folder / split
            audio = base / "audio" / "11" / "22"
            audio.mkdir(parents=True)
            names = [f"11_22_{number:06d}" for number in range(count)]
            for number, name in enumerate(names):
                noise = np.random.default_rng(number).standard_normal(24_000 + 1600 * number)
                soundfile.write(audio / f"{name}.flac", 0.1 * noise, 16_000)
            texts = [f"{name}\t{sentences[i % 3]}\n" for i, name in enumerate(names)]
            (base / "transcripts.txt").write_text("".join(texts))
            times = [f"{name}\thttp://x/y.mp3\t0.00\t{1.5 + 0.1 * i:.2f}\n" for i, name in enumerate(names)]
            (base / "segments.txt").write_text("".join(times))
    return root


@pytest.mark.slow
def test_the_same_list_runs_on_mls_folders_through_torchrun(tmp_path):
    """A dense model and one pruning stage from it, two processes: what the full scale does, for a few steps."""
    import tiny_study

    from experiments import stages
    from sparse_pathways.asr.mls import import_mls

    import_mls(make_mls(tmp_path / "mls"), tiny_study.LANGUAGES, tmp_path / "runs" / "data")
    cell = tiny_study.make_cells()[1]
    own = stages.stages_of(tiny_study.STUDY, cell)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for stage in own[:2]:
        words = [str(HERE / "tiny_study.py"), str(tmp_path / "runs"), "stage", stage.key]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, *words], env=environment, check=True, timeout=300)
        folder = stage.folder(tmp_path / "runs")
        assert json.loads((folder / "config.json").read_text())["processes"] == 2
        assert (folder / "model.pt").is_file() and json.loads((folder / "cost.json").read_text())["cpu_s"] > 0
    import sparse_pathways as sp
    from sparse_pathways.asr.checkpoint import load_model

    model = load_model(own[1].folder(tmp_path / "runs"))
    assert sp.density(model, own[1].phase.plan.pathways[0])["total"] == pytest.approx(0.2, abs=0.01)


def test_cells_share_stages_and_other_settings_have_other_keys():
    import tiny_study

    from experiments import stages

    cells = {cell.name: cell for cell in tiny_study.make_cells()}
    own = {name: stages.stages_of(tiny_study.STUDY, cell) for name, cell in cells.items()}
    assert {steps[0].key for steps in own.values()} == {own["dense"][0].key}
    again = replace(cells["fixed"], name="other", row="another row")
    assert [s.key for s in stages.stages_of(tiny_study.STUDY, again)] == [s.key for s in own["fixed"]]
    longer = {cell.name: stages.stages_of(tiny_study.STUDY, cell) for cell in tiny_study.make_cells(steps=9)}
    assert longer["fixed"][-1].key != own["fixed"][-1].key
    assert [s.key for s in longer["fixed"][:-1]] == [s.key for s in own["fixed"][:-1]]  # the masks are those
    moved = stages.stages_of(replace(tiny_study.STUDY, prune={"batch": 5}), cells["fixed"])
    assert moved[0].key == own["fixed"][0].key and moved[1].key != own["fixed"][1].key


def test_the_list_covers_the_tables_and_its_titles_are_distinct():
    from experiments.cells import REDUCED
    from experiments.tables import TABLES

    cells = REDUCED.all_cells()
    have = {(cell.name, cell.sparsity) for cell in cells}
    for table in TABLES:
        for claim in table.claims:
            assert claim.a in have and claim.b in have, claim.text
    for name in ("lap", "pathways-lsp", "dynamic-wg"):
        assert {cell.seed for cell in cells if cell.name == name and cell.sparsity == 0.9} == {0, 1, 2}
    with pytest.raises(ValueError, match="distinct names"):
        from experiments.stages import check_cells

        check_cells([cells[0], replace(cells[0], row="another")])


def fake(name, seed, rate, sparsity=0.9, utterances=200):
    """A result whose errors are drawn at a rate; the same utterances are hard for all."""
    hard = np.random.default_rng(3).random(utterances) * 2 * rate
    draw = np.random.default_rng([seed, len(name)])
    test = {}
    for language in ("en", "fr", "it", "nl"):
        errors = draw.binomial(6, np.minimum(hard, 1.0))
        test[language] = {"wer": errors.sum() / (6 * utterances), "errors": errors.tolist(), "words": [6] * utterances}
    mean = float(np.mean([one["wer"] for one in test.values()]))
    return {
        "key": f"{name}{seed}",
        "row": name,
        "name": name,
        "sparsity": sparsity,
        "seed": seed,
        "languages": ["en", "fr", "it", "nl"],
        "wer_mean": mean,
        "test": test,
        "cost": {"steps": 10, "cpu_s": 60},
        "history": {"loss": [], "overlap": [], "dev": [], "decisions": []},
    }


def results_of(tmp_path, *found):
    from experiments.statistics import Results

    for one in found:
        (tmp_path / f"{one['name']}{one['seed']}.json").write_text(json.dumps(one))
    wanted = {(one["name"], one["sparsity"]): [0, 1, 2] for one in found}
    keys = {f"{one['name']}{one['seed']}": one["key"] for one in found}
    return Results(tmp_path, wanted, keys)


def test_differences_have_intervals_that_know_what_is_certain(tmp_path):
    results = results_of(tmp_path, *(fake(n, s, r) for n, r in (("good", 0.1), ("bad", 0.15)) for s in (0, 1, 2)))
    good, bad = results.row("good", 0.9), results.row("bad", 0.9)
    found = results.compare(good, bad)
    assert found.low < found.relative < found.high < 0 and found.verdict() == "lower"
    assert found.relative == pytest.approx(0.1 / 0.15 - 1, abs=0.08)
    assert results.compare(bad, good).verdict() == "higher"
    itself = results.compare(good, good)
    assert (itself.low, itself.relative, itself.high) == (0, 0, 0) and itself.verdict() == "open"
    assert results.compare(good, bad) == found  # no chance in it


def test_a_difference_that_one_seed_denies_is_open(tmp_path):
    found = [fake("a", 0, 0.1), fake("a", 1, 0.16), fake("b", 0, 0.15), fake("b", 1, 0.15)]
    results = results_of(tmp_path, *found)
    difference = results.compare(results.row("a", 0.9), results.row("b", 0.9))
    assert min(difference.by_seed) < 0 < max(difference.by_seed) and difference.verdict() == "open"


def test_the_sparsity_that_still_equals_dense_lies_where_errors_cross(tmp_path):
    from experiments.tables import parity

    found = [fake("dense", 0, 0.1, sparsity=0.0)]
    for share, rate in ((0.5, 0.1), (0.7, 0.1), (0.9, 0.15)):  # equal up to 70 %, 50 % worse at 90 %
        found.append({**fake("lap", 0, rate, sparsity=share), "key": f"lap{share}"})
    folder = tmp_path / "results"
    folder.mkdir()
    for one in found:
        for language in one["test"].values():
            language["wer"] = 0.75 if one["sparsity"] == 0.9 else 0.5
        (folder / f"{one['name']}-{one['sparsity']}.json").write_text(json.dumps(one))
    from experiments.statistics import Results

    keys = {f"{one['name']}-{one['sparsity']}": one["key"] for one in found}
    results = Results(folder, {(one["name"], one["sparsity"]): [0] for one in found}, keys)
    line = next(line for line in parity(results) if line.startswith("| one shared mask"))
    assert "| 72% (50%, 70%, 90%) |" in line  # 5 % of 50 %, a tenth of the way from 70 to 90 %


def test_missing_seeds_and_stale_files_are_said(tmp_path):
    from experiments.tables import Claim, claim_lines

    results = results_of(tmp_path, fake("a", 0, 0.1), fake("b", 0, 0.2), fake("b", 1, 0.2))
    claim = Claim("a beats b", ("a", 0.9), ("b", 0.9))
    assert "yes (1 of 3 seeds so far)" in claim_lines(results, [claim])[-1]
    assert results.row("a", 0.9).seeds == "1 of 3"
    nothing = Claim("c beats b", ("c", 0.9), ("b", 0.9))
    assert "not measured yet" in claim_lines(results, [nothing])[-1]
    from experiments.statistics import Results

    stale = Results(tmp_path, results.wanted, {"a0": "of other settings", "b0": "b0", "b1": "b1"})
    assert stale.stale == ["a0"] and stale.row("a", 0.9) is None


def test_the_page_in_git_is_made_from_the_results_in_git(tmp_path):
    from experiments.cells import REDUCED
    from experiments.tables import write_all

    for _ in range(2):
        write_all(REDUCED.study, REDUCED.all_cells(), ROOT / "experiments" / "results", tmp_path)
        page = (tmp_path / "results.md").read_text()
        assert page == (ROOT / "experiments" / "results.md").read_text(), "run `make tables`"
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "plots").glob("*.svg")}
    write_all(REDUCED.study, REDUCED.all_cells(), ROOT / "experiments" / "results", tmp_path)
    assert pictures == {path.name: path.read_bytes() for path in (tmp_path / "plots").glob("*.svg")}
    for path in (ROOT / "experiments" / "results").glob("*.json"):
        assert path.stat().st_size < 30_000, path


def test_curves_of_seeds_that_decide_at_other_steps_are_drawn():
    """Own masks are decided every so many batches of their language, so at other steps in every seed."""
    from experiments.plots import _mean_curve
    from experiments.statistics import Row

    def result(seed, steps):
        return {"history": {"decisions": [[step, "en", 0.5 + seed] for step in steps]}}

    runs = {seed: result(seed, range(seed + 1, 1001, 7)) for seed in (0, 1)}
    points = _mean_curve(Row("dynamic", 0.9, runs, 2), "decisions", 2)
    assert len(points) == 25 and points == sorted(points)
    assert {y for _, y in points} == {1.0}


def test_tables_of_no_results_leave_the_page_alone(tmp_path):
    from experiments.cells import REDUCED
    from experiments.tables import write_all

    (tmp_path / "results").mkdir()
    (tmp_path / "results.md").write_text("mine")
    command = [sys.executable, "-m", "experiments", "--results", str(tmp_path / "results"), "tables"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds no result of this list" in done.stderr
    assert (tmp_path / "results.md").read_text() == "mine"
    (tmp_path / "results" / "dense-0-s0.json").write_text('{"key": ')
    with pytest.raises(SystemExit, match=r"dense-0-s0\.json is damaged .*delete it"):
        write_all(REDUCED.study, REDUCED.all_cells(), tmp_path / "results", tmp_path)


@pytest.mark.parametrize("words", [["stage", "nosuch"], ["measure", "nosuch"]])
def test_what_is_not_in_the_list_is_said(tmp_path, words):
    places = ["--runs", str(tmp_path), "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *places, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith(f"no {words[0].replace('measure', 'cell')} nosuch; ")


def test_a_stage_of_two_cells_is_done_once(tmp_path):
    """Its folder has the name that the first cell gave it, also when only the second one is left."""
    import tiny_study

    from experiments import runner, stages

    first = tiny_study.make_cells()
    second = replace(tiny_study.make_cells(steps=9)[1], name="other")
    cells = (*first, second)
    places = runner.Places(tmp_path, tmp_path / "results")
    for stage in stages.all_stages(tiny_study.STUDY, cells).values():
        stage.folder(tmp_path).mkdir()
        (stage.folder(tmp_path) / runner.DONE).touch()
    left = [job.words for job in runner.open_jobs(tiny_study.STUDY, cells, places)]
    assert left == [("measure", "dense-0-s0"), ("measure", "fixed-80-s0"), ("measure", "other-80-s0")]
    assert runner.describe(tiny_study.STUDY, cells, places)["stages_left"] == 0
