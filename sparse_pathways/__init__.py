"""Block-sparse pathways: masks, packed weights, products, modules and pruning. `import sparse_pathways as sp`."""

from sparse_pathways.checks import BackendUnavailable, FormatError
from sparse_pathways.environment import env
from sparse_pathways.layout import BlockLayout, PackedWeight
from sparse_pathways.mask import block_scores, expand_mask, topk_mask
from sparse_pathways.nn import (
    PackedLinear,
    Recommendation,
    SparseLinear,
    density,
    explain,
    load_packed,
    overlap,
    pack,
    pack_,
    pathway,
    pathways,
    recommend,
    save_packed,
    set_pathway,
    sparse_layers,
    sparsify_,
    unpack_,
)
from sparse_pathways.ops import masked_linear, sparse_linear
from sparse_pathways.prune import PruneEvent, Pruner, PruningPlan, methods

__all__ = [
    "BackendUnavailable",
    "BlockLayout",
    "FormatError",
    "PackedLinear",
    "PackedWeight",
    "PruneEvent",
    "Pruner",
    "PruningPlan",
    "Recommendation",
    "SparseLinear",
    "block_scores",
    "density",
    "env",
    "expand_mask",
    "explain",
    "load_packed",
    "masked_linear",
    "methods",
    "overlap",
    "pack",
    "pack_",
    "pathway",
    "pathways",
    "recommend",
    "save_packed",
    "set_pathway",
    "sparse_layers",
    "sparse_linear",
    "sparsify_",
    "topk_mask",
    "unpack_",
]
