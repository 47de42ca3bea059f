import pytest
import torch
from torch.library import opcheck

import sparse_pathways as sp
from sparse_pathways.ops import backends, library
from sparse_pathways.ops.lstm import Norm, Prepared, Weight, kernel_name, sparse_lstm

ROWS = [*range(1, 10), 17]
BLOCKS = [(8, 1), (16, 1), (8, 4), (16, 16), (4, 4), (3, 5)]
EPS = torch.finfo(torch.float32).eps
FUNCTION = 4 * EPS  # error of one sigmoid or tanh, relative to its largest value, 1


def make_weight(hidden, inputs, block, rng, pathways=("default",), density=0.3, structured=False):
    """(packed, {pathway: dense}); pruned weights are NaN or Inf, one block row is empty, one full."""
    shape, grid = (4 * hidden, inputs), (-(-4 * hidden // block[0]), -(-inputs // block[1]))
    masks = {}
    for name in pathways:
        mask = torch.rand(grid, generator=rng) < density
        if structured:  # whole inputs and a run of outputs are gone, as in trained masks
            mask = (torch.rand(1, grid[1], generator=rng) < 0.7).expand(grid).clone()
            mask[grid[0] // 3 : grid[0] // 2] = False
        mask[0], mask[-1] = False, True
        masks[name] = mask
    weight = torch.randn(shape, generator=rng) / inputs**0.5
    kept = {name: sp.expand_mask(mask, block, shape) for name, mask in masks.items()}
    bad = torch.where(torch.rand(shape, generator=rng) < 0.5, float("nan"), float("inf"))
    union = torch.stack(list(kept.values())).any(0)
    packed = sp.PackedWeight.pack(torch.where(union, weight, bad), masks, block)
    return packed, {name: torch.where(one, weight, 0) for name, one in kept.items()}


def make_norm(hidden, rng):
    weights = [1 + 0.3 * torch.randn(n, generator=rng) for n in (4 * hidden, hidden)]
    biases = [0.3 * torch.randn(n, generator=rng) for n in (4 * hidden, hidden)]
    return Norm(weights[0], biases[0], weights[1], biases[1], 1e-5, 1e-3)


def normalised(value, error, weight, bias, eps):
    """LayerNorm in float64 and the first-order bound of its error: of the input, and of its own sums."""
    value, size = value.double(), value.shape[-1]
    centred = value - value.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    z = centred / deviation
    error = error + size * EPS * value.abs().mean(-1, keepdim=True)
    shift = error + error.mean(-1, keepdim=True) + z.abs() * error.square().mean(-1, keepdim=True).sqrt()
    result = z * weight.double() + bias.double()
    own = (size + 8) * EPS * z.abs() * weight.double().abs() + 2 * EPS * (result.abs() + bias.double().abs())
    return result, weight.double().abs() * shift / deviation + own


def oracle(x, h, c, w_ih, w_hh, b_ih, b_hh, norm=None, reverse=False):
    """float64: (y, h, c) and the first-order bounds of their fp32 errors, carried from step to step."""
    w_ih, w_hh, b_ih, b_hh, h, c = (t.double() for t in (w_ih, w_hh, b_ih, b_hh, h, c))
    bias, bias_size = b_ih + b_hh, b_ih.abs() + b_hh.abs()
    dh, dc, steps = torch.zeros_like(h), torch.zeros_like(c), {}
    count = x.shape[-1] + h.shape[-1] + 8
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        now = x[t].double()
        gates = now @ w_ih.T + h @ w_hh.T + bias
        size = now.abs() @ w_ih.abs().T + h.abs() @ w_hh.abs().T + bias_size
        error = count * EPS * size + dh @ w_hh.abs().T
        if norm is not None:
            gates, error = normalised(gates, error, norm.g_weight, norm.g_bias, norm.g_eps)
        i, f, g, o = gates.chunk(4, -1)
        di, df, dg, do = error.chunk(4, -1)
        before = c
        c = f.sigmoid() * before + i.sigmoid() * g.tanh()
        dc = f.sigmoid() * dc + (df / 4 + FUNCTION) * before.abs() + di / 4 + dg + 2 * FUNCTION
        dc = dc + 2 * EPS * (before.abs() + 1)
        if norm is not None:
            c, dc = normalised(c, dc, norm.c_weight, norm.c_bias, norm.c_eps)
        h = o.sigmoid() * c.tanh()
        dh = do / 4 + dc + 3 * FUNCTION
        steps[t] = (h, dh)
    y, dy = (torch.stack([steps[t][k] for t in range(x.shape[0])]) for k in (0, 1))
    return (y, h, c), (dy, dh, dc)


def assert_within(results, exact, bounds):
    for result, value, bound in zip(results, exact, bounds, strict=True):
        assert result.shape == value.shape
        excess = (result.double() - value).abs() / bound
        assert (excess <= 1).all(), f"{excess.max()} times the bound"


def make_problem(rng, rows=1, steps=None, hidden=24, inputs=13, block=(8, 1), pathways=("default",), structured=False):
    w_ih, dense_ih = make_weight(hidden, inputs, block, rng, pathways, structured=structured)
    w_hh, dense_hh = make_weight(hidden, hidden, block, rng, pathways, structured=structured)
    shapes = ((steps or 1, rows, inputs), (rows, hidden), (rows, hidden), (4 * hidden,), (4 * hidden,))
    x, h, c, b_ih, b_hh = (torch.randn(s, generator=rng) for s in shapes)
    return x, h, c, w_ih, w_hh, b_ih, b_hh, dense_ih, dense_hh


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("hidden", [24, 21])
def test_cell_equals_masked_dense(backend, rows, block, hidden, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, dense_ih, dense_hh = make_problem(rng, rows, hidden=hidden, block=block)
    before = x.clone(), h.clone(), c.clone()
    results = sp.sparse_lstm_cell(x[0], (h, c), w_ih, w_hh, b_ih, b_hh)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, h, c), strict=True))
    exact, bounds = oracle(x, h, c, dense_ih["default"], dense_hh["default"], b_ih, b_hh)
    assert_within(results, exact[1:], bounds[1:])


@pytest.mark.parametrize("steps", [1, 3, 70])
@pytest.mark.parametrize("rows", [1, 3, 8, 17])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "layer_norm"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_sequence_equals_masked_dense(backend, steps, rows, norm, reverse, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, dense_ih, dense_hh = make_problem(rng, rows, steps, pathways=("en", "fr"))
    norm = make_norm(24, rng) if norm else None
    for name in ("en", "fr"):
        weights = Weight(w_ih, b_ih, name), Weight(w_hh, b_hh, name)
        with torch.no_grad():
            results = sparse_lstm(x, h, c, *weights, norm, reverse)
        assert_within(results, *oracle(x, h, c, dense_ih[name], dense_hh[name], b_ih, b_hh, norm, reverse))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "layer_norm"])
def test_real_size_and_structured_mask(backend, rows, norm, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, dense_ih, dense_hh = make_problem(
        rng, rows, 2, hidden=128, inputs=96, structured=True
    )
    norm = make_norm(128, rng) if norm else None
    results = sparse_lstm(x, h, c, Weight(w_ih, b_ih, None), Weight(w_hh, b_hh, None), norm)
    assert_within(results, *oracle(x, h, c, dense_ih["default"], dense_hh["default"], b_ih, b_hh, norm))


@pytest.mark.parametrize("threads", [2, 3])
def test_two_threads_compute_the_same(threads, rng):
    problem = make_problem(rng, 2, 3, hidden=512, inputs=512)
    x, h, c, w_ih, w_hh, b_ih, b_hh = problem[:7]
    weights = Weight(w_ih, b_ih, None), Weight(w_hh, b_hh, None)
    alone = [sparse_lstm(steps, h, c, *weights) for steps in (x, x[:1])]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = [sparse_lstm(steps, h, c, *weights) for steps in (x, x[:1])]
    finally:
        torch.set_num_threads(before)
    for one, many in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_unbatched_without_bias_and_strided(backend, rng):
    x, h, c, w_ih, w_hh, *_, dense_ih, dense_hh = make_problem(rng, 3)
    zero = torch.zeros(96)
    exact, bounds = oracle(x, h, c, dense_ih["default"], dense_hh["default"], zero, zero)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x[0], h, c)]
    assert not strided[0].is_contiguous()
    assert_within(sp.sparse_lstm_cell(strided[0], tuple(strided[1:]), w_ih, w_hh), exact[1:], bounds[1:])
    one = sp.sparse_lstm_cell(x[0, 0], (h[0], c[0]), w_ih, w_hh)
    assert_within(one, [t[0] for t in exact[1:]], [t[0] for t in bounds[1:]])


def test_mixed_pathways_in_one_batch(backend, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, dense_ih, dense_hh = make_problem(rng, 5, pathways=("en", "fr"))
    rows = torch.tensor([1, 0, 1, 1, 0])
    got = sp.sparse_lstm_cell(x[0], (h, c), w_ih, w_hh, b_ih, b_hh, pathway=rows)
    for number, name in enumerate(("en", "fr")):
        mine = rows == number
        exact, bounds = oracle(x[:, mine], h[mine], c[mine], dense_ih[name], dense_hh[name], b_ih, b_hh)
        assert_within([t[mine] for t in got], exact[1:], bounds[1:])


def test_nan_in_x_stays_and_extreme_gates_saturate(backend, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, 2)
    x[0, 1, :] = float("nan")
    h1, c1 = sp.sparse_lstm_cell(x[0], (h, c), w_ih, w_hh, b_ih, b_hh)
    assert h1[0].isfinite().all() and h1[1].isnan().any()
    b_ih = torch.tensor([1e4, -1e4, 300.0, 1e30]).repeat_interleave(24)  # i = 1, f = 0, g = 1, o = 1
    h1, c1 = sp.sparse_lstm_cell(x[0, :1], (h[:1], c[:1]), w_ih, w_hh, b_ih, b_hh)
    torch.testing.assert_close(c1, torch.ones_like(c1))
    torch.testing.assert_close(h1, torch.ones_like(h1).tanh())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_other_dtypes(dtype, rows, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, rows, 3)
    w_ih, w_hh = (
        sp.PackedWeight(w.shape, w.block, (w.values * 20).to(dtype), scale, {"default": w.mask()}, False)
        for w, scale in ((w, torch.full((96,), 0.05) if dtype == torch.int8 else None) for w in (w_ih, w_hh))
    )
    state = [t.to(w_ih.x_dtype) for t in (x, h, c, b_ih, b_hh)]
    x, h, c, b_ih, b_hh = state
    results = sparse_lstm(x, h, c, Weight(w_ih, b_ih, None), Weight(w_hh, b_hh, None))
    assert all(t.dtype == w_ih.x_dtype for t in results)
    exact, _ = oracle(x, h, c, w_ih.unpack(), w_hh.unpack(), b_ih, b_hh)
    # Steep gates: an error of one unit in their last place, of up to about 100, is all that may be seen.
    slack = {torch.bfloat16: 0.5, torch.float16: 0.07, torch.float64: 1e-12, torch.int8: 2e-2}[dtype]
    for result, value in zip(results, exact, strict=True):
        torch.testing.assert_close(result.double(), value, rtol=0, atol=slack)


@pytest.mark.skipif(library.MISSING is not None, reason="no CPU kernels")
@pytest.mark.parametrize("isa", backends.ISAS)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_fused_step_of_small_weights(isa, rows, dtype, rng):
    """The step kernels themselves: the automatic choice takes them only where a product of that dtype is there too."""
    if backends.ISAS.index(isa) > torch.ops.sparse_pathways.max_isa():
        pytest.skip("not on this machine")
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, rows)
    w_ih, w_hh = (sp.PackedWeight.pack(w.unpack(), w.mask(), dtype=dtype) for w in (w_ih, w_hh))
    x, h, c, b_ih, b_hh = (t.to(w_ih.x_dtype) for t in (x, h, c, b_ih, b_hh))
    parts = [(w.values, *w.index(), w.scale, b) for w, b in ((w_ih, b_ih), (w_hh, b_hh))]
    with backends.forced(isa):
        results = torch.ops.sparse_pathways.bcsr_lstm(x, h, c, *parts[0], *parts[1])
    exact, bounds = oracle(x, h, c, w_ih.unpack(), w_hh.unpack(), b_ih, b_hh)
    if dtype == torch.bfloat16:  # h and c are rounded once, and h is of the cell before that
        bounds = [bound + torch.finfo(dtype).eps * value.abs() for value, bound in zip(exact, bounds, strict=True)]
    assert_within(results, exact, bounds)


@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("steps", [1, 3])
def test_int8_rounds_x_and_h_where_the_weights_say_so(backend, rows, steps, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, rows, steps)
    w_ih, w_hh = (sp.PackedWeight.pack(w.unpack(), w.mask(), dtype=torch.int8) for w in (w_ih, w_hh))
    results = sparse_lstm(x, h, c, Weight(w_ih, b_ih, None), Weight(w_hh, b_hh, None))
    with backends.forced("reference"):
        expected = sparse_lstm(x, h, c, Weight(w_ih, b_ih, None), Weight(w_hh, b_hh, None))
    for result, value in zip(results, expected, strict=True):
        # The integers are the same but where a rounding of h falls on the other side: a step of 1/127 of one input.
        torch.testing.assert_close(result, value, rtol=0, atol=1e-5 if steps == 1 else 5e-3)
    exact, _ = oracle(x, h, c, w_ih.unpack(), w_hh.unpack(), b_ih, b_hh)
    for result, value in zip(results, exact, strict=True):
        assert not torch.equal(result.double(), value)
        torch.testing.assert_close(result.double(), value, rtol=0, atol=0.1)


def test_gradients_are_those_of_the_dense_cell(rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, dense_ih, dense_hh = make_problem(rng, 3)
    cell = torch.nn.LSTMCell(13, 24)
    with torch.no_grad():
        for parameter, value in zip(
            cell.parameters(), (dense_ih["default"], dense_hh["default"], b_ih, b_hh), strict=True
        ):
            parameter.copy_(value)
    grads = []
    for step in (lambda x, s: sp.sparse_lstm_cell(x, s, w_ih, w_hh, b_ih, b_hh), cell):
        inputs = [t.clone().requires_grad_() for t in (x[0], h, c)]
        h1, c1 = step(inputs[0], (inputs[1], inputs[2]))
        grads.append(torch.autograd.grad((h1 * c1).sum(), inputs))
    for mine, dense in zip(*grads, strict=True):
        torch.testing.assert_close(mine, dense)


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm, rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, 3, 2, pathways=("en", "fr"))
    parts = [(w.values, *w.index("fr"), w.scale, b) for w, b in ((w_ih, b_ih), (w_hh, b_hh))]
    rest = (*make_norm(24, rng), True) if norm else ()
    opcheck(torch.ops.sparse_pathways.bcsr_lstm.default, (x, h, c, *parts[0], *parts[1], *rest))


def test_compiles_without_a_graph_break(rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, 3)

    def cell(x, h, c):
        return sp.sparse_lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)

    with torch.no_grad():
        plain = cell(x[0], h, c)  # first: the choice of a backend, made once per process, is not traced
        compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")(x[0], h, c)
    torch.testing.assert_close(compiled, plain)


def test_autocast_gives_its_dtype(rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, 3)
    exact = sp.sparse_lstm_cell(x[0], (h, c), w_ih, w_hh, b_ih, b_hh)
    with torch.autocast("cpu", torch.bfloat16):
        results = sp.sparse_lstm_cell(x[0], (h, c), w_ih, w_hh, b_ih, b_hh)
    for result, value in zip(results, exact, strict=True):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, value.bfloat16())


BAD = [
    (dict(x=torch.zeros(2, 12)), ValueError, r"x has shape \(2, 12\)"),
    (dict(x=torch.zeros(2, 2, 13)), ValueError, "want .M, E. or .E."),
    (dict(x=torch.zeros(4, 13)), ValueError, r"h has shape \(2, 24\)"),
    (dict(h=torch.zeros(1, 24)), ValueError, r"h has shape \(1, 24\)"),
    (dict(c=torch.zeros(2, 23)), ValueError, r"c \(2, 23\)"),
    (dict(x=torch.zeros(2, 13).double()), TypeError, "x.dtype = torch.float64"),
    (dict(b_ih=torch.zeros(24)), ValueError, "b_ih is"),
    (dict(b_hh=torch.zeros(96).double()), ValueError, "b_hh is"),
    (dict(w_ih=torch.zeros(96, 13)), TypeError, "w_ih is a Tensor"),
    (dict(pathway="de"), KeyError, "pathway = 'de' is not known"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_bad_arguments_are_named(change, error, message, again, rng):
    _, _, _, w_ih, w_hh, *_ = make_problem(rng)
    good = dict(x=torch.zeros(2, 13), h=torch.zeros(2, 24), c=torch.zeros(2, 24), w_ih=w_ih, w_hh=w_hh)

    def call(x, h, c, **rest):
        return sp.sparse_lstm_cell(x, (h, c), **rest)

    with torch.inference_mode():
        if again:  # the short way of a second call words its errors no worse
            call(**good)
        with pytest.raises(error, match=message):
            call(**good | change)


def test_a_later_call_sees_other_weights_pathways_and_backends(rng):
    first, second = (make_problem(rng, 2, pathways=("en", "fr")) for _ in range(2))
    x, h, c, w_ih, w_hh, b_ih, b_hh, dense_ih, dense_hh = first
    other_ih, other_bias, other_dense = second[3], second[5], second[7]
    with torch.no_grad():
        for forced in (None, "reference", None):
            with backends.forced(forced):
                for weights, name, bias, dense in (
                    (w_ih, "en", b_ih, dense_ih), (w_ih, "fr", b_ih, dense_ih), (w_ih, "fr", other_bias, dense_ih),
                    (other_ih, "fr", b_ih, other_dense), (w_ih, "en", b_ih, dense_ih),
                ):  # fmt: skip
                    exact, bounds = oracle(x, h, c, dense[name], dense_hh[name], bias, b_hh)
                    for _ in range(2):
                        results = sp.sparse_lstm_cell(x[0], (h, c), weights, w_hh, bias, b_hh, pathway=name)
                        assert_within(results, exact[1:], bounds[1:])


def test_the_operator_refuses_what_does_not_fit(rng):
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = make_problem(rng, 2)
    weights, prepared = (Weight(w_ih, b_ih, None), Weight(w_hh, b_hh, None)), Prepared()
    with torch.no_grad():
        prepared.keep(*weights)
        if prepared.run(x, h, c, *weights) is None:
            pytest.skip("no CPU kernels")
        narrow = x[..., 1:], h[:, 1:], c[:, 1:]
        for bad in ((x[:, :1], h, c), (x, h[:1], c[:1]), (x, h, c[:1]), narrow, (x.double(), h, c)):
            with pytest.raises(RuntimeError):
                prepared.run(*bad, *weights)


@pytest.mark.parametrize(
    ("x", "state", "reason"),
    [
        ([1.0], None, "state is a NoneType; want a pair"),
        ([1.0], (torch.zeros(1, 24),) * 2, "x is a list; want a Tensor"),
        (torch.zeros(1, 13), (torch.zeros(1, 24), 0.0), "c is a float; want a Tensor"),
    ],
)
def test_what_is_no_tensor_is_named(rng, x, state, reason):
    _, _, _, w_ih, w_hh, *_ = make_problem(rng)
    with pytest.raises(TypeError, match=reason):
        sp.sparse_lstm_cell(x, state, w_ih, w_hh)


def test_no_rows(rng):
    _, _, _, w_ih, w_hh, *_ = make_problem(rng)
    h, c = sp.sparse_lstm_cell(torch.zeros(0, 13), (torch.zeros(0, 24), torch.zeros(0, 24)), w_ih, w_hh)
    assert h.shape == c.shape == (0, 24)


def test_a_forced_backend_serves_or_raises(rng):
    _, _, _, w_ih, w_hh, *_ = make_problem(rng)
    with backends.forced("triton"), pytest.raises(sp.BackendUnavailable):
        kernel_name(w_ih, w_hh)
    with backends.forced("reference"):
        assert kernel_name(w_ih, w_hh) == "reference"
