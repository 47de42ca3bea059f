"""A tiny recogniser with random weights that still says different things to different sounds, and a tiny corpus."""

import copy
from pathlib import Path

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.asr.config import CorpusConfig, ModelConfig
from sparse_pathways.asr.features import LogMel
from sparse_pathways.asr.model import Recogniser, new, prunable
from sparse_pathways.asr.synthetic import synthesise
from sparse_pathways.asr.text import Tokenizer

SENTENCES = ("turn on the lamp", "allume la lampe du salon", "accendi la luce", "doe het licht aan in de keuken")
SIZES = ModelConfig(
    d_model=32,
    heads=2,
    ffn=64,
    layers=2,
    segment_frames=16,
    right_context_frames=8,
    encoding=32,
    embedding=32,
    vocab=40,
)


def make_sound(seconds: float, seed: int) -> torch.Tensor:
    """Noise whose loudness and colour wander: `[S]` at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(round(seconds * 16_000), generator=generator)
    pitch = torch.rand(len(noise) // 1600 + 1, generator=generator).repeat_interleave(1600)[: len(noise)]
    tone = torch.sin(torch.cumsum(0.05 + pitch, 0))
    return 0.2 * (tone + 0.3 * noise) * (0.1 + pitch)


def make_recogniser(languages: tuple[str, ...] = ("en", "fr")) -> Recogniser:
    torch.manual_seed(0)
    model = new(SIZES, Tokenizer.train(SENTENCES, SIZES.vocab), languages).eval()
    frames = LogMel()(make_sound(8.0, seed=99))
    model.mean.copy_(frames.mean(0))
    model.inv_std.copy_(1 / frames.std(0))
    with torch.no_grad():  # about every other frame speaks
        model.rnnt.joiner.linear.weight.mul_(4)
        enc, _ = model.encode(frames[None], torch.tensor([len(frames)]))
        start, _, _ = model.rnnt.predict(torch.tensor([[model.blank]]), torch.tensor([1]), None)
        logits, _, _ = model.rnnt.join(enc, torch.tensor([enc.shape[1]]), start, torch.tensor([1]))
        lead = logits[0, :, 0, : model.blank].amax(-1) - logits[0, :, 0, model.blank]
        model.rnnt.joiner.linear.bias[model.blank] += lead.median()
    return model


def make_pruned(model: Recogniser, sparsity: float = 0.5) -> Recogniser:
    """A copy with one pathway per language, each with random masks of its own."""
    pruned = sp.sparsify_(copy.deepcopy(model), pathways=model.languages, filter_fn=prunable)
    generator = torch.Generator().manual_seed(1)
    for layer in sp.sparse_layers(pruned).values():
        for name, mask in layer.masks.items():
            layer.set_mask_(sp.topk_mask(torch.rand(mask.shape, generator=generator), sparsity), name)
    return pruned.eval()


@pytest.fixture(scope="session")
def recogniser() -> Recogniser:
    return make_recogniser()


@pytest.fixture(scope="session")
def pruned(recogniser) -> Recogniser:
    return make_pruned(recogniser)


@pytest.fixture(scope="session")
def packed_file(pruned, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    packed = sp.pack(pruned)
    packed.ctc = None
    sp.save_packed(packed, path)
    return path


@pytest.fixture(scope="session")
def packed(packed_file) -> Recogniser:
    return sp.load_packed(packed_file)


@pytest.fixture(params=["dense", "masked", "packed"])
def form(request, recogniser, pruned, packed) -> Recogniser:
    return {"dense": recogniser, "masked": pruned, "packed": packed}[request.param]


@pytest.fixture(scope="session")
def sound():
    return make_sound


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """Folder of a synthetic corpus: two languages, a few spoken sentences."""
    config = CorpusConfig(languages=("en", "nl"), train=12, dev=2, test=3, workers=1, seed=3)
    return synthesise(config, tmp_path_factory.mktemp("corpus"), progress=False).parent


@pytest.fixture
def tiny_model() -> Recogniser:
    """An untrained recogniser of its own for each test, to be changed at will."""
    return make_recogniser(("en", "nl"))
