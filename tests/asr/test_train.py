import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.asr import loop
from sparse_pathways.asr.checkpoint import read
from sparse_pathways.asr.config import ModelConfig, PruneConfig, TrainConfig
from sparse_pathways.asr.train import load_model, prune, train

MODEL = ModelConfig(
    d_model=32,
    heads=2,
    ffn=48,
    layers=1,
    segment_frames=32,
    right_context_frames=8,
    left_context=4,
    encoding=32,
    embedding=24,
    vocab=60,
)


@pytest.fixture
def dense_config(tiny_corpus, tmp_path):
    return TrainConfig(
        data=tiny_corpus,
        out=tmp_path / "dense",
        steps=6,
        ctc_only_steps=2,
        batch=2,
        warmup=2,
        seed=4,
        threads=1,
        progress=False,
        model=MODEL,
    )


@pytest.fixture(scope="module")
def dense(tiny_corpus, tmp_path_factory) -> Path:
    """A finished dense run."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    return train(
        TrainConfig(data=tiny_corpus, out=out, steps=4, ctc_only_steps=1, batch=2, progress=False, model=MODEL)
    )


@pytest.fixture
def prune_config(tiny_corpus, dense, tmp_path):
    return PruneConfig(
        data=tiny_corpus,
        start=dense,
        out=tmp_path / "pruned",
        steps=6,
        batch=2,
        warmup=2,
        interval=1,
        freeze=5,
        threads=1,
        progress=False,
    )


def interrupt_after(monkeypatch, step, number):
    """Have the process receive a signal during a step, as if a user had asked."""
    one_step = loop._Fit.one_step

    def interrupted(fit):
        one_step(fit)
        if fit.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(loop._Fit, "one_step", interrupted)


def assert_same(a, b, where="checkpoint"):
    """Equality of nested plain data and tensors, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def checkpoint(folder):
    content = read(folder / "checkpoint.pt")
    content["run"].pop("out")
    return content


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def ctrl_c():
    """A shell starts what it puts into the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_and_resumed_equals_straight(dense_config, tmp_path, monkeypatch, number):
    train(dense_config)
    resumed = replace(dense_config, out=tmp_path / "resumed")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, number)
        with pytest.raises(KeyboardInterrupt, match=r"stopped after step 3 of 6, checkpoint .*run the same command"):
            train(resumed)
    assert not (resumed.out / "model.pt").exists()
    assert read(resumed.out / "checkpoint.pt")["step"] == 3
    assert train(resumed) == resumed.out
    assert_same(checkpoint(dense_config.out), checkpoint(resumed.out))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_second_signal_is_obeyed_at_once_by_a_process_that_is_alone():
    with pytest.raises(KeyboardInterrupt), loop._stop_signals(alone=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    with loop._stop_signals(alone=False) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("method", ["dynamic_asr_pathways", "lap", "gradual"])
def test_interrupted_and_resumed_pruning_equals_straight(prune_config, tmp_path, monkeypatch, method):
    straight = replace(prune_config, method=method)
    prune(straight)
    resumed = replace(straight, out=tmp_path / "resumed")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            prune(resumed)
    prune(resumed)
    ours, theirs = checkpoint(straight.out), checkpoint(resumed.out)
    assert ours["pruner"]["steps"] == 6
    assert_same(ours, theirs)
    events = [line for line in log(straight.out) if "event" in line]
    assert events and events == [line for line in log(resumed.out) if "event" in line]


def test_log_of_a_sitting_that_was_killed_is_cut_to_its_checkpoint(dense_config, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(dense_config)
    with (dense_config.out / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": 6, "lo')
    train(dense_config)
    assert [line["step"] for line in log(dense_config.out)] == [6, 6]


def test_pruned_model_has_the_sparsity_and_pathways_of_its_own(prune_config):
    prune(replace(prune_config, sparsity=0.7))
    model = load_model(prune_config.out)
    assert sp.pathways(model) == ("en", "nl")
    assert sp.density(model)["total"] == pytest.approx(0.3, abs=0.01)
    assert sp.overlap(model)["total"][0, 1] < 1
    lines = log(prune_config.out)
    event = next(line["event"] for line in lines if "event" in line)
    assert event.keys() >= {"pathway", "sparsity", "density", "pruned", "regrown", "iou"}
    last = next(line for line in lines if "loss" in line and line["step"] == 6)
    assert last["sparsity"] == pytest.approx(0.7, abs=0.01) and 0 < last["overlap"] < 1
    assert next(line for line in lines if "wer" in line)["wer"].keys() == {"en", "nl"}


def test_lap_has_one_mask(prune_config):
    prune(replace(prune_config, method="lap"))
    assert torch.equal(sp.overlap(load_model(prune_config.out))["total"], torch.ones(2, 2))


def test_pruned_model_is_pruned_further(prune_config, tmp_path):
    first = replace(prune_config, sparsity=0.5)
    prune(first)
    second = replace(prune_config, start=first.out, out=tmp_path / "further", sparsity=0.8)
    prune(second)
    densities = [line["event"]["density"] for line in log(second.out) if "event" in line]
    assert max(densities) < 0.51
    assert sp.density(load_model(second.out))["total"] == pytest.approx(0.2, abs=0.01)
    with pytest.raises(ValueError, match=r"sparsity = 0\.3, but the start model is at 0\.50 already"):
        prune(replace(second, out=tmp_path / "back", sparsity=0.3))
    with pytest.raises(ValueError, match=r"block = \(4, 1\), but the start model is pruned in blocks of \(8, 1\)"):
        prune(replace(second, out=tmp_path / "block", block=(4, 1)))


def test_fixed_masks_of_a_pruned_model(prune_config, tmp_path):
    first = replace(prune_config, sparsity=0.5)
    prune(first)
    second = replace(
        prune_config, start=first.out, out=tmp_path / "fixed", method="asr_pathways", sparsity=0.5, eval_every=6
    )
    prune(second)
    for old, new in zip(*(sp.sparse_layers(load_model(run.out)).values() for run in (first, second)), strict=True):
        assert all(torch.equal(old.masks[name], new.masks[name]) for name in ("en", "nl"))
    assert not any("event" in line for line in log(second.out))


def test_the_start_model_teaches(prune_config, tmp_path, monkeypatch):
    straight = replace(prune_config, distil=0.5)
    prune(straight)
    torn = replace(straight, out=tmp_path / "torn")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            prune(torn)
    prune(torn)
    assert_same(checkpoint(straight.out), checkpoint(torn.out))
    line = [line for line in log(straight.out) if "loss" in line][-1]
    assert line["distil"] > 0
    assert line["loss"] == pytest.approx(line["rnnt"] + 0.5 * line["ctc"] + 0.5 * line["distil"], rel=1e-3)
    with pytest.raises(ValueError, match="distil = -1; want at least 0"):
        replace(straight, distil=-1)


@pytest.mark.parametrize(
    ("settings", "phases", "density"),
    [
        (dict(method="imp", options={"levels": 2}), 2, {"en": 0.3, "nl": 0.3}),
        (dict(method="lth", options={"levels": 1}), 2, {"en": 0.3, "nl": 0.3}),
        (dict(method="lsp"), 2, {"en": 0.3, "nl": 0.3}),
        (dict(method="asr_pathways", source="lsp", source_steps=3), 3, {"en": 0.3, "nl": 0.3}),
        (dict(source="lap", source_steps=3, source_sparsity=0.5), 2, {"en": 0.3, "nl": 0.3}),
    ],
    ids=["imp", "lth", "lsp", "pathways-from-lsp", "dynamic-from-lap"],
)
def test_method_of_several_rounds_interrupted_equals_straight(
    prune_config, tmp_path, monkeypatch, settings, phases, density
):
    straight = replace(prune_config, sparsity=0.7, interval=None, freeze=None, steps=6, **settings)
    prune(straight)
    torn = replace(straight, out=tmp_path / "torn")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            prune(torn)
    prune(torn)
    models = [load_model(run.out) for run in (straight, torn)]
    assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))
    for name, share in density.items():
        assert sp.density(models[0], name)["total"] == pytest.approx(share, abs=0.01)
    assert len(list(straight.out.glob("*/model.pt"))) == phases
    before = {path: path.stat().st_mtime_ns for path in straight.out.rglob("*.*")}
    assert prune(straight) == straight.out
    assert before == {path: path.stat().st_mtime_ns for path in straight.out.rglob("*.*")}
    with pytest.raises(ValueError, match=r"holds a run with lr = 0\.0005, not 0\.1; choose another folder"):
        prune(replace(straight, lr=0.1))


def test_source_and_options_that_do_not_fit_are_refused(prune_config):
    with pytest.raises(ValueError, match=r"source = 'magic'; want lap, lsp or nothing"):
        replace(prune_config, source="magic")
    with pytest.raises(ValueError, match=r"source_sparsity = 0\.9; want a share of at most sparsity = 0\.7"):
        replace(prune_config, source="lap", source_sparsity=0.9)
    with pytest.raises(ValueError, match="method = 'imp' makes masks of its own"):
        prune(replace(prune_config, method="imp", source="lsp", interval=None, freeze=None))
    with pytest.raises(ValueError, match="levels is no argument of method 'lap'; it takes steps, start"):
        prune(replace(prune_config, method="lap", options={"levels": 3}))


def test_training_lowers_the_loss(dense_config):
    train(replace(dense_config, steps=60, ctc_only_steps=0, batch=4, lr=3e-3, eval_every=60))
    losses = [line["rnnt"] for line in log(dense_config.out) if "rnnt" in line]
    assert len(losses) == 3
    assert losses[-1] < 0.85 * losses[0]


def test_finished_run_is_left_alone(dense, tiny_corpus):
    before = {path: path.stat().st_mtime_ns for path in dense.iterdir()}
    config = TrainConfig(data=tiny_corpus, out=dense, steps=4, ctc_only_steps=1, batch=2, progress=False, model=MODEL)
    assert train(config) == dense
    assert before == {path: path.stat().st_mtime_ns for path in dense.iterdir()}


def test_folder_of_another_run_is_refused(dense, tiny_corpus):
    config = TrainConfig(data=tiny_corpus, out=dense, steps=4, ctc_only_steps=1, batch=3, progress=False, model=MODEL)
    with pytest.raises(ValueError, match=r"holds a run with batch = 2, not 3; choose another folder, or delete"):
        train(config)
    with pytest.raises(ValueError, match=r"holds a run with data = .*, not .*elsewhere"):
        train(replace(config, batch=2, data=tiny_corpus / "elsewhere"))


def test_unknown_method_and_score(prune_config):
    with pytest.raises(ValueError, match=r"method = 'magic'; want one of .*dynamic_asr_pathways"):
        prune(replace(prune_config, method="magic"))
    with pytest.raises(ValueError, match="score = 'luck'"):
        prune(replace(prune_config, score="luck"))


def test_dense_model_is_loaded_as_it_was_saved(dense):
    model = load_model(dense)
    assert model.languages == ("en", "nl")
    assert_same(dict(model.state_dict()), dict(load_model(dense / "checkpoint.pt").state_dict()))


def test_files_that_are_no_models(dense, tmp_path, monkeypatch):
    with pytest.raises(sp.FormatError, match="no such file"):
        load_model(tmp_path / "nothing.pt")
    whole = (dense / "model.pt").read_bytes()
    for name, content in {"cut.pt": whole[: len(whole) // 2], "text.pt": b"text", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(sp.FormatError, match="cannot be read"):
            load_model(tmp_path / name)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(sp.FormatError, match="is not a model of this package"):
        load_model(tmp_path / "foreign.pt")
    content = torch.load(dense / "model.pt")
    content["state"].pop("mean")
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(sp.FormatError, match="holds no usable model"):
        load_model(tmp_path / "part.pt")
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    with pytest.raises(sp.FormatError, match="this run is not finished"):
        load_model(tmp_path)


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from sparse_pathways.asr.config import ModelConfig, PruneConfig, TrainConfig
from sparse_pathways.asr.loop import end_processes
from sparse_pathways.asr.train import prune, train

data, out = Path(sys.argv[1]), Path(sys.argv[2])
model = ModelConfig(d_model=32, heads=2, ffn=48, layers=1, left_context=4, encoding=32, embedding=24, vocab=60)
common = dict(data=data, steps=6, batch=2, threads=1, progress=False)
train(TrainConfig(out=out / "dense", ctc_only_steps=2, model=model, **common))
prune(PruneConfig(start=out / "dense", out=out / "pruned", interval=2, freeze=5, **common))
end_processes()
"""


def test_two_processes(tiny_corpus, tmp_path):
    """Gloo on the CPU; the pruner itself checks that both ranks decide the same masks."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(tiny_corpus), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sp.density(load_model(tmp_path / "pruned"))["total"] == pytest.approx(0.3, abs=0.01)
    assert [line["step"] for line in log(tmp_path / "dense")] == [6, 6]
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["processes"] == 2


def test_torchaudio_that_does_not_load_is_explained(tmp_path):
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise RuntimeError('built for another CUDA')")
    done = subprocess.run(
        [sys.executable, "-c", "import sparse_pathways.asr"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sparse_pathways.asr could not import torchaudio (built for another CUDA)")
    assert f"found torch {torch.__version__}" in last
    assert last.endswith("pip install torch==2.14.1 torchaudio==2.11.0")
