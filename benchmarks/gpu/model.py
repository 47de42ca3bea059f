"""The roofline table: what a model expects of an H100, before or beside a measurement.   python benchmarks/gpu/model.py

Every number here is a prediction of `sparse_pathways/ops/roofline.py`, never a measurement. `CONTENDERS` lists the
kernels; each brings a function of the same arguments, so that kernels of other makes stand in the same table.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401  (makes the package importable)

from sparse_pathways.ops import roofline
from sparse_pathways.ops.roofline import Prediction

Block = tuple[int, int]

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
# (name, N, K, rows): the note's shapes. Emformer's layers at training size, and one that caches and memory do not cap.
SHAPES = (
    ("out 512->512", 512, 512, 16384),
    ("QKV 512->1536", 1536, 512, 16384),
    ("FFN1 512->2048", 2048, 512, 16384),
    ("FFN2 2048->512", 512, 2048, 16384),
    ("big 4096->4096", 4096, 4096, 8192),
    ("streaming 512->2048", 2048, 512, 16),
)


class Contender(NamedTuple):
    """A kernel for one block shape. `predict(op, m, n, k, block, density)`: None where it has no such product."""

    name: str
    block: Block
    predict: Callable[[str, int, int, int, Block, float], Prediction | None]


CONTENDERS = [Contender("triton", (side, side), roofline.triton) for side in (16, 32, 64, 128)]


def row_of(contender: Contender, op: str, shape: tuple[str, int, int, int], sparsity: float) -> dict | None:
    """One prediction: microseconds, ratio to the dense product, bound, and the path the dispatcher would take."""
    name, n, k, m = shape
    sparse = contender.predict(op, m, n, k, contender.block, 1 - sparsity)
    if sparse is None:
        return None
    dense = roofline.dense(*{"forward": (m, n, k), "dx": (m, k, n), "dw": (n, k, m)}[op])
    training = roofline.masked_dense(op, m, n, k)
    return {
        "kernel": contender.name,
        "block": list(contender.block),
        "op": op,
        "shape": name,
        "n": n,
        "k": k,
        "m": m,
        "sparsity": sparsity,
        "dense_us": dense.us,
        "sparse_us": sparse.us,
        "ratio": dense.us / sparse.us,
        "bound": sparse.bound,
        "path": contender.name if sparse.us < training.us else "dense",
        "source": "model",
    }


def table(contenders: list[Contender] | None = None) -> list[dict]:
    """All predictions."""
    found = (
        row_of(one, op, shape, sparsity)
        for op, shape, one, sparsity in itertools.product(
            roofline.OPS, SHAPES, CONTENDERS if contenders is None else contenders, SPARSITIES
        )
    )
    return [row for row in found if row is not None]


def print_table(rows: list[dict]) -> None:
    """One line per kernel, block and shape; a star marks where the dispatcher of training stays dense."""
    print(
        "model of an H100 (not measured): time of the dense product over time of the kernel; bound; * = dense is taken"
    )
    for op in roofline.OPS:
        head = "".join(f"{sparsity:>16.0%}" for sparsity in SPARSITIES)
        print(f"\n{op:<10}{'shape':<22}{'rows':>6} {'kernel':<8}{'block':<9}{head}")
        mine = [row for row in rows if row["op"] == op]
        for key, group in itertools.groupby(mine, lambda row: (row["shape"], row["m"], row["kernel"], row["block"])):
            cells = "".join(
                f"{row['ratio']:9.2f}x {row['bound']:<4.4}{'*' if row['path'] == 'dense' else ' '}" for row in group
            )
            shape, m, kernel, block = key
            print(f"{'':<10}{shape:<22}{m:>6} {kernel:<8}{f'{block[0]}x{block[1]}':<9}{cells}")


def main() -> None:
    """Print the table; with --out write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = table()
    print_table(rows)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
