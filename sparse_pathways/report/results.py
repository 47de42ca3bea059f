"""`results.json`: what `sparse-pathways evaluate` measured, read by every table and picture."""

import datetime
import json
import math
from pathlib import Path
from typing import Any, TypedDict

import sparse_pathways as sp

VERSION = 1


class Speed(TypedDict):
    """Time of one layer with one number of rows."""

    layer: str
    outputs: int
    inputs: int
    density: float
    rows: int
    linear_us: float
    prepacked_us: float | None
    packed_us: float
    backend: str


class ModelResult(TypedDict):
    """One model: errors by language, and what its form on disk and in memory costs."""

    name: str
    kind: str
    """"dense", "shared" (one mask for all languages) or "pathways" (masks differ)."""
    languages: dict[str, dict[str, Any]]
    """Language -> wer, errors, words, deletions, utterances."""
    wer: float
    """Mean over languages."""
    density: dict[str, float]
    """Language -> kept share of the blocks in prunable layers; 1.0 for a dense model."""
    layer_density: dict[str, dict[str, float]]
    """Layer -> language -> kept share; empty for a dense model."""
    overlap: list[list[float]]
    """Intersection over union of the languages' masks, all layers together; empty for a dense model."""
    layer_overlap: dict[str, float]
    """Layer -> mean intersection over union of two languages."""
    bytes: int
    """Of the dense fp32 parameters, or of the packed file."""
    agreement: float | None
    """Share of utterances on which masked dense and packed model give the same text."""
    latency: dict[str, Any]
    """Form ("dense", "dense prepacked", "masked", "packed") -> median, p10, p90; ms per second of audio."""
    profile: dict[str, Any] | None
    """Operators of packed decoding."""


class Transcript(TypedDict):
    """One utterance: what was said, and what every model made of it."""

    language: str
    reference: str
    texts: dict[str, str]


def origin() -> dict[str, Any]:
    """Where figures come from: time, machine, versions, commit of the source tree (None outside of one)."""
    env = sp.env()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "commit": env["commit"], "env": env}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as indented JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = json.dumps({"version": VERSION, **results}, indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read_results(path: Path) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
        sp.FormatError: missing, not JSON, of another version, or without models.
    """
    if not path.is_file():
        raise sp.FormatError(path, "no such file; measure first with `sparse-pathways evaluate`")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise sp.FormatError(path, f"not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("version") != VERSION or not results.get("models"):
        raise sp.FormatError(path, f"not the results of `sparse-pathways evaluate` (version {VERSION}, with models)")
    return results


def read_logs(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The log of every run in a folder or below it, by the run's path within the folder.

    Raises:
        sp.FormatError: a damaged log.
    """
    paths = {path: path.parent.relative_to(run).as_posix() for path in sorted(run.rglob("log.jsonl"))}
    return {run.resolve().name if name == "." else name: read_log(path) for path, name in paths.items()}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a run's log.jsonl: one JSON object per line, with the `step` it is of. Known are `loss` and other numbers by
    name, `event` (`dataclasses.asdict` of a PruneEvent) and `masks` (`sp.mask_report(model)`). A last line that is cut
    off is left out: the run is being written, or was killed.

    Raises:
        sp.FormatError: another line that is not a JSON object, with its number.
    """
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise sp.FormatError(path, f"line {number}: {error}") from error
        if not isinstance(record, dict):
            raise sp.FormatError(path, f"line {number}: want a JSON object")
        records.append(record)
    return records


def best_dense(model: ModelResult) -> tuple[str, float] | None:
    """Fastest dense form of a model and its milliseconds per second of audio; None if it was not timed."""
    forms = {form: spread["median"] for form, spread in model["latency"].items() if form.startswith("dense")}
    return min(forms.items(), key=lambda item: item[1]) if forms else None


def fastest(model: ModelResult) -> float:
    """Milliseconds per second of audio in the form one would deploy: packed, or the faster dense one."""
    if "packed" in model["latency"]:
        return model["latency"]["packed"]["median"]
    dense = best_dense(model)
    return math.nan if dense is None else dense[1]
