"""Every example runs, learns and ends at its sparsity; the steps are fewer than those of the script itself."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(name, **settings):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(**settings)


def test_mlp():
    found = run("mlp", steps=200)
    assert found["density"] == pytest.approx(0.1, abs=0.01)
    assert found["unexplained"] < 0.5 and found["packed differs by"] < 1e-5


@pytest.mark.slow
def test_rnnt():
    pytest.importorskip("torchaudio")
    found = run("rnnt", steps=80)
    assert found["last loss"] < 0.5 * found["first loss"]
    assert found["density"] == pytest.approx(0.3, abs=0.01) and found["IoU of the languages"] < 0.9


@pytest.mark.slow
def test_transformer():
    found = run("transformer", steps=200)
    assert found["density"] == pytest.approx(0.2, abs=0.01) and found["IoU of the tasks"] < 0.9
    assert found["copy"] > 0.2 and found["reverse"] > 0.2  # chance: 0.08


@pytest.mark.slow
def test_hugging_face():
    pytest.importorskip("transformers")
    found = run("hugging_face", steps=100)
    assert found["density"] == pytest.approx(0.2, abs=0.01) and found["decisions"] >= 10
    assert found["accuracy"] > 0.6


@pytest.mark.slow
def test_text_classification():
    found = run("text_classification", steps=400)
    assert min(found["pathways"], found["one mask"]) > 0.5  # chance: 0.09; at these sizes one mask is enough
    assert found["nl, added, its mask learned"] > found["nl, added, all weights"] + 0.05
