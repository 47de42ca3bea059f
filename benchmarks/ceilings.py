"""Ceilings of one thread, measured beside the products: multiply-add rate by dtype, bandwidth by what is read."""

import ctypes
import functools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "ceilings.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC")
PEAKS = {"float32": "FmaFloat32", "bfloat16": "DotBFloat16", "int8": "DotInt8"}
ROUNDS = 16
ROUND_SECONDS = 1e-3


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the ceilings of this machine need a C++ compiler: install g++ or point CXX to one")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ceilings.so"
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    for name in (*PEAKS.values(), "ReadMemory"):
        getattr(library, name).restype = ctypes.c_double
    return library


def _best_rate(run: Callable[[], float], rounds: int) -> float:
    """Most per second of any round: a ceiling is what the machine does when nobody interferes."""
    rates = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        done = run()
        rates.append(done / (time.perf_counter() - start))
    return max(rates[1:])


def peak(dtype: str) -> float | None:
    """Operations per second (a multiply-add is two) of one thread on registers; None: no instruction for this dtype."""
    function = getattr(_library(), PEAKS[dtype])
    start, steps = time.perf_counter(), 20_000
    if function(ctypes.c_int64(steps)) == 0:
        return None
    steps = round(steps * ROUND_SECONDS / (time.perf_counter() - start))
    return _best_rate(lambda: function(ctypes.c_int64(steps)), ROUNDS)


@functools.lru_cache(maxsize=4)
def _buffer(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.int8)


def bandwidth(nbytes: int) -> float:
    """Bytes per second of one thread that reads `nbytes` in order, again and again."""
    memory, passes = _buffer(nbytes), max(1, 2**22 // nbytes)

    def read() -> float:
        return sum(
            _library().ReadMemory(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(nbytes)) for _ in range(passes)
        )

    return _best_rate(read, ROUNDS)


def summary(samples: list[dict[str, float | None]]) -> dict[str, dict[str, float] | None]:
    """{name: {median, lowest, highest}} of ceilings sampled all through a run, in 1e9 per second."""
    result: dict[str, dict[str, float] | None] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [value / 1e9 for sample in samples if (value := sample.get(name)) is not None]
        result[name] = (
            {"median": statistics.median(values), "lowest": min(values), "highest": max(values)} if values else None
        )
    return result


def sentence(limits: dict[str, dict[str, float] | None]) -> str:
    """The medians, for the terminal."""
    parts = [
        f"{name} {value['median']:.0f} {'1e9 operations/s' if name in PEAKS else 'GB/s'}"
        for name, value in limits.items()
        if value is not None
    ]
    return "ceilings of one thread: " + ", ".join(parts)
