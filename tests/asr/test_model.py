import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import sparse_pathways as sp
from sparse_pathways.asr.config import ModelConfig
from sparse_pathways.asr.model import Recogniser, build, new, prunable
from sparse_pathways.asr.text import Tokenizer

LENGTHS = [37, 64, 5, 50]  # part of a segment, whole segments, less than one, part again; segments of 16


@pytest.fixture
def batch(rng):
    """Features like speech; what lies past an utterance's end must not matter, so it is NaN."""
    feats = 8 + 3 * torch.randn(len(LENGTHS), max(LENGTHS), 80, generator=rng)
    for row, length in zip(feats, LENGTHS, strict=True):
        row[length:] = torch.nan
    return feats, torch.tensor(LENGTHS)


def stream(model, feats):
    """Encode one utterance segment by segment, as a recording that arrives: zeros follow its end."""
    segment, ahead = model.config.segment_frames, model.config.right_context_frames
    normal = model.normalise(feats)
    count = -(-len(normal) // segment)
    padded = torch.cat([normal, torch.zeros(count * segment + ahead - len(normal), 80)])
    state, pieces = None, []
    for start in range(0, count * segment, segment):
        chunk = padded[None, start : start + segment + ahead]
        encoded, lengths, state = model.rnnt.transcribe_streaming(chunk, torch.tensor([segment + ahead]), state)
        pieces.append(encoded[0, : int(lengths[0])])
    return torch.cat(pieces)


@torch.no_grad()
def test_batch_equals_alone_equals_streaming(tiny_model, batch):
    feats, lengths = batch
    together, encoded_lengths = tiny_model.encode(feats, lengths)
    for row, length in enumerate(LENGTHS):
        alone, alone_lengths = tiny_model.encode(feats[row : row + 1, :length], lengths[row : row + 1])
        valid = int(encoded_lengths[row])
        assert valid == int(alone_lengths[0]) == -(-length // 16) * 2
        torch.testing.assert_close(together[row, :valid], alone[0, :valid], atol=1e-5, rtol=0)
        torch.testing.assert_close(stream(tiny_model, feats[row, :length]), alone[0, :valid], atol=1e-5, rtol=0)


@torch.no_grad()
def test_batch_of_the_demo_size_equals_streaming(rng):
    torch.manual_seed(1)
    model = new(ModelConfig(vocab=40), Tokenizer.train(["a b c d"], 40), ("en",)).eval()
    feats = torch.randn(1, 150, 80, generator=rng)
    whole, _ = model.encode(feats, torch.tensor([150]))
    torch.testing.assert_close(stream(model, feats[0]), whole[0], atol=1e-5, rtol=0)


def test_demo_size():
    tokenizer = Tokenizer.train(["a b c d"], 40)
    count = sum(parameter.numel() for parameter in new(ModelConfig(), tokenizer, ("en",)).parameters())
    assert 3.5e6 < count < 4.1e6


@torch.no_grad()
def test_forward_gives_what_the_losses_need(tiny_model, batch):
    feats, lengths = batch
    targets, target_lengths = torch.zeros(4, 7, dtype=torch.long), torch.tensor([7, 2, 0, 5])
    logits, ctc, encoded_lengths = tiny_model(feats, lengths, targets, target_lengths)
    symbols = tiny_model.tokenizer.size + 1
    assert logits.shape == (4, 8, 8, symbols) and ctc.shape == (4, 8, symbols)
    assert encoded_lengths.tolist() == [6, 8, 2, 8]
    assert torch.isfinite(logits).all()
    only_ctc = tiny_model(feats, lengths, targets, target_lengths, ctc_only=True)
    assert only_ctc[0] is None and torch.equal(only_ctc[1], ctc)


def test_wrong_shapes_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"want \[B, T, 80\] and \[B\]"):
        tiny_model.encode(torch.zeros(1, 5, 40), torch.tensor([5]))
    with pytest.raises(ValueError, match="lengths reach 6, but feats has 5 frames"):
        tiny_model.encode(torch.zeros(1, 5, 80), torch.tensor([6]))


@torch.no_grad()
def test_built_again_from_its_configuration(tiny_model, batch):
    again = build(json.loads(json.dumps(tiny_model.packed_config))).eval()
    again.load_state_dict(tiny_model.state_dict())
    assert again.languages == ("en", "nl") and again.blank == tiny_model.blank == again.tokenizer.size
    assert torch.equal(again.encode(*batch)[0], tiny_model.encode(*batch)[0])
    assert again.tokenizer.encode("kwart over tien") == tiny_model.tokenizer.encode("kwart over tien")


def test_recognition_does_without_the_ctc_head(tiny_model, batch):
    tiny_model.ctc = None
    again = build(tiny_model.packed_config).eval()
    again.load_state_dict(tiny_model.state_dict())
    assert again.encode(*batch)[0].shape == (4, 8, 32)
    with pytest.raises(RuntimeError, match="without its CTC head"):
        again(*batch, torch.zeros(4, 1, dtype=torch.long), torch.ones(4, dtype=torch.long))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("tokenizer"),
        lambda config: config.update(architecture="whisper"),
        lambda config: config.update(tokenizer="!"),
        lambda config: config.update(tokenizer="AAAA"),
        lambda config: config["model"].update(width=3),
        lambda config: config["model"].update(heads=3),
        lambda config: config["model"].update(vocab=7),
    ],
    ids=["missing", "architecture", "base64", "tokenizer", "unknown", "heads", "vocab"],
)
def test_foreign_configuration_is_refused(tiny_model, change):
    config = copy.deepcopy(tiny_model.packed_config)
    change(config)
    with pytest.raises(ValueError):
        build(config)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layers": 0}, r"ModelConfig\.layers = 0; want at least 1"),
        ({"dropout": 1.0}, r"ModelConfig\.dropout = 1\.0"),
        ({"d_model": 100, "heads": 8}, r"d_model = 100; want a multiple of heads = 8"),
        ({"segment_frames": 20}, r"segment_frames = 20; want a multiple of stride = 8"),
        ({"right_context_frames": 4}, r"right_context_frames = 4; want a multiple of stride"),
    ],
    ids=["layers", "dropout", "heads", "segment", "right-context"],
)
def test_config_refuses(fields, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**fields)


def test_tokenizer_and_config_must_agree(tiny_model):
    config = dataclasses.replace(tiny_model.config, vocab=5)
    with pytest.raises(ValueError, match=r"config\.vocab = 5, but the tokenizer has"):
        Recogniser(config, tiny_model.tokenizer, ("en",))


def test_masks_go_to_encoder_and_lstm_only(tiny_model):
    chosen = {name for name, module in tiny_model.named_modules() if prunable(module, name)}
    layer = "rnnt.transcriber.transformer.emformer_layers.{}."
    parts = ["attention.emb_to_query", "attention.emb_to_key_value", "attention.out_proj", "pos_ff.1", "pos_ff.4"]
    expected = {layer.format(index) + part for index in range(2) for part in parts}
    expected |= {"rnnt.predictor.lstm_layers.0.x2g", "rnnt.predictor.lstm_layers.0.p2g"}
    assert chosen == expected


@torch.no_grad()
def test_full_masks_change_nothing(tiny_model, batch):
    expected = tiny_model.encode(*batch)[0]
    sparse = sp.sparsify_(copy.deepcopy(tiny_model), (8, 1), ("en", "nl"), prunable)
    with sp.pathway(sparse, "nl"):
        torch.testing.assert_close(sparse.encode(*batch)[0], expected, atol=1e-5, rtol=0)
    assert isinstance(sparse.rnnt.joiner.linear, nn.Linear)
