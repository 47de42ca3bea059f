"""Pictures of the results: sparsity against errors, convergence, churn of masks and overlap of languages over time."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.statistics import Results, Row
from sparse_pathways.report.figures import COLOURS, to_svg

SWEPT = (
    ("lap", "one shared mask"),
    ("pathways-lsp", "fixed pathways (LSP)"),
    ("dynamic-wg", "dynamic pathways, |w g|"),
    ("dynamic-across", "dynamic pathways, |w g|, one ranking, longer average"),
)
BINS = 25  # of a curve
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
FOLLOWED = ("lap", "pathways-lsp", "dynamic-magnitude", "dynamic-lap70", "dynamic-wg", "dynamic-across")


def sparsity_figure(results: Results) -> Figure | None:
    """Mean word error rate over sparsity, a line per method, dense as a level."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = _plain(figure.subplots())
    drawn = False
    for (name, label), colour in zip(SWEPT, COLOURS, strict=False):
        rows = [(s, row) for s in SPARSITIES if (row := results.row(name, s)) is not None]
        if not rows:
            continue
        drawn = True
        axes.plot([100 * s for s, _ in rows], [100 * row.mean() for _, row in rows], "o-", color=colour, label=label)
        for sparsity, row in rows:
            axes.plot([100 * sparsity] * len(row.results), [100 * w for w in row.wer()], ".", color=colour, alpha=0.5)
    if not drawn:
        return None
    for name, style in (("dense", "-"), ("tuned", "--")):
        if (row := results.row(name, 0.0)) is not None:
            axes.axhline(100 * row.mean(), color="black", linewidth=1, linestyle=style, label=row.label)
    axes.set_xlabel("blocks pruned [%]")
    axes.set_ylabel("mean word error rate [%]")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _curves(results: Results, sparsity: float, curve: str, column: int, label: str) -> Figure | None:
    """A curve of the last stage over its steps, mean of the seeds, a line per method."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = _plain(figure.subplots())
    drawn = False
    for name, colour in zip(FOLLOWED, COLOURS, strict=False):
        row = results.row(name, sparsity)
        points = _mean_curve(row, curve, column) if row is not None else []
        if row is None or not points:
            continue
        drawn = True
        axes.plot(*zip(*points, strict=True), color=colour, label=row.label, linewidth=1.4)
    if not drawn:
        return None
    axes.set_xlabel("optimiser steps of the joint phase")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _mean_curve(row: Row, curve: str, column: int) -> list[tuple[float, float]]:
    """Mean over seeds, bin by bin: with masks of their own, languages are decided at other steps in every seed."""
    binned: dict[int, list[list[tuple[float, float]]]] = defaultdict(list)
    curves = [result["history"][curve] for result in row.results.values()]
    width = max((point[0] for one in curves for point in one), default=0) / BINS
    for one in curves:
        for bin_, points in itertools.groupby(one, lambda point: math.ceil(point[0] / width)):
            binned[bin_].append([(point[0], point[column]) for point in points])
    shared = [seeds for _, seeds in sorted(binned.items()) if len(seeds) == len(curves)]
    means = [[tuple(map(statistics.fmean, zip(*points, strict=True))) for points in seeds] for seeds in shared]
    return [(statistics.fmean(x for x, _ in seeds), statistics.fmean(y for _, y in seeds)) for seeds in means]


FIGURES: dict[str, tuple[str, Callable[[Results], Figure | None]]] = {
    "sparsity": ("Sparsity against word error rate; dots are seeds.", sparsity_figure),
    "loss-90": ("Training loss at 90 %.", lambda r: _curves(r, 0.9, "loss", 1, "loss per token")),
    "dev-90": ("Word error rate on the dev split at 90 %.", lambda r: _curves(r, 0.9, "dev", 1, "mean WER, dev")),
    "churn-90": (
        "Masks: intersection over union of a mask before and after each decision, at 90 %.",
        lambda r: _curves(r, 0.9, "decisions", 2, "IoU with the mask before"),
    ),
    "overlap-90": (
        "Languages: mean intersection over union of the masks of two languages, at 90 %.",
        lambda r: _curves(r, 0.9, "overlap", 1, "IoU between languages"),
    ),
}


def write_plots(results: Results, folder: Path) -> list[str]:
    """SVG files of all pictures there is something to draw in; Markdown lines that show them."""
    lines = ["## Pictures", ""]
    folder.mkdir(parents=True, exist_ok=True)
    for name, (caption, draw) in FIGURES.items():
        path = folder / f"{name}.svg"
        figure = draw(results)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        path.write_text(to_svg(figure), encoding="utf-8")
        lines += [f"![{caption}]({folder.name}/{name}.svg)", "", caption, ""]
    return lines if len(lines) > 2 else []


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes
