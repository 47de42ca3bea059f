"""The call past torch's dispatcher: the operator's numbers, and the operator itself wherever anybody else has a say."""

import ctypes
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_pathways as sp
from sparse_pathways.ops import direct, library
from sparse_pathways.ops.prepared import packed_linear

X = torch.zeros(1)

pytestmark = pytest.mark.skipif(library.MISSING is not None, reason="the compiled CPU kernels are missing")
built = pytest.mark.skipif(direct.MISSING is not None, reason=f"no direct calls: {direct.MISSING}")


class Operator:
    """Stands in for the way through the operator and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return direct.through_operator(*args)


@pytest.fixture
def operator():
    """What the direct call turns to, counted."""
    stand_in = Operator()
    bind = direct.linear.__self__.bind
    bind(torch.ops.sparse_pathways.direct_calls(), stand_in)
    yield stand_in
    bind(torch.ops.sparse_pathways.direct_calls(), direct.through_operator)


def linear(x, handle, residual=None, values=X, bias=None, version=None, call=direct.linear):
    """A direct call; `values` [1] whose version is not looked at, if no others are given."""
    return call(x, handle, residual, values, bias, version, values.data_ptr())


def pack(dtype=torch.float32, pathways=1, with_bias=True):
    """A weight 40 x 24 and the handle of its first pathway."""
    torch.manual_seed(0)
    masks = {f"p{i}": torch.rand(5, 24) < 0.5 for i in range(pathways)}
    packed = sp.PackedWeight.pack(torch.randn(40, 24), masks, dtype=dtype)
    with torch.no_grad():
        bias = torch.randn(40).to(packed.x_dtype) if with_bias else None
        sp.sparse_linear(torch.randn(1, 24).to(packed.x_dtype), packed, bias, pathway="p0")
    return packed, bias


@built
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 9, 24), (0, 24), (1,) * 7 + (24,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize("pathways", [1, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_is_the_operator_bit_for_bit(operator, shape, dtype, pathways, mode):
    packed, bias = pack(dtype, pathways)
    handle = packed.prepared["p0"].handle
    x = torch.randn(shape).to(packed.x_dtype)
    residual = torch.randn(*shape[:-1], 40).to(packed.x_dtype)
    with mode():
        for rest in ((), (None,), (residual,)):
            got, want = linear(x, handle, *rest, bias=bias), packed_linear(x, handle, *rest)
            assert operator.calls == 0
            assert torch.equal(got, want) and got.dtype == want.dtype and got.stride() == want.stride()
            assert got.is_inference() == want.is_inference() and not got.requires_grad


@built
def test_sparse_linear_takes_it(operator):
    packed, bias = pack()
    x = torch.randn(2, 24)
    with torch.no_grad():
        y = sp.sparse_linear(x, packed, bias, pathway="p0")
    assert operator.calls == 0
    torch.testing.assert_close(y, torch.nn.functional.linear(x, packed.unpack("p0"), bias))
    with torch.profiler.profile(), torch.no_grad():
        sp.sparse_linear(x, packed, bias, pathway="p0")
    assert operator.calls == 1


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


@built
def test_the_operator_serves_what_others_watch(operator):
    packed, bias = pack()
    handle = packed.prepared["p0"].handle
    x = torch.randn(2, 24)
    want = packed_linear(x, handle)
    with torch.no_grad():
        for call in (
            lambda: linear(x.as_subclass(Own), handle, bias=bias).as_subclass(torch.Tensor),
            lambda: linear(x.T.contiguous().T, handle, bias=bias),
            lambda: linear(torch._neg_view(-x), handle, bias=bias),
        ):
            before = operator.calls
            torch.testing.assert_close(call(), want)
            assert operator.calls == before + 1
        for watcher in (Functions(), torch.profiler.profile()):
            with watcher:
                before = operator.calls
                torch.testing.assert_close(linear(x, handle, bias=bias), want)
                assert operator.calls == before + 1


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
@pytest.mark.parametrize("call", [direct.linear, direct.through_operator], ids=["direct", "operator"])
def test_no_handle_comes_into_what_others_keep(call):
    """A trace, or a mode's record, would outlive the handle: they get no answer, and `sparse_linear` the long way."""
    packed, bias = pack()
    handle = packed.prepared["p0"].handle
    x = torch.randn(2, 24)
    want = sp.sparse_linear(x, packed, bias, pathway="p0")
    with torch.no_grad():
        with Dispatches() as mode:
            assert linear(x, handle, call=call) is None
            torch.testing.assert_close(sp.sparse_linear(x, packed, bias, pathway="p0"), want)
            assert torch.ops.sparse_pathways.bcsr_linear.default in mode.seen and packed_linear not in mode.seen
        traced = torch.jit.trace(lambda t: sp.sparse_linear(t, packed, bias, pathway="p0"), x, check_trace=False)
        assert "bcsr_linear" in str(traced.graph) and "packed_linear" not in str(traced.graph)
        torch.testing.assert_close(traced(x), want)
        assert linear(x, handle, call=call) is not None


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (lambda x, handle: (x.double(), handle), "values and x differ in dtype"),
        (lambda x, handle: (x[:, :9].contiguous(), handle), r"x must be \[\.\.\., 24\]"),
        (lambda x, handle: (x, handle, x), "residual must be contiguous"),
        (lambda x, handle: (x, handle, torch.zeros(40, 2)), "residual must be contiguous, of x's dtype and y's shape"),
        (lambda x, handle: (x, 0), "handle is not of a prepared weight"),
        (lambda x, handle: (None, handle), "no tensor arguments|NoneType"),
    ],
    ids=["dtype", "columns", "residual", "residual's shape", "handle", "None"],
)
def test_bad_arguments_are_refused_in_the_operators_words(args, reason):
    packed, _ = pack()
    args = args(torch.randn(2, 24), packed.prepared["p0"].handle)
    for call in (direct.linear, direct.through_operator):
        with torch.no_grad(), pytest.raises((RuntimeError, AttributeError), match=reason):
            linear(*args, call=call)


def test_too_few_arguments():
    with pytest.raises(TypeError, match="missing 4 required positional arguments"):
        direct.linear(X, 0, None)


@built
@pytest.mark.parametrize("number", [2**80, 1.5, None])
def test_numbers_that_are_none(number):
    packed, _ = pack()
    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        linear(torch.randn(2, 24), number)
    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        if direct.linear(torch.randn(2, 24), packed.prepared["p0"].handle, None, X, None, "a", X.data_ptr()) is None:
            raise TypeError("a version that is no number is another one")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("call", [direct.linear, direct.through_operator], ids=["direct", "operator"])
def test_no_answer_where_it_would_be_wrong(call):
    packed, _ = pack(with_bias=False)
    handle, x = packed.prepared["p0"].handle, torch.randn(2, 24)
    wants, bias = x.clone().requires_grad_(), torch.randn(40, requires_grad=True)
    residual = torch.randn(2, 40)

    def answers(*args, **named):
        return linear(*args, **named, call=call) is not None

    values = torch.zeros(3)
    assert answers(x, handle, None, values, version=0)
    values += 1
    assert not answers(x, handle, None, values, version=0) and answers(x, handle, None, values, version=1)
    assert call(x, handle, None, values, None, 1, X.data_ptr()) is None  # moved
    wanted = torch.zeros(3, requires_grad=True)
    assert not answers(wants, handle) and not answers(x, handle, bias=bias) and not answers(x, handle, values=wanted)
    assert answers(x, handle, residual) and not answers(x, handle, residual.clone().requires_grad_())
    with torch.no_grad():
        assert answers(wants, handle) and answers(x, handle, bias=bias) and answers(x, handle, values=wanted)
        with forward_ad.dual_level():
            assert not answers(forward_ad.make_dual(x, x), handle)


@built
def test_nothing_is_kept(operator):
    packed, bias = pack()
    handle = packed.prepared["p0"].handle
    x, residual = torch.randn(2, 24), torch.randn(2, 40)
    counts = sys.getrefcount(x), sys.getrefcount(residual), sys.getrefcount(handle)
    with torch.no_grad():
        for _ in range(50):
            y = linear(x, handle, residual, bias=bias)
            linear(x.T.contiguous().T, handle, bias=bias)
    assert (sys.getrefcount(x), sys.getrefcount(residual), sys.getrefcount(handle)) == counts
    assert sys.getrefcount(y) == 2
    assert operator.calls == 50


@built
def test_a_long_product_lets_other_threads_run():
    """The interpreter's lock is released: a counter in Python goes on while a product of some 100 ms runs."""
    packed = sp.PackedWeight.pack(torch.randn(2048, 2048), torch.ones(256, 2048, dtype=torch.bool))
    x, counted, stop = torch.randn(1024, 2048), [0], threading.Event()

    def count():
        while not stop.wait(0.001):
            counted[0] += 1

    with torch.no_grad():
        sp.sparse_linear(x, packed)
        handle = packed.prepared[None].handle
        thread = threading.Thread(target=count)
        thread.start()
        try:
            before = counted[0]
            linear(x, handle)
            after = counted[0]
        finally:
            stop.set()
            thread.join()
    assert after > before + 3


@built
def test_kernels_of_another_build_are_refused():
    other = ctypes.c_uint64(0)
    with pytest.raises(ImportError, match="reinstall the package"):
        direct.linear.__self__.bind(ctypes.addressof(other), direct.through_operator)


def test_without_it_the_operator_is_called_and_the_reason_said(monkeypatch, tmp_path):
    monkeypatch.setattr(direct, "PATH", tmp_path / "libsparse_pathways_direct-9.9.so")
    call, missing = direct._load()
    assert call is direct.through_operator and missing.startswith(f"not built for torch {torch.__version__}")
    direct.PATH.write_bytes(b"no library")
    call, missing = direct._load()
    assert call is direct.through_operator and "does not load" in missing
