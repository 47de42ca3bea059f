"""Makes recogniser_masks.npz: some masks of a recogniser that was really trained and pruned, bit-packed.

    sparse-pathways data synthetic --out runs/data
    sparse-pathways train --data runs/data --out runs/dense --steps 3000
    for method in lap dynamic_asr_pathways; do from=dense
      for sparsity in 70 90; do
        sparse-pathways prune --data runs/data --start runs/$from --out runs/$method$sparsity --method $method \\
          --sparsity 0.$sparsity --steps 100
        from=$method$sparsity
      done
    done
    python tests/ops/make_recogniser_masks.py runs

Keys "<method><sparsity> <layer>": uint8 [pathways, bytes], masks [NB, KB] of 8x1 blocks by `pack_bits`; lap has one
mask for all languages, dynamic those of English and French.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ENCODER = "rnnt.transcriber.transformer.emformer_layers.2."
LAYERS = (
    ENCODER + "attention.emb_to_query",
    ENCODER + "attention.emb_to_key_value",
    ENCODER + "pos_ff.4",
    "rnnt.predictor.lstm_layers.0.x2g",
    "rnnt.predictor.lstm_layers.0.p2g",
)
FILE = Path(__file__).with_name("recogniser_masks.npz")


def main(runs: Path) -> None:
    """Collect the masks of the four pruned recognisers under `runs`."""
    masks = {}
    for method, languages in (("lap", 1), ("dynamic_asr_pathways", 2)):
        for sparsity in (70, 90):
            state = torch.load(runs / f"{method}{sparsity}" / "model.pt")["state"]
            for layer in LAYERS:
                name = "ffn" if layer.endswith("pos_ff.4") else layer.rpartition(".")[2]
                bits = state[layer + ".block_mask"][:languages]
                masks[f"{method.partition('_')[0]}{sparsity} {name}"] = bits.numpy()
    np.savez_compressed(FILE, **masks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
