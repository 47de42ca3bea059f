"""Prepared products: `sparse_pathways::packed_linear(x, handle)`, the shortest way from Python into a CPU kernel.

A handle stands for a packed weight, one pathway, a bias and an activation, all checked once, and for a copy of the
weight in the order its kernel reads it, where the kernel has one (bfloat16, int8). It is an eager-only short
cut for inference: under a compiler, with gradients or off the CPU, `sparse_linear` takes `bcsr_linear`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sparse_pathways.layout.packed import BlockIndex, PackedWeight
from sparse_pathways.ops import backends

PACKED_LINEAR = "sparse_pathways::packed_linear"

torch.library.define(
    "sparse_pathways::prepare_linear",
    "(Tensor values, Tensor crow, Tensor col, Tensor? pos, Tensor? bias, int n, int k, Tensor? scale, int activation, "
    "bool quantise_x, int base) -> int",
)
torch.library.define("sparse_pathways::release_linear", "(int handle) -> ()")
torch.library.define("sparse_pathways::direct_calls", "() -> int")
torch.library.define(PACKED_LINEAR, "(Tensor x, int handle, Tensor? residual=None) -> Tensor")

_LIBRARY = torch.library.Library("sparse_pathways", "IMPL")


def _refuse(*_: object) -> Tensor:
    raise RuntimeError("operators on handles are for eager calls outside autocast, traces and compilers")


def eager_only(name: str) -> None:
    """Keep compilers and autocast away from an operator that takes handles, and autograd out of its way.

    Gradients never come to it (its callers see to that), so autograd has nothing to record: no detour, no graph node.
    """
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "ADInplaceOrView")
    _LIBRARY.impl(name, _refuse, "AutocastCPU")
    _LIBRARY.impl(name, _refuse, "Tracer")
    torch.library.register_fake(f"sparse_pathways::{name}")(_refuse)


eager_only("packed_linear")
for _name in ("prepare_linear", "release_linear", "direct_calls", "isa", "max_isa", "set_isa"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Tracer")  # what they say is no part of a model


def is_plain_call() -> bool:
    """Whether nobody but a kernel has a say in what is called now: no compiler, no trace (which would keep a handle
    beyond its weight), no mode, no transform, no forward derivative."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or is_forward_mode()
    )


def is_forward_mode() -> bool:
    """Whether forward derivatives are being computed, of which operators without a formula would lose theirs."""
    return torch.autograd.forward_ad._current_level >= 0


packed_linear = torch.ops.sparse_pathways.packed_linear.default


def version_of(values: Tensor) -> int | None:
    """Count of in-place writes, at another value of which a handle is stale: it has copies. None: not counted."""
    return None if values.is_inference() else values._version


class Prepared:
    """Owner of one handle, with what tells whether the next call may use it."""

    __slots__ = ("activation", "base", "bias", "epoch", "handle", "pointer", "values", "version")

    def __init__(
        self,
        packed: PackedWeight,
        values: Tensor,
        index: BlockIndex,
        bias: Tensor | None = None,
        activation: str | None = None,
        number: int = 0,
        base: Prepared | None = None,
    ) -> None:
        self.bias, self.activation, self.epoch, self.handle, self.base = bias, activation, backends.epoch, 0, base
        self.values, self.version, self.pointer = packed.values, version_of(packed.values), packed.values.data_ptr()
        self.handle = torch.ops.sparse_pathways.prepare_linear.default(
            values, *index, bias, *packed.shape, packed.scale, number, packed.quantise_x, base.handle if base else 0
        )

    def is_stale(self) -> bool:
        """Whether the values have changed or moved, or the forced backend is another."""
        changed = self.version is not None and self.version != self.values._version
        return changed or self.pointer != self.values.data_ptr() or self.epoch != backends.epoch

    def __del__(self, release=torch.ops.sparse_pathways.release_linear.default, finalizing=sys.is_finalizing) -> None:  # type: ignore[no-untyped-def]
        # Bound as defaults: when the interpreter ends, the modules may be gone before the last weight.
        if self.handle and not finalizing():
            release(self.handle)


def prepare(
    packed: PackedWeight, pathway: str | None, bias: Tensor | None, activation: str | None, number: int
) -> Prepared:
    """One pathway of `packed`, made ready for `packed_linear`.

    A pathway among several names blocks here and there in the common pool, which the memory serves at a half to a
    third of its speed. So the blocks that all pathways share are copied once, and those of this pathway besides: two
    products, each over blocks that lie one after the other, the second added to the first. bfloat16 would round in
    between: there every pathway in use has a copy of its own.
    """
    index = packed.index(pathway)
    if index.pos is None:
        return Prepared(packed, packed.values, index, bias, activation, number)
    mask = packed.mask(pathway)
    shared = torch.stack([packed.mask(name) for name in packed.pathways]).all(0)
    if packed.dtype == torch.bfloat16 or not shared.any() or torch.equal(shared, mask):
        return Prepared(packed, *packed.part(mask), bias, activation, number)
    base = packed.prepared.get(_SHARED)
    if base is None or base.values is not packed.values or base.is_stale():
        base = packed.prepared[_SHARED] = Prepared(packed, *packed.part(shared))
    return Prepared(packed, *packed.part(mask & ~shared), bias, activation, number, base)


_SHARED = object()  # key of the part that all pathways share, among the names of pathways
