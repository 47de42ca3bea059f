"""`python -m benchmarks.page [FOLDER]`: one HTML page, FOLDER/index.html, from the JSON files in FOLDER alone."""

import base64
import collections
import sys
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from benchmarks import plots, record
from benchmarks.goals import form, geometric_mean
from sparse_pathways.report.figures import to_svg

HERE = Path(__file__).parent
LEVELS = {
    "l2": ("beyond L2", "the weights of one layer lie in L3, as in a small model that runs again and again"),
    "l3": ("beyond L3", "the weights come from main memory, as in a large model"),
}
Table = list[list[str]]


def _embed(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure).encode()).decode()


def _headline(linear: dict[str, Any], lstm: dict[str, Any] | None, model: dict[str, Any] | None) -> Table:
    """Speed-ups in one table: geometric means of the layers with their range, the LSTM step, the whole model."""
    found: dict[str, dict[float, list[float]]] = {}
    for level, result in linear.items():
        for row in result["rows"]:
            line = found.setdefault(f"linear layers, {row['dtype']}, weights {LEVELS[level][0]}", {})
            line.setdefault(row["sparsity"], []).append(row["ratio"])
    for row in lstm["rows"] if lstm else []:
        if row["m"] == 1:
            line = found.setdefault(f"{row['form']} LSTM step, {row['dtype']}, one stream", {})
            line.setdefault(row["sparsity"], []).append(row["ratio"])
    for row in model["rows"] if model else []:
        if not row["dense"]:
            found[f"whole recogniser, {row['dtype']}, one chunk"] = {model["sparsity"]: [row["ratio"]]}
    sparsities = sorted({sparsity for line in found.values() for sparsity in line})
    table = [["", *(f"{sparsity:.0%} pruned" for sparsity in sparsities)]]
    for name, line in found.items():
        table.append([name, *(_range(line.get(sparsity, [])) for sparsity in sparsities)])
    return table


def _range(ratios: list[float]) -> str:
    if len(ratios) < 2:
        return "".join(f"{ratio:.1f}x" for ratio in ratios)
    return f"{geometric_mean(ratios):.1f}x ({min(ratios):.1f} - {max(ratios):.1f})"


def _goals(results: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Columns, and per goal what each of them reached."""
    columns = {f"linear_{level}": f"weights {name}" for level, (name, _) in LEVELS.items()} | {
        "lstm": "LSTM step",
        "train": "training",
    }
    present = [name for name in columns if results.get(name, {}).get("goals")]
    found: dict[str, dict[str, Any]] = {}
    for name in present:
        for goal in results[name]["goals"]:
            found.setdefault(goal["what"], {})[columns[name]] = goal
    return [columns[name] for name in present], found


def _winners(rows: list[dict[str, Any]]) -> Table:
    """How often each dense product was the best one; every cell counts once."""
    cells = {(row["n"], row["k"], row["m"], row["dtype"]): row["best_dense"] for row in rows}
    counts = collections.Counter((dtype, best) for (*_, dtype), best in cells.items())
    order = sorted(counts, key=lambda key: (key[0], -counts[key], key[1]))
    return [["dtype", "best dense", "cells"], *([dtype, best, str(counts[dtype, best])] for dtype, best in order)]


def _cells(rows: list[dict[str, Any]]) -> dict[str, Table]:
    """dtype -> every cell."""
    tables: dict[str, Table] = {}
    for row in rows:
        heading = ["N x K", "M", "pruned", "best dense", "dense us", "sparse us", "module us", "speed-up", "quartiles"]
        table = tables.setdefault(row["dtype"], [[*heading, "GFLOP/s", "of peak", "GB/s", "of bandwidth"]])
        low, high = row["quartiles"]
        module = row["module_us"]
        table.append(
            [
                f"{row['n']} x {row['k']}",
                str(row["m"]),
                f"{row['sparsity']:.0%}",
                row["best_dense"],
                f"{row['dense_us']:.1f}",
                f"{row['sparse_us']:.1f}",
                "" if module is None else f"{module:.1f}",
                f"{row['ratio']:.2f}x",
                f"{low:.2f} - {high:.2f}",
                f"{row['gflops']:.0f}",
                _share(row["peak_share"]),
                f"{row['gbytes']:.1f}",
                _share(row["bandwidth_share"]),
            ]
        )
    return tables


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _lost(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['n']} x {row['k']}, M={row['m']}, {row['dtype']}, {row['sparsity']:.0%}: {row['ratio']:.2f}x "
        f"({row['sparse_us']:.1f} us against {row['dense_us']:.1f} us of {row['best_dense']})"
        for row in sorted(rows, key=lambda row: row["ratio"])
        if row["ratio"] < 1
    ]


def _linear(level: str, result: dict[str, Any]) -> dict[str, Any]:
    rows = result["rows"]
    name, meaning = LEVELS[level]
    return {
        "name": name,
        "meaning": meaning,
        "result": result,
        "speed_ups": _embed(plots.speed_ups(rows)),
        "roofline": _embed(plots.roofline(rows, result["ceilings"], result["home"])),
        "winners": _winners(rows),
        "lost": _lost(rows),
        "cells": _cells(rows),
        "ceilings": [
            ["ceiling", "median of the run", "lowest", "highest"],
            *(
                [_ceiling(key), *(f"{value[column]:.0f}" for column in ("median", "lowest", "highest"))]
                for key, value in result["ceilings"].items()
                if value is not None
            ),
        ],
    }


def _ceiling(key: str) -> str:
    return f"reading from {key}, GB/s" if key in ("L2", "L3", "memory") else f"multiply-add in {key}, GFLOP/s"


def _lstm(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["rows"]
    heading = ["step", "dtype", "M", "pruned", "best dense", "dense us", "sparse us", "speed-up", "quartiles"]
    table = [[*heading, "all dense, us"]]
    for row in rows:
        low, high = row["quartiles"]
        others = ", ".join(f"{name} {us:.0f}" for name, us in row["dense"].items())
        ratio, pruned = f"{row['ratio']:.2f}x", f"{row['sparsity']:.0%}"
        times = [f"{row['dense_us']:.1f}", f"{row['sparse_us']:.1f}"]
        who = [row["form"], row["dtype"], str(row["m"]), pruned, row["best_dense"]]
        table.append([*who, *times, ratio, f"{low:.2f} - {high:.2f}", others])
    return {"result": result, "picture": _embed(plots.lstm(rows)) if rows else None, "table": table}


def _train(result: dict[str, Any]) -> dict[str, Any]:
    heading = ["N x K", "M", "pruned", "gradient of", "best dense", "dense us", "sparse us", "speed-up", "quartiles"]
    table = [[*heading, "all dense, us"]]
    for row in result["rows"]:
        low, high = row["quartiles"]
        others = ", ".join(f"{name} {us:.0f}" for name, us in row["dense"].items())
        who = [f"{row['n']} x {row['k']}", str(row["m"]), f"{row['sparsity']:.0%}", row["gradient"], row["best_dense"]]
        times = [f"{row['dense_us']:.0f}", f"{row['sparse_us']:.0f}", f"{row['ratio']:.2f}x"]
        table.append([*who, *times, f"{low:.2f} - {high:.2f}", others])
    return {"result": result, "summary": _by_rows(result["rows"]), "table": table}


def _by_rows(rows: list[dict[str, Any]]) -> Table:
    """Speed-ups of a training step by rows: geometric mean of the shapes, and their range."""
    forms = sorted({(row["sparsity"], row["gradient"]) for row in rows}, key=lambda form: (form[1] != "kept", form[0]))
    table = [["M", *(f"{sparsity:.0%}, gradient of {gradient} weights" for sparsity, gradient in forms)]]
    for m in sorted({row["m"] for row in rows}):
        cells = [[r["ratio"] for r in rows if (r["m"], r["sparsity"], r["gradient"]) == (m, *form)] for form in forms]
        table.append([str(m), *map(_range, cells)])
    return table


def _model(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["rows"]
    groups = [name for name in plots.GROUP_COLOURS if any(row["groups"][name] for row in rows)]
    table = [["model", "ms", "speed-up", "ms, profiled", *groups]]
    for row in rows:
        ratio = "" if row["dense"] else f"{row['ratio']:.2f}x"
        times = [f"{row['ms']:.1f}", ratio, f"{row['profiled_ms']:.1f}"]
        parts = [f"{row['groups'][name]:.1f}" for name in groups]
        table.append([f"{row['dtype']}, {row['contender']}", *times, *parts])
    operators = {
        f"{row['dtype']}, {row['contender']}": [
            ["operator", "calls per chunk", "ms of its own"],
            *([name, f"{calls:g}", f"{ms:.2f}"] for name, calls, ms in row["operators"]),
        ]
        for row in rows
    }
    return {"result": result, "picture": _embed(plots.operators(rows)), "table": table, "operators": operators}


def write_page(folder: Path) -> Path:
    """Write FOLDER/index.html; the same JSON gives the same bytes.

    Raises:
        FileNotFoundError: no results in the folder.
    """
    results = {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}
    linear = {level: results[f"linear_{level}"] for level in LEVELS if f"linear_{level}" in results}
    chosen = [*linear.values(), *(results[name] for name in ("lstm", "train", "model") if name in results)]
    if not chosen:
        raise FileNotFoundError(f"{folder} holds no results; `make bench-full` measures them")
    columns, goals = _goals(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        headline=_headline(linear, results.get("lstm"), results.get("model")),
        columns=columns,
        goals=goals,
        form=form,
        linear=[_linear(level, result) for level, result in linear.items()],
        lstm=_lstm(results["lstm"]) if "lstm" in results else None,
        train=_train(results["train"]) if results.get("train", {}).get("rows") else None,
        model=_model(results["model"]) if results.get("model", {}).get("rows") else None,
        abouts=[(result["suite"], result["about"]) for result in chosen],
        warnings=[(result["suite"], warning) for result in chosen if (warning := record.busy(result["about"]))],
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


if __name__ == "__main__":
    written = write_page(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results")
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB, open it in a browser")
