"""`sparse-pathways report`: pictures and tables from what was measured."""

from pathlib import Path

from sparse_pathways.cli.parsing import make_parser


def main(words: list[str]) -> int:
    """Run `sparse-pathways report` with the words after it."""
    parser = make_parser(
        "report RUN",
        "Draw one self-contained HTML page from a run folder: the log.jsonl of every run in it or below, and\n"
        "results.json if `evaluate` has written it. Or write the result table into a README, between the lines\n"
        "<!-- results:begin --> and <!-- results:end -->. Or write the logs as event files of TensorBoard.",
        "sparse-pathways report runs/demo --out runs/demo/report.html\n"
        "sparse-pathways report runs/dynamic70\n"
        "sparse-pathways report runs/demo --readme README.md\n"
        "sparse-pathways report runs/demo --tensorboard runs/events",
    )
    parser.add_argument("run", type=Path, help="run folder, or folder of run folders, perhaps with results.json")
    parser.add_argument("--out", type=Path, help="HTML file to write; RUN/report.html by default")
    parser.add_argument(
        "--readme", type=Path, help="Markdown file whose result table to replace; HTML only with --out then"
    )
    parser.add_argument("--tensorboard", type=Path, help="folder for event files; HTML only with --out then")
    args = parser.parse_args(words)
    from sparse_pathways.report.results import read_logs, read_results

    wanted = args.readme is not None or (args.run / "results.json").exists() or not args.run.is_dir()
    results = read_results(args.run / "results.json") if wanted else None
    if args.tensorboard is not None:
        from sparse_pathways.report.tensorboard import write_events

        print(f"{write_events(read_logs(args.run), args.tensorboard)}: open with tensorboard --logdir")
    if args.readme is not None and results is not None:
        from sparse_pathways.report.tables import update_readme

        update_readme(args.readme, results)
        print(f"{args.readme}: result table replaced")
    if args.out is not None or (args.readme is None and args.tensorboard is None):
        from sparse_pathways.report.page import write_page

        page = write_page(args.run, results, args.out or args.run / "report.html")
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, open it in a browser")
    return 0
