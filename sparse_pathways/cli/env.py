"""`sparse-pathways env`: machine, versions and backends."""

import json

from sparse_pathways.cli.parsing import make_parser


def main(words: list[str]) -> int:
    """Run `sparse-pathways env` with the words after it."""
    parser = make_parser(
        "env",
        "Print what this machine is, which kernels it can run and which versions are installed.",
        "sparse-pathways env\nsparse-pathways env --json > machine.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(words)
    import sparse_pathways as sp

    env = sp.env()
    print(json.dumps(env, indent=1) if args.json else env)
    return 0
