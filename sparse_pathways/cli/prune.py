"""`sparse-pathways prune`: masks for a trained recogniser, by one of the methods in `sp.methods`."""

from sparse_pathways.cli.parsing import add_config_options, is_first_process, make_parser


def main(words: list[str]) -> int:
    """Run `sparse-pathways prune` with the words after it."""
    from sparse_pathways.asr.config import PruneConfig

    parser = make_parser(
        "prune --data DATA --start RUN --out OUT",
        "Prune a trained recogniser while training it on: one mask for all languages (lap), or one pathway per\n"
        "language that keeps adapting (dynamic_asr_pathways). Resumes like `train`.",
        "sparse-pathways prune --data runs/data --start runs/dense --out runs/lap70 --method lap --sparsity 0.7\n"
        "sparse-pathways prune --data runs/data --start runs/dense --out runs/dynamic90 --sparsity 0.9\n"
        "sparse-pathways prune --config prune.yaml --steps 3000",
    )
    add_config_options(parser, PruneConfig)
    config = parser.config(PruneConfig, parser.parse_args(words))
    from sparse_pathways.asr.loop import end_processes
    from sparse_pathways.asr.train import prune

    out = prune(config)
    end_processes()
    if is_first_process():
        print(f"pruned: {out}")
    return 0
