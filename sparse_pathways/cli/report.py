"""`sparse-pathways report`: pictures and tables from what was measured."""

from pathlib import Path

from sparse_pathways.cli.parsing import make_parser


def main(words: list[str]) -> int:
    """Run `sparse-pathways report` with the words after it."""
    parser = make_parser(
        "report RUN",
        "Draw one self-contained HTML page from a run folder: results.json (by `evaluate`) and the log.jsonl of every\n"
        "run below it. Or write the result table into a README, between the lines <!-- results:begin --> and\n"
        "<!-- results:end -->.",
        "sparse-pathways report runs/demo --out runs/demo/report.html\n"
        "sparse-pathways report runs/demo --readme README.md",
    )
    parser.add_argument("run", type=Path, help="folder with results.json and run folders")
    parser.add_argument("--out", type=Path, help="HTML file to write; RUN/report.html by default")
    parser.add_argument(
        "--readme", type=Path, help="Markdown file whose result table to replace; HTML only with --out then"
    )
    args = parser.parse_args(words)
    from sparse_pathways.report.results import read_results

    results = read_results(args.run / "results.json")
    if args.readme is not None:
        from sparse_pathways.report.tables import update_readme

        update_readme(args.readme, results)
        print(f"{args.readme}: result table replaced")
    if args.out is not None or args.readme is None:
        from sparse_pathways.report.page import write_page

        page = write_page(args.run, results, args.out or args.run / "report.html")
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, open it in a browser")
    return 0
