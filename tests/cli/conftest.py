"""A packed model file and a sound file for the command line; a tiny model with random weights is enough here."""

import pytest
import soundfile
import torch

import sparse_pathways as sp
from sparse_pathways.asr.config import ModelConfig
from sparse_pathways.asr.model import new, prunable
from sparse_pathways.asr.text import Tokenizer

SIZES = ModelConfig(
    d_model=32,
    heads=2,
    ffn=64,
    layers=1,
    segment_frames=16,
    right_context_frames=8,
    encoding=32,
    embedding=32,
    vocab=40,
)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(
        ["turn on the lamp in the kitchen", "allume la lampe", "doe het licht aan"], SIZES.vocab
    )
    model = sp.sparsify_(new(SIZES, tokenizer, ("en", "fr")), pathways=("en", "fr"), filter_fn=prunable)
    for layer in sp.sparse_layers(model).values():
        layer.set_mask_(sp.topk_mask(sp.block_scores(layer.weight), 0.7))
    with torch.no_grad():
        model.rnnt.joiner.linear.bias[model.blank] = -1.0  # always something to say
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    sp.save_packed(sp.pack(model), path)
    return path


@pytest.fixture
def sound_file(tmp_path, rng):
    path = tmp_path / "some.wav"
    soundfile.write(path, 0.1 * torch.randn(22_050, generator=rng).numpy(), 22_050)
    return path
