"""Contenders in turns, next to each other in time, so that a ratio compares two moments of the same machine."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROUND_SECONDS = 2e-3  # a contender's turn calls often enough to last so long
WARM_SECONDS = 20e-3  # longest run through a rotation before a turn
TURNS = (5, 25)  # fewest and most


@dataclass(frozen=True)
class Contender:
    """One way to compute a product.

    Attributes:
        name: in the tables.
        dense: the side it is on.
        run: one call.
        products: how many products one call computes.
        rotation: calls after which its weights repeat.
    """

    name: str
    dense: bool
    run: Callable[[], object]
    products: int = 1
    rotation: int = 1


@dataclass(frozen=True)
class Verdict:
    """One sparse contender against the best dense one. A ratio above 1: sparse is faster."""

    name: str
    best_dense: str
    dense_us: float
    sparse_us: float
    fastest_sparse_us: float
    ratio: float  # median of the ratios within a turn
    quartiles: tuple[float, float]
    ratio_of_fastest: float  # of the fastest turns: what a quiet machine would show


def rotating(products: Sequence[Callable[..., object]], *arguments: object) -> Callable[[], object]:
    """A call that takes the next product each time: its weight is no longer where the last call left it."""
    next_one = itertools.cycle(products).__next__
    return lambda: next_one()(*arguments)


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        run()
    return time.perf_counter() - start


def duel(contenders: Sequence[Contender], seconds: float, turns: int | None = None) -> dict[str, list[float]]:
    """Times of every contender, turn by turn.

    Before its turn a contender runs unmeasured through its whole rotation, where that is short enough for a cache to
    hold it: the others have evicted its weights from a cache that would, and rotate through more than that together.

    Args:
        contenders: each runs once per turn; the order rotates, so that none always follows the same neighbour.
        seconds: about how long it may take in all.
        turns: their number; None: as many as fit `seconds`, within TURNS.

    Returns:
        {name: seconds per product, one per turn}.
    """
    calls, warm, cost = {}, {}, 0.0
    for one in contenders:
        one.run()
        once = _seconds(one.run, 1)
        once = _seconds(one.run, 5) / 5 if once < ROUND_SECONDS else once
        calls[one.name] = max(1, round(ROUND_SECONDS / once))
        whole = once * one.rotation <= WARM_SECONDS
        warm[one.name] = one.rotation if whole else min(one.rotation, calls[one.name])
        cost += once * (calls[one.name] + warm[one.name])
    turns = turns or min(max(round(seconds / cost), TURNS[0]), TURNS[1])
    times: dict[str, list[float]] = {one.name: [] for one in contenders}
    gc.disable()
    try:
        for turn in range(turns):
            first = turn % len(contenders)
            for one in [*contenders[first:], *contenders[:first]]:
                _seconds(one.run, warm[one.name])
                elapsed = _seconds(one.run, calls[one.name])
                times[one.name].append(elapsed / calls[one.name] / one.products)
    finally:
        gc.enable()
    return times


def judge(times: dict[str, list[float]], dense: Sequence[str]) -> list[Verdict]:
    """Every sparse contender against the dense one with the lowest median."""
    best = min(dense, key=lambda name: statistics.median(times[name]))
    verdicts = []
    for name in times:
        if name in dense:
            continue
        ratios = [d / s for d, s in zip(times[best], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        verdicts.append(
            Verdict(
                name=name,
                best_dense=best,
                dense_us=statistics.median(times[best]) * 1e6,
                sparse_us=statistics.median(times[name]) * 1e6,
                fastest_sparse_us=min(times[name]) * 1e6,
                ratio=middle,
                quartiles=(low, high),
                ratio_of_fastest=min(times[best]) / min(times[name]),
            )
        )
    return verdicts
