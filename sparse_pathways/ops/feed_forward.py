"""`sparse_feed_forward`: two packed products with an activation between them; on CUDA one Triton kernel for both."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_pathways.layout.packed import PackedWeight
from sparse_pathways.ops import backends
from sparse_pathways.ops.cuda import on_its_device
from sparse_pathways.ops.linear import autocast_dtype, sparse_linear, wants_grad
from sparse_pathways.ops.prepared import is_forward_mode
from sparse_pathways.ops.reference import ACTIVATION_NAMES, reference_linear

FFN = "sparse_pathways::bcsr_ffn"
torch.library.define(
    FFN,
    "(Tensor x, Tensor values_1, Tensor crow_1, Tensor col_1, Tensor? pos_1, Tensor? bias_1, int n_1, Tensor values_2, "
    "Tensor crow_2, Tensor col_2, Tensor? pos_2, Tensor? bias_2, int n_2, int activation) -> Tensor",
)


@torch.library.register_kernel(FFN, None)
def _reference(x, v1, crow1, col1, pos1, b1, n1, v2, crow2, col2, pos2, b2, n2, activation):  # type: ignore[no-untyped-def]
    hidden = reference_linear(x, v1, crow1, col1, pos1, b1, n1, activation=activation)
    return reference_linear(hidden, v2, crow2, col2, pos2, b2, n2)


@on_its_device
def cuda_ffn(x, v1, crow1, col1, pos1, b1, n1, v2, crow2, col2, pos2, b2, n2, activation):  # type: ignore[no-untyped-def]
    """`bcsr_ffn` on CUDA."""
    from sparse_pathways.kernels.ffn import Weight, bcsr_ffn  # imports Triton: only where it runs

    first = Weight(v1, crow1, col1, pos1, b1, n1, (v1.shape[2], v1.shape[1]))
    return bcsr_ffn(x, first, Weight(v2, crow2, col2, pos2, b2, n2, (v2.shape[2], v2.shape[1])), activation)


torch.library.register_kernel(FFN, "cuda", cuda_ffn)


@torch.library.register_fake(FFN)
def _fake(x, v1, crow1, col1, pos1, b1, n1, v2, crow2, col2, pos2, b2, n2, activation):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], n2)


def sparse_feed_forward(
    x: Tensor,
    first: PackedWeight,
    second: PackedWeight,
    bias_first: Tensor | None = None,
    bias_second: Tensor | None = None,
    *,
    pathway: str | Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """`activation(x @ W1.T + b1) @ W2.T + b2`, both weights packed: the feed-forward layer of a transformer.

    On CUDA, with blocks that the Triton kernels take and nothing to differentiate, one kernel: the hidden values of a
    tile of rows stay in L2 (not yet run on a device). Everywhere else two calls of `sparse_linear`.

    Args:
        x: `[..., K]`.
        first: W1 `[H, K]`.
        second: W2 `[N, H]`.
        bias_first: `[H]`.
        bias_second: `[N]`.
        pathway: as for `sparse_linear`, of both weights.
        activation: None, "relu", "gelu", "silu" or "tanh".

    Returns:
        `[..., N]` in the dtype of x.

    Raises:
        As `sparse_linear`; ValueError: W2 does not take the outputs of W1.
    """
    for name, weight in (("first", first), ("second", second)):
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"{name} is a {type(weight).__name__}; want a PackedWeight")
    if second.shape[1] != first.shape[0]:
        raise ValueError(f"second takes {second.shape[1]} inputs, first has {first.shape[0]} outputs")
    if not _is_fused(x, first, second, bias_first, bias_second, pathway):
        hidden = sparse_linear(x, first, bias_first, pathway=pathway, activation=activation)
        return sparse_linear(hidden, second, bias_second, pathway=pathway)
    assert not isinstance(pathway, Tensor)
    one, two = first.index(pathway), second.index(pathway)
    y = torch.ops.sparse_pathways.bcsr_ffn(
        x.reshape(-1, x.shape[-1]).contiguous(),
        *(first.values, *one, bias_first, first.shape[0]),
        *(second.values, *two, bias_second, second.shape[0]),
        ACTIVATION_NAMES.index(activation),
    )
    return y.view(*x.shape[:-1], second.shape[0])


def _is_fused(
    x: Tensor,
    first: PackedWeight,
    second: PackedWeight,
    bias_first: Tensor | None,
    bias_second: Tensor | None,
    pathway: str | Tensor | None,
) -> bool:
    """Whether one kernel takes it; what is wrong in the arguments is for `sparse_linear` to say."""
    biases = [(bias, weight) for bias, weight in ((bias_first, first), (bias_second, second)) if bias is not None]
    return (
        first.device.type == "cuda"
        and not isinstance(pathway, Tensor)
        and x.device == first.device == second.device
        and x.dtype == first.dtype == second.dtype
        and x.dim() > 0
        and x.shape[-1] == first.shape[1]
        and all(
            bias.shape == weight.shape[:1]
            and bias.dtype == x.dtype
            and bias.device == x.device
            and bias.is_contiguous()
            for bias, weight in biases
        )
        and autocast_dtype("cuda") is None
        and not is_forward_mode()
        and not wants_grad(x, first.values, second.values, bias_first, bias_second)
        and all(backends.select("cuda", one.dtype, one.block) == "triton" for one in (first, second))
    )
