"""One chunk of a stream through torchaudio's `emformer_rnnt_base`, dense against packed at 70 %, time by operator.

A chunk is 160 ms of audio: `transcribe_streaming` on 16 feature frames and 4 of right context, then greedy search with
one symbol found: five calls of the joiner (each with an argmax) and one step of the predictor. The symbol is given, so
that every contender does the same work. Weights and masks are random.
"""

import copy
import functools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchaudio.models import RNNT
from torchaudio.models.rnnt import emformer_rnnt_model

import sparse_pathways as sp
from benchmarks import dense, duel, workload
from benchmarks.workload import DTYPES

LAYERS = 20
SYMBOLS = 4097  # of torchaudio's pretrained bundle
SEGMENT, RIGHT_CONTEXT, FEATURES, STRIDE = 16, 4, 80, 4
SPARSITY = 0.7
PACKED = "packed 70 %"
TURNS = 15
TIMES_DENSE_ERROR = 4  # the packed model may be so much further from float64 than the masked dense one of its dtype

# First match wins: (group, pattern of operator names).
GROUPS = (
    ("products", r"addmm|^aten::mm$|linear_pointwise|bcsr_linear|linear_dynamic|sparse_pathways::\w*linear"),
    ("LSTM", r"lstm"),
    ("attention", r"bmm|softmax|masked_fill|scaled_dot"),
    ("layer norm", r"layer_norm"),
    ("activations", r"gelu|relu|tanh|sigmoid|silu"),
    ("arithmetic", r"::(add|sub|mul|div|sum|mean|eq|lt|gt|ge|le|bitwise|clamp|where|argmax|max|min|arange|any|pow)"),
    ("copies", r"copy|::cat$|clone|contiguous|::to$|index|embedding|stack|fill_|zeros|ones|::pad|resolve"),
)


def build(layers: int) -> RNNT:
    """`emformer_rnnt_base`, with as many encoder layers as asked for."""
    torch.manual_seed(0)
    model = emformer_rnnt_model(
        input_dim=FEATURES,
        encoding_dim=1024,
        num_symbols=SYMBOLS,
        segment_length=SEGMENT,
        right_context_length=RIGHT_CONTEXT,
        time_reduction_input_dim=128,
        time_reduction_stride=STRIDE,
        transformer_num_heads=8,
        transformer_ffn_dim=2048,
        transformer_num_layers=layers,
        transformer_dropout=0.1,
        transformer_activation="gelu",
        transformer_left_context_length=30,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=512,
        num_lstm_layers=3,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.3,
    )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Chunk:
    """What a recogniser holds in the middle of a stream."""

    frames: Tensor
    states: list[list[Tensor]]
    prediction: Tensor
    predictor_state: list[list[Tensor]]

    def through(self, model: RNNT) -> Tensor:
        """Scores of the symbols at every call of the joiner, `[5, symbols]`."""
        states = [list(state) for state in self.states]  # the encoder changes the lists
        source, _, _ = model.transcribe_streaming(self.frames, _LENGTH, states)
        scores = [_join(model, source[:, :1], self.prediction)]
        target, _, _ = model.predict(_SYMBOL, _ONE, self.predictor_state)
        scores += [_join(model, source[:, i : i + 1], target) for i in range(source.shape[1])]
        return torch.cat(scores)

    def to(self, dtype: torch.dtype) -> "Chunk":
        """The same chunk for a model of another float type."""
        return Chunk(
            self.frames.to(dtype),
            [[t.to(dtype) if t.is_floating_point() else t for t in state] for state in self.states],
            self.prediction.to(dtype),
            [[t.to(dtype) for t in state] for state in self.predictor_state],
        )


_LENGTH, _ONE = torch.tensor([SEGMENT + RIGHT_CONTEXT]), torch.tensor([1])
_SYMBOL = torch.tensor([[7]])


def _join(model: RNNT, source: Tensor, target: Tensor) -> Tensor:
    scores, _, _ = model.join(source, _ONE, target, _ONE)
    scores = scores.reshape(1, -1)
    scores.argmax()
    return scores


def chunk(model: RNNT) -> Chunk:
    """A chunk after more than a second of others, with the states that `model` has then."""
    rng = torch.Generator().manual_seed(1)
    states = predictor_state = None
    for _ in range(9):  # 36 encoder frames fill the left context of 30
        frames = torch.randn(1, SEGMENT + RIGHT_CONTEXT, FEATURES, generator=rng)
        frames = frames.to(next(model.parameters()).dtype)
        prediction, _, predictor_state = model.predict(_SYMBOL, _ONE, predictor_state)
        before = None if states is None else [list(state) for state in states]
        _, _, states = model.transcribe_streaming(frames, _LENGTH, before)
    return Chunk(frames, states, prediction, predictor_state)


def _quantised(model: RNNT) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def contenders(dtype: str, layers: int, faults: list[str]) -> tuple[Chunk, dict[str, tuple[bool, nn.Module]]]:
    """A chunk and {name: (dense?, model)} of one dtype; the packed one only if it computes the right thing."""
    base = build(layers)
    sparse = workload.mask_at_random_(copy.deepcopy(base), SPARSITY)
    masked = workload.masked_dense(sparse)
    exact = chunk(masked.double())
    truth = exact.through(masked)
    held = torch.float32 if dtype == "int8" else DTYPES[dtype]
    given = exact.to(held)
    twin, base, sparse = masked.to(held), base.to(held), sparse.to(held)
    if dtype == "int8":
        twin, models = _quantised(twin), {"torch int8": (True, _quantised(base))}
    else:
        models = {"F.linear": (True, base)}
        if torch.backends.mkldnn.is_available():
            models["oneDNN"] = (True, dense.prepack_(copy.deepcopy(base), SEGMENT // STRIDE + RIGHT_CONTEXT // STRIDE))
    try:
        packed = sp.pack_(sparse, dtype=DTYPES[dtype])
        allowed = TIMES_DENSE_ERROR * _distance(given.through(twin), truth)
        if not (error := _distance(given.through(packed), truth)) <= allowed:
            raise ArithmeticError(f"scores are {error:.3g} away from float64, allowed {allowed:.3g}")
        models[PACKED] = (False, packed)
    except (ArithmeticError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        faults.append(f"{dtype} {PACKED}: {error}")
    return given, models


def _distance(scores: Tensor, truth: Tensor) -> float:
    return (scores.double() - truth).abs().max().item()


def by_operator(run: Callable[[], object], chunks: int) -> dict[str, Any]:
    """Milliseconds per chunk by group of operators, each operator's own time; what is left is Python and dispatch."""
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(chunks):
            run()
        wall = (time.perf_counter() - start) / chunks * 1e3
    groups = dict.fromkeys([name for name, _ in GROUPS] + ["views and allocation"], 0.0)
    operators = []
    for event in profiler.key_averages():
        own = event.self_cpu_time_total / chunks / 1e3
        groups[group_of(event.key)] += own
        operators.append([event.key, event.count / chunks, own])
    groups["Python and between operators"] = max(0.0, wall - sum(groups.values()))
    operators.sort(key=lambda one: -one[2])
    return {"profiled_ms": wall, "groups": groups, "operators": operators[:12]}


def group_of(operator: str) -> str:
    return next((name for name, pattern in GROUPS if re.search(pattern, operator)), "views and allocation")


def run(
    dtypes: tuple[str, ...], layers: int, turns: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """The whole model in every dtype: (terms, rows, faults)."""
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for dtype in dtypes:
        given, models = contenders(dtype, layers, faults)
        runs = {name: functools.partial(given.through, model) for name, (_, model) in models.items()}
        times = duel.duel([duel.Contender(n, models[n][0], runs[n]) for n in runs], 0, turns or TURNS)
        best = min((n for n in runs if models[n][0]), key=lambda name: statistics.median(times[name]))
        for name in runs:
            row = {
                "dtype": dtype,
                "contender": name,
                "dense": models[name][0],
                "ms": statistics.median(times[name]) * 1e3,
                "fastest_ms": min(times[name]) * 1e3,
                "ratio": statistics.median(d / s for d, s in zip(times[best], times[name], strict=True)),
                "best_dense": best,
                **by_operator(runs[name], turns or TURNS),
            }
            rows.append(row)
            shares = ", ".join(f"{group} {ms:.1f}" for group, ms in row["groups"].items())
            print(f"{dtype:8} {name:12} {row['ms']:7.1f} ms {row['ratio']:5.2f}x | {shares}", flush=True)
    parameters = sum(p.numel() for p in build(layers).parameters())
    what = {
        "call": "one chunk of 160 ms: transcribe_streaming, 5 joiner calls, 1 predictor step; one stream, one thread",
        "model": f"emformer_rnnt_base, {layers} encoder layers, {parameters / 1e6:.0f} M parameters, {SYMBOLS} symbols",
        "weights": "the whole model, beyond L3 when dense; every linear layer packed at 70 %, block 8x1, random masks",
        "sparsity": SPARSITY,
        "faults": faults,
    }
    return what, rows, faults
