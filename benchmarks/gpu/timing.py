"""Times of device code: CUDA graphs that rotate over several inputs, CUDA events, medians. Dry run: the wall clock."""

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from checkout import PRETEND
from torch import Tensor

DEVICE = "cpu" if PRETEND else "cuda"
DTYPE = torch.float16 if PRETEND else torch.bfloat16  # Triton's interpreter cannot multiply bfloat16
WARM_UP, ROUNDS, ROUND_MS = (1, 1, 0.0) if PRETEND else (3, 20, 1.0)
L2_BYTES = 50e6


def sets_for(*tensors: Tensor) -> int:
    """How many inputs a graph rotates over, so that none is found in L2 from the call before; at most 16."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return 1 if PRETEND else max(1, min(16, round(2 * L2_BYTES / max(size, 1))))


def graphed(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """The calls one after the other as a CUDA graph: without Python's launch time, which hides small kernels."""
    if PRETEND:
        return lambda: [call() for call in calls] and None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def timer() -> Callable[[Callable[[], Any], int], float]:
    """Microseconds of `calls` calls."""
    if PRETEND:

        def by_clock(run: Callable[[], Any], calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) * 1e6

        return by_clock
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events(run: Callable[[], Any], calls: int) -> float:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return by_events


def median_us(
    contenders: dict[str, Sequence[Callable[[], Any]]], eager: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """Median and quartiles of one call of each contender; contenders take turns, so a drift of the clock hits all.

    Args:
        contenders: per name, the same product on several inputs.
        eager: names that cannot be captured in a graph; Python's launch time is in theirs.

    Returns:
        {name: {"us", "low_us", "high_us"}} of one product.
    """
    time_us, runs, repeats = timer(), {}, {}
    for name, calls in contenders.items():
        run = graphed(calls) if name not in eager else lambda calls=calls: [call() for call in calls]
        for _ in range(WARM_UP):
            time_us(run, 1)
        runs[name], repeats[name] = run, max(1, round(ROUND_MS * 1e3 / max(time_us(run, 1), 1.0)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(time_us(run, repeats[name]) / repeats[name] / len(contenders[name]))
    found = {}
    for name, one in times.items():
        low, middle, high = statistics.quantiles(one, n=4) if len(one) > 1 else one * 3
        found[name] = {"us": middle, "low_us": low, "high_us": high}
    return found
