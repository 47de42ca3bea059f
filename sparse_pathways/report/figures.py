"""Pictures of a comparison, as SVG. Each function draws one and returns None where there is nothing to draw."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from sparse_pathways.report.results import ModelResult, Speed, best_dense
from sparse_pathways.report.speed import best_dense_us
from sparse_pathways.report.tables import short

COLOURS = ("#33658a", "#f26419", "#2f9c6a", "#8f5ea8", "#c0392b", "#7f8c8d", "#b8860b", "#1b998b")

Colours = Mapping[str, str]
"""Colour of every model and run by name, the same in every picture."""

Log = Sequence[Mapping[str, Any]]


def colours_of(names: Iterable[str]) -> Colours:
    """Give every name a colour; a run that is no model comes after the models."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(names))}


def to_svg(figure: Figure) -> str:
    """Figure as SVG text, the same for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparse-pathways"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def word_errors(models: Sequence[ModelResult], colours: Colours) -> Figure:
    """Bars: word error rate by language, one bar per model."""
    groups = [*models[0]["languages"], "mean"]
    figure = Figure(figsize=(9, 3.6))
    axes = _plain(figure.subplots())
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        rates = [100 * model["languages"][name]["wer"] for name in groups[:-1]] + [100 * model["wer"]]
        places = [group + (number - (len(models) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, rates, width * 0.92, color=colours[model["name"]], label=model["name"])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("word error rate [%]")
    _legend_beside(axes)
    return figure


def overlaps(models: Sequence[ModelResult]) -> Figure | None:
    """Heat maps: intersection over union of the languages' masks, one map per pruned model."""
    pruned = [model for model in models if model["overlap"]]
    if not pruned:
        return None
    figure = Figure(figsize=(2.7 * len(pruned) + 1, 3.2), layout="constrained")
    row = figure.subplots(1, len(pruned), squeeze=False)[0]
    lowest = min(min(line) for model in pruned for line in model["overlap"])
    lowest = min(0.9, math.floor(10 * lowest) / 10)
    for axes, model in zip(row, pruned, strict=True):
        names = list(model["languages"])
        axes.imshow(model["overlap"], vmin=lowest, vmax=1, cmap="YlGnBu")
        axes.set_title(model["name"], fontsize=10)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        for y, line in enumerate(model["overlap"]):
            for x, value in enumerate(line):
                dark = value > (1 + lowest) / 2
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
    figure.colorbar(row[0].images[0], ax=row.tolist(), label="intersection over union", shrink=0.85)
    return figure


PANELS: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    ("training loss", lambda record: record.get("loss")),
    ("dev word error rate [%]", lambda record: _times100(_mean(record.get("wer")))),
    ("sparsity [%]", lambda record: _times100(record.get("sparsity"))),
    ("mean overlap of masks", lambda record: record.get("overlap")),
    ("blocks in any mask [%]", lambda record: _times100(record.get("union"))),
    ("blocks ever tried [%]", lambda record: _times100(record.get("explored"))),
    ("exchanged at a decision [%]", lambda record: _exchanged(record.get("event"))),
)


def progress(logs: Mapping[str, Log], colours: Colours) -> Figure | None:
    """Curves over the steps: dense runs on the left, pruning runs on the right, one row per quantity."""
    pruning = {name: any("sparsity" in record for record in log) for name, log in logs.items()}
    columns = [[name for name in logs if pruning[name] == kind] for kind in (False, True) if kind in pruning.values()]
    curves = {(label, name): _series(log, read) for label, read in PANELS for name, log in logs.items()}
    rows = [label for label, _ in PANELS if any(curves[label, name][0] for name in logs)]
    if not rows:
        return None
    figure = Figure(figsize=(1 + 4.5 * len(columns), 2.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="row")
    for place, label in enumerate(rows):
        for names, axes in zip(columns, grid[place], strict=True):
            drawn = [_curve(axes, label, *curves[label, name], colours[name], name) for name in names]
            if not any(drawn):
                axes.set_visible(False)
        visible = [axes for axes in grid[place] if axes.get_visible()]
        visible[0].set_ylabel(label)
        visible[0].tick_params(labelleft=True)
        if label == "training loss":
            visible[0].set_yscale("log")
            visible[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            visible[0].yaxis.set_major_formatter("{x:g}")
            visible[0].yaxis.set_minor_locator(NullLocator())
        else:
            top = max(max(curves[label, name][1], default=0) for name in logs)
            visible[0].set_ylim(0, 1.08 * top or 1)
    for column in grid.T:
        lowest = [axes for axes in column if axes.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("optimiser step of the run")
        column[0].legend(frameon=False, fontsize=8)
    return figure


def _curve(axes: Axes, label: str, steps: list[float], values: list[float], colour: str, name: str) -> bool:
    """Draw one run's curve, if it has one; what is measured on the dev split is marked point by point."""
    if not steps:
        return False
    style = {"marker": "o", "markersize": 3} if label.startswith("dev") else {}
    _plain(axes).plot(steps, values if style else _smooth(values), color=colour, label=name, **style)  # type: ignore[arg-type]
    return True


FORMS = {"dense": "F.linear", "dense prepacked": "oneDNN prepacked"}


def latencies(models: Sequence[ModelResult]) -> Figure | None:
    """Horizontal bars: milliseconds of computation per second of audio, with the middle 80 % of utterances."""
    entries = [(model["name"], form, spread) for model in models for form, spread in model["latency"].items()]
    if not entries:
        return None
    figure = Figure(figsize=(9, 0.32 * len(entries) + 0.9))
    axes = _plain(figure.subplots(), across="x")
    form_colours = {"packed": "#2f9c6a", "masked": "#c9c9c9"}
    for place, (_, form, spread) in enumerate(entries):
        median = spread["median"]
        span = [[median - spread["p10"]], [spread["p90"] - median]]
        axes.barh(place, median, 0.7, color=form_colours.get(form, "#33658a"), xerr=span, ecolor="#444444", capsize=2)
        axes.text(spread["p90"], place, f"  {median:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(entries)), [f"{name}, {FORMS.get(form, form)}" for name, form, _ in entries])
    axes.invert_yaxis()
    axes.set_xlabel("ms of computation per second of audio (1000 = real time)")
    axes.margins(x=0.1)
    dense = [best for model in models if (best := best_dense(model)) is not None]
    if dense:
        axes.axvline(min(value for _, value in dense), color="#33658a", linewidth=1, linestyle="--")
    return figure


def layers(models: Sequence[ModelResult], colours: Colours) -> Figure | None:
    """Per layer: density by language, and mean overlap of two languages' masks, for the models with pathways."""
    chosen = [model for model in models if model["kind"] == "pathways"] or [m for m in models if m["layer_density"]]
    if not chosen:
        return None
    names = list(chosen[0]["layer_density"])
    figure = Figure(figsize=(9, 0.2 * len(names) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for model in chosen:
        colour, name = colours[model["name"]], model["name"]
        shares = model["layer_density"]
        means = [100 * statistics.fmean(shares[layer].values()) for layer in names]
        spread = [[100 * min(shares[n].values()) for n in names], [100 * max(shares[n].values()) for n in names]]
        _plain(left, across="x").plot(means, range(len(names)), "o-", color=colour, label=name)
        left.hlines(range(len(names)), *spread, color=colour, linewidth=3, alpha=0.4)
        if model["layer_overlap"]:
            overlap = [model["layer_overlap"][layer] for layer in names]
            _plain(right, across="x").plot(overlap, range(len(names)), "o-", color=colour, label=name)
    left.set_yticks(range(len(names)), [short(layer) for layer in names], fontsize=7)
    left.invert_yaxis()
    left.set_xlim(0, 1.1 * left.get_xlim()[1])
    left.set_xlabel("blocks kept [%], range over languages")
    right.set_xlabel("mean overlap (IoU) of two languages")
    _legend_beside(right)
    return figure


def layer_speeds(speeds: Sequence[Speed]) -> Figure | None:
    """Speed-up of the packed product over the faster dense one, by shape of the layers and number of rows."""
    if not speeds:
        return None
    shapes = list(dict.fromkeys((s["outputs"], s["inputs"]) for s in speeds))
    rows = list(dict.fromkeys(s["rows"] for s in speeds))
    figure = Figure(figsize=(9, 3.2))
    axes = _plain(figure.subplots())
    width = 0.8 / len(rows)
    for number, count in enumerate(rows):
        ratios = [
            statistics.median(
                best_dense_us(s) / s["packed_us"]
                for s in speeds
                if (s["outputs"], s["inputs"]) == shape and s["rows"] == count
            )
            for shape in shapes
        ]
        places = [group + (number - (len(rows) - 1) / 2) * width for group in range(len(shapes))]
        bars = axes.bar(
            places, ratios, width * 0.92, color=COLOURS[number % len(COLOURS)], label=f"{count} row{'s' * (count > 1)}"
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(shapes)), [f"{n} x {k}" for n, k in shapes])
    axes.set_xlabel("layer, outputs x inputs")
    axes.set_ylabel("speed-up over dense")
    _legend_beside(axes)
    return figure


def _plain(axes: Axes, across: str = "y") -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=across, color="#dddddd", linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    return axes


def _legend_beside(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _series(log: Log, read: Any) -> tuple[list[float], list[float]]:
    points = [(record["step"], value) for record in log if "step" in record and (value := read(record)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _mean(value: Any) -> float | None:
    return statistics.fmean(value.values()) if isinstance(value, Mapping) else value


def _times100(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _exchanged(event: Mapping[str, Any] | None) -> float | None:
    """Blocks that came back at a decision, as a share of those kept."""
    if event is None:
        return None
    return 100 * event["regrown"] / max(1.0, event["density"] * event["blocks"])


def _smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Median of the neighbours: single batches are noisy."""
    half = window // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
