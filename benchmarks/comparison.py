"""From timings to a table: dense and sparse side by side, ratios from pairs measured next to each other.

Every contender of a group runs many short times, in turn with the others ("turns"). A ratio is taken within a turn,
where both sides saw the same machine; the table shows the median of the ratios and their quartiles.
"""

import json
import os
import platform
import statistics
import subprocess
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Suite:
    """What one table measures."""

    name: str
    call: str  # what is timed
    weights: str  # "hot": in cache from call to call; "cold": evicted from L2 between calls; "model": a whole one


@dataclass(frozen=True)
class Turn:
    """One contender's turn: seconds per call, median and fastest round."""

    suite: Suite
    group: str
    contender: str
    dense: bool
    median: float
    fastest: float


@dataclass(frozen=True)
class Row:
    """One sparse contender against the best dense one of its group. Ratio above 1: sparse is faster."""

    group: str
    contender: str
    best_dense: str
    dense_us: float
    sparse_us: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    ratio_of_fastest: float  # of the fastest rounds of all turns: what a quiet machine would show
    all_dense_us: dict[str, float]


def compare(turns: list[Turn]) -> list[Row]:
    """Rows of one suite, groups in order of appearance; the best dense contender has the lowest median of its turns."""
    groups: dict[str, dict[str, list[Turn]]] = defaultdict(lambda: defaultdict(list))
    for turn in turns:
        groups[turn.group][turn.contender].append(turn)
    rows = []
    for group, contenders in groups.items():
        medians = {name: statistics.median(t.median for t in of_name) * 1e6 for name, of_name in contenders.items()}
        dense = {name: us for name, us in medians.items() if contenders[name][0].dense}
        if not dense:
            continue
        best = min(dense, key=dense.__getitem__)
        fastest_dense = min(turn.fastest for turn in contenders[best])
        for name in sorted(contenders.keys() - dense.keys()):
            ratios = [d.median / s.median for d, s in zip(contenders[best], contenders[name], strict=False)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            fastest = fastest_dense / min(turn.fastest for turn in contenders[name])
            rows.append(Row(group, name, best, dense[best], medians[name], middle, (low, high), fastest, dense))
    return rows


def table(rows: list[Row]) -> list[str]:
    """Lines of text; a sparse contender that loses stays in and is marked."""
    group_width, name_width = (max(len(getattr(row, column)) for row in rows) for column in ("group", "contender"))
    dense_width = max(10, *(len(row.best_dense) for row in rows))
    left = f"{'':{group_width}}  {'best dense':{dense_width}} {'us':>9}"
    lines = [f"{left}   {'sparse':{name_width}} {'us':>9}   ratio  quartiles      fastest"]
    for row in rows:
        low, high = row.ratio_quartiles
        quartiles = f"{low:.2f} - {high:.2f}"
        mark = "" if row.ratio >= 1 else "  slower than dense"
        lines.append(
            f"{row.group:{group_width}}  {row.best_dense:{dense_width}} {row.dense_us:9.1f}   "
            f"{row.contender:{name_width}} {row.sparse_us:9.1f}  {row.ratio:5.2f}x  {quartiles:13}  "
            f"{row.ratio_of_fastest:5.2f}x{mark}"
        )
    return lines


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()


def circumstances(threads: int, env: dict) -> dict:
    """What a reader needs to judge the figures; no host name."""
    return {
        "cpu": env["cpu"],
        "isa": env["cpu_backend"],
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "..", ":!results")),
    }


def write(path: Path, suite: Suite, about: dict, rows: list[Row]) -> None:
    """The table as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = []
    for row in rows:
        figures.append(
            asdict(row)
            | {
                "dense_us": round(row.dense_us, 2),
                "sparse_us": round(row.sparse_us, 2),
                "ratio": round(row.ratio, 3),
                "ratio_of_fastest": round(row.ratio_of_fastest, 3),
                "ratio_quartiles": [round(value, 3) for value in row.ratio_quartiles],
                "all_dense_us": {name: round(us, 2) for name, us in row.all_dense_us.items()},
            }
        )
    path.write_text(json.dumps({"suite": asdict(suite), **about, "rows": figures}, indent=1) + "\n")
