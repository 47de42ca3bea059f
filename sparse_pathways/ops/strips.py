"""CUDA C++ kernels over strips: products and LSTM steps. Kernels: csrc/cuda/, registered by
csrc/torch/library_cuda.cpp. Not yet run on a device: proven on the host by an emulator, see tests/cuda/.

Strips are the packed order of these kernels (csrc/cuda/kernels.h): P neighbouring outputs with one list of inputs,
values in the order of the tensor cores' operands. They are made on the device from the generic order, once per weight
and pathway, and kept with the weight (`PackedWeight.prepared`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_pathways.checks import Block
from sparse_pathways.layout.packed import BlockIndex, PackedWeight
from sparse_pathways.ops import library

torch.library.define(
    "sparse_pathways::strips_pack",
    "(Tensor source, Tensor crow, Tensor col, Tensor? pos, int n, int k, int r, int c, int p, int capacity=-1) -> "
    "(Tensor values, Tensor ids, Tensor begin, Tensor needed)",
)
torch.library.define(
    "sparse_pathways::strips_linear",
    "(Tensor x, Tensor values, Tensor ids, Tensor begin, Tensor? bias, Tensor? residual, int n, int p, "
    "int activation=0, int tile_m=0) -> Tensor",
)
torch.library.define(
    "sparse_pathways::strips_lstm",
    "(Tensor x, Tensor h, Tensor c, Tensor values_ih, Tensor ids_ih, Tensor begin_ih, Tensor? bias_ih, "
    "Tensor values_hh, Tensor ids_hh, Tensor begin_hh, Tensor? bias_hh, Tensor? g_weight=None, Tensor? g_bias=None, "
    "Tensor? c_weight=None, Tensor? c_bias=None, float g_eps=0.0, float c_eps=0.0, bool reverse=False) -> "
    "(Tensor, Tensor, Tensor)",
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEIGHTS = (32, 16, 8)  # a strip of 64 would need twice the registers, or read its values twice
LSTM_HEIGHT = 8
CHUNK = 512  # inputs that one list covers: kChunk of csrc/cuda
SHARED_BYTES, LSTM_PARTIAL_BYTES = 160 << 10, 16 << 10  # kMaxSharedBytes, kPartialBytes of csrc/cuda
UNION_SAVES = 0.8  # strips of 16 for 8-high blocks: fewer lists, more zeros; from this share of octets on they pay


@torch.library.register_fake("sparse_pathways::strips_linear")
def _fake_linear(x, values, ids, begin, bias, residual, n, p, activation=0, tile_m=0):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], n)


@torch.library.register_fake("sparse_pathways::strips_pack")
def _fake_pack(source, crow, col, pos, n, k, r, c, p, capacity=-1):  # type: ignore[no-untyped-def]
    octets = capacity if capacity >= 0 else torch.library.get_ctx().new_dynamic_size()
    ids = crow.new_empty(octets, 8, dtype=torch.uint16)
    return source.new_empty(octets, 8 * p), ids, crow.new_empty(-(-n // p) * -(-k // CHUNK) + 1), crow.new_empty(1)


@torch.library.register_fake("sparse_pathways::strips_lstm")
def _fake_lstm(x, h, c, *rest, **named):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], h.shape[-1]), torch.empty_like(h), torch.empty_like(c)


class Strips(NamedTuple):
    """One pathway of a weight in strips of `p` outputs.

    values: `[octets, 8 p]`; ids: uint16 `[octets, 8]`; begin: int32 `[strips * chunks + 1]`.
    """

    values: Tensor
    ids: Tensor
    begin: Tensor
    p: int


def refusal(dtype: torch.dtype, block: Block) -> str | None:
    """Why these kernels cannot serve a dtype and a block shape on the current device; None when they can."""
    if library.CUDA_MISSING is not None:
        return f"the CUDA kernels are missing: {library.CUDA_MISSING}"
    if dtype not in DTYPES:
        return f"dtype = {dtype}; the CUDA kernels take float32, float16 and bfloat16"
    if block[0] % 8:
        return f"block = {block}; the CUDA kernels take blocks of a multiple of 8 outputs"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (8, 0) and major not in (9, 10):  # sm_86, sm_89 and sm_120 have too little shared memory
        return f"the device is sm_{major}{minor}; the CUDA kernels need the shared memory of sm_80, sm_90 or sm_100"
    return None


def _pack(packed: PackedWeight, index: BlockIndex, p: int) -> Strips:
    (n, k), (r, c) = packed.shape, packed.block
    values, ids, begin, *_ = torch.ops.sparse_pathways.strips_pack.default(packed.values, *index, n, k, r, c, p)
    return Strips(values, ids, begin, p)


def strips_of(packed: PackedWeight, index: BlockIndex, height: int | None = None) -> Strips:
    """Strips of one pathway, made at the first call (which waits for the device) and kept with the weight.

    Args:
        packed: float weight on a CUDA device.
        index: of the pathway, from `packed.index`.
        height: outputs per strip; None chooses: as high as the blocks, at most 32; for 8-high blocks also 16, where
            neighbouring block rows keep much the same inputs.
    """
    number = next(i for i, one in enumerate(packed.indices) if one is index)
    values = packed.values
    # Tensors of inference_mode do not count their writes: who changes those in place packs anew.
    state = values.data_ptr(), None if values.is_inference() else values._version
    key = ("strips", height, number)
    found = packed.prepared.get(key)
    if found is None or found[1] is not values or found[2] != state:
        p = height or next(h for h in HEIGHTS if packed.block[0] % h == 0)
        strips = _pack(packed, index, p)
        if height is None and p == 8:
            union = _pack(packed, index, 16)
            if union.ids.shape[0] <= UNION_SAVES * strips.ids.shape[0]:
                strips = union
        packed.prepared[key] = found = strips, values, state
    return found[0]


def linear(
    x: Tensor,
    packed: PackedWeight,
    index: BlockIndex,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """`activation(x @ W.T + bias) + residual` for x `[M, K]`, rows contiguous: `[M, N]`. No gradient."""
    values, ids, begin, p = strips_of(packed, index)
    return torch.ops.sparse_pathways.strips_linear.default(
        x, values, ids, begin, bias, residual, packed.shape[0], p, activation
    )


def takes_lstm(steps: int, width: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether the LSTM kernel takes these sizes: x (of a single step) and h of 16 rows must fit shared memory."""
    tiles = 16 * dtype.itemsize * ((width if steps == 1 else 0) + hidden + 14)
    return steps > 0 and hidden % 8 == 0 and tiles + LSTM_PARTIAL_BYTES <= SHARED_BYTES


def lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    ih: tuple[PackedWeight, BlockIndex, Tensor | None],
    hh: tuple[PackedWeight, BlockIndex, Tensor | None],
    norm: tuple[Tensor, Tensor, Tensor, Tensor, float, float] | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, h, c)` of one direction of one layer: x `[T, M, E]`, h and c `[M, H]`. No gradient."""
    weights: list[Tensor | None] = []
    for packed, index, bias in (ih, hh):
        weights += [*strips_of(packed, index, LSTM_HEIGHT)[:3], bias]
    more = (*(norm or (None, None, None, None, 0.0, 0.0)), reverse)
    return torch.ops.sparse_pathways.strips_lstm.default(x, h, c, *weights, *more)
