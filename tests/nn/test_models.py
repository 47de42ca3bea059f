import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_pathways as sp


class Tied(nn.Module):
    """One layer used in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def make_model(rng, names=("en", "fr"), density=0.4):
    model = sp.sparsify_(
        nn.Sequential(nn.Linear(29, 37), nn.ReLU(), nn.Linear(37, 16), nn.LayerNorm(16)), pathways=names
    )
    for layer in sp.sparse_layers(model).values():
        for name in names:
            layer.set_mask_(torch.rand(layer.masks[name].shape, generator=rng) < density, name)
    return model


def test_sparsify_keeps_parameters_and_optimiser(rng):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    parameters = list(model.parameters())
    sp.sparsify_(model, filter_fn=lambda module, name: name == "1")
    assert [type(m) for m in model] == [nn.Linear, sp.SparseLinear]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_shared_modules_stay_shared():
    model = sp.sparsify_(Tied())
    assert model.first is model.second and isinstance(model.first, sp.SparseLinear)
    packed = sp.pack(model)
    assert packed.first is packed.second and isinstance(packed.first, sp.PackedLinear)


def test_a_single_linear_comes_back_converted():
    assert isinstance(sp.sparsify_(nn.Linear(4, 8)), sp.SparseLinear)
    assert isinstance(sp.pack(sp.SparseLinear(4, 8)), sp.PackedLinear)


def test_switching_nests_and_survives_exceptions(rng):
    model, x = make_model(rng), torch.randn(3, 29)
    outputs = {}
    for name in ("en", "fr"):
        sp.set_pathway(model, name)
        outputs[name] = model(x)
    assert not torch.equal(outputs["en"], outputs["fr"])
    sp.set_pathway(model, "en")
    with pytest.raises(RuntimeError, match="inside"), sp.pathway(model, "fr"):
        assert torch.equal(model(x), outputs["fr"])
        with sp.pathway(model, "en"):
            assert torch.equal(model(x), outputs["en"])
        assert torch.equal(model(x), outputs["fr"])
        raise RuntimeError("inside")
    assert torch.equal(model(x), outputs["en"])
    with pytest.raises(KeyError, match="pathway = 'de' is not known; choose one of en, fr"):
        sp.set_pathway(model, "de")
    assert torch.equal(model(x), outputs["en"])


def test_pack_unpack_round_trip(rng):
    model, x = make_model(rng), torch.randn(3, 29)
    packed = sp.pack(model)
    back = sp.unpack_(copy.deepcopy(packed))
    assert sp.pathways(packed) == sp.pathways(model) == ("en", "fr")
    for name in ("en", "fr"):
        for one in (model, packed, back):
            sp.set_pathway(one, name)
        torch.testing.assert_close(packed(x), model(x))
        torch.testing.assert_close(back(x), model(x))
    assert not any(isinstance(m, sp.SparseLinear) for m in packed.modules())
    assert isinstance(model[0], sp.SparseLinear)
    with pytest.raises(ValueError, match="packed already"):
        sp.pack_(packed)
    with pytest.raises(ValueError, match="no sparse layers"):
        sp.pack_(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
def test_file_round_trip(dtype, rng, tmp_path):
    model, x = make_model(rng), torch.randn(3, 29)
    packed = sp.pack(model, dtype)
    if dtype == torch.bfloat16:
        x = x.to(dtype)
        packed[3].to(dtype)  # the layer norm is the user's own
    sp.save_packed(packed, tmp_path / "m.safetensors")
    sp.save_packed(packed, tmp_path / "again.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "m.safetensors"]
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    dense = nn.Sequential(nn.Linear(29, 37), nn.ReLU(), nn.Linear(37, 16), nn.LayerNorm(16))
    loaded = sp.load_packed(tmp_path / "m.safetensors", dense.to(x.dtype))
    assert not loaded.training
    for name in ("fr", "en"):
        sp.set_pathway(packed, name)
        sp.set_pathway(loaded, name)
        assert torch.equal(loaded(x), packed(x))
    french = sp.load_packed(tmp_path / "m.safetensors", copy.deepcopy(loaded), pathways=["fr"])
    sp.set_pathway(packed, "fr")
    torch.testing.assert_close(french(x), packed(x))
    assert sp.pathways(french) == ("fr",) and french[0].packed.nbytes < loaded[0].packed.nbytes
    assert french[0].packed.indices[0].pos is None


def test_values_are_stored_once_for_all_pathways(rng, tmp_path):
    model = make_model(rng, names=tuple("abcdef"), density=0.3)
    sp.save_packed(sp.pack(model), tmp_path / "m.safetensors")
    values = load_file(tmp_path / "m.safetensors")["0.values"]
    union = torch.stack(list(model[0].masks.values())).any(0)
    assert values.shape == (int(union.sum()), 1, 8)


def corrupt(path, change):
    """Rewrite the file with changed tensors and header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, header = load_file(path), json.loads(metadata["sparse_pathways"])
    change(tensors, header)
    save_file(tensors, path, {**metadata, "sparse_pathways": json.dumps(header)})


def set_bits(tensors, header):
    tensors["0.block_mask"] = torch.full_like(tensors["0.block_mask"], 255)


CORRUPTIONS = {
    "mask bits beyond the values": (set_bits, "layer 0: masks keep"),
    "values missing": (lambda t, h: t.pop("0.values"), "layer 0"),
    "bias of another size": (lambda t, h: t.update({"0.bias": torch.zeros(3)}), "bias is torch.float32"),
    "block of another size": (lambda t, h: h["layers"]["0"].update(block=[4, 1]), "layer 0"),
    "shape negative": (lambda t, h: h["layers"]["0"].update(shape=[-8, 29]), "layer 0"),
    "newer version": (lambda t, h: h.update(version=99), "format version 99"),
    "extra tensor": (lambda t, h: t.update(more=torch.zeros(1)), "does not fit the model"),
    "layer missing": (lambda t, h: h["layers"].pop("2"), "does not fit the model"),
    "layers of another type": (lambda t, h: h.update(layers="abc"), "not a packed model"),
    "values of a foreign dtype": (lambda t, h: t.update({"0.values": t["0.values"].int()}), "values are torch.int32"),
    "no layers": (lambda t, h: h.pop("layers"), "not a packed model"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_damaged_files_are_refused_in_one_line(case, rng, tmp_path):
    change, message = CORRUPTIONS[case]
    path, model = tmp_path / "m.safetensors", make_model(rng)
    sp.save_packed(sp.pack(model), path)
    corrupt(path, change)
    with pytest.raises(sp.FormatError, match=message) as caught:
        sp.load_packed(path, model)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_files_are_refused(size, rng, tmp_path):
    path, model = tmp_path / "m.safetensors", make_model(rng)
    sp.save_packed(sp.pack(model), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(sp.FormatError, match="truncated"):
        sp.load_packed(path, model)


def test_foreign_and_missing_files_and_models(rng, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(sp.FormatError, match="not a packed model of this package"):
        sp.load_packed(tmp_path / "foreign.safetensors")
    with pytest.raises(sp.FormatError, match="no such file"):
        sp.load_packed(tmp_path / "none.safetensors")
    with pytest.raises(sp.FormatError, match="not a file"):
        sp.load_packed(tmp_path)
    path, model = tmp_path / "m.safetensors", make_model(rng)
    sp.save_packed(sp.pack(model), path)
    with pytest.raises(sp.FormatError, match=r"load_packed\(path, model=...\)"):
        sp.load_packed(path)
    with pytest.raises(sp.FormatError, match="does not fit the model: it has no linear layer '2'"):
        sp.load_packed(path, nn.Sequential(nn.Linear(29, 37)))
    with pytest.raises(sp.FormatError, match=r"layer 2 is \(16, 36\)"):
        sp.load_packed(path, nn.Sequential(nn.Linear(29, 37), nn.ReLU(), nn.Linear(36, 16), nn.LayerNorm(16)))
    with pytest.raises(KeyError, match="'de' is not known"):
        sp.load_packed(path, model, pathways=["de"])
    with pytest.raises(ValueError, match="layer 0 is not packed"):
        sp.save_packed(model, path)


def test_density_and_overlap_equal_a_count(rng):
    model = make_model(rng)
    for one in (model, sp.pack(model)):
        masks = {
            n: torch.cat([layer.masks[n].flatten() for layer in sp.sparse_layers(model).values()]) for n in ("en", "fr")
        }
        assert sp.density(one, "fr")["total"] == pytest.approx(float(masks["fr"].double().mean()))
        assert sp.density(one, "fr")["0"] == pytest.approx(float(model[0].masks["fr"].double().mean()))
        union, both = masks["en"] | masks["fr"], masks["en"] & masks["fr"]
        expected = float(both.sum() / union.sum())
        torch.testing.assert_close(
            sp.overlap(one)["total"], torch.tensor([[1, expected], [expected, 1]]).double(), rtol=1e-6, atol=0
        )


def test_sparsify_refuses_when_nothing_matches():
    with pytest.raises(ValueError, match="found no nn"):
        sp.sparsify_(nn.ReLU())
    with pytest.raises(ValueError, match="filter_fn accepted none"):
        sp.sparsify_(nn.Linear(2, 2), filter_fn=lambda module, name: False)


def test_transformer_encoder_does_not_bypass_the_masks(rng):
    """nn.TransformerEncoderLayer's fused inference path reads weights directly."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    sp.sparsify_(layer)
    for one in sp.sparse_layers(layer).values():
        one.set_mask_(torch.rand(one.masks["default"].shape, generator=rng) < 0.4)
        with torch.no_grad():
            one.weight[~sp.expand_mask(one.masks["default"], one.block, tuple(one.weight.shape))] = float("nan")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.isfinite(layer(x)).all()
        torch.testing.assert_close(sp.pack(layer)(x), layer(x))


@pytest.mark.parametrize("only", ["linear1", "linear2", "linear"])
def test_transformer_encoder_with_padding_is_the_same_masked_and_packed(only, rng):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    dense = copy.deepcopy(model)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    sp.sparsify_(model, filter_fn=lambda module, name: only in name)
    with torch.no_grad():
        full = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(
            full[~padding], dense(x, src_key_padding_mask=padding)[~padding], rtol=1e-4, atol=1e-5
        )
        for one in sp.sparse_layers(model).values():
            one.set_mask_(torch.zeros_like(one.masks["default"]))
        pruned = model(x, src_key_padding_mask=padding)
        assert not torch.allclose(pruned[~padding], full[~padding])
        torch.testing.assert_close(sp.pack(model)(x, src_key_padding_mask=padding), pruned)


def test_a_model_that_does_not_fit_stays_as_it_was(rng, tmp_path):
    sp.save_packed(sp.pack(make_model(rng)), tmp_path / "m.safetensors")
    model = nn.Sequential(nn.Linear(29, 37), nn.ReLU(), nn.Linear(37, 16), nn.LayerNorm(16, bias=False))
    with pytest.raises(sp.FormatError, match=r"3\.bias is only in the file"):
        sp.load_packed(tmp_path / "m.safetensors", model)
    assert type(model[0]) is nn.Linear


def test_layers_that_would_lose_something_are_refused():
    with pytest.raises(ValueError, match=r"layer 0: its weight is computed"):
        sp.sparsify_(nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8))))
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match="layer 0 has hooks"):
        sp.sparsify_(nn.Sequential(hooked))


def test_torchaudio_rnnt_converts_and_streams(rng):
    models = pytest.importorskip("torchaudio.models", reason="torchaudio belongs to the asr extra")
    rnnt = models.emformer_rnnt_model(
        input_dim=80, encoding_dim=64, num_symbols=33, segment_length=16, right_context_length=4,
        time_reduction_input_dim=16, time_reduction_stride=4, transformer_num_heads=2, transformer_ffn_dim=128,
        transformer_num_layers=2, transformer_dropout=0.0, transformer_activation="gelu",
        transformer_left_context_length=8, transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True, symbol_embedding_dim=32,
        num_lstm_layers=2, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3, lstm_dropout=0.0,
    ).eval()  # fmt: skip
    sp.sparsify_(rnnt, pathways=("en", "fr"))
    names = sp.sparse_layers(rnnt)
    assert "predictor.lstm_layers.1.p2g" in names and "transcriber.transformer.emformer_layers.0.pos_ff.1" in names
    for layer in names.values():
        for name in ("en", "fr"):
            layer.set_mask_(torch.rand(layer.masks[name].shape, generator=rng) < 0.3, name)
    packed = sp.pack(rnnt)
    chunk, tokens = torch.randn(1, 20, 80, generator=rng), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for name in ("en", "fr"):
            with sp.pathway(rnnt, name), sp.pathway(packed, name):
                for one in (lambda m: m.transcribe_streaming(chunk, torch.tensor([20]), None)[0],
                            lambda m: m.predict(tokens, torch.tensor([3]), None)[0]):  # fmt: skip
                    torch.testing.assert_close(one(packed), one(rnnt), rtol=1e-4, atol=1e-5)


def test_a_pattern_is_no_function():
    with pytest.raises(TypeError, match=r"filter_fn = 'encoder'; want a function of module and name"):
        sp.sparsify_(nn.Sequential(nn.Linear(8, 8)), filter_fn="encoder")
