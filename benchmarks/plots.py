"""Pictures of the benchmark page, drawn from the JSON alone."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.goals import SPEED_UPS, geometric_mean
from sparse_pathways.report.figures import COLOURS

Rows = list[dict[str, Any]]

SPARSITY_COLOURS = {0.7: COLOURS[0], 0.9: COLOURS[1], 0.95: COLOURS[2]}
ROWS_COLOURS = ("#0b3954", "#1b6ca8", "#3fa7d6", "#59cd90", "#a7c957", "#fac05e", "#f79d84", "#ee6352", "#a4243b")
GROUP_COLOURS = {
    "products": "#33658a",
    "LSTM": "#1b998b",
    "attention": "#8f5ea8",
    "layer norm": "#b8860b",
    "activations": "#f26419",
    "arithmetic": "#c0392b",
    "copies": "#7f8c8d",
    "views and allocation": "#b9c2c4",
    "Python and between operators": "#e4e4e4",
}


def speed_ups(rows: Rows) -> Figure:
    """One panel per dtype: speed-up over rows M, geometric mean of the shapes as a line, all shapes as a band."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    counts = sorted({row["m"] for row in rows})
    figure = Figure(figsize=(3.55 * len(dtypes) + 1.2, 3.5), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        for sparsity, colour in SPARSITY_COLOURS.items():
            cells = [row for row in rows if row["dtype"] == dtype and row["sparsity"] == sparsity]
            if not cells:
                continue
            ratios = [[row["ratio"] for row in cells if row["m"] == m] for m in counts]
            places = [place for place, values in enumerate(ratios) if values]
            ratios = [values for values in ratios if values]
            axes.fill_between(places, *zip(*((min(v), max(v)) for v in ratios), strict=True), color=colour, alpha=0.15)
            means = [geometric_mean(values) for values in ratios]
            axes.plot(places, means, "o-", color=colour, markersize=4, label=f"{sparsity:.0%} pruned")
            if (goal := SPEED_UPS.get((dtype, sparsity))) is not None:
                axes.axhline(goal, color=colour, linewidth=0.8, linestyle=":")
        axes.axhline(1, color="black", linewidth=1.2)
        axes.set_title(dtype, fontsize=10)
        axes.set_xticks(range(len(counts)), [str(m) for m in counts])
        axes.set_xlabel("rows M (frames at once)")
        _log(axes, "y")
    panels[0].set_ylabel("speed-up over the best dense")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    return figure


def roofline(rows: Rows, ceilings: dict[str, Any], home: str) -> Figure:
    """One panel per dtype: operations per second against operations per byte, under the ceilings of the same run."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    counts = sorted({row["m"] for row in rows})
    figure = Figure(figsize=(3.55 * len(dtypes) + 1.2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    low = min(row["intensity"] for row in rows) / 2
    high = max(row["intensity"] for row in rows) * 2
    for axes, dtype in zip(panels, dtypes, strict=True):
        peak = ceilings[dtype]["median"] if ceilings.get(dtype) else None
        lines = []
        for name, style in (("L2", ":"), (home, "-")):
            stream = ceilings[name]["median"]
            end = high if peak is None else min(high, peak / stream)
            label, black = f"{name}, {stream:.0f} GB/s", "#444444"
            lines += axes.plot([low, end], [stream * low, stream * end], style, color=black, linewidth=1, label=label)
        if peak is not None:
            label = f"multiply-add, {peak:.0f}e9 per s"
            lines.append(axes.axhline(peak, color="#444444", linewidth=1.8, label=label))
        for m in counts:
            cells = [row for row in rows if row["dtype"] == dtype and row["m"] == m]
            axes.scatter(
                [row["intensity"] for row in cells],
                [row["gflops"] for row in cells],
                s=11,
                color=_colour(m, counts),
                zorder=3,
            )
        axes.set_title(dtype, fontsize=10)
        axes.set_xlim(low, high)
        _log(axes, "x")
        _log(axes, "y")
        axes.set_xlabel("operations per byte")
        axes.legend(handles=lines, frameon=False, fontsize=7, loc="lower right")
    panels[0].set_ylabel("1e9 operations per second")
    handles = [Line2D([], [], linestyle="", marker="o", markersize=4, color=_colour(m, counts)) for m in counts]
    figure.legend(handles, [f"M={m}" for m in counts], frameon=False, fontsize=8, loc="outside right center")
    return figure


def _colour(m: int, counts: list[int]) -> str:
    return ROWS_COLOURS[counts.index(m) * (len(ROWS_COLOURS) - 1) // max(1, len(counts) - 1)]


def lstm(rows: Rows) -> Figure:
    """Bars: speed-up of the packed step over the best dense one, by form and streams."""
    groups = list(dict.fromkeys((row["form"], row["dtype"], row["m"]) for row in rows))
    sparsities = [sparsity for sparsity in SPARSITY_COLOURS if any(row["sparsity"] == sparsity for row in rows)]
    figure = Figure(figsize=(max(6.0, 0.75 * len(groups) + 1.5), 3.2))
    axes = _plain(figure.subplots())
    width = 0.8 / len(sparsities)
    for number, sparsity in enumerate(sparsities):
        cells = [row for row in rows if row["sparsity"] == sparsity]
        at = [groups.index((row["form"], row["dtype"], row["m"])) for row in cells]
        places = [place + (number - (len(sparsities) - 1) / 2) * width for place in at]
        heights = [row["ratio"] for row in cells]
        colour = SPARSITY_COLOURS[sparsity]
        bars = axes.bar(places, heights, width * 0.92, color=colour, label=f"{sparsity:.0%} pruned")
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=1.2)
    axes.set_xticks(range(len(groups)), [f"{form}\n{dtype}\nM={m}" for form, dtype, m in groups], fontsize=7)
    axes.set_ylabel("speed-up over the best dense")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def operators(rows: Rows) -> Figure:
    """Stacked bars: milliseconds of one chunk by group of operators, one bar per model."""
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.5))
    axes = _plain(figure.subplots(), across="x")
    left = [0.0] * len(rows)
    for group, colour in GROUP_COLOURS.items():
        widths = [row["groups"][group] for row in rows]
        if any(widths):
            axes.barh(range(len(rows)), widths, 0.7, left=left, color=colour, label=group)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (row, end) in enumerate(zip(rows, left, strict=True)):
        products = row["groups"]["products"] + row["groups"]["LSTM"]
        axes.text(end, place, f"  {end:.1f} ms, products {products / end:.0%}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['dtype']}, {row['contender']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms per chunk of 160 ms of audio, under the profiler")
    axes.margins(x=0.22)
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.5 / len(rows) - 0.1))
    return figure


def _plain(axes: Axes, across: str = "y") -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=across, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def _log(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers."""
    _plain(axes, "both")
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    steps: Sequence[float] = (1, 2, 5) if high / low < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
