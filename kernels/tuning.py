"""Schedules found by measuring, and where they are kept.

`schedule` is what every launcher asks: the user's file first (`SPARSE_PATHWAYS_SCHEDULES`, default
~/.cache/sparse_pathways/schedules), then the table shipped for this device (kernels/schedules/), then the rule. Nothing
is measured behind the caller's back: `tune` does it when asked, checks every candidate's result before timing it, and
writes the user's file. `benchmarks/gpu/run.py --tune` tunes the package's shapes. A schedule changes the order of a sum
at most, never what is summed.

A schedule is kept by kind, rows, block and dtype, and serves every N, K and density of these: it says how one block is
cut, and N, K and density only change how many blocks there are. Where few programs fill the device unevenly that is a
guess: the entry is the best of the last shape tuned, not of each.
"""

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import triton
from sparse_pathways.kernels.schedule import Schedule, rule, rule_dw
from torch import Tensor

KINDS = ("product", "dw")
VARIABLE = "SPARSE_PATHWAYS_SCHEDULES"
SHIPPED = Path(__file__).with_name("schedules")
RULES = {"product": rule, "dw": rule_dw}


def user_folder() -> Path:
    """Folder of the user's tables."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "sparse_pathways" / "schedules")


def file_name(device: str) -> str:
    """Name of a device's table."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def key(kind: str, m: int, sides: tuple[int, int], dtype: torch.dtype) -> str:
    """The products that one entry serves: rows count up to the next power of two, between 16 and 65536; outputs,
    inputs and density do not count."""
    rows = min(65536, max(16, triton.next_power_of_2(m)))
    return f"{kind} M{rows} {sides[0]}x{sides[1]} {str(dtype).removeprefix('torch.')}"


def _legal(name: str, numbers: object) -> Schedule:
    """The schedule of one entry, or ValueError."""
    match = re.fullmatch(r"(\w+) M\d+ (\d+)x(\d+) \w+", name)
    if match is None or match[1] not in KINDS:
        raise ValueError(f"entry {name!r} names no product")
    if not isinstance(numbers, list) or len(numbers) != 5 or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"entry {name!r} is {numbers}; want five numbers {Schedule._fields}")
    found = Schedule(*numbers)
    tiles_divide = int(match[2]) % found.tile_out == 0 and int(match[3]) % found.tile_red == 0
    if not tiles_divide or min(found[:3]) < 16 or any(n & (n - 1) for n in found[:4]):
        raise ValueError(f"entry {name!r}: {found} does not cut this block into powers of two from 16 up")
    return found


def read_table(path: Path) -> dict[str, Schedule]:
    """Entries of a table file; an unreadable file is named in a warning and counts as empty."""
    try:
        return {name: _legal(name, numbers) for name, numbers in json.loads(path.read_text())["schedules"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is no table of schedules and is not used: {error}; delete it or tune again", stacklevel=2
        )
        return {}


@functools.cache
def _table(device: str) -> dict[str, tuple[Schedule, str]]:
    table: dict[str, tuple[Schedule, str]] = {}
    for origin, folder in (("shipped", SHIPPED), ("tuned here", user_folder())):
        table |= {name: (found, origin) for name, found in read_table(folder / file_name(device)).items()}
    return table


def schedule(kind: str, m: int, sides: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Schedule:
    """The schedule of a product.

    Args:
        kind: "product" (forward and dx) or "dw".
        m: rows.
        sides: of a block along the outputs and along the sum; of "dw" (R, C).
        dtype: of the operands.
        device: where it will run.
    """
    if device.type == "cuda":
        found = _table(torch.cuda.get_device_name(device)).get(key(kind, m, sides, dtype))
        if found is not None:
            return found[0]
    return RULES[kind](m, *sides, dtype)


def origin(kind: str, m: int, sides: tuple[int, int], dtype: torch.dtype, device: str) -> str:
    """Where the schedule of a product on the named device comes from: "tuned here", "shipped" or "rule"."""
    return _table(device).get(key(kind, m, sides, dtype), (None, "rule"))[1]


def candidates(kind: str, m: int, sides: tuple[int, int], dtype: torch.dtype) -> list[Schedule]:
    """The rule's schedule, and its neighbours: tiles halved and doubled, other warps, every depth of the pipeline."""
    start = RULES[kind](m, *sides, dtype)
    found = [start]
    halves = 1 if dtype == torch.float32 else 2
    for tile_m in sorted({max(16, start.tile_m // 2), start.tile_m, min(256, start.tile_m * 2)}):
        for tile_out in sorted({max(16, start.tile_out // halves), start.tile_out}):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    found.append(Schedule(tile_m, tile_out, start.tile_red, warps, stages))
    sums = {one: one.tile_out * (one.tile_red if kind == "dw" else one.tile_m) for one in found}
    return [one for one, size in sums.items() if size <= 64 * 32 * one.num_warps]  # more per thread would be spilled


def _median_ms(run: Callable[[], Tensor]) -> float:
    """Median time by Triton's own timer, which clears the L2 cache between calls."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


def tune(
    name: str,
    run: Callable[[Schedule], Tensor],
    tried: Iterable[Schedule],
    device: str,
    time_ms: Callable[[Callable[[], Tensor]], float] = _median_ms,
) -> tuple[Schedule, dict[Schedule, float | str]]:
    """Time every candidate, keep the fastest in the user's table.

    Args:
        name: `key` of the product.
        run: the product under a schedule.
        tried: candidates; the first is the rule's, whose result the others must have.
        device: name of the device.
        time_ms: how a call is timed.

    Returns:
        (fastest, what became of each: milliseconds, or why it was left out).
    """
    expected, outcome = None, {}
    for one in tried:
        try:
            y = run(one)
            if expected is None:
                expected = y.double()
            eps = torch.finfo(y.dtype).eps
            if not torch.allclose(y.double(), expected, rtol=4 * eps, atol=4 * eps * float(expected.abs().max())):
                outcome[one] = "wrong: its result is not that of the rule's schedule"
                continue
            outcome[one] = time_ms(functools.partial(run, one))
        except triton.runtime.errors.OutOfResources as error:
            outcome[one] = f"too large: {error}"
    timed = {one: ms for one, ms in outcome.items() if isinstance(ms, float)}
    if not timed:
        raise RuntimeError(f"no schedule of {name} runs: {outcome}")
    best = min(timed, key=lambda one: timed[one])
    write(device, {name: best})
    return best, outcome


def write(device: str, entries: dict[str, Schedule]) -> Path:
    """Add entries to the user's table of a device, in one step that another process cannot see half done."""
    path = user_folder() / file_name(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = read_table(path) | entries
    about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    text = json.dumps(about | {"schedules": {name: list(table[name]) for name in sorted(table)}}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text + "\n")
    os.replace(file.name, path)
    _table.cache_clear()
    return path
