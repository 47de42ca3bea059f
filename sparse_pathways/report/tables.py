"""Tables for the terminal, for Markdown and for the page: rows of strings made from results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sparse_pathways as sp
from sparse_pathways.report.results import ModelResult, Speed, fastest
from sparse_pathways.report.speed import best_dense_us

Table = list[list[str]]
"""First row: headings."""

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

MASKS = {"dense": "none", "shared": "one for all", "pathways": "per language"}


def result_table(results: dict[str, Any]) -> Table:
    """The table: per model its masks, sparsity, word error rate by language, time, size and agreement."""
    models: list[ModelResult] = results["models"]
    languages = list(models[0]["languages"])
    dense = next((fastest(model) for model in models if model["kind"] == "dense"), None)
    heading = ["model", "masks", "sparsity", *(f"WER {name}" for name in languages), "mean"]
    table = [[*heading, "ms per s audio", "size", "agreement"]]
    for model in models:
        time = f"{fastest(model):.1f}"
        if dense is not None and model["kind"] != "dense":
            time += f" ({dense / fastest(model):.2f}x)"
        table.append(
            [
                model["name"],
                MASKS[model["kind"]],
                percent(1 - sum(model["density"].values()) / len(model["density"]), 0),
                *(percent(model["languages"][name]["wer"]) for name in languages),
                percent(model["wer"]),
                time,
                f"{model['bytes'] / 1e6:.1f} MB",
                "" if model["agreement"] is None else percent(model["agreement"]),
            ]
        )
    return table


def mask_table(log: Sequence[Mapping[str, Any]]) -> Table | None:
    """Masks at the end of a pruning run, layer by layer; None for a log without them (dense, or not finished)."""
    masks = next((record["masks"] for record in reversed(log) if "masks" in record), None)
    if masks is None:
        return None
    table = [["layer", "kept", "kept by any", "kept by all", "overlap of two", "dead rows"]]
    for name, shares in masks.items():
        low, high = min(shares["density"].values()), max(shares["density"].values())
        kept = percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"
        parts = (percent(shares["union"]), percent(shares["core"]), f"{shares['overlap']:.2f}")
        table.append([short(name), kept, *parts, percent(shares["dead_rows"])])
    return table


def result_notes(results: dict[str, Any]) -> list[str]:
    """What one must know to read the table, in sentences."""
    corpus, origin, latency = results["corpus"], results["origin"], results["latency"]
    env = origin["env"]
    words = min(result["words"] for result in results["models"][0]["languages"].values())
    count = ", ".join(f"{language} {number}" for language, number in corpus["utterances"].items())
    return [
        f"WER: word error rate on the {corpus['split']} split ({count} utterances; at least {words} words per "
        "language), greedy decoding; sparse models decode through the packed product.",
        "Time: streaming transcription from samples to text, median over "
        f"{latency['utterances']} utterances, {latency['pinned']}, contenders taking turns; dense is the faster of "
        "F.linear and oneDNN with prepacked weights.",
        "Size: fp32 parameters of the dense model, packed file of a sparse one. Sparsity: of the prunable layers.",
        "Agreement: share of utterances with the same text from the masked dense and the packed model.",
        f"{env['cpu']}, kernels {env['cpu_backend']}, torch {env['torch']}, sparse-pathways {env['package']} "
        f"({origin['commit'] or 'no commit'}), {origin['created'][:10]}.",
    ]


def speed_table(speeds: Sequence[Speed]) -> Table:
    """Per layer and number of rows: dense and packed microseconds."""
    table = [["layer", "N x K", "density", "rows", "F.linear us", "oneDNN us", "packed us", "speed-up"]]
    for speed in speeds:
        prepacked = speed["prepacked_us"]
        table.append(
            [
                short(speed["layer"]),
                f"{speed['outputs']} x {speed['inputs']}",
                percent(speed["density"]),
                str(speed["rows"]),
                f"{speed['linear_us']:.1f}",
                "" if prepacked is None else f"{prepacked:.1f}",
                f"{speed['packed_us']:.1f}",
                f"{best_dense_us(speed) / speed['packed_us']:.2f}x",
            ]
        )
    return table


def short(layer: str) -> str:
    """A layer's name without the parts that all layers share."""
    for prefix in ("rnnt.transcriber.transformer.emformer_layers.", "rnnt."):
        if layer.startswith(prefix):
            return layer.removeprefix(prefix).replace("attention.", "")
    return layer


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent."""
    return f"{100 * share:.{digits}f} %"


def as_text(table: Table) -> str:
    """For a terminal: columns aligned, first column to the left."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(table: Table) -> str:
    """For a README."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def update_readme(path: Path, results: dict[str, Any]) -> None:
    """Replace what stands between the two result marks of a Markdown file.

    Raises:
        sp.FormatError: no such file, or not exactly one pair of marks.
    """
    if not path.is_file():
        raise sp.FormatError(path, "no such file")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise sp.FormatError(path, f"wants one line {BEGIN} and after it one line {END}")
    notes = "\n".join(f"- {note}" for note in result_notes(results))
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{as_markdown(result_table(results))}\n\n{notes}\n{END}{after}", encoding="utf-8")
