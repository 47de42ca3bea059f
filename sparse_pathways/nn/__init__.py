"""nn.Module shells that hold tensors and call the operators, and the conversion of whole models."""

from sparse_pathways.nn.convert import (
    add_pathway_,
    density,
    explain,
    overlap,
    pack,
    pack_,
    pathway,
    pathways,
    set_pathway,
    sparse_layers,
    sparsify_,
    unpack_,
)
from sparse_pathways.nn.file import load_packed, save_packed
from sparse_pathways.nn.linear import PackedLinear, SparseLinear
from sparse_pathways.nn.lstm import SparseLSTM
from sparse_pathways.nn.lstm_packed import PackedLayerNormLSTM, PackedLSTM
from sparse_pathways.nn.recommend import Recommendation, recommend
from sparse_pathways.nn.sight import mask_report

__all__ = [
    "PackedLSTM",
    "PackedLayerNormLSTM",
    "PackedLinear",
    "Recommendation",
    "SparseLSTM",
    "SparseLinear",
    "add_pathway_",
    "density",
    "explain",
    "load_packed",
    "mask_report",
    "overlap",
    "pack",
    "pack_",
    "pathway",
    "pathways",
    "recommend",
    "save_packed",
    "set_pathway",
    "sparse_layers",
    "sparsify_",
    "unpack_",
]
