"""`sparse-pathways bench`: every packed layer against the fastest dense one, on this machine."""

from pathlib import Path

from sparse_pathways.cli.parsing import make_parser


def main(words: list[str]) -> int:
    """Run `sparse-pathways bench` with the words after it."""
    parser = make_parser(
        "bench MODEL",
        "Time the layers of a packed model on this machine: packed product, F.linear, oneDNN with prepacked weights.\n"
        "One pinned thread, contenders taking turns, medians. Speed-up is against the faster dense one.",
        "sparse-pathways bench model.safetensors\nsparse-pathways bench model.safetensors --language fr --rows 1 64",
    )
    parser.add_argument("model", type=Path, help="packed model file")
    parser.add_argument("--language", help="time this language's pathway; the first one by default")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="numbers of rows (frames) at once")
    args = parser.parse_args(words)
    if min(args.rows) < 1:
        raise ValueError(f"rows = {args.rows}; want numbers from 1 on")
    import sparse_pathways as sp
    from sparse_pathways.asr.evaluate import pinned_thread
    from sparse_pathways.asr.transcribe import language_pathway, open_model
    from sparse_pathways.report.speed import layer_speed
    from sparse_pathways.report.tables import as_text, speed_table

    model = open_model(args.model)
    with pinned_thread() as pinned, language_pathway(model, args.language or model.languages[0]):
        speeds = layer_speed(model, args.rows)
    print(as_text(speed_table(speeds)))
    env = sp.env()
    print(f"{env['cpu']}, torch {env['torch']}, {pinned}; packed product by {speeds[0]['backend']}")
    return 0
