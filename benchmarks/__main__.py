"""`python -m benchmarks [SUITE ...]`: measure dense against sparse, print tables, write JSON where it is asked for."""

import argparse
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library would talk between the lines; read at import

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sparse_pathways as sp
from benchmarks import goals, linear, lstm, model, record, train
from benchmarks.workload import DTYPES, Shape

SUITES = ("linear", "lstm", "model", "train")
QUICK = linear.Plan(
    shapes=((512, 512), (2048, 512), (512, 2048)), rows=(1, 4, 16, 64), sparsities=(0.7, 0.9), seconds=0.8
)
QUICK_TRAIN = train.Plan(rows=(16, 512), seconds=0.5)
FULL = linear.Plan(frozen_rows={"l2": (1, 8, 64), "l3": (1, 8)})


def _shape(text: str) -> Shape:
    n, k = map(int, text.split("x"))
    return n, k


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "suites", nargs="*", default=[], metavar="SUITE", help="linear, lstm, model, train; default linear lstm train"
    )
    parser.add_argument("--full", action="store_true", help="the whole grid and all suites, about half an hour")
    parser.add_argument("--results", type=Path, help="folder to write one JSON per table into; default: print only")
    parser.add_argument("--levels", nargs="+", choices=linear.LEVELS, help="weights rotate over more than this cache")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--sparsities", nargs="+", type=float)
    parser.add_argument("--seconds", type=float, help="about how long one cell may take")
    parser.add_argument("--turns", type=int, help="turns per contender; default: as many as fit, 5 to 25")
    parser.add_argument(
        "--frozen-rows", nargs="*", type=int, help="rows at which torch.compile with freezing takes part"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the sparse kernels (default 1)")
    parser.add_argument("--layers", type=int, help="of the whole model's encoder; default 20")
    return parser


def _given(args: argparse.Namespace, *keys: str) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key in keys
        if (value := getattr(args, key)) is not None
    }


def _train_plan(args: argparse.Namespace) -> train.Plan:
    plan = train.Plan() if args.full else QUICK_TRAIN
    return replace(plan, **_given(args, "shapes", "rows", "sparsities", "seconds", "turns"))


def _plan(args: argparse.Namespace) -> linear.Plan:
    plan = FULL if args.full else QUICK
    given = _given(args, "shapes", "rows", "dtypes", "sparsities", "seconds", "turns")
    if args.frozen_rows is not None:
        given["frozen_rows"] = dict.fromkeys(linear.LEVELS, tuple(args.frozen_rows))
    return replace(plan, **given)


def _pin(parser: argparse.ArgumentParser, threads: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        parser.error(f"--threads {threads}: this machine lends {len(cores)} cores")
    os.sched_setaffinity(0, cores[-threads:])  # before the first product starts torch's threads
    torch.set_num_threads(threads)


def _finish(
    name: str, what: dict[str, Any], about: dict[str, Any], rows: list[dict[str, Any]], results: Path | None
) -> None:
    reached = what.get("goals", [])
    print("\n".join(["", *goals.lines(reached), ""]))
    for fault in what.get("faults", []):
        print(f"LEFT OUT {fault}")
    if warning := record.busy(about):
        print(warning)
    if results is not None:
        path = results / f"{name}.json"
        record.write(path, name, what, about, rows)
        print(f"written: {path}")


def main() -> int:
    """Run the suites; 1 when a product was wrong."""
    parser = _parser()
    args = parser.parse_args()
    suites = args.suites or (list(SUITES) if args.full else ["linear", "lstm", "train"])
    if unknown := set(suites) - set(SUITES):
        parser.error(f"unknown suite {', '.join(sorted(unknown))}; choose among {', '.join(SUITES)}")
    _pin(parser, args.threads)
    plan, faults = _plan(args), []
    env = sp.env()
    print(f"{env['cpu']}, kernels {env['cpu_backend']}, torch {env['torch']}, {args.threads} thread(s)")
    with torch.inference_mode():
        for level in args.levels or (linear.LEVELS if args.full else ["l2"]) if "linear" in suites else []:
            print(f"\nlinear, weights {linear.LEVELS[level]}: median us per call, ratio and its quartiles")
            circumstances = record.Circumstances()
            what, rows, failed = linear.run(level, plan)
            what["goals"] = goals.linear(rows, level)
            _finish(f"linear_{level}", what, circumstances.describe(), rows, args.results)
            faults += failed
        if "lstm" in suites:
            print("\nlstm, one step, weights beyond L2: median us per call, ratio and its quartiles")
            circumstances = record.Circumstances()
            what, rows, failed = lstm.run(plan.dtypes, plan.sparsities, plan.seconds, plan.turns)
            what["goals"] = goals.lstm(rows)
            _finish("lstm", what, circumstances.describe(), rows, args.results)
            faults += failed
        if "model" in suites:
            print("\nmodel, one chunk of a stream: median ms, and where it goes")
            circumstances = record.Circumstances()
            what, rows, failed = model.run(plan.dtypes, args.layers or model.LAYERS, plan.turns)
            _finish("model", what, circumstances.describe(), rows, args.results)
            faults += failed
    if "train" in suites:
        print("\ntrain, one step of a layer: median us per step, and ratio")
        circumstances = record.Circumstances()
        what, rows, failed = train.run(_train_plan(args))
        what["goals"] = goals.train(rows)
        _finish("train", what, circumstances.describe(), rows, args.results)
        faults += failed
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
