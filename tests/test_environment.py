"""`sp.env()`: complete, JSON-able, right about what can be checked, and None for what a machine does not tell."""

import json
import os

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways import environment
from sparse_pathways.cli import main
from sparse_pathways.ops.backends import ISAS
from sparse_pathways.ops.library import MISSING

KEYS = {
    *("package", "commit", "python", "torch", "triton", "torchaudio", "cpu", "cores", "cores_allowed"),
    *("l1d_kib", "l2_kib", "l3_kib", "cpu_flags", "isa_available", "cpu_backend", "cpu_kernels", "compiler"),
    "direct_calls",
    *("threads", "pool_threads", "cuda_device", "forced_backend"),
}


def test_keys_and_json():
    env = sp.env()
    assert set(env) == KEYS
    assert json.loads(json.dumps(env)) == env


def test_what_can_be_checked():
    env = sp.env()
    assert env["torch"] == torch.__version__
    assert env["threads"] == torch.get_num_threads()
    assert env["cores"] == os.cpu_count() >= env["cores_allowed"] >= 1
    if MISSING is None:
        assert env["isa_available"] == list(ISAS[: torch.ops.sparse_pathways.max_isa() + 1])
        assert env["compiler"].split()[0] in ("g++", "clang")
        assert env["pool_threads"] >= 0
    else:
        assert env["isa_available"] == [] and env["compiler"] is None


def test_text_is_one_line_per_key(capsys):
    lines = str(sp.env()).splitlines()
    assert {line.split()[0] for line in lines} == KEYS
    assert len(lines) == len(KEYS)
    assert main(["env"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KEYS)
    assert main(["env", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == KEYS


def cache_folder(root, caches):
    for number, (level, kind, size) in enumerate(caches):
        folder = root / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("caches", "sizes"),
    [
        ([(1, "Instruction", "64K"), (1, "Data", "32K"), (2, "Unified", "1024K"), (3, "Unified", "32M")],
         (32, 1024, 32768)),
        ([(1, "Data", "48K")], (48, None, None)),
        ([(1, "Data", ""), (2, "Unified", "512")], (None, None, None)),
        ([], (None, None, None)),
    ],
    ids=["usual", "one-level", "unreadable", "none"],
)  # fmt: skip
def test_caches(tmp_path, monkeypatch, caches, sizes):
    monkeypatch.setattr(environment, "CACHES", cache_folder(tmp_path, caches))
    assert tuple(environment.cache_kib(level) for level in (1, 2, 3)) == sizes


def test_a_machine_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "absent")
    env = sp.env()
    assert env["cpu_flags"] == []
    assert env["cpu"]
