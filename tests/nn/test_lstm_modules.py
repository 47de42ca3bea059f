"""SparseLSTM and its packed forms against nn.LSTM and torchaudio's LSTM with zeros where masks prune."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import sparse_pathways as sp

NAMES = ("en", "fr")


class _CustomLSTM(nn.Module):
    """The LSTM of torchaudio's predictor (torchaudio/models/rnnt.py), written down once more."""

    def __init__(self, input_dim, hidden_dim, layer_norm=False, eps=1e-3):
        super().__init__()
        self.x2g = nn.Linear(input_dim, 4 * hidden_dim, bias=not layer_norm)
        self.p2g = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)
        self.c_norm = nn.LayerNorm(hidden_dim, eps=eps) if layer_norm else nn.Identity()
        self.g_norm = nn.LayerNorm(4 * hidden_dim, eps=eps) if layer_norm else nn.Identity()
        self.hidden_dim = hidden_dim

    def forward(self, input, state):
        if state is None:
            state = [input.new_zeros(input.shape[1], self.hidden_dim) for _ in range(2)]
        h, c = state
        outputs = []
        for gates in self.x2g(input).unbind(0):
            i, f, g, o = self.g_norm(gates + self.p2g(h)).chunk(4, 1)
            c = self.c_norm(f.sigmoid() * c + i.sigmoid() * g.tanh())
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), [h, c]


def set_masks(model, rng, density=0.3):
    for layer in sp.sparse_layers(model).values():
        for name in layer.pathways:
            layer.set_mask_(torch.rand(layer.masks[name].shape, generator=rng) < density, name)
    return model


def sparse_lstm(rng, *sizes, pathways=NAMES, **options):
    torch.manual_seed(0)
    lstm = set_masks(sp.SparseLSTM(*sizes, pathways=pathways, **options), rng)
    for gate in lstm.gates.values():  # what is pruned for all pathways must never be seen
        kept = sp.expand_mask(torch.stack(list(gate.masks.values())).any(0), gate.block, tuple(gate.weight.shape))
        gate.weight.data[~kept] = float("nan")
    return lstm.eval()


def dense_double(lstm):
    """nn.LSTM in float64 with the active pathway's weights."""
    return lstm.to_lstm().double().eval()


def close(result, exact):
    torch.testing.assert_close(result, exact, check_dtype=False, rtol=1e-5, atol=1e-5)


OPTIONS = [
    dict(),
    dict(batch_first=True),
    dict(bias=False),
    dict(num_layers=2),
    dict(bidirectional=True),
    dict(num_layers=2, bidirectional=True, batch_first=True, dropout=0.5),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("hidden", [16, 21])
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_the_masked_nn_lstm(backend, options, hidden, steps, rng):
    lstm = sparse_lstm(rng, 10, hidden, **options)
    packed = sp.pack(lstm)
    assert isinstance(packed, sp.PackedLSTM)
    layers = lstm.num_layers * (2 if lstm.bidirectional else 1)
    for name in NAMES:
        with sp.pathway(lstm, name), sp.pathway(packed, name), torch.no_grad():
            dense = dense_double(lstm)
            for rows in (1, 4):
                shape = (rows, steps, 10) if lstm.batch_first else (steps, rows, 10)
                x = torch.randn(shape, generator=rng)
                hx = tuple(torch.randn(layers, rows, hidden, generator=rng) for _ in range(2))
                exact = dense(x.double(), tuple(t.double() for t in hx))
                exact_from_zero = dense(x.double())
                for model in (lstm, packed):
                    close(model(x, hx), exact)
                    close(model(x), exact_from_zero)
            x = torch.randn(steps, 10, generator=rng)  # unbatched
            hx = tuple(torch.randn(layers, hidden, generator=rng) for _ in range(2))
            for model in (lstm, packed):
                close(model(x, hx), dense(x.double(), tuple(t.double() for t in hx)))


def test_state_is_carried_over(backend, rng):
    packed = sp.pack(sparse_lstm(rng, 10, 16, num_layers=2))
    x = torch.randn(6, 3, 10, generator=rng)
    with torch.inference_mode():
        whole, state = packed(x)
        hx, parts = None, []
        for chunk in x.split([1, 2, 3]):
            y, hx = packed(chunk, hx)
            parts.append(y)
    close(torch.cat(parts), whole)
    close(hx, state)


def test_parameters_and_keys_are_those_of_nn_lstm(rng):
    options = dict(num_layers=2, bidirectional=True)
    lstm, dense = sp.SparseLSTM(10, 16, **options), nn.LSTM(10, 16, **options)
    assert [name for name, _ in lstm.named_parameters()] == [name for name, _ in dense.named_parameters()]
    added = set(lstm.state_dict()) - set(dense.state_dict())
    assert added == {f"{gate}.{key}" for gate in lstm.gates for key in ("block_mask", "mask_layout")}
    assert len(added) == 16
    set_masks(lstm, rng)
    masks = {name: gate.mask() for name, gate in lstm.gates.items()}
    with pytest.warns(UserWarning, match="dense checkpoint is loaded into a sparse model"):
        lstm.load_state_dict(dense.state_dict())
    assert torch.equal(lstm.weight_hh_l1_reverse, dense.weight_hh_l1_reverse)
    assert all(torch.equal(gate.mask(), masks[name]) for name, gate in lstm.gates.items())
    other = sp.SparseLSTM(10, 16, **options)
    other.load_state_dict(lstm.state_dict())
    x = torch.randn(3, 2, 10, generator=rng)
    torch.testing.assert_close(other(x), lstm(x))


def test_gradients_are_those_of_the_masked_lstm(rng):
    lstm = set_masks(sp.SparseLSTM(10, 16, num_layers=2), rng)
    dense, x = lstm.to_lstm(), torch.randn(3, 2, 10, generator=rng)
    dense(x)[0].square().sum().backward()
    for dense_grad in (True, False):
        for gate in lstm.gates.values():
            gate.dense_grad = dense_grad
        lstm.zero_grad()
        lstm(x)[0].square().sum().backward()
        for key, parameter in dense.named_parameters():
            want, mine = parameter.grad, dict(lstm.named_parameters())[key].grad
            if key.startswith("weight") and not dense_grad:
                gate = lstm.gates[key.removeprefix("weight_")]
                want = torch.where(sp.expand_mask(gate.mask(), (8, 1), tuple(want.shape)), want, 0)
            torch.testing.assert_close(mine, want)


def test_nan_in_pruned_weights_does_not_leak_into_gradients(rng):
    lstm = sparse_lstm(rng, 10, 16).train()
    lstm(torch.randn(3, 2, 10, generator=rng))[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in lstm.parameters())


def test_packed_sequences_run_unpacked_and_are_refused_packed(rng):
    lstm = sparse_lstm(rng, 10, 16)
    batch = pack_padded_sequence(torch.randn(4, 2, 10, generator=rng), [4, 2])
    with torch.no_grad():
        close(lstm(batch)[0].data, dense_double(lstm)(batch.double())[0].data)
    with pytest.raises(TypeError, match="PackedSequence"):
        sp.pack(lstm)(batch)


def test_copies_pickles_and_casts(rng):
    lstm, x = sparse_lstm(rng, 10, 16), torch.randn(3, 2, 10, generator=rng)
    with torch.no_grad():
        for model in (lstm, sp.pack(lstm)):
            want = model(x)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                torch.testing.assert_close(twin(x), want)
                sp.set_pathway(twin, "fr")  # the copy's own masks, not the original's
                assert not torch.equal(twin(x)[0], want[0])
                torch.testing.assert_close(model(x), want)
            double = copy.deepcopy(model).double()
            close(want, double(x.double()))
    twin = copy.deepcopy(lstm)
    twin.weight_ih_l0.data.zero_()
    assert twin.gates["ih_l0"].weight is twin.weight_ih_l0
    assert lstm.gates["ih_l0"].weight is lstm.weight_ih_l0


def test_the_packed_form_sees_what_changes(rng):
    lstm = sparse_lstm(rng, 10, 16)
    packed, other, x = sp.pack(lstm), sp.pack(sparse_lstm(rng, 10, 16)), torch.randn(3, 2, 10, generator=rng)
    with torch.no_grad():
        packed(x)
        packed.load_state_dict(other.state_dict())
        torch.testing.assert_close(packed(x), other(x))
        packed.ih_l0.bias, other.ih_l0.bias = torch.ones(64), torch.ones(64)
        torch.testing.assert_close(packed(x), other(x))
        packed.bfloat16()
        assert packed(x.bfloat16())[0].dtype == torch.bfloat16


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.front, self.rnn, self.head = nn.Linear(6, 10), nn.LSTM(10, 16, num_layers=2), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.rnn(self.front(x))[0])


def test_whole_model_conversion_file_and_back(tmp_path, rng):
    torch.manual_seed(1)
    model, x = Tagger(), torch.randn(4, 2, 6, generator=rng)
    parameters = dict(model.named_parameters())
    sp.sparsify_(model, pathways=NAMES)
    assert isinstance(model.rnn, sp.SparseLSTM) and len(sp.sparse_layers(model)) == 6
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    set_masks(model.eval(), rng)
    packed = sp.pack(model)
    assert isinstance(packed.rnn, sp.PackedLSTM)
    assert sp.density(packed) == sp.density(model)
    assert sp.overlap(packed).keys() == sp.overlap(model).keys() >= {"rnn.hh_l1", "total"}
    assert "two products" in sp.explain(packed.rnn, 1)
    sp.save_packed(packed, tmp_path / "m.safetensors")
    loaded = [sp.load_packed(tmp_path / "m.safetensors", start) for start in (Tagger(), model_like(model), packed)]
    back = sp.unpack_(copy.deepcopy(packed))
    assert isinstance(back.rnn, sp.SparseLSTM)
    with torch.no_grad():
        for name in NAMES:
            with sp.pathway(model, name):
                want = model(x)
            for other in (*loaded, back):
                with sp.pathway(other, name):
                    torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-5)
    assert all(isinstance(one.rnn, sp.PackedLSTM) for one in loaded)


def model_like(model):
    return sp.sparsify_(Tagger(), pathways=sp.pathways(model))


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path, rng):
    packed = sp.pack_(set_masks(sp.sparsify_(Tagger()), rng))
    sp.save_packed(packed, tmp_path / "m.safetensors")
    model = Tagger()
    model.rnn = nn.LSTM(10, 24, num_layers=2)
    with pytest.raises(sp.FormatError, match=r"layer rnn.ih_l0 is \(96, 10\), in the file \(64, 10\)"):
        sp.load_packed(tmp_path / "m.safetensors", model)
    assert type(model.rnn) is nn.LSTM and type(model.front) is nn.Linear
    model.rnn = nn.LSTM(10, 16, num_layers=3)
    with pytest.raises(sp.FormatError, match=r"sparse layer rnn.ih_l2 is not in the file"):
        sp.load_packed(tmp_path / "m.safetensors", model)


def test_pruning_moves_an_lstm(rng):
    model = sp.sparsify_(Tagger())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = sp.Pruner(model, sp.methods.gradual(sparsity=0.5, steps=4), optimizer)
    for _ in range(6):
        model(torch.randn(4, 2, 6, generator=rng)).square().sum().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert sp.density(model)["total"] == pytest.approx(0.5, abs=0.02)
    assert sp.density(model)["rnn.hh_l0"] < 1


# --- torchaudio's LSTM ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer_norm", [True, False], ids=["layer_norm", "plain"])
@pytest.mark.parametrize("hidden", [16, 21])
def test_custom_lstm_equals_its_masked_dense_form(backend, layer_norm, hidden, rng):
    torch.manual_seed(2)
    model = nn.Sequential(_CustomLSTM(10, hidden, layer_norm)).eval()
    if layer_norm:
        for norm in (model[0].g_norm, model[0].c_norm):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
    sp.sparsify_(model, pathways=NAMES)
    set_masks(model, rng)
    packed = sp.pack(model)[0]
    assert isinstance(packed, sp.PackedLayerNormLSTM)
    for name in NAMES:
        with sp.pathway(model, name), sp.pathway(packed, name), torch.no_grad():
            dense = copy.deepcopy(model)[0]
            dense.x2g, dense.p2g = dense.x2g.to_linear(), dense.p2g.to_linear()
            dense.double()
            for rows, steps in ((1, 1), (1, 5), (4, 3), (8, 1), (12, 2)):
                x = torch.randn(steps, rows, 10, generator=rng)
                state = [torch.randn(rows, hidden, generator=rng) for _ in range(2)]
                close(packed(x, state), dense(x.double(), [t.double() for t in state]))
                close(packed(x, None), dense(x.double(), None))
    for _ in range(2):  # before and after a call that prepares a shorter way
        with pytest.raises(ValueError, match="input has shape"):
            packed(torch.zeros(1, 2, 9), None)
        with pytest.raises(ValueError, match="the state"):
            packed(torch.zeros(1, 2, 10), [torch.zeros(1, hidden)] * 2)
        with torch.no_grad():
            packed(torch.zeros(1, 2, 10), None)


def test_custom_lstm_goes_back_and_through_files_without_a_new_key(tmp_path, rng):
    model = nn.Sequential(_CustomLSTM(10, 16, True)).eval()
    dense = copy.deepcopy(model)
    set_masks(sp.sparsify_(model, pathways=NAMES), rng)
    assert type(model[0]) is _CustomLSTM  # training keeps its form
    packed = sp.pack(model)
    assert {"0.x2g.values", "0.p2g.block_mask", "0.g_norm.weight"} <= set(packed.state_dict())
    assert set(sp.sparse_layers(packed)) == {"0.x2g", "0.p2g"}
    sp.save_packed(packed, tmp_path / "m.safetensors")
    loaded = sp.load_packed(tmp_path / "m.safetensors", dense)
    back = sp.unpack_(copy.deepcopy(packed))
    assert isinstance(loaded[0], sp.PackedLayerNormLSTM) and type(back[0]) is _CustomLSTM
    x = torch.randn(3, 2, 10, generator=rng)
    with torch.no_grad():
        want = model[0](x, None)
        for other in (packed, loaded, back, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            close(other[0](x, None), want)
        packed[0].c_norm.bias = nn.Parameter(torch.ones(16))
        assert not torch.allclose(packed[0](x, None)[0], want[0])


def test_an_lstm_of_which_only_a_part_is_sparse_is_left_alone(rng):
    model = nn.Sequential(_CustomLSTM(10, 16, True))
    sp.sparsify_(model, filter_fn=lambda module, name: name.endswith("x2g"))
    assert type(sp.pack_(model)[0]) is _CustomLSTM


def test_torchaudio_predictor_is_fused_and_equals_the_masked_dense_model(rng):
    models = pytest.importorskip("torchaudio.models", reason="torchaudio belongs to the asr extra")
    rnnt = models.emformer_rnnt_model(
        input_dim=80, encoding_dim=64, num_symbols=33, segment_length=16, right_context_length=4,
        time_reduction_input_dim=16, time_reduction_stride=4, transformer_num_heads=2, transformer_ffn_dim=128,
        transformer_num_layers=1, transformer_dropout=0.0, transformer_activation="gelu",
        transformer_left_context_length=8, transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True, symbol_embedding_dim=32,
        num_lstm_layers=2, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3, lstm_dropout=0.0,
    ).eval()  # fmt: skip
    set_masks(sp.sparsify_(rnnt, pathways=NAMES), rng)
    packed = sp.pack(rnnt)
    assert sum(isinstance(module, sp.PackedLayerNormLSTM) for module in packed.modules()) == 2
    for name in NAMES:
        with sp.pathway(rnnt, name), sp.pathway(packed, name), torch.no_grad():
            state = other = None
            for tokens in (torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7], [8]])):
                lengths = torch.full((2,), tokens.shape[1])
                want, _, state = rnnt.predict(tokens, lengths, state)
                got, _, other = packed.predict(tokens, lengths, other)
                close(got, want)
                close(other, state)


# --- refusals -------------------------------------------------------------------------------------------------------
def test_refusals(rng):
    for make in (
        lambda: sp.SparseLSTM(10, 16, proj_size=8),
        lambda: sp.SparseLSTM.from_lstm(nn.LSTM(10, 16, proj_size=8)),
        lambda: sp.sparsify_(nn.Sequential(nn.LSTM(10, 16, proj_size=8))),
    ):
        with pytest.raises(ValueError, match="proj_size = 8"):
            make()
    lstm = sp.SparseLSTM(10, 16, pathways=NAMES)
    with pytest.raises(KeyError, match="'ih_l1' is not known; choose one of ih_l0, hh_l0"):
        lstm.set_mask_("ih_l1", torch.ones(8, 10, dtype=torch.bool))
    with pytest.raises(KeyError, match="pathway = 'de'"):
        lstm.active = "de"
    packed = sp.pack(lstm)
    for x, hx, error, message in (
        (torch.zeros(3, 2, 9), None, ValueError, "input has shape"),
        (torch.zeros(10), None, ValueError, "input has shape"),
        (torch.zeros(3, 2, 10), (torch.zeros(1, 3, 16),) * 2, ValueError, r"hx has shapes \(1, 3, 16\)"),
        (torch.zeros(3, 2, 10).double(), None, TypeError, "input.dtype = torch.float64"),
    ):
        with torch.no_grad():
            with pytest.raises(error, match=message):
                packed(x, hx)
            packed(torch.zeros(3, 2, 10), (torch.zeros(1, 2, 16),) * 2)  # the next call takes the short way
            with pytest.raises(error, match=message):
                packed(x, hx)


def test_masks_by_weight(rng):
    lstm = sp.SparseLSTM(10, 16, pathways=NAMES)
    mask = torch.rand(8, 10, generator=rng) < 0.5
    lstm.set_mask_("ih_l0", mask, "fr")
    assert torch.equal(lstm.gates["ih_l0"].mask("fr"), mask) and lstm.gates["ih_l0"].mask("en").all()
    lstm.active = "fr"
    assert all(gate.active == "fr" for gate in lstm.gates.values()) and lstm.active == "fr"
    assert lstm.pathways == NAMES
