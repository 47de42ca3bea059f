"""`sparse-pathways evaluate`: several recognisers on the same utterances, and results.json for tables and pictures."""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from sparse_pathways.cli.parsing import make_parser

if TYPE_CHECKING:
    from sparse_pathways.asr.evaluate import Example, LanguageResult
    from sparse_pathways.asr.model import Recogniser
    from sparse_pathways.report.results import ModelResult, Speed, Transcript


def main(words: list[str]) -> int:
    """Run `sparse-pathways evaluate` with the words after it."""
    parser = make_parser(
        "evaluate NAME=PATH... --data DATA --out OUT",
        "Compare recognisers on one split of a corpus: word error rates by language (pruned models decode through the\n"
        "packed product), agreement of masked and packed transcripts, streaming latency on one pinned thread,\n"
        "operator profile, time by layer. Prints one table and writes everything to a JSON file.",
        "sparse-pathways evaluate dense=runs/dense lap70=runs/lap70 dynamic70=runs/dynamic70 \\\n"
        "    --data runs/data --out runs/results.json",
    )
    parser.add_argument("models", nargs="+", metavar="NAME=PATH", help="name in the table, and run folder or model.pt")
    parser.add_argument("--data", type=Path, required=True, help="corpus: its folder or manifest.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--split", default="test", help="split of the corpus: train, dev or test")
    parser.add_argument("--utterances", type=PositiveInt, help="at most so many per language; all by default")
    parser.add_argument(
        "--batch", type=PositiveInt, default=16, help="utterances decoded at once for the word error rates"
    )
    parser.add_argument(
        "--threads", type=PositiveInt, default=1, help="threads for the word error rates; times use one"
    )
    parser.add_argument(
        "--timed", type=NonNegativeInt, default=6, help="utterances per language that are timed; 0 times nothing"
    )
    parser.add_argument("--repeats", type=PositiveInt, default=3, help="timed runs per utterance and model")
    parser.add_argument(
        "--rows", type=PositiveInt, nargs="+", default=[1, 4, 16], help="rows at once for the times by layer"
    )
    args = parser.parse_args(words)
    paths = _name_paths(args.models)
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):  # not after minutes of measuring
        raise ValueError(f"out = {args.out}: want a file in an existing folder that can be written to")
    import torch

    from sparse_pathways.asr.transcribe import open_model
    from sparse_pathways.report.results import origin, write_results
    from sparse_pathways.report.tables import as_text, result_notes, result_table

    torch.set_num_threads(args.threads)
    examples = _load(args.data, args.split, args.utterances)
    models = {name: open_model(path) for name, path in paths.items()}
    measured = _word_errors(models, examples, args.batch)
    timing, speed = _times(measured, examples, args)
    results: dict[str, Any] = {
        "origin": origin(),
        "corpus": {
            "path": str(args.data),
            "split": args.split,
            "utterances": dict(Counter(example.language for example in examples)),
            "seconds": sum(example.seconds for example in examples),
        },
        "models": [one.result for one in measured],
        "transcripts": _transcripts(examples, measured),
        "latency": timing,
        "speed": speed,
    }
    write_results(args.out, results)
    print(as_text(result_table(results)))
    print()
    print("\n".join(result_notes(results)))
    return 0


def _name_paths(pairs: list[str]) -> dict[str, Path]:
    paths = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ValueError(f"model {pair!r}; want NAME=PATH, for example dense=runs/dense")
        if name in paths:
            raise ValueError(f"model name {name!r} is given twice")
        paths[name] = Path(path)
    return paths


def _load(data: Path, split: str, limit: int | None) -> list[Example]:
    from sparse_pathways.asr.corpus import SPLITS, read_manifest
    from sparse_pathways.asr.evaluate import load_examples

    if split not in SPLITS:
        raise ValueError(f"split = {split!r}; choose one of {', '.join(SPLITS)}")
    chosen, count = [], Counter[str]()
    for utterance in read_manifest(data):
        if utterance.split == split and (limit is None or count[utterance.language] < limit):
            count[utterance.language] += 1
            chosen.append(utterance)
    if not chosen:
        raise ValueError(f"{data} has no utterances in its {split} split")
    return load_examples(chosen)


@dataclass
class _Measured:
    """One model, and what was found about it so far."""

    forms: dict[str, Recogniser]
    """"dense", or "masked" and "packed"; further dense forms are added for the times."""
    result: ModelResult
    texts: dict[str, list[str]]
    """Language -> transcripts in the order of its examples."""


def _word_errors(models: dict[str, Recogniser], examples: list[Example], batch: int) -> list[_Measured]:
    """Decode with every form of every model."""
    from tqdm import tqdm

    progress = tqdm(models.items(), desc="word error rates", unit="model")
    return [_evaluate_model(name, model, examples, batch) for name, model in progress]


def _transcripts(examples: list[Example], measured: list[_Measured]) -> list[Transcript]:
    """The first utterance of every language, as an example for the reader."""
    from sparse_pathways.report.results import Transcript

    first = {example.language: example.reference for example in reversed(examples)}
    return [
        Transcript(
            language=language,
            reference=first[language],
            texts={one.result["name"]: one.texts[language][0] for one in measured},
        )
        for language in measured[0].texts
    ]


def _evaluate_model(name: str, model: Recogniser, examples: list[Example], batch: int) -> _Measured:
    import sparse_pathways as sp
    from sparse_pathways.asr.evaluate import agreement, average_wer, dense_bytes, evaluate
    from sparse_pathways.asr.transcribe import packed_copy, pathway_of
    from sparse_pathways.report.results import ModelResult

    languages = evaluate(model, examples, batch=batch)
    result = ModelResult(
        name=name,
        kind="dense",
        languages={},
        wer=0.0,
        density=dict.fromkeys(languages, 1.0),
        layer_density={},
        overlap=[],
        layer_overlap={},
        bytes=dense_bytes(model),
        agreement=None,
        latency={},
        profile=None,
    )
    forms = {"dense": model}
    if pathway_of(model, model.languages[0]) is not None:
        masked = languages
        with tempfile.TemporaryDirectory() as folder:  # the file's way, so that what is measured is what ships
            file = Path(folder) / "model.safetensors"
            sp.save_packed(packed_copy(model), file)
            result["bytes"] = file.stat().st_size
            forms = {"masked": model, "packed": sp.load_packed(file)}  # type: ignore[dict-item]
        languages = evaluate(forms["packed"], examples, batch=batch)
        result["agreement"] = agreement(masked, languages)
        _describe_masks(model, result)
    result["languages"] = {language: _without_text(errors) for language, errors in languages.items()}
    result["wer"] = average_wer(languages)
    return _Measured(forms, result, {language: errors["hypotheses"] for language, errors in languages.items()})


def _describe_masks(model: Recogniser, result: ModelResult) -> None:
    import sparse_pathways as sp
    from sparse_pathways.asr.transcribe import pathway_of

    for language in result["density"]:
        shares = sp.density(model, pathway_of(model, language))
        result["density"][language] = shares.pop("total")
        for layer, share in shares.items():
            result["layer_density"].setdefault(layer, {})[language] = share
    names = sp.pathways(model)
    overlaps = sp.overlap(model)
    rows = [names.index(pathway_of(model, language)) for language in result["density"]]  # type: ignore[arg-type]
    total = overlaps.pop("total")[rows][:, rows]
    result["overlap"] = total.tolist()
    result["kind"] = "pathways" if float(total.min()) < 1.0 else "shared"
    if len(names) > 1:
        pairs = len(names) * (len(names) - 1)
        result["layer_overlap"] = {
            layer: float((iou.sum() - iou.diagonal().sum()) / pairs) for layer, iou in overlaps.items()
        }


def _without_text(errors: LanguageResult) -> dict[str, Any]:
    return {key: value for key, value in errors.items() if key != "hypotheses"}


def _times(measured: list[_Measured], examples: list[Example], args: Any) -> tuple[dict[str, Any], list[Speed]]:
    """Time streaming and layers, write the figures into the results; returns how it was done, and times by layer."""
    from sparse_pathways.asr.evaluate import latency, operator_profile, pinned_thread, select_per_language
    from sparse_pathways.report.speed import layer_speed

    if args.timed == 0:
        return {"pinned": "not timed", "utterances": 0, "repeats": 0}, []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs on stderr where there is no GPU
    timed = select_per_language(examples, args.timed)
    for one in measured:
        if "dense" in one.forms:
            _add_prepacked(one.forms)
    contenders = {(i, form): model for i, one in enumerate(measured) for form, model in one.forms.items()}
    spreads, pinned = latency(contenders, timed, repeats=args.repeats)
    for (i, form), spread in spreads.items():
        measured[i].result["latency"][form] = spread
    sparse = [one for one in measured if "packed" in one.forms]
    for one in sparse:
        one.result["profile"] = dict(operator_profile(one.forms["packed"], timed[:2]))
    speed: list[Speed] = []
    if sparse:
        with pinned_thread():
            speed = layer_speed(sparse[0].forms["packed"], args.rows)
    return {"pinned": pinned, "utterances": len(timed), "repeats": args.repeats}, speed


def _add_prepacked(forms: dict[str, Recogniser]) -> None:
    """Beside a dense model, the same with oneDNN's weight order in the layers that pruning would touch."""
    from sparse_pathways.asr.model import prunable
    from sparse_pathways.report.speed import can_prepack, prepack_

    if not can_prepack():
        return
    model = copy.deepcopy(forms["dense"])
    rows = (model.config.segment_frames + model.config.right_context_frames) // model.config.stride
    prepack_(model, rows, [name for name, module in model.named_modules() if prunable(module, name)])
    forms["dense prepacked"] = model
