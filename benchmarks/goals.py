"""What the figures are meant to reach: each goal against what was measured, for the terminal and the page."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

Rows = list[dict[str, Any]]

SPEED_UPS = {
    ("float32", 0.7): 3.0,
    ("float32", 0.9): 8.0,
    ("bfloat16", 0.7): 3.0,
    ("bfloat16", 0.9): 8.0,
    ("int8", 0.7): 2.0,
    ("int8", 0.9): 4.5,
}
LSTM_SPEED_UPS = {0.7: 4.0, 0.9: 12.0}
PEAK_SHARE, PEAK_ROWS = 0.85, 32
BANDWIDTH_SHARE = 0.80
TRAIN_ROWS = 16


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _goal(what: str, unit: str, goal: float, value: float, note: str) -> dict[str, Any]:
    return {"what": what, "unit": unit, "goal": goal, "value": value, "reached": value >= goal, "note": note}


def form(value: float, unit: str) -> str:
    """A speed-up ("x") or a share ("%") in words."""
    return f"{value:.2f}x" if unit == "x" else f"{value:.0%}"


def _place(row: dict[str, Any]) -> str:
    return f"{row['n']}x{row['k']} M={row['m']}"


def linear(rows: Rows, level: str) -> list[dict[str, Any]]:
    """Goals of one table of linear layers; only those that its rows can answer."""
    found = []
    for (dtype, sparsity), goal in SPEED_UPS.items():
        cells = [row for row in rows if row["dtype"] == dtype and row["sparsity"] == sparsity]
        if not cells:
            continue
        mean, worst = geometric_mean(row["ratio"] for row in cells), min(cells, key=lambda row: row["ratio"])
        what = f"{dtype}, {sparsity:.0%}: geometric mean of the speed-ups"
        spread = f"lowest {worst['ratio']:.2f}x at {_place(worst)}, {len(cells)} cells"
        found.append(_goal(what, "x", goal, mean, spread))
        if sparsity == 0.7:
            slower = sum(row["ratio"] < 1 for row in cells)
            what = f"{dtype}, {sparsity:.0%}: the slowest cell"
            found.append(_goal(what, "x", 1.0, worst["ratio"], f"{slower} cells slower than dense"))
    if level == "l2":
        found += _shares(
            [r for r in rows if r["dtype"] == "float32" and r["m"] >= PEAK_ROWS],
            "peak_share",
            PEAK_SHARE,
            f"float32, M >= {PEAK_ROWS}: share of the FMA peak",
        )
    if level == "l3":
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            cells = [row for row in rows if row["dtype"] == dtype and row["m"] == 1]
            found += _shares(cells, "bandwidth_share", BANDWIDTH_SHARE, f"{dtype}, M = 1: share of streaming bandwidth")
    return found


def _shares(rows: Rows, key: str, goal: float, what: str) -> list[dict[str, Any]]:
    """The goal is for every cell, so the lowest decides; the mean stands beside it."""
    found = []
    for sparsity in sorted({row["sparsity"] for row in rows if row[key] is not None}):
        cells = [row for row in rows if row["sparsity"] == sparsity]
        worst, mean = min(cells, key=lambda row: row[key]), geometric_mean(row[key] for row in cells)
        reach = sum(row[key] >= goal for row in cells)
        note = f"at {_place(worst)}; geometric mean {mean:.0%}; {reach} of {len(cells)} cells reach it"
        found.append(_goal(f"{what}, {sparsity:.0%}, lowest cell", "%", goal, worst[key], note))
    return found


def lstm(rows: Rows) -> list[dict[str, Any]]:
    """Goals of the recurrent step: against LSTMCell, one stream, float32; the LayerNorm step by more."""
    found = []
    for row in rows:
        goal = LSTM_SPEED_UPS.get(row["sparsity"])
        if goal is None or row["dtype"] != "float32" or row["m"] != 1:
            continue
        rival = "nn.LSTMCell" if row["form"] == "plain" else "_CustomLSTM"
        ratio = row["dense"][rival] / row["sparse_us"]
        what = f"{row['form']} LSTM step, {row['sparsity']:.0%}: speed-up over {rival}"
        spread = f"{row['ratio']:.2f}x over the best dense one ({row['best_dense']})"
        found.append(_goal(what, "x", goal, ratio, spread))
    return found


def train(rows: Rows) -> list[dict[str, Any]]:
    """Goals of a training step: every cell from TRAIN_ROWS rows on is faster than dense."""
    found = []
    for sparsity, gradient in sorted({(row["sparsity"], row["gradient"]) for row in rows}):
        cells = [
            row for row in rows if (row["sparsity"], row["gradient"]) == (sparsity, gradient) and row["m"] >= TRAIN_ROWS
        ]
        if cells:
            worst, mean = min(cells, key=lambda row: row["ratio"]), geometric_mean(row["ratio"] for row in cells)
            what = f"training step, {sparsity:.0%}, gradient of {gradient} weights, M >= {TRAIN_ROWS}: the slowest cell"
            note = f"at {_place(worst)}; geometric mean {mean:.2f}x, {len(cells)} cells"
            found.append(_goal(what, "x", 1.0, worst["ratio"], note))
    return found


def lines(goals: list[dict[str, Any]]) -> list[str]:
    """For the terminal."""
    width = max((len(goal["what"]) for goal in goals), default=0)
    return [
        f"{'reached' if goal['reached'] else 'SHORT':8} {goal['what']:{width}} {form(goal['value'], goal['unit']):>7} "
        f"(goal {form(goal['goal'], goal['unit'])}; {goal['note']})"
        for goal in goals
    ]
