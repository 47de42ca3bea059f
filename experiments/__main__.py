"""`python -m experiments run|status|tables`: train and measure what is missing; say what is; draw tables and plots."""

import argparse
from pathlib import Path

from experiments import runner
from experiments.cells import SCALES

HERE = Path(__file__).parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=HERE.parent / "runs" / "experiments", help="checkpoints and corpus"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="one JSON per cell")
    parser.add_argument("--scale", choices=SCALES, default="reduced", help="settings of the list (default reduced)")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="what is missing, until nothing is; again after a kill")
    run.add_argument("--processes", type=int, default=2, help="at a time (default 2)")
    commands.add_parser("status", help="how much is done, and which stage is next")
    commands.add_parser("tables", help="tables and plots from the JSON files, beside the folder of the results")
    for name, word in (("stage", "key"), ("measure", "title")):
        one = commands.add_parser(name, help="used by run")
        one.add_argument(word)
    for name in ("run", "stage", "measure"):
        commands.choices[name].add_argument("--threads", type=int, default=1, help="per process (default 1)")
    return parser


def main() -> int:
    """One command."""
    args = _parser().parse_args()
    places = runner.Places(args.runs.resolve(), args.results.resolve())
    study, cells = SCALES[args.scale].study, SCALES[args.scale].all_cells()
    if args.command == "status":
        print(*(f"{name}: {value}" for name, value in runner.describe(study, cells, places).items()), sep="\n")
    elif args.command == "tables":
        from experiments.tables import write_all

        write_all(study, cells, places.results, places.results.parent)
    elif args.command == "stage":
        runner.run_stage(study, cells, args.key, places, args.threads)
    elif args.command == "measure":
        runner.run_measurement(study, cells, args.title, places, args.threads)
    else:
        runner.ensure_corpus(study, places)
        command = [*runner.main_command(), "--runs", str(places.runs), "--results", str(places.results)]
        command += ["--scale", args.scale]
        return runner.Runner(command, study, cells, places, args.processes, args.threads).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
