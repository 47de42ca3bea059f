"""`sparse-pathways pack`: a pruned run to one packed model file."""

from pathlib import Path

from sparse_pathways.cli.parsing import make_parser


def main(words: list[str]) -> int:
    """Run `sparse-pathways pack` with the words after it."""
    parser = make_parser(
        "pack RUN --out OUT",
        "Write a pruned recogniser as a packed model file (safetensors): only the blocks that some pathway keeps, one\n"
        "bit mask per pathway, tokenizer and sizes included. The file is all that `transcribe` needs.",
        "sparse-pathways pack runs/dynamic70 --out model.safetensors",
    )
    parser.add_argument("run", type=Path, help="run folder of `prune`, or a model.pt or checkpoint.pt in it")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(words)
    import sparse_pathways as sp
    from sparse_pathways.asr.evaluate import dense_bytes
    from sparse_pathways.asr.transcribe import open_model, packed_copy, pathway_of

    model = open_model(args.run)
    if pathway_of(model, model.languages[0]) is None:
        raise ValueError(f"{args.run} is a dense model: nothing to pack; prune it first (sparse-pathways prune)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sp.save_packed(packed_copy(model), args.out)
    dense, packed = dense_bytes(model), args.out.stat().st_size
    print(f"{args.out}: {packed / 1e6:.2f} MB, dense fp32 {dense / 1e6:.2f} MB ({packed / dense:.0%})")
    for language in model.languages:
        share = sp.density(model, pathway_of(model, language))["total"]
        print(f"  {language}  density {share:.3f} of the blocks in prunable layers")
    return 0
