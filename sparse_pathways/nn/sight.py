"""What the masks of a model look like: per layer and over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pathways.checks import check_names, unknown_pathway
from sparse_pathways.nn.convert import pathways as pathways_of
from sparse_pathways.nn.convert import sparse_layers
from sparse_pathways.nn.linear import PackedLinear

Counts = dict[str, int]


def mask_report(model: nn.Module, pathways: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Shares of blocks, in [0, 1], per layer and over all layers ("total").

    Args:
        model: with sparse layers, packed or not.
        pathways: names to look at; None: all.

    Returns:
        Per layer: `density` {pathway: kept share}; `overlap`, mean intersection over union of two pathways (1.0 with
        one); `union` and `core`, blocks in any and in all of them; `dead_rows`, outputs blocks of which no pathway
        keeps any.

    Raises:
        KeyError: an unknown pathway.
    """
    names = pathways_of(model) if pathways is None else check_names(pathways)
    counts: dict[str, list[int]] = {}
    for layer_name, layer in sparse_layers(model).items():
        for name in names:
            if name not in layer.pathways:
                raise unknown_pathway(name, layer.pathways)
        mask_of = layer.packed.mask if isinstance(layer, PackedLinear) else layer.mask
        counts[layer_name] = _count(torch.stack([mask_of(name) for name in names]))
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    return {name: _shares(row, names) for name, row in {**counts, "total": totals}.items()}


def _count(masks: Tensor) -> list[int]:
    """Of bool `[P, NB, KB]`: blocks, rows, union, core, dead rows, kept of each, and of every two both and either."""
    flat = masks.flatten(1).double()
    both = flat @ flat.T
    kept = both.diagonal()
    either = kept[:, None] + kept[None] - both
    pairs = torch.tril_indices(len(masks), len(masks), -1)
    numbers = [
        torch.tensor([masks[0].numel(), masks.shape[1]]),
        torch.stack([masks.any(0).sum(), masks.all(0).sum(), (~masks.any(0).any(1)).sum()]),
        *(one.long() for one in (kept, both[*pairs], either[*pairs])),
    ]
    return torch.cat([one.to(masks.device) for one in numbers]).tolist()


def _shares(row: list[int], names: tuple[str, ...]) -> dict[str, Any]:
    blocks, rows, union, core, dead, *rest = row
    kept, rest = rest[: len(names)], rest[len(names) :]
    both, either = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    ious = [b / e if e else 1.0 for b, e in zip(both, either, strict=True)]
    return {
        "density": {name: k / max(1, blocks) for name, k in zip(names, kept, strict=True)},
        "overlap": sum(ious) / len(ious) if ious else 1.0,
        "union": union / max(1, blocks),
        "core": core / max(1, blocks),
        "dead_rows": dead / max(1, rows),
    }
