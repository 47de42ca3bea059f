"""The call past torch's dispatcher: the operator's numbers, and the operator itself wherever anybody else has a say."""

import ctypes
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_pathways as sp
from sparse_pathways.ops import direct
from sparse_pathways.ops.prepared import packed_linear

X = torch.zeros(1)

pytestmark = pytest.mark.skipif(direct.MISSING is not None, reason=f"no direct calls: {direct.MISSING}")


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


def linear(x, handle, residual=None, values=X, version=None, trains=False, call=direct.linear):
    """A direct call; `values` [1] whose version is not looked at, if no others are given."""
    return call(x, handle, residual, values, version, trains)


def pack(dtype=torch.float32, pathways=1):
    """A weight 40 x 24 and the handle of its first pathway."""
    torch.manual_seed(0)
    masks = {f"p{i}": torch.rand(5, 24) < 0.5 for i in range(pathways)}
    packed = sp.PackedWeight.pack(torch.randn(40, 24), masks, dtype=dtype)
    with torch.no_grad():
        bias = torch.randn(40).to(packed.x_dtype)
        sp.sparse_linear(torch.randn(1, 24).to(packed.x_dtype), packed, bias, pathway="p0")
    return packed, bias


@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 9, 24), (0, 24), (1,) * 7 + (24,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize("pathways", [1, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_is_the_operator_bit_for_bit(operator, shape, dtype, pathways, mode):
    packed, _ = pack(dtype, pathways)
    handle = packed.prepared["p0"].handle
    x = torch.randn(shape).to(packed.x_dtype)
    residual = torch.randn(*shape[:-1], 40).to(packed.x_dtype)
    with mode():
        for rest in ((), (None,), (residual,)):
            got, want = linear(x, handle, *rest), packed_linear(x, handle, *rest)
            assert operator.calls == 0
            assert torch.equal(got, want) and got.dtype == want.dtype and got.stride() == want.stride()
            assert got.is_inference() == want.is_inference() and not got.requires_grad


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_the_operator_serves_what_others_may_watch_or_change(operator):
    packed, _ = pack()
    handle = packed.prepared["p0"].handle
    x = torch.randn(2, 24)
    want = packed_linear(x, handle)
    served = []

    def served_by_operator(what, call):
        before = operator.calls
        y = call()
        served.append((what, operator.calls - before))
        torch.testing.assert_close(torch.as_tensor(y), want)

    with torch.no_grad():
        with Functions():
            served_by_operator("function mode", lambda: linear(x, handle))
        with Dispatches() as mode:
            served_by_operator("dispatch mode", lambda: linear(x, handle))
            assert packed_linear in mode.seen
        with torch.profiler.profile():
            served_by_operator("profiler", lambda: linear(x, handle))
        served_by_operator("subclass", lambda: linear(x.as_subclass(Own), handle).as_subclass(torch.Tensor))
        served_by_operator("strides", lambda: linear(x.T.contiguous().T, handle))
        served_by_operator("lazy negation", lambda: linear(torch._neg_view(-x), handle))
        served_by_operator("trace", lambda: torch.jit.trace(lambda t: linear(t, handle), x, check_trace=False)(x))
    assert [what for what, calls in served if calls < 1] == []


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (lambda x, handle: (x.double(), handle), "values and x differ in dtype"),
        (lambda x, handle: (x[:, :9].contiguous(), handle), r"x must be \[\.\.\., 24\]"),
        (lambda x, handle: (x, handle, x), "residual must be contiguous"),
        (lambda x, handle: (x, 0), "handle is not of a prepared weight"),
        (lambda x, handle: (None, handle), "'NoneType' object has no attribute 'requires_grad'"),
    ],
    ids=["dtype", "columns", "residual", "handle", "None"],
)
def test_bad_arguments_are_refused_in_the_operators_words(args, reason):
    packed, _ = pack()
    args = args(torch.randn(2, 24), packed.prepared["p0"].handle)
    for call in (direct.linear, direct.through_operator):
        with torch.no_grad(), pytest.raises((RuntimeError, AttributeError), match=reason):
            linear(*args, call=call)


def test_too_few_arguments():
    with pytest.raises(TypeError, match="missing 3 required positional arguments"):
        direct.linear(X, 0, None)


@pytest.mark.parametrize("call", [direct.linear, direct.through_operator], ids=["direct", "operator"])
def test_no_answer_where_it_would_be_wrong(call):
    packed, _ = pack()
    handle, x = packed.prepared["p0"].handle, torch.randn(2, 24)
    wants = x.clone().requires_grad_()
    residual = torch.randn(2, 40)

    def answers(*args, **named):
        return linear(*args, **named, call=call) is not None

    values = torch.zeros(3)
    assert answers(x, handle, None, values, 0)
    values += 1
    assert not answers(x, handle, None, values, 0) and answers(x, handle, None, values, 1)
    assert not answers(wants, handle) and not answers(x, handle, trains=True) and not answers(x, handle, residual)
    with torch.no_grad():
        assert answers(wants, handle) and answers(x, handle, trains=True) and answers(x, handle, residual)


def test_nothing_is_kept(operator):
    packed, _ = pack()
    handle = packed.prepared["p0"].handle
    x, residual = torch.randn(2, 24), torch.randn(2, 40)
    counts = sys.getrefcount(x), sys.getrefcount(residual), sys.getrefcount(handle)
    with torch.no_grad():
        for _ in range(50):
            y = linear(x, handle, residual)
            linear(x.T.contiguous().T, handle)
    assert (sys.getrefcount(x), sys.getrefcount(residual), sys.getrefcount(handle)) == counts
    assert sys.getrefcount(y) == 2
    assert operator.calls == 50


def test_a_long_product_lets_other_threads_run():
    """The interpreter's lock is released: a counter in Python goes on while a product of some 100 ms runs."""
    import threading

    packed = sp.PackedWeight.pack(torch.randn(2048, 2048), torch.ones(256, 2048, dtype=torch.bool))
    x, counted, stop = torch.randn(1024, 2048), [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    with torch.no_grad():
        sp.sparse_linear(x, packed)
        handle = packed.prepared[None].handle
        interval = sys.getswitchinterval()
        sys.setswitchinterval(10.0)  # only a call that releases the lock gives way
        thread = threading.Thread(target=count)
        try:
            thread.start()
            before = counted[0]
            linear(x, handle)
            after = counted[0]
        finally:
            stop.set()
            sys.setswitchinterval(interval)
            thread.join()
    assert after > before


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
