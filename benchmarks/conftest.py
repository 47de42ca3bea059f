"""`pytest benchmarks` (make bench): pytest-benchmark measures, the last lines put dense and sparse side by side.

Options: --threads N (default 1), --cold (weights rotate over four times the L2 cache; default hot: one weight).
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comparison import Suite, Turn, circumstances, compare, table, write

import sparse_pathways as sp

ROUNDS = 8  # per turn
ROUND_SECONDS = 5e-4  # a round calls often enough to last so long
RESULTS = Path(__file__).parent / "results"
TURNS = pytest.StashKey[list[Turn]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch and of the sparse kernels (default 1)")
    parser.addoption("--cold", action="store_true", help="rotate over copies of the weights, four times L2 in all")


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("--threads")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise pytest.UsageError(f"--threads {threads}: this machine lends {len(cores)} cores")
    os.sched_setaffinity(0, cores[-threads:])  # before the first product starts torch's threads
    torch.set_num_threads(threads)
    config.stash[TURNS] = []


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _calls_per_round(run: Callable[[], object]) -> int:
    """Calls that last ROUND_SECONDS, from a short trial that also warms up."""
    run()
    calls, elapsed = 1, 0.0
    while elapsed < ROUND_SECONDS / 4:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        elapsed = time.perf_counter() - start
        calls *= 2
    return max(1, round(ROUND_SECONDS / (elapsed / (calls // 2))))


@pytest.fixture
def take_turn(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`take_turn(run, suite=, group=, contender=, dense=)`: measure one turn of one contender."""

    def measure(run: Callable[[], object], *, suite: Suite, group: str, contender: str, dense: bool) -> None:
        benchmark.group = f"{suite.name} {group}"
        benchmark.extra_info.update(contender=contender, dense=dense)
        benchmark.pedantic(run, rounds=ROUNDS, iterations=_calls_per_round(run), warmup_rounds=1)
        if benchmark.stats is not None:  # None under --benchmark-disable
            stats = benchmark.stats.stats
            turn = Turn(suite, group, contender, dense, stats.median, stats.min)
            request.config.stash[TURNS].append(turn)

    return measure


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    turns = config.stash[TURNS]
    about = circumstances(config.getoption("--threads"), sp.env())
    for suite in dict.fromkeys(turn.suite for turn in turns):
        rows = compare([turn for turn in turns if turn.suite == suite])
        if not rows:
            continue
        terminalreporter.section(f"{suite.name}: dense against sparse")
        terminalreporter.write_line(
            f"median us of {suite.call}; weights {suite.weights}; {about['threads']} thread(s); "
            f"{about['cpu']}, {about['isa']}, torch {about['torch']}"
        )
        for line in table(rows):
            terminalreporter.write_line(line)
        if about["load"] > about["threads"] + 0.5:
            busy = f"The machine was busy (load {about['load']}): medians of long calls are inflated, "
            terminalreporter.write_line(f"{busy}trust the fastest rounds; do not quote this table.")
        if exitstatus != 0 or config.getoption("keyword"):
            terminalreporter.write_line("not written: a part of the benchmarks, or a failed one")
            continue
        path = RESULTS / f"{suite.name}_{about['isa']}_{about['threads']}thread_{suite.weights}.json"
        write(path, suite, about, rows)
        terminalreporter.write_line(f"written to {path.relative_to(Path(__file__).parent.parent)}")
