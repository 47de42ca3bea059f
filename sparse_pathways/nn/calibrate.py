"""A model of the time of one CPU product, fitted to a second of measurements on this machine.

Time = overhead + per kept weight + per input (x is packed) + per output (the result is stored), at one number of rows,
fitted three times: with weights that stay in the L2 cache from call to call, that come from the L3 cache, and from
memory. Between them the model goes by the logarithm of the size of all weights that are used in turn.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.checks import Block
from sparse_pathways.environment import cache_kib
from sparse_pathways.layout import PackedWeight
from sparse_pathways.ops import sparse_linear

Call = Callable[[], object]

# (N, K, density) to measure: the first for an L2 cache of 1 MiB, scaled to fit another; the others with copies that
# take turns.
IN_L2 = ((128, 128, 0.4), (256, 128, 0.2), (128, 256, 0.2), (256, 256, 0.1), (384, 256, 0.6), (256, 384, 0.3))
BEYOND = ((512, 512, 0.2), (1024, 512, 0.3), (512, 1024, 0.3), (1024, 1024, 0.1), (1024, 1024, 0.4))
ROUNDS, ROUND_S, ENOUGH_S = 5, 1.5e-3, 20e-3  # rounds of one measurement, seconds of each, and of all if calls are long
MANY_ROWS = 64  # where so many rows use each weight, it makes no difference which cache it comes from
MEMORY_BYTES = 128 * 2**20  # at most this much is touched to get past an L3 cache


def working_sets() -> tuple[int, int, int]:
    """Bytes of weights to measure with: that stay in L2, that come from L3, that come from memory."""
    l2, l3 = cache_bytes()
    return l2, 4 * l2, max(8 * l2, min(2 * l3, MEMORY_BYTES))


def cache_bytes() -> tuple[int, int]:
    """Sizes of the L2 and L3 cache; where the system does not say, 1 MiB and none."""
    return 1024 * (cache_kib(2) or 1024), 1024 * (cache_kib(3) or 0)


@dataclass(frozen=True)
class TimeModel:
    """Microseconds of one call.

    Attributes:
        fits: for each of `working_sets()` the coefficients of (1, weights, inputs, outputs), none negative.
    """

    fits: tuple[tuple[float, ...], ...]

    def us(self, weights: float, inputs: int, outputs: int, working_set: float) -> float:
        """Predicted time of a product that uses `weights` stored weights, of `working_set` bytes used in turn.

        Grows with each argument.
        """
        features = (1.0, weights, float(inputs), float(outputs))
        times = [math.fsum(map(float.__mul__, one, features)) for one in self.fits]
        times = list(itertools.accumulate(times, max))  # farther weights are never faster: a fit may say so by noise
        l2, l3 = cache_bytes()
        near, l3_from, l3_to, memory = map(math.log, (l2, 4 * l2, max(4 * l2, l3 // 4), max(8 * l2, l3)))
        size = math.log(max(working_set, 1))
        far = min(max((size - near) / (l3_from - near), 0.0), 1.0)
        farther = min(
            max((size - l3_to) / (memory - l3_to), 0.0), 1.0
        )  # an L3 cache is shared: it ends before its size
        return times[0] + far * (times[1] - times[0]) + farther * (times[2] - times[1])


def fit(features: list[tuple[float, ...]], times: list[float]) -> tuple[float, ...]:
    """Coefficients >= 0 with the least sum of squared relative errors: the best of all subsets' least squares."""
    matrix = torch.tensor(features, dtype=torch.float64, device="cpu")
    target = torch.tensor(times, dtype=torch.float64, device="cpu")
    scale = matrix.amax(0)
    relative = matrix / scale / target[:, None]
    best, best_error = [0.0] * matrix.shape[1], math.inf
    columns = range(matrix.shape[1])
    for count in columns:
        for subset in itertools.combinations(columns, count + 1):
            found = torch.linalg.lstsq(relative[:, subset], torch.ones_like(target)[:, None]).solution[:, 0]
            error = float((relative[:, subset] @ found - 1).square().sum())
            if bool((found >= 0).all()) and error < best_error:
                best, best_error = [0.0] * matrix.shape[1], error
                for column, value in zip(subset, found.tolist(), strict=True):
                    best[column] = value / float(scale[column])
    return tuple(best)


def measure_us(calls: list[Call]) -> float:
    """Microseconds per call, all of `calls` in turn: the fastest of a few rounds, what a quiet machine shows."""
    calls[-1]()
    begin = time.perf_counter()
    calls[0]()
    count = max(1, round(ROUND_S / (time.perf_counter() - begin)))
    turn = itertools.cycle(calls)
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for call in itertools.islice(turn, count):
            call()
        rounds.append((time.perf_counter() - begin) / count)
        if sum(rounds) * count > ENOUGH_S and len(rounds) > 1:
            break
    return min(rounds) * 1e6


Measure = Callable[[int, int, float, Callable[[int], int]], tuple[float, float]]


def _model(measure: Measure, tiers: tuple[int, ...]) -> TimeModel:
    """Fit a model; `measure(n, k, density, copies)` gives the weights that were used and the time.

    `copies(size)` says how many weights of `size` bytes shall take turns. `tiers` are the working sets to measure; the
    last one stands for those left out.
    """
    fits = []
    l2 = working_sets()[0]
    for number in tiers:
        wanted = working_sets()[number]
        side = 1.0 if number else math.sqrt(l2 / 2**20)
        features: list[tuple[float, ...]] = []
        times: list[float] = []
        for n, k, density in BEYOND if number else IN_L2:
            n, k = (max(32, round(one * side / 32) * 32) for one in (n, k))
            weights, us = measure(n, k, density, lambda size: math.ceil(wanted / size) if number else 1)  # noqa: B023
            features.append((1.0, weights, float(k), float(n)))
            times.append(us)
        fits.append(fit(features, times))
    return TimeModel(tuple(fits + [fits[-1]] * (3 - len(fits))))


def _tiers(rows: int) -> tuple[int, ...]:
    return (1,) if rows >= MANY_ROWS else (0, 1, 2)


def _random(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float32, device="cpu")


@functools.cache
def sparse_model(dtype: torch.dtype, block: Block, rows: int, shared: bool, backend: str, threads: int) -> TimeModel:
    """Time of the packed product; measured once per process for each set of arguments.

    Args:
        dtype: of the stored values.
        block: (R, C).
        rows: M.
        shared: whether several pathways share the values.
        backend: that serves it, from `backends.select`.
        threads: that torch is told to use.
    """
    rng = torch.Generator("cpu").manual_seed(0)

    def measure(n: int, k: int, density: float, copies: Callable[[int], int]) -> tuple[float, float]:
        grid = (-(-n // block[0]), -(-k // block[1]))
        names = ("one", "other") if shared else ("one",)
        masks = {name: torch.rand(grid, generator=rng, device="cpu") < density for name in names}
        first = PackedWeight.pack(_random(rng, n, k), masks, block, dtype)
        size = max(1, first.nbytes // (2 if shared else 1))
        weights = [first] + [first._apply(Tensor.clone) for _ in range(copies(size) - 1)]
        x, bias = _random(rng, rows, k).to(first.x_dtype), _random(rng, n).to(first.x_dtype)
        us = measure_us([functools.partial(sparse_linear, x, one, bias, pathway="one") for one in weights])
        # The reference makes the weight dense at every call: its time does not depend on the mask.
        used = grid[0] * grid[1] if backend == "reference" else int(masks["one"].sum())
        return float(used * block[0] * block[1]), us

    # The reference never wins, since it ends in the dense product: a rough figure will do.
    return _model(measure, (0,) if backend == "reference" else _tiers(rows))


def _f_linear(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    return lambda: F.linear(x, weight, bias)


def _onednn(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda: product(x, packed, bias, "none", [], "")


def _dynamic_int8(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch is about to give up quantised tensors
        quantised = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantised, bias)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def dense_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the dense products of this torch that a sparse one with weights of `dtype` has to beat."""
    names = ["F.linear"]
    if torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16, torch.int8):
        names.append("oneDNN")
    if dtype == torch.int8 and hasattr(torch, "quantize_per_tensor") and torch.backends.quantized.engine != "none":
        names.append("torch int8")
    return tuple(names)


@functools.cache
def dense_model(dtype: torch.dtype, rows: int, kernel: str, threads: int) -> TimeModel:
    """Time of the dense product `kernel`, one of `dense_kernels(dtype)`; measured once per process."""
    rng = torch.Generator("cpu").manual_seed(0)
    prepare = {"F.linear": _f_linear, "oneDNN": _onednn, "torch int8": _dynamic_int8}[kernel]
    x_dtype = torch.float32 if dtype == torch.int8 else dtype
    bytes_each = 1 if kernel == "torch int8" else x_dtype.itemsize

    def measure(n: int, k: int, density: float, copies: Callable[[int], int]) -> tuple[float, float]:
        weight, bias, x = (_random(rng, *shape).to(x_dtype) for shape in ((n, k), (n,), (rows, k)))
        count = copies(n * k * bytes_each)
        return float(n * k), measure_us([prepare(weight.clone(), bias, x) for _ in range(count)])

    # Enough int8 weights to get past an L3 cache would take seconds to pack.
    return _model(measure, (0, 1) if kernel == "torch int8" else _tiers(rows))
