"""One step of an LSTM with 512 inputs and 512 units: packed against dense, plain and with torchaudio's layer norms.

Plain: `sp.sparse_lstm_cell` against nn.LSTMCell, nn.LSTM on one frame, and oneDNN's prepacked products with the gates
in torch. LayerNorm: torchaudio's `_CustomLSTM` (the RNN-T predictor's), packed by `sp.pack`, against itself dense.
Weights rotate over four times L2, as in the table of the linear layers.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchaudio.models.rnnt import _CustomLSTM

import sparse_pathways as sp
from benchmarks import dense, duel, workload
from benchmarks.workload import BLOCK, DTYPES, Answer

SIZE = 512
ROWS = (1, 4, 8)  # streams, or hypotheses of a beam
Step = Callable[[], tuple[Tensor, Tensor]]  # -> h, c
GATE_ROUNDINGS = 16  # exp, tanh and the sums and products around them, in units of the last place


class State:
    """x, h and c of one step, and the exact answers."""

    def __init__(self, m: int, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(m)
        held = torch.float32 if dtype == torch.int8 else dtype
        self.x, self.c = (torch.randn(m, SIZE, generator=rng).to(held) for _ in range(2))
        self.h = torch.tanh(torch.randn(m, SIZE, generator=rng)).to(held)
        self.dtype, self.eps = dtype, torch.finfo(held).eps

    def answers(self, weight: Tensor, bias: Tensor, norms: tuple[nn.LayerNorm, nn.LayerNorm] | None) -> list[Answer]:
        """Exact h and c, with the bound of the gates' products carried through what follows them.

        sigmoid changes by at most a quarter of what its argument does, tanh by no more than it; a layer norm divides by
        the deviation what its input, its mean and its deviation may be off.
        """
        x = torch.cat([self.x, self.h], 1)
        gates = workload.answer(x, weight, None, bias, self.dtype)
        if norms is not None:
            gates = self._normed(gates, norms[1])
        i, f, g, o = gates.exact.chunk(4, 1)
        di, df, dg, do = gates.bound.chunk(4, 1)
        c = f.sigmoid() * self.c.double() + i.sigmoid() * g.tanh()
        own = GATE_ROUNDINGS * self.eps * (1 + self.c.double().abs())
        cell = Answer(c, df / 4 * self.c.double().abs() + di / 4 + dg + own)
        if norms is not None:
            cell = self._normed(cell, norms[0])
        return [Answer(o.sigmoid() * cell.exact.tanh(), do / 4 + cell.bound + GATE_ROUNDINGS * self.eps), cell]

    def _normed(self, answer: Answer, norm: nn.LayerNorm) -> Answer:
        z, worst = answer.exact, answer.bound.amax(1, keepdim=True)
        deviation = (z.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
        y = (z - z.mean(1, keepdim=True)) / deviation
        bound = worst / deviation * (2 + y.abs()) + GATE_ROUNDINGS * self.eps * (1 + y.abs())
        gain, shift = norm.weight.double(), norm.bias.double()
        return Answer(y * gain + shift, bound * gain.abs() + self.eps * shift.abs())


def _plain(dtype: torch.dtype) -> nn.LSTMCell:
    torch.manual_seed(0)
    return nn.LSTMCell(SIZE, SIZE).to(torch.float32 if dtype == torch.int8 else dtype).requires_grad_(False)


def _custom(dtype: torch.dtype) -> _CustomLSTM:
    torch.manual_seed(0)
    cell = _CustomLSTM(SIZE, SIZE, layer_norm=True, layer_norm_epsilon=1e-3).eval().requires_grad_(False)
    return cell.to(torch.float32 if dtype == torch.int8 else dtype)


def _cell_step(cell: nn.Module, state: State) -> Step:
    return lambda: cell(state.x, (state.h, state.c))


def _sequence_step(layer: nn.LSTM, state: State) -> Step:
    def step() -> tuple[Tensor, Tensor]:
        _, (h, c) = layer(state.x[None], (state.h[None], state.c[None]))
        return h[0], c[0]

    return step


def _prepacked_step(inputs: dense.Product, hidden: dense.Product, state: State) -> Step:
    def step() -> tuple[Tensor, Tensor]:
        i, f, g, o = (inputs(state.x) + hidden(state.h)).chunk(4, 1)
        c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    return step


def _custom_step(cell: nn.Module, state: State) -> Step:
    def step() -> tuple[Tensor, Tensor]:
        _, (h, c) = cell(state.x[None], [state.h, state.c])
        return h, c

    return step


def _as_lstm(cell: nn.LSTMCell) -> nn.LSTM:
    layer = nn.LSTM(SIZE, SIZE).to(cell.weight_ih.dtype).requires_grad_(False)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return layer


def _dense_plain(cell: nn.LSTMCell, state: State) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Names, and what makes a step on its own copy of the weights."""
    if state.dtype == torch.int8:
        quantised = torch.ao.nn.quantized.dynamic.LSTMCell
        config = torch.ao.quantization.default_dynamic_qconfig

        def make() -> Step:
            source = copy.deepcopy(cell)
            source.qconfig = config
            return _cell_step(quantised.from_float(source), state)

        yield "torch int8 LSTMCell", make
        return
    yield "nn.LSTMCell", lambda: _cell_step(copy.deepcopy(cell), state)
    yield "nn.LSTM, T=1", lambda: _sequence_step(_as_lstm(cell), state)
    if torch.backends.mkldnn.is_available():
        m = len(state.x)

        def prepacked() -> Step:
            inputs = dense.onednn(cell.weight_ih, cell.bias_ih, m)
            return _prepacked_step(inputs, dense.onednn(cell.weight_hh, cell.bias_hh, m), state)

        yield "oneDNN, gates in torch", prepacked


def _dense_custom(cell: _CustomLSTM, state: State) -> Iterator[tuple[str, Callable[[], Step]]]:
    if state.dtype == torch.int8:
        quantise = torch.ao.quantization.quantize_dynamic
        yield "_CustomLSTM, torch int8", lambda: _custom_step(quantise(cell, {nn.Linear}, torch.qint8), state)
        return
    yield "_CustomLSTM", lambda: _custom_step(copy.deepcopy(cell), state)
    if torch.backends.mkldnn.is_available():
        yield "_CustomLSTM, oneDNN", lambda: _custom_step(dense.prepack_(copy.deepcopy(cell), len(state.x)), state)


def _packed_plain(cell: nn.LSTMCell, sparsity: float, state: State) -> tuple[Callable[[], Step], list[Answer]]:
    masks = [sp.topk_mask(sp.block_scores(w, BLOCK), sparsity) for w in (cell.weight_ih, cell.weight_hh)]
    kept = [
        torch.where(sp.expand_mask(mask, BLOCK, tuple(w.shape)), w, 0)
        for mask, w in zip(masks, (cell.weight_ih, cell.weight_hh), strict=True)
    ]

    def make() -> Step:
        w_ih, w_hh = (
            sp.PackedWeight.pack(w, mask, BLOCK, state.dtype)
            for w, mask in zip((cell.weight_ih, cell.weight_hh), masks, strict=True)
        )
        b_ih, b_hh = cell.bias_ih, cell.bias_hh
        return lambda: sp.sparse_lstm_cell(state.x, (state.h, state.c), w_ih, w_hh, b_ih, b_hh)

    return make, state.answers(torch.cat(kept, 1), cell.bias_ih + cell.bias_hh, None)


def _packed_custom(cell: _CustomLSTM, sparsity: float, state: State) -> tuple[Callable[[], Step], list[Answer]]:
    sparse = workload.mask_at_random_(copy.deepcopy(cell), sparsity)
    baked = workload.masked_dense(sparse)

    def make() -> Step:
        return _custom_step(sp.pack(sparse, dtype=state.dtype), state)

    return make, state.answers(*_parts(baked))


def _parts(cell: _CustomLSTM) -> tuple[Tensor, Tensor, tuple[nn.LayerNorm, nn.LayerNorm]]:
    weight = torch.cat([cell.x2g.weight, cell.p2g.weight], 1)
    return weight, weight.new_zeros(len(weight)), (cell.c_norm, cell.g_norm)


def _check(name: str, steps: list[Step], answers: list[Answer]) -> None:
    for outputs in [step() for step in steps]:  # all: a first call may set up what later ones find
        for part, got, answer in zip(("h", "c"), outputs, answers, strict=True):
            answer.check(f"{name}: {part}", got)


def _cell(form: str, dtype: str, m: int, sparsities: tuple[float, ...], seconds: float, turns: int | None) -> Any:
    """Rows of one form, dtype and number of streams, and what was wrong."""
    state = State(m, DTYPES[dtype])
    plain = form == "plain"
    cell = _plain(state.dtype) if plain else _custom(state.dtype)
    if plain:
        exact = state.answers(torch.cat([cell.weight_ih, cell.weight_hh], 1), cell.bias_ih + cell.bias_hh, None)
    else:
        exact = state.answers(*_parts(cell))
    sources = [(name, True, make, exact, 1.0) for name, make in (_dense_plain if plain else _dense_custom)(cell, state)]
    for sparsity in sparsities:
        make, answers = (_packed_plain if plain else _packed_custom)(cell, sparsity, state)
        sources.append((f"sparse {sparsity:.0%}", False, make, answers, 1 - sparsity))
    contenders, faults = [], []
    for name, is_dense, make, answers, density in sources:
        nbytes = round(8 * SIZE * SIZE * state.dtype.itemsize * density)
        try:
            steps = [make() for _ in range(max(2, workload.copies(nbytes, "l2")))]
            _check(name, steps, answers)
            contenders.append(duel.Contender(name, is_dense, duel.rotating(steps), rotation=len(steps)))
        except (ArithmeticError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            faults.append(f"{form} {dtype} M={m} {name}: {error}")
    names = [one.name for one in contenders if one.dense]
    if not names or len(names) == len(contenders):
        return [], faults
    times = duel.duel(contenders, seconds, turns)
    dense_us = {name: statistics.median(times[name]) * 1e6 for name in names}
    density_of = {f"sparse {sparsity:.0%}": sparsity for sparsity in sparsities}
    return [
        {
            "form": form,
            "m": m,
            "dtype": dtype,
            "sparsity": density_of[verdict.name],
            "best_dense": verdict.best_dense,
            "dense_us": verdict.dense_us,
            "sparse_us": verdict.sparse_us,
            "ratio": verdict.ratio,
            "quartiles": verdict.quartiles,
            "ratio_of_fastest": verdict.ratio_of_fastest,
            "dense": dense_us,
        }
        for verdict in duel.judge(times, names)
    ], faults


def run(
    dtypes: tuple[str, ...], sparsities: tuple[float, ...], seconds: float, turns: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Every form, dtype and number of streams, printed as they are done: (terms, rows, faults)."""
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    skipped = []
    for form in ("plain", "LayerNorm"):
        if form == "plain" and not hasattr(sp, "sparse_lstm_cell"):
            skipped.append("plain: this version of the package has no sp.sparse_lstm_cell")
            print(f"skipped {skipped[-1]}")
            continue
        for dtype in dtypes:
            for m in ROWS:
                measured, failed = _cell(form, dtype, m, sparsities, seconds, turns)
                rows += measured
                faults += failed
                print(_line(form, dtype, m, measured), flush=True)
    what = {
        "call": f"one step, {SIZE} inputs, {SIZE} units, block 8x1, one Python call, one thread, inference_mode",
        "weights": f"rotating over {workload.rotation_bytes('l2') / 2**20:.0f} MB, beyond L2",
        "skipped": skipped,
        "faults": faults,
    }
    return what, rows, faults


def _line(form: str, dtype: str, m: int, rows: list[dict[str, Any]]) -> str:
    text = f"{form:9} {dtype:8} M={m}"
    if not rows:
        return f"{text} nothing to compare"
    text += f" {rows[0]['best_dense']:24} {rows[0]['dense_us']:7.1f} us"
    for row in rows:
        low, high = row["quartiles"]
        text += f" | {row['sparsity']:.0%} {row['sparse_us']:6.1f} us {row['ratio']:5.2f}x ({low:.2f}-{high:.2f})"
    return text
