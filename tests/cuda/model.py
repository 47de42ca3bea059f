"""Predicted time of the CUDA kernels on an H100, from what the emulator counts. A model, not a measurement.

    python tests/cuda/model.py [counts.json]

Every block of `strips_linear` is emulated once per block shape, height of strips, density and rows per tile; sectors,
wavefronts and tensor-core instructions of a whole product follow. The time is that of the busiest of: shared memory (a
wavefront per clock and multiprocessor), tensor cores (mma.sync), L2, HBM; where one block has a multiprocessor to
itself, the filling of its tile adds up, as nothing overlaps it. Not in it: issue slots, latency of short lists, hits
in L1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from emulation import build, missing, prove

# H100 SXM: HBM and the dense rate as measured on large products, L2 as published by micro-benchmarks, mma.sync as the
# share of the wgmma rate that kernels without wgmma reach.
SMS, CLOCK = 132, 1.755e9
HBM, L2, DENSE = 3.0e12, 5.5e12, 800e12
MMA_SYNC = 1070.0  # bf16 multiply-adds per clock and multiprocessor
LAUNCH_US = 2.0
SHAPES = (
    *((m, n, k) for m in (4096, 16384, 65536) for n, k in ((512, 512), (1536, 512), (2048, 512), (512, 2048))),
    (8192, 4096, 4096),
    *((m, n, k) for m in (1, 8) for n, k in ((512, 512), (2048, 512), (512, 2048))),
)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)


class Prediction(NamedTuple):
    """Time of one product, what bounds it, and how it is cut."""

    us: float
    bound: str
    tile_m: int
    p: int


def dense_us(m: int, n: int, k: int) -> float:
    """cuBLAS in bf16; it reaches its rate at long sums only."""
    return max(2 * m * n * k / (DENSE * k / (k + 170)), 2 * (m * k + n * k + m * n) / HBM) * 1e6 + LAUNCH_US


def _scaled(counts: dict[str, Any], blocks: float, passes: float) -> dict[str, float]:
    """Counts of so many blocks that make so many passes over 256 outputs in all."""
    one, two = counts["passes1"], counts["passes2"]
    keys = ("load_sectors", "store_sectors", "wavefronts", "mma_16816", "mma_1688")
    per_pass = {key: two[key] - one[key] for key in keys}
    fill = {key: one[key] - per_pass[key] for key in keys}
    return {key: blocks * fill[key] + passes * per_pass[key] for key in keys}


def predict(counts: dict[str, Any], m: int, n: int, k: int) -> Prediction:
    """Time of `[m, k] @ [n, k].T`; beyond the K that was emulated, a pass is as many chunks longer."""
    tile, longer = counts["tile_m"], k / counts["k"]
    tiles, passes = -(-m // tile), -(-n // 256)
    if tile == 16:  # blocks of their own for the strips of each pass
        per_pass = counts["passes1"]["blocks"]
        blocks, total = tiles * passes * per_pass, _scaled(counts, 0, tiles * passes)
    else:
        columns = min(passes, -(-2 * SMS // tiles))
        blocks, total = tiles * columns, _scaled(counts, tiles * columns, tiles * passes)
    total = {key: value * longer for key, value in total.items()}
    rounds = -(-blocks // SMS) / blocks  # share of all work that the busiest multiprocessor has
    stored = counts["passes1"]["octets"] * 8 * 2 * (counts["p"] + 1)  # bytes of values and ids per 256 outputs
    seconds = {
        "shared memory": total["wavefronts"] * rounds / CLOCK,
        "tensor cores": (2048 * total["mma_16816"] + 1024 * total["mma_1688"]) / MMA_SYNC * rounds / CLOCK,
        "L2": 32 * (total["load_sectors"] + total["store_sectors"]) / L2,
        "HBM": (2 * (m * k + m * n) + stored * longer * n / 256) / HBM,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    us = seconds[bound] * 1e6
    if tile == 128:
        fills = tiles * (passes if k > 512 else columns)
        us += 2 * tile * k * (tiles / HBM + (fills - tiles) / L2) * 1e6  # the first time from memory, then from L2
    return Prediction(us + LAUNCH_US, "launch" if us < LAUNCH_US else bound, tile, counts["p"])


def best(table: list[dict[str, Any]], r: int, sparsity: float, m: int, n: int, k: int) -> Prediction:
    """The fastest way that the model finds for blocks of r x 1."""
    emulated = 512 if k <= 512 else 2048
    fitting = [c for c in table if c["r"] == r and abs(1 - sparsity - c["density"]) < 1e-6 and c["k"] == emulated]
    return min(predict(c, m, n, k) for c in fitting if (c["tile_m"] == 16) == (m <= 16))


def rows(table: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """(m, n, k, r, sparsity, prediction, ratio to dense)."""
    for m, n, k in SHAPES:
        for r in (8, 16, 32, 64):
            for sparsity in SPARSITIES:
                found = best(table, r, sparsity, m, n, k)
                yield m, n, k, r, sparsity, found, dense_us(m, n, k) / found.us


def conflicts(table: list[dict[str, Any]]) -> float:
    """Largest share of shared-memory clocks lost to bank conflicts, many rows."""
    many = [c["passes2"] for c in table if c["tile_m"] >= 64]
    return max(c["wavefronts"] / c["ideal_wavefronts"] - 1 for c in many)


def load(path: str | None) -> list[dict[str, Any]]:
    """Counts from a file, else from the emulator (minutes)."""
    if path is not None:
        return json.loads(Path(path).read_text())
    done = prove(build("traced"), "--counts")
    if done.returncode:
        raise RuntimeError(done.stdout)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table."""
    if (reason := missing()) is not None:
        raise SystemExit(f"no counts: {reason}")
    table = load(sys.argv[1] if len(sys.argv) > 1 else None)
    print("bf16 strips_linear on an H100: MODEL from emulator counts, nothing here was measured on a device")
    print(f"clocks lost to bank conflicts, 64 and 128 rows: at most {conflicts(table):.0%}\n")
    print("Packed weights always take strips: a packed model keeps no dense weight to take instead. Training with such")
    print("blocks takes the dense product of the masked weight.\n")
    print("     M     N     K  block  sparsity  strips  tile    us (model)  bound          to dense (model)  faster")
    for m, n, k, r, sparsity, found, ratio in rows(table):
        print(
            f"{m:6} {n:5} {k:5}  {r:3}x1  {sparsity:7.0%}  {found.p:6}  {found.tile_m:4}  {found.us:10.1f}    "
            f"{found.bound:13}  {ratio:10.2f}x       {'sparse' if ratio >= 1 else 'dense'}"
        )


if __name__ == "__main__":
    main()
