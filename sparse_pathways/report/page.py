"""One self-contained HTML page from a run folder."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

import sparse_pathways as sp
from sparse_pathways.report import figures
from sparse_pathways.report.results import origin, read_logs
from sparse_pathways.report.tables import mask_table, percent, result_notes, result_table, speed_table


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    title: str
    caption: str
    """What to look for."""
    source: str
    """`data:` address of the SVG, so that the page needs no other file."""


def write_page(run: Path, results: dict[str, Any] | None, out: Path) -> Path:
    """Write the page.

    Args:
        run: folder; every log.jsonl in it or below gives curves over steps, and masks layer by layer.
        results: from `read_results`; None: not evaluated yet.
        out: file to write.

    Returns:
        `out`.

    Raises:
        sp.FormatError: a damaged log, or neither logs nor results.
    """
    logs = read_logs(run)
    if results is None and not logs:
        raise sp.FormatError(run, "holds no log.jsonl and no results.json; train, prune or evaluate there first")
    results = results or {"models": [], "transcripts": [], "speed": [], "origin": origin()}
    order = [model["name"] for model in results["models"]]
    logs = {
        name: logs[name] for name in sorted(logs, key=lambda name: (order.index(name) if name in order else 99, name))
    }
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        table=result_table(results) if results["models"] else None,
        notes=result_notes(results) if results["models"] else [],
        masks={name: table for name, log in logs.items() if (table := mask_table(log)) is not None},
        pictures=_pictures(results, logs),
        transcripts=results["transcripts"],
        profiles=_profiles(results),
        speed=speed_table(results["speed"]),
        origin=results["origin"],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _pictures(results: dict[str, Any], logs: dict[str, Any]) -> list[Picture]:
    models = results["models"]
    colours = figures.colours_of([*(model["name"] for model in models), *logs])
    drawn: list[tuple[str, str, Figure | None]] = [
        (
            "Word error rates",
            "Lower is better. Compare the models of one sparsity: does a mask per language lose less than one mask for "
            "all, and in which languages?",
            figures.word_errors(models, colours) if models else None,
        ),
        (
            "How much masks of two languages share",
            "Intersection over union of the kept blocks, all prunable layers together: 1 means the same mask, and two "
            "random masks of density d would share d / (2 - d). One mask for all languages is 1 throughout; pathways "
            "fall below 1 as far as languages want different weights.",
            figures.overlaps(models),
        ),
        (
            "Training and pruning, step by step",
            "Left: training of the dense model; right: pruning runs, which start from a trained model, each with its "
            "own step 0. Where the sparsity rises the loss jumps and then recovers; what is left at the end is the "
            "price of pruning. The dense loss steps up where the RNN-T loss joins the CTC loss. Overlap: mean over "
            "every two languages; pathways that adapt move apart until their masks are fixed.",
            figures.progress(logs, colours),
        ),
        (
            "Latency of streaming transcription",
            "Blue: dense, green: packed (the form one deploys), grey: masked dense (the form one trains). The bar is "
            "the median over utterances, the whisker their middle 80 %; the dashed line is the fastest dense form. "
            "Features, attention and search cost the same in every form.",
            figures.latencies(models),
        ),
        (
            "Layer by layer: what is kept",
            "Left: share of blocks kept, with its range over languages. Right: layers in which languages differ most "
            "have the lowest overlap.",
            figures.layers(models, colours),
        ),
        (
            "Layer by layer: speed of the packed product",
            "Median over the layers of one shape, at different numbers of rows (frames at once). Above 1 the packed "
            "product is faster than the faster of F.linear and oneDNN with prepacked weights.",
            figures.layer_speeds(results["speed"]),
        ),
    ]
    return [Picture(title, caption, _embed(figure)) for title, caption, figure in drawn if figure is not None]


def _embed(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(figures.to_svg(figure).encode()).decode()


def _profiles(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Operator profiles of packed decoding, as sentences and rows."""
    return [
        {
            "model": model["name"],
            "sentence": f"{profile['operator']} ran {profile['calls']} times and took {percent(profile['share'])} "
            "of the time spent in operators.",
            "rows": [[name, str(calls), f"{ms:.1f}"] for name, calls, ms in profile["top"]],
        }
        for model in results["models"]
        if (profile := model["profile"]) is not None
    ]
