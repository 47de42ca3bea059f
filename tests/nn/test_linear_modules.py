import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparse_pathways as sp


def masked(layer, name):
    return torch.where(sp.expand_mask(layer.masks[name], layer.block, tuple(layer.weight.shape)), layer.weight, 0)


def random_layer(rng, block=(8, 1), names=("en", "fr"), bias=True):
    layer = sp.SparseLinear(29, 37, bias, block=block, pathways=names)
    for name in names:
        layer.set_mask_(torch.rand(layer.masks[name].shape, generator=rng) < 0.4, name)
    return layer


def test_starts_as_the_dense_layer():
    dense = nn.Linear(29, 37)
    layer = sp.SparseLinear.from_linear(dense, block=(4, 4), pathways=("en", "fr"))
    x = torch.randn(5, 29)
    assert layer.weight is dense.weight and layer.bias is dense.bias
    assert torch.equal(layer(x), dense(x))
    assert all(mask.all() for mask in layer.masks.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [(8, 1), (4, 4)], ids=str)
def test_forward_uses_the_active_pathway_and_to_linear_agrees(block, bias, rng):
    layer, x = random_layer(rng, block, bias=bias), torch.randn(2, 3, 29)
    for name in ("en", "fr"):
        layer.active = name
        expected = nn.functional.linear(x, masked(layer, name), layer.bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.to_linear()(x), expected)


def test_state_dict_keys_and_dense_checkpoints(rng):
    layer = random_layer(rng)
    assert set(layer.state_dict()) == {"weight", "bias", "block_mask", "mask_layout"}
    assert layer.block_mask.dtype == torch.uint8 and layer.block_mask.shape == (2, -(-5 * 29 // 8))
    other = sp.SparseLinear(29, 37, pathways=("en", "fr"))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 29)
    assert torch.equal(other(x), layer(x))
    with pytest.warns(UserWarning, match="masks stay as they are"):
        other.load_state_dict(nn.Linear(29, 37).state_dict())
    assert torch.equal(other.masks["en"], layer.masks["en"])
    with pytest.raises(RuntimeError, match="are of the pathways en, fr; this layer has default"):
        sp.SparseLinear(29, 37).load_state_dict(layer.state_dict())


def test_masks_of_other_blocks_or_pathways_are_refused(rng):
    """Bits alone would fit: (8, 1) and (1, 8) of a square weight have equally many blocks."""
    layer = nn.Sequential(sp.SparseLinear(16, 16, block=(8, 1), pathways=("en", "fr")))
    layer[0].set_mask_(torch.rand(2, 16, generator=rng) < 0.5, "en")
    state = layer.state_dict()
    for block, names, reason in [
        ((1, 8), ("en", "fr"), r"0: the masks loaded are of blocks \(8, 1\), those of this layer of \(1, 8\)"),
        ((8, 1), ("fr", "en"), "0: the masks loaded are of the pathways en, fr; this layer has fr, en"),
    ]:
        other = nn.Sequential(sp.SparseLinear(16, 16, block=block, pathways=names))
        with pytest.raises(RuntimeError, match=reason):
            other.load_state_dict(state)
        assert other[0].mask("en").all() and other[0].mask("fr").all()
    same = nn.Sequential(sp.SparseLinear(16, 16, block=(8, 1), pathways=("en", "fr")))
    older = {key: value for key, value in state.items() if "mask_layout" not in key}
    for given in (state, older, {key: value.float() for key, value in state.items()}):
        same.load_state_dict(given)
        assert torch.equal(same[0].mask("en"), layer[0].mask("en"))
        assert torch.equal(same[0].mask_layout, layer[0].mask_layout)
    same[0].add_pathway_("it")
    with pytest.raises(RuntimeError, match="are of the pathways en, fr; this layer has en, fr, it"):
        same.load_state_dict(state)
    with torch.device("meta"):
        empty = nn.Sequential(sp.SparseLinear(16, 16, block=(8, 1), pathways=("en", "fr")))
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty[0].mask_layout, layer[0].mask_layout)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(clone, rng):
    layer, x = random_layer(rng), torch.randn(3, 29)
    before = layer(x)
    other = clone(layer)
    assert torch.equal(other(x), before)
    other.set_mask_(~other.masks["en"], "en")
    assert torch.equal(layer(x), before) and not torch.equal(other(x), before)


def test_torch_save_round_trip(rng):
    layer, x = random_layer(rng), torch.randn(3, 29)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m])
@pytest.mark.parametrize("sets", [0, 1, 2, 3])
def test_mask_changed_through_the_buffer_is_seen(sets, clone, rng):
    """EMA and DDP write into the buffer without calling set_mask_."""
    layer, x = random_layer(rng), torch.randn(3, 29)
    for _ in range(sets):
        layer.set_mask_(torch.rand(5, 29, generator=rng) < 0.4, "fr")
    layer = clone(layer)
    for _ in range(4):
        other = random_layer(rng)
        with torch.no_grad():
            layer.block_mask.copy_(other.block_mask)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, masked(layer, "en"), layer.bias))
        assert torch.equal(layer.masks["en"], other.masks["en"])


def test_functional_call_uses_the_masks_it_is_given(rng):
    layer, other, x = random_layer(rng), random_layer(rng), torch.randn(3, 29)
    before = layer(x)
    assert torch.equal(torch.func.functional_call(layer, dict(other.state_dict()), (x,)), other(x))
    assert torch.equal(layer(x), before)


def test_masks_set_under_inference_mode_can_be_trained_on(rng):
    layer = sp.SparseLinear(29, 37)
    with torch.inference_mode():
        layer.set_mask_(torch.rand(5, 29) < 0.4)
    layer(torch.randn(3, 29)).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_packed_in_another_dtype_works_with_its_bias(dtype, rng):
    layer = random_layer(rng)
    packed = sp.pack(layer, dtype)
    x = torch.randn(3, 29).to(packed.packed.x_dtype)
    error = (packed(x).double() - layer(x.float()).double()).abs().max()
    assert error < {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.int8: 0.1}[dtype]
    if dtype == torch.int8:
        # Scales and bias stay float32. Two pathways are two sums on the prepared way, one on the first call.
        torch.testing.assert_close(packed.to(torch.bfloat16)(x), packed(x))


def test_state_dict_of_a_packed_layer_carries_its_weights(rng):
    first, second = (sp.pack(random_layer(rng)) for _ in range(2))
    x = torch.randn(3, 29)
    second.load_state_dict(first.state_dict())
    for name in ("en", "fr"):
        first.active = second.active = name
        assert torch.equal(second(x), first(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*values"):
        second.load_state_dict({"bias": torch.zeros(37)})
    with pytest.raises(RuntimeError, match="masks keep"):
        second.load_state_dict({**first.state_dict(), "values": torch.zeros(3, 1, 8)})


def test_nan_in_pruned_weights_does_not_reach_output_or_gradients(rng):
    layer, x = random_layer(rng), torch.randn(3, 29, requires_grad=True)
    with torch.no_grad():
        layer.weight[~sp.expand_mask(layer.masks["en"], (8, 1), (37, 29))] = float("nan")
    y = layer(x)
    y.sum().backward()
    for tensor in (y, x.grad, layer.weight.grad, layer.bias.grad):
        assert torch.isfinite(tensor).all()
    assert torch.isfinite(sp.PackedLinear(layer.pack())(x)).all()


def test_meta_device_and_moves(rng):
    with torch.device("meta"):
        layer = sp.SparseLinear(29, 37)
    assert layer(torch.zeros(3, 29, device="meta")).shape == (3, 37)
    dense = copy.deepcopy(layer)
    with pytest.warns(UserWarning, match="masks stay"):
        dense.load_state_dict(nn.Linear(29, 37).state_dict(), assign=True)
    assert dense.masks["default"].all() and dense.masks["default"].device.type == "cpu"
    layer = layer.to_empty(device="cpu")
    source = random_layer(rng, names=("default",))
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 29)
    assert torch.equal(layer(x), source(x))
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.set_mask_(torch.ones(5, 29, dtype=torch.bool), "de"), KeyError, "choose one of en, fr"),
        (lambda s: s.set_mask_(torch.ones(5, 28, dtype=torch.bool)), ValueError, r"needs the grid \(5, 29\)"),
        (lambda s: s(torch.zeros(3, 28)), ValueError, "x has shape"),
        (lambda s: s(torch.zeros(3, 29).double()), TypeError, "x.dtype"),
        (lambda s: sp.SparseLinear(4, 8, pathways="en"), TypeError, "want a sequence of names"),
        (lambda s: sp.SparseLinear(4, 8, pathways=("en", "en")), ValueError, "must be distinct"),
        (lambda s: sp.SparseLinear(4, 8, block=(0, 1)), ValueError, "block = "),
    ],
    ids=["name", "grid", "shape", "dtype", "string", "twice", "block"],
)
def test_bad_arguments(call, error, message, rng):
    with pytest.raises(error, match=message):
        call(random_layer(rng))


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_without_graph_breaks(training, rng):
    layer = random_layer(rng)
    model = layer if training else sp.PackedLinear(layer.pack(), layer.bias)
    x = torch.randn(3, 29, requires_grad=training)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    if training:
        (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (eager,) = torch.autograd.grad(model(x).square().sum(), x)
        torch.testing.assert_close(ours, eager)


def test_states_pass_through_what_wraps_a_model(rng):
    """Distributed checkpoints map the keys of parameters and buffers, and nothing else."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = (sp.sparsify_(nn.Sequential(nn.Linear(16, 16)), (8, 1), ("en", "fr")) for _ in range(2))
    model[0].set_mask_(torch.rand(2, 16, generator=rng) < 0.5, "en")
    state = get_model_state_dict(torch.compile(model))
    set_model_state_dict(torch.compile(other), state)
    assert torch.equal(other[0].mask("en"), model[0].mask("en"))
