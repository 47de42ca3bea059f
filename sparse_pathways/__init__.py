"""Block-sparse pathways: masks, packed weights, products, modules and pruning. `import sparse_pathways as sp`."""

from sparse_pathways.checks import BackendUnavailable, FormatError
from sparse_pathways.environment import env
from sparse_pathways.layout import BlockLayout, PackedWeight
from sparse_pathways.mask import block_scores, expand_mask, topk_mask
from sparse_pathways.nn import (
    PackedLayerNormLSTM,
    PackedLinear,
    PackedLSTM,
    Recommendation,
    SparseLinear,
    SparseLSTM,
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
from sparse_pathways.ops import masked_linear, sparse_linear, sparse_lstm_cell
from sparse_pathways.prune import PruneEvent, Pruner, PruningPlan, methods

__all__ = [
    "BackendUnavailable",
    "BlockLayout",
    "FormatError",
    "PackedLSTM",
    "PackedLayerNormLSTM",
    "PackedLinear",
    "PackedWeight",
    "PruneEvent",
    "Pruner",
    "PruningPlan",
    "Recommendation",
    "SparseLSTM",
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
    "sparse_lstm_cell",
    "sparsify_",
    "topk_mask",
    "unpack_",
]
