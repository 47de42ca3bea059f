"""Results as JSON: what was measured, where, by which commit, and how busy the machine was."""

import datetime
import json
import os
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import sparse_pathways as sp

HERE = Path(__file__).parent
PREEMPTIONS_PER_SECOND = 20  # by the system's own threads on a quiet machine: fewer


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()


class Circumstances:
    """What a reader needs to judge figures. Make it before the measurements, ask `describe` after them."""

    def __init__(self) -> None:
        self._began, self._load = time.monotonic(), os.getloadavg()[0]
        self._preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def describe(self) -> dict[str, Any]:
        """Time, commit, machine and versions; load before and after; how often others took the core away."""
        seconds = time.monotonic() - self._began
        preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - self._preempted
        return {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "--short=12", "HEAD") or None,
            "uncommitted_changes": bool(_git("status", "--porcelain", "--", "..", ":!results")),
            "env": sp.env(),
            "seconds": round(seconds),
            "load": [round(self._load, 1), round(os.getloadavg()[0], 1)],
            "preemptions_per_second": round(preempted / max(seconds, 1e-9), 1),
        }


def busy(about: dict[str, Any]) -> str | None:
    """A warning when somebody else used the machine; None when it was quiet."""
    threads, rate, (before, after) = about["env"]["threads"], about["preemptions_per_second"], about["load"]
    if max(before, after) <= threads + 0.5 and rate <= PREEMPTIONS_PER_SECOND:
        return None
    return (
        f"The machine was busy (load {before} before, {after} after, {rate} preemptions a second): "
        "trust the ratios of the fastest turns, do not quote this table."
    )


def _rounded(value: Any) -> Any:
    """Four significant digits: more would be noise, and files would differ for nothing."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def write(path: Path, suite: str, what: dict[str, Any], about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One suite as JSON, a row per line."""
    head = json.dumps({"suite": suite, **_rounded(what), "about": about}, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(_rounded(row)) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
