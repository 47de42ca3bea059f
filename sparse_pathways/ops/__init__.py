"""The operators: schema, fake, autograd and reference in Python, kernels from C++ and Triton."""

from sparse_pathways.ops.backends import explain_product
from sparse_pathways.ops.feed_forward import sparse_feed_forward
from sparse_pathways.ops.linear import sparse_linear
from sparse_pathways.ops.lstm import sparse_lstm_cell
from sparse_pathways.ops.masked import masked_linear
from sparse_pathways.ops.static import StaticLayouts

__all__ = [
    "StaticLayouts",
    "explain_product",
    "masked_linear",
    "sparse_feed_forward",
    "sparse_linear",
    "sparse_lstm_cell",
]
