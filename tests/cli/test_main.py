"""The command as a whole: help, errors in one line with exit code 2, Ctrl-C, debugging."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import soundfile

from sparse_pathways import cli
from sparse_pathways.cli import SUBCOMMANDS, main
from sparse_pathways.cli.data import SOURCES


def run_command(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "sparse_pathways.cli", *map(str, words)], capture_output=True, text=True, **kwargs
    )


def one_line_error(capsys, *words) -> str:
    """Run a command that must fail as a user's error does; returns its line on stderr."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sparse-pathways: "), captured.err
    return lines[0]


# --- help ---------------------------------------------------------------------------------------------------------
def test_help_names_every_subcommand(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in SUBCOMMANDS)


COMMANDS = [(name,) for name in SUBCOMMANDS if name != "data"] + [("data", source) for source in SOURCES]


@pytest.mark.parametrize("words", COMMANDS, ids="-".join)
def test_help_of_a_subcommand_explains_and_shows_an_example(capsys, words):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: sparse-pathways {' '.join(words)}")
    assert "\nexamples:\n  " in text and f"sparse-pathways {' '.join(words)}" in text.split("examples:")[1]
    assert "<class" not in text
    options = text.split("examples:")[0].split("-h, --help")[1]
    for line in options.split("\n  -")[1:]:  # every option has a sentence of its own
        first = line.split("(type:")[0].split("(required")[0].split("(default:")[0]
        assert len(first.split()) >= 4, line


def test_data_help_names_every_source(capsys):
    assert main(["data"]) == 0
    assert all(f"\n  {source} " in capsys.readouterr().out for source in ["synthetic"])


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparse-pathways 0.")


def test_print_config_can_be_read_back(capsys, tmp_path):
    words = ["train", "--data", "corpus", "--out", "run", "--model.layers", "2", "--steps", "7"]
    assert main([*words, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert "steps: 7" in text and "layers: 2" in text
    (tmp_path / "train.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "train.yaml"), "--steps", "8", "--print_config"]) == 0
    assert capsys.readouterr().out == text.replace("steps: 7", "steps: 8")  # typed options win over the file
    assert main(["train", "--steps", "8", "--config", str(tmp_path / "train.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == text.replace("steps: 7", "steps: 8")  # wherever the file is named


# --- errors -------------------------------------------------------------------------------------------------------
ARGUMENTS = {
    "no_such_subcommand": (["transscribe"], "no subcommand 'transscribe'; choose one of data, train"),
    "no_such_source": (["data", "youtube"], "no source 'youtube'; choose one of synthetic"),
    "unknown_option": (["train", "--data", "d", "--out", "o", "--stepps", "3"], "--stepps"),
    "missing_option": (["train", "--out", "o"], "data"),
    "missing_positional": (["pack", "--out", "o"], "run"),
    "not_a_number": (["train", "--data", "d", "--out", "o", "--steps", "many"], "--steps: Expected a int"),
    "outside_its_range": (["train", "--data", "d", "--out", "o", "--steps", "0"], "TrainConfig.steps = 0"),
    "nested_outside": (["train", "--data", "d", "--out", "o", "--model.heads", "7"], "ModelConfig.d_model = 256"),
    "sparsity_in_per_cent": (["prune", "--data", "d", "--start", "s", "--out", "o", "--sparsity", "70"], "sparsity"),
    "no_corpus": (["train", "--data", "nowhere", "--out", "o"], "nowhere: no such manifest"),
    "no_run": (["pack", "nowhere", "--out", "o"], "nowhere: no such file"),
    "no_results": (["report", "nowhere"], "nowhere/results.json: no such file"),
    "no_pairs": (["evaluate", "runs/dense", "--data", "d", "--out", "o"], "NAME=PATH"),
    "same_name": (["evaluate", "a=x", "a=y", "--data", "d", "--out", "o"], "'a' is given twice"),
    "bad_split": (["evaluate", "a=x", "--data", "d", "--out", "o", "--split", "eval"], "split = 'eval'"),
    "no_threads": (["transcribe", "m", "a.wav", "--language", "fr", "--threads", "0"], "--threads"),
    "no_batch": (["evaluate", "a=x", "--data", "d", "--out", "o", "--batch", "0"], "--batch"),
    "nothing_timed": (["evaluate", "a=x", "--data", "d", "--out", "o", "--timed", "-1"], "--timed"),
    "nowhere_to_write": (["evaluate", "a=x", "--data", "d", "--out", "no/o.json"], "out = no/o.json"),
    "bad_rows": (["bench", "m", "--rows", "0"], "rows = [0]"),
}


@pytest.mark.parametrize(("words", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in one_line_error(capsys, *words)


CONFIGS = {
    "unknown_field": ("data: d\nout: o\nstepps: 3\n", "stepps"),
    "wrong_type": ("data: d\nout: o\nsteps: many\n", "steps"),
    "broken_yaml": ("data: [d\n", "config"),
    "not_a_mapping": ("- 1\n- 2\n", "config"),
}


@pytest.mark.parametrize(("text", "message"), CONFIGS.values(), ids=CONFIGS)
def test_wrong_config_file(capsys, tmp_path, text, message):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    assert message in one_line_error(capsys, "train", "--config", path)


def test_missing_config_file(capsys, tmp_path):
    assert "train.yaml" in one_line_error(capsys, "train", "--config", tmp_path / "train.yaml")


def truncated(path, model_file):
    path.write_bytes(model_file.read_bytes()[:-1000])


def foreign(path, _):
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, path)


def text_file(path, _):
    path.write_text("this is no model\n")


def empty(path, _):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [truncated, foreign, text_file, empty, None], ids=lambda f: f.__name__ if f else "missing"
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("command", ["transcribe", "bench"])
def test_unusable_model(capsys, tmp_path, model_file, sound_file, command, name, spoil):
    path = tmp_path / name
    if spoil is not None:
        spoil(path, model_file)
    words = [command, path] if command == "bench" else [command, path, "--language", "en", sound_file]
    assert str(path) in one_line_error(capsys, *words)


def test_unknown_language_lists_the_known_ones(capsys, model_file, sound_file):
    line = one_line_error(capsys, "transcribe", model_file, "--language", "de", sound_file)
    assert "'de'" in line and "en, fr" in line


def test_language_of_the_bench(capsys, model_file):
    assert "en, fr" in one_line_error(capsys, "bench", model_file, "--language", "de")


SOUNDS = {
    "missing": None,
    "zero_bytes": b"",
    "no_samples": np.zeros(0),
    "corrupt": b"RIFF\x00\x00WAVE but not really",
    "nan": np.array([0.0, np.nan]),
}


@pytest.mark.parametrize("content", SOUNDS.values(), ids=SOUNDS)
def test_unusable_sound(capsys, tmp_path, model_file, content):
    path = tmp_path / "bad.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 16_000, subtype="FLOAT")
    assert str(path) in one_line_error(capsys, "transcribe", model_file, "--language", "en", path)


def test_a_packed_model_cannot_be_packed_again(capsys, tmp_path, model_file):
    assert "packed already" in one_line_error(capsys, "pack", model_file, "--out", tmp_path / "again.safetensors")


# --- from a shell -------------------------------------------------------------------------------------------------
def test_error_from_a_shell_has_no_traceback_unless_asked_for(tmp_path):
    words = ["report", tmp_path]
    plain = run_command(*words)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.count("\n") == 1 and "holds no log.jsonl and no results.json" in plain.stderr
    asked = run_command(*words, "--debug")
    assert asked.returncode != 0 and "Traceback" in asked.stderr and "FormatError" in asked.stderr


def test_a_bug_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", lambda words: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["report"])


@pytest.mark.parametrize(("said", "shown"), [("stopped after step 3", "stopped after step 3"), ("", "interrupted")])
def test_interruption_is_one_line_and_130(monkeypatch, capsys, said, shown):
    def interrupted(words):
        raise KeyboardInterrupt(*([said] if said else []))

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert main(["train"]) == 130
    error = capsys.readouterr().err
    assert error.startswith(f"sparse-pathways: {shown}") and error.count("\n") == 1


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m sparse_pathways.cli train --help | head -n 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert result.stderr == "" and result.stdout.startswith("usage:")
