"""The short way from `sparse_linear` into a kernel: taken when it may be, left when it must be, and never stale."""

import copy
import gc
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.ops import backends, library, linear

pytestmark = pytest.mark.skipif(library.MISSING is not None, reason="the compiled CPU kernels are missing")


@pytest.fixture
def packed():
    torch.manual_seed(0)
    weight = torch.randn(40, 24)
    masks = {name: torch.rand(5, 24) < 0.5 for name in ("en", "fr")}
    return sp.PackedWeight.pack(weight, masks)


def dense(packed, pathway, x, bias=None):
    return torch.nn.functional.linear(x, packed.unpack(pathway), bias)


def calls(function):
    """Names of the package's operators that `function` runs."""
    with torch.profiler.profile() as recorded:
        result = function()
    return result, [e.key for e in recorded.key_averages() if e.key.startswith("sparse_pathways::")]


def test_the_second_call_is_short_and_the_same(packed):
    x, bias = torch.randn(3, 24), torch.randn(40)
    with torch.no_grad():
        first, long_way = calls(lambda: sp.sparse_linear(x, packed, bias, pathway="en"))
        second, short = calls(lambda: sp.sparse_linear(x, packed, bias, pathway="en"))
    assert "sparse_pathways::bcsr_linear" in long_way and short == ["sparse_pathways::packed_linear"]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_arguments_are_not_answered_by_the_prepared_ones(packed, mode):
    with mode():
        for _ in range(2):
            for pathway in ("en", "fr"):
                for bias in (None, torch.randn(40), torch.randn(40)):
                    for activation in (None, "relu", "tanh"):
                        for shape in ((24,), (5, 24), (2, 3, 24), (0, 24)):
                            x = torch.randn(shape)
                            residual = torch.randn(*shape[:-1], 40)
                            want = dense(packed, pathway, x, bias)
                            want = {None: lambda t: t, "relu": torch.relu, "tanh": torch.tanh}[activation](want)
                            for added in (None, residual):
                                y = sp.sparse_linear(
                                    x, packed, bias, pathway=pathway, activation=activation, residual=added
                                )
                                torch.testing.assert_close(y, want if added is None else want + added)


def test_a_bias_changed_in_place_is_seen(packed):
    x, bias = torch.randn(3, 24), torch.zeros(40)
    with torch.inference_mode():
        before = sp.sparse_linear(x, packed, bias, pathway="en")
        sp.sparse_linear(x, packed, bias, pathway="en")
        bias += 1
        torch.testing.assert_close(sp.sparse_linear(x, packed, bias, pathway="en"), before + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("pathway", [("en",), ("en", "fr")], ids=["alone", "of two"])
def test_values_changed_in_place_are_seen(packed, dtype, pathway):
    packed = sp.PackedWeight.pack(packed.unpack(), {name: packed.mask(name) for name in pathway}, dtype=dtype)
    x = torch.randn(3, 24).to(packed.x_dtype)
    with torch.no_grad():
        for _ in range(2):
            sp.sparse_linear(x, packed, pathway="en")
        packed.values.neg_()
        for _ in range(2):
            y = sp.sparse_linear(x, packed, pathway="en")
            want = torch.nn.functional.linear(x.float(), packed.unpack("en").float())
            torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.1)


def test_a_weight_packed_in_inference_mode_is_prepared():
    with torch.inference_mode():
        packed = sp.PackedWeight.pack(torch.randn(40, 24), torch.rand(5, 24) < 0.5)
        x = torch.randn(3, 24)
        first = sp.sparse_linear(x, packed)
        second, ran = calls(lambda: sp.sparse_linear(x, packed))
    assert ran == ["sparse_pathways::packed_linear"]
    torch.testing.assert_close(first, second)


def test_gradients_autocast_and_strides_take_the_long_way_or_the_right_one(packed):
    x = torch.randn(3, 24)
    with torch.no_grad():
        want = sp.sparse_linear(x, packed, pathway="en")
        transposed = torch.randn(24, 3).t()
        torch.testing.assert_close(sp.sparse_linear(transposed, packed, pathway="en"), dense(packed, "en", transposed))
        with torch.autocast("cpu", torch.bfloat16):
            assert sp.sparse_linear(x, packed, pathway="en").dtype == torch.bfloat16
    x.requires_grad_()
    y = sp.sparse_linear(x, packed, pathway="en")
    y.sum().backward()
    torch.testing.assert_close(x.grad, packed.unpack("en").sum(0).expand(3, 24))
    torch.testing.assert_close(y, want)


def test_a_forced_backend_is_not_bypassed(packed):
    x = torch.randn(3, 24)
    with torch.no_grad():
        sp.sparse_linear(x, packed, pathway="en")
        with backends.forced("reference"):
            _, ran = calls(lambda: sp.sparse_linear(x, packed, pathway="en"))
        assert ran == []
        with backends.forced("portable"):
            for _ in range(2):
                torch.testing.assert_close(sp.sparse_linear(x, packed, pathway="en"), dense(packed, "en", x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(3, 23), ValueError, "takes"),
        (torch.randn(3, 24).double(), TypeError, "x.dtype"),
        (torch.tensor(1.0), ValueError, "x has shape"),
        ([1.0], TypeError, "x is a list"),
    ],
)
def test_wrong_calls_are_worded_after_a_right_one_too(packed, x, error, message):
    with torch.no_grad():
        sp.sparse_linear(torch.randn(3, 24), packed, pathway="en")
        with pytest.raises(error, match=message):
            sp.sparse_linear(x, packed, pathway="en")
        with pytest.raises(ValueError, match="residual"):
            sp.sparse_linear(torch.randn(3, 24), packed, pathway="en", residual=torch.randn(3, 39))


def test_copies_prepare_their_own(packed):
    x = torch.randn(3, 24)
    with torch.no_grad():
        want = sp.sparse_linear(x, packed, pathway="en")
        twins = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")]
        assert all(not twin.prepared for twin in twins)
        del packed
        gc.collect()
        for twin in twins:
            for _ in range(2):
                torch.testing.assert_close(sp.sparse_linear(x, twin, pathway="en"), want)


def test_a_released_handle_is_refused(packed):
    ops = torch.ops.sparse_pathways
    with pytest.raises(RuntimeError, match="handle"):
        ops.packed_linear(torch.randn(3, 24), 0)


def kinds_of_overlap():
    half = torch.arange(5 * 24).view(5, 24) % 2 == 0
    left = torch.zeros(5, 24, dtype=torch.bool)
    left[:, :12] = True
    return {
        "some shared": (half, left),
        "nothing shared": (half, ~half),
        "one within the other": (left, left & half),
        "one empty": (left, torch.zeros_like(left)),
        "the same": (half, half),
        "three": (half, left, half | left),
    }


@pytest.mark.parametrize("overlap", kinds_of_overlap())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_shared_and_own_blocks_make_the_pathway(overlap, dtype, rows):
    torch.manual_seed(0)
    masks = dict(zip("abc", kinds_of_overlap()[overlap], strict=False))
    packed = sp.PackedWeight.pack(torch.randn(40, 24), masks, dtype=dtype)
    x = torch.randn(rows, 24).to(packed.x_dtype)
    bias, residual = torch.randn(40).to(x.dtype), torch.randn(rows, 40).to(x.dtype)
    for _ in range(2):
        for pathway in packed.pathways:
            with torch.no_grad():
                y = sp.sparse_linear(x, packed, bias, pathway=pathway, activation="silu", residual=residual)
            sums = torch.nn.functional.linear(x.double(), packed.unpack(pathway).double(), bias.double())
            want = torch.nn.functional.silu(sums) + residual
            # int8: x is rounded to 127 steps of its largest value in the row, 24 products.
            step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.int8: 0.02}[dtype]
            assert ((y.double() - want).abs() <= step * (10 + sums.abs() + residual.abs())).all()


def test_a_pathway_does_not_read_the_blocks_of_another():
    masks = dict(zip("ab", kinds_of_overlap()["some shared"], strict=True))
    weight = torch.randn(40, 24)
    only_b = sp.expand_mask(masks["b"] & ~masks["a"], (8, 1), (40, 24))
    packed = sp.PackedWeight.pack(torch.where(only_b, float("nan"), weight), masks)
    with torch.no_grad():
        for _ in range(2):
            assert sp.sparse_linear(torch.randn(3, 24), packed, pathway="a").isfinite().all()
            assert sp.sparse_linear(torch.randn(3, 24), packed, pathway="b").isnan().any()


# --- what others do to a weight between two calls ------------------------------------------------------------------
@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.int8], ids=str)
def warm(request):
    """A module after its first calls, an input, and a function for what it should give."""
    torch.manual_seed(0)
    packed = sp.PackedWeight.pack(torch.randn(64, 48), torch.rand(8, 48) < 0.5, dtype=request.param)
    module, x = sp.PackedLinear(packed, torch.randn(64)), torch.randn(3, 48).to(packed.x_dtype)
    with torch.no_grad():
        module(x), module(x)

    def expected():
        return torch.nn.functional.linear(x, module.packed.unpack().to(x.dtype), module.bias)

    tolerance = dict(rtol=0.05, atol=0.3) if request.param is not torch.float32 else {}
    return module, x, lambda y: torch.testing.assert_close(y, expected(), **tolerance)


def moved_to_shared_memory(module):
    ForkingPickler.dumps(module)


def moved_by_data(module):
    module.packed.values.data = module.packed.values.data.clone()


def other_values(module):
    module.packed.values = module.packed.values.clone().mul_(2)


def other_scale(module):
    if module.packed.scale is not None:
        module.packed.scale.data = module.packed.scale.data * 3


def other_bias(module):
    module.bias.data = torch.randn_like(module.bias)


def parameter_for_bias(module):
    module.bias = torch.nn.Parameter(torch.randn_like(module.bias))


@pytest.mark.parametrize(
    "change",
    [moved_to_shared_memory, moved_by_data, other_values, other_scale, other_bias, parameter_for_bias],
    ids=lambda change: change.__name__,
)
def test_memory_that_moves_is_followed(warm, change):
    module, x, check = warm
    change(module)
    with torch.no_grad():
        for _ in range(2):
            check(module(x))


def test_a_state_is_copied(warm):
    module, x, _ = warm
    other = copy.deepcopy(module)
    module.load_state_dict(other.state_dict())
    with torch.no_grad():
        before = module(x)
        other.packed.values.zero_()
        assert torch.equal(module(x), before)


@pytest.mark.parametrize(
    "bias", [torch.ones(3), torch.ones(40).double(), torch.arange(80.0)[::2], torch.ones(1).expand(40), torch.ones(0)]
)
def test_a_bias_that_became_another_is_looked_at(packed, bias):
    x, own = torch.randn(2, 24), torch.zeros(40)
    with torch.no_grad():
        for _ in range(2):
            sp.sparse_linear(x, packed, own, pathway="en")
        own.data = bias
        if bias.shape == (40,) and bias.dtype == torch.float32:
            torch.testing.assert_close(sp.sparse_linear(x, packed, own, pathway="en"), dense(packed, "en", x, bias))
        else:
            with pytest.raises(ValueError, match="bias is torch"):
                sp.sparse_linear(x, packed, own, pathway="en")


@pytest.mark.parametrize("shape", [(40, 2), (80,), (4, 20)])
def test_a_residual_of_another_shape_is_refused_also_later(packed, shape):
    x = torch.randn(2, 24)
    with torch.no_grad():
        for _ in range(2):
            sp.sparse_linear(x, packed, pathway="en", residual=torch.zeros(2, 40))
        with pytest.raises(ValueError, match="residual is torch"):
            sp.sparse_linear(x, packed, pathway="en", residual=torch.zeros(shape))


def test_gradients_wanted_later_are_given(packed):
    x, bias = torch.randn(2, 24), torch.zeros(40)
    sp.sparse_linear(x, packed, bias, pathway="en"), sp.sparse_linear(x, packed, bias, pathway="en")
    bias.requires_grad_()
    sp.sparse_linear(x, packed, bias, pathway="en").sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((40,), 2.0))
    packed.values.requires_grad_()
    assert sp.sparse_linear(x, packed, None, pathway="en").requires_grad


def test_forward_derivatives_are_those_of_a_dense_product(packed):
    x, tangent = torch.randn(2, 24), torch.randn(2, 24)
    for _ in range(2):
        _, got = torch.func.jvp(lambda t: sp.sparse_linear(t, packed, pathway="en"), (x,), (tangent,))
        torch.testing.assert_close(got, dense(packed, "en", tangent))
        with torch.no_grad():
            sp.sparse_linear(x, packed, pathway="en")


def test_vmap_over_the_bias(packed):
    x, biases = torch.randn(3, 24), torch.randn(2, 40)
    got = torch.func.vmap(lambda b: sp.sparse_linear(x, packed, b, pathway="en"))(biases)
    torch.testing.assert_close(got, torch.stack([dense(packed, "en", x, b) for b in biases]))


@pytest.mark.parametrize("case", ["gradient", "residual", "strided bias", "inference"])
def test_a_weight_is_prepared_once_or_not_at_all(packed, monkeypatch, case):
    made = []
    real = linear.prepare
    monkeypatch.setattr(linear, "prepare", lambda *args: made.append(args) or real(*args))
    x, bias, residual = torch.randn(2, 24), torch.randn(40), None
    if case == "gradient":
        x.requires_grad_()
    elif case == "residual":
        residual = torch.randn(2, 40)
    elif case == "strided bias":
        bias = torch.randn(80)[::2]
    for _ in range(5):
        sp.sparse_linear(x, packed, bias, pathway="en", residual=residual)
    assert len(made) == (0 if case in ("gradient", "strided bias") else 1)


SAVED = """
import sys, torch
import sparse_pathways
x = torch.load(sys.argv[2])
torch.save(torch.jit.load(sys.argv[1])(x), sys.argv[3])
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
@pytest.mark.parametrize("calls", [0, 2], ids=["cold", "warm"])
def test_a_trace_serves_another_process(packed, tmp_path, calls):
    module, x = sp.PackedLinear(packed, torch.randn(40)), torch.randn(2, 24)
    with torch.no_grad():
        for _ in range(calls):
            module(x)
        torch.jit.trace(module, x, check_trace=False).save(tmp_path / "model.pt")
        torch.save(x, tmp_path / "x")
        paths = [str(tmp_path / name) for name in ("model.pt", "x", "y")]
        subprocess.run([sys.executable, "-c", SAVED, *paths], check=True, timeout=100)
        torch.testing.assert_close(torch.load(tmp_path / "y"), module(x))


@pytest.mark.parametrize("name", ["bias", "residual"])
def test_what_is_no_tensor_is_named(packed, name):
    x = torch.randn(2, 24)
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name} is a float; want a Tensor or None"):
            sp.sparse_linear(x, packed, pathway="en", **{name: 1.0})
        sp.sparse_linear(x, packed, pathway="en")
