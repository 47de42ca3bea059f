"""`sparse-pathways train`: a dense recogniser from a corpus."""

from sparse_pathways.cli.parsing import add_config_options, is_first_process, make_parser


def main(words: list[str]) -> int:
    """Run `sparse-pathways train` with the words after it."""
    from sparse_pathways.asr.config import TrainConfig

    parser = make_parser(
        "train --data DATA --out OUT",
        "Train a dense streaming RNN-T on a corpus. The run folder gets checkpoints, log.jsonl and at the end\n"
        "model.pt; a run that was interrupted goes on from its last checkpoint when the command is given again.",
        "sparse-pathways train --data runs/data --out runs/dense\n"
        "sparse-pathways train --data runs/data --out runs/wide --model.d_model 512 --steps 8000\n"
        "sparse-pathways train --config train.yaml --lr 5e-4\n"
        "sparse-pathways train --data runs/data --out runs/dense --print_config > train.yaml\n"
        "torchrun --nproc-per-node 2 -m sparse_pathways.cli train --data runs/data --out runs/dense",
    )
    add_config_options(parser, TrainConfig)
    config = parser.config(TrainConfig, parser.parse_args(words))
    from sparse_pathways.asr.loop import end_processes
    from sparse_pathways.asr.train import train

    out = train(config)
    end_processes()
    if is_first_process():
        print(f"trained: {out}")
    return 0
