"""`sparse_pathways::bcsr_lstm`: one direction of one LSTM layer over a sequence, both weights held as packed blocks.

Here: schema, fake, PyTorch reference, the differentiable form, and the public `sparse_lstm_cell`. Kernel:
csrc/torch/lstm_cpu.cpp (CPU); other devices and dtypes, gradients and mixed pathways take the composition of
`sparse_linear` and PyTorch's own functions, `compose`. `packed_lstm` is the same on prepared weights (prepared.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_pathways.layout.packed import PackedWeight
from sparse_pathways.ops import backends, strips
from sparse_pathways.ops.linear import autocast_dtype, sparse_linear, wants_grad
from sparse_pathways.ops.prepared import Prepared as PreparedWeight
from sparse_pathways.ops.prepared import eager_only, is_forward_mode, is_plain_call, prepare
from sparse_pathways.ops.reference import reference_linear

LSTM = "sparse_pathways::bcsr_lstm"
State = tuple[Tensor, Tensor]

_WEIGHT = "Tensor values_{0}, Tensor crow_{0}, Tensor col_{0}, Tensor? pos_{0}, Tensor? scale_{0}, Tensor? bias_{0}"
torch.library.define(
    LSTM,
    f"(Tensor x, Tensor h, Tensor c, {_WEIGHT.format('ih')}, {_WEIGHT.format('hh')}, Tensor? g_weight=None, "
    "Tensor? g_bias=None, Tensor? c_weight=None, Tensor? c_bias=None, float g_eps=0.0, float c_eps=0.0, "
    "bool reverse=False, bool quantise_x=False) -> (Tensor, Tensor, Tensor)",
)


torch.library.define(
    "sparse_pathways::packed_lstm",
    "(Tensor x, Tensor h, Tensor c, int ih, int hh, Tensor? g_weight=None, Tensor? g_bias=None, Tensor? c_weight=None, "
    "Tensor? c_bias=None, float g_eps=0.0, float c_eps=0.0, bool reverse=False) -> (Tensor, Tensor, Tensor)",
)
eager_only("packed_lstm")


class Norm(NamedTuple):
    """LayerNorm over all 4H gates before their activations, and over the H new cells."""

    g_weight: Tensor
    g_bias: Tensor
    c_weight: Tensor
    c_bias: Tensor
    g_eps: float
    c_eps: float


class Weight(NamedTuple):
    """One of the two weights of a layer, with the pathway that is used: a name, or an index per row."""

    packed: PackedWeight
    bias: Tensor | None
    pathway: str | Tensor | None


def _recur(
    inputs: Tensor,
    h: Tensor,
    c: Tensor,
    product: Callable[[Tensor], Tensor],
    norm: Norm | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`inputs [T, M, 4H]`: W_ih x + b_ih of all steps; `product`: W_hh h + b_hh."""
    if inputs.shape[0] == 0:
        return inputs.new_empty(0, *h.shape), h.clone(), c.clone()
    outputs = []
    for gates in reversed(inputs.unbind()) if reverse else inputs.unbind():
        gates = gates + product(h)
        if norm is not None:
            gates = F.layer_norm(gates, gates.shape[-1:], norm.g_weight, norm.g_bias, norm.g_eps)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if norm is not None:
            c = F.layer_norm(c, c.shape[-1:], norm.c_weight, norm.c_bias, norm.c_eps)
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), h, c


def _as_steps(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x [T, M, E]`, `h [M, H]` and `c [M, H]` of whatever leading shapes the caller has."""
    rows = h.numel() // h.shape[-1]
    steps = x.numel() // (x.shape[-1] * rows) if rows else 0
    return x.reshape(steps, rows, x.shape[-1]), h.reshape(rows, h.shape[-1]), c.reshape(rows, c.shape[-1])


def _in_shape(result: tuple[Tensor, Tensor, Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, h_last, c_last = result
    return y.reshape(*x.shape[:-1], h.shape[-1]), h_last.reshape(h.shape), c_last.reshape(h.shape)


def reference_lstm(x, h, c, *rest):  # type: ignore[no-untyped-def]
    """What `bcsr_lstm` computes, in plain PyTorch: `(y [..., H], h, c)`."""
    ih, hh, norm, reverse, quantise_x = rest[:6], rest[6:12], Norm(*rest[12:18]), rest[18], rest[19]
    xs, h0, c0 = _as_steps(x, h, c)

    def product(weight, rows):  # type: ignore[no-untyped-def]
        values, crow, col, pos, scale, bias = weight
        return reference_linear(rows, values, crow, col, pos, bias, 4 * h.shape[-1], scale, None, 0, quantise_x)

    inputs = product(ih, xs.flatten(0, 1)).view(*xs.shape[:2], -1)
    result = _recur(inputs, h0, c0, partial(product, hh), norm if norm.g_weight is not None else None, reverse)
    return _in_shape(result, x, h)


@torch.library.register_kernel(LSTM, None)
def _reference(
    x, h, c, values_ih, crow_ih, col_ih, pos_ih, scale_ih, bias_ih, values_hh, crow_hh, col_hh, pos_hh, scale_hh,
    bias_hh, g_weight=None, g_bias=None, c_weight=None, c_bias=None, g_eps=0.0, c_eps=0.0, reverse=False,
    quantise_x=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    return reference_lstm(
        x, h, c, values_ih, crow_ih, col_ih, pos_ih, scale_ih, bias_ih, values_hh, crow_hh, col_hh, pos_hh, scale_hh,
        bias_hh, g_weight, g_bias, c_weight, c_bias, g_eps, c_eps, reverse, quantise_x,
    )  # fmt: skip


@torch.library.register_fake(LSTM)
def _fake(x, h, c, *rest, **named):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], h.shape[-1]), torch.empty_like(h), torch.empty_like(c)


_bcsr_lstm = torch.ops.sparse_pathways.bcsr_lstm.default
_packed_lstm = torch.ops.sparse_pathways.packed_lstm.default._op  # as for packed_linear


def kernel_name(ih: PackedWeight, hh: PackedWeight) -> str:
    """CPU backend that serves a layer with these weights; "reference" is the composition of products.

    Raises:
        BackendUnavailable: a backend is forced and cannot serve it.
    """
    names = {backends.select(w.device.type, w.dtype, w.block) for w in (ih, hh)}
    return names.pop() if len(names) == 1 and names.isdisjoint({"reference", "triton", "cuda"}) else "reference"


def _served(ih: Weight, hh: Weight) -> bool:
    """Whether the operators take these weights; `compose` takes all."""
    one_pathway = not isinstance(ih.pathway, Tensor) and not isinstance(hh.pathway, Tensor)
    same = ih.packed.dtype == hh.packed.dtype and ih.packed.quantise_x == hh.packed.quantise_x
    return one_pathway and same and not is_forward_mode() and kernel_name(ih.packed, hh.packed) != "reference"


def _whole(x: Tensor, h: Tensor, c: Tensor, ih: Weight, hh: Weight, norm: Norm | None, reverse: bool):  # type: ignore[no-untyped-def]
    """`bcsr_lstm` with all its arguments."""
    weights: list[Any] = []
    for packed, bias, pathway in (ih, hh):
        index = packed.index(pathway)  # type: ignore[arg-type]
        weights += [packed.values, *index, packed.scale, None if bias is None else bias.contiguous()]
    norms = norm or (None, None, None, None, 0.0, 0.0)
    return _bcsr_lstm(x.contiguous(), h.contiguous(), c.contiguous(), *weights, *norms, reverse, ih.packed.quantise_x)


def _prepared_weight(packed: PackedWeight, bias: Tensor | None, pathway: Any) -> PreparedWeight:
    """Kept with the packed weight, one per pathway, so that a switch of pathways prepares nothing again."""
    ready = packed.prepared.get(pathway)
    if ready is None or ready.bias is not bias or ready.activation is not None or ready.is_stale():
        ready = prepare(packed, pathway, bias, None, 0)
        packed.prepared[pathway] = ready
    return ready


class Prepared:
    """The weights of one layer and direction prepared, kept until one of the parts they are made of is another.

    Checking shapes and looking up index lists in Python takes longer than the fastest kernels: a call that finds its
    arguments here makes neither, and leaves the checks of shapes to the operator.
    """

    __slots__ = ("_arguments", "_ids", "_parts", "_weights")

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()
        self._parts: tuple[Any, ...] = ()
        self._weights: tuple[PreparedWeight, ...] = ()
        self._arguments: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()  # a copy has parts of its own

    def run(
        self, x: Tensor, h: Tensor, c: Tensor, ih: Weight, hh: Weight, norm: Norm | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The layer, if `keep` got these very objects and a call may use them as they are; else None.

        Raises:
            RuntimeError: shapes or dtypes do not fit.
        """
        arguments = self._arguments
        if (
            arguments is None
            or not is_plain_call()
            or torch.is_grad_enabled()
            or torch._C._is_any_autocast_enabled()
            or tuple(map(id, (*ih, *hh, *(norm or ())))) != self._ids
            or any(weight.is_stale() for weight in self._weights)
        ):
            return None
        return _packed_lstm(x.contiguous(), h.contiguous(), c.contiguous(), *arguments)

    def keep(self, ih: Weight, hh: Weight, norm: Norm | None = None, reverse: bool = False) -> None:
        """Prepare for the next call, after one that was checked."""
        self._arguments = None
        if not is_plain_call() or torch.is_grad_enabled() or not _served(ih, hh):
            return
        if any(bias is not None and not bias.is_contiguous() for bias in (ih.bias, hh.bias)):
            return  # a copy of it would not follow its changes
        self._parts = (*ih, *hh, *(norm or ()))
        self._ids = tuple(map(id, self._parts))  # an id is good only while its object lives
        self._weights = tuple(_prepared_weight(*weight) for weight in (ih, hh))
        handles = [weight.handle for weight in self._weights]
        last = (*(norm or (None, None, None, None, 0.0, 0.0)), reverse) if reverse else norm or ()
        self._arguments = (*handles, *last)  # every argument takes time, defaults too


def compose(
    x: Tensor, h: Tensor, c: Tensor, ih: Weight, hh: Weight, norm: Norm | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from `sparse_linear` and PyTorch's functions: any device and dtype, differentiable, mixed pathways."""
    xs, h0, c0 = _as_steps(x, h, c)
    pathway = ih.pathway.repeat(xs.shape[0]) if isinstance(ih.pathway, Tensor) else ih.pathway
    inputs = sparse_linear(xs.flatten(0, 1), ih.packed, ih.bias, pathway=pathway)
    product = partial(sparse_linear, packed=hh.packed, bias=hh.bias, pathway=hh.pathway)
    return _in_shape(_recur(inputs.view(*xs.shape[:2], -1), h0, c0, product, norm, reverse), x, h)


def _takes_strips(x: Tensor, h: Tensor, ih: Weight, hh: Weight) -> bool:
    """Whether the CUDA C++ kernel serves this call."""
    if not x.is_cuda or torch.compiler.is_compiling() or isinstance(ih.pathway, Tensor) or ih.packed.dtype != x.dtype:
        return False
    names = {backends.select("cuda", w.packed.dtype, w.packed.block) for w in (ih, hh)}
    steps = x.numel() // max(1, x.shape[-1] * h.numel() // h.shape[-1])
    return (
        names == {"cuda"} and hh.packed.dtype == x.dtype and strips.takes_lstm(steps, x.shape[-1], h.shape[-1], x.dtype)
    )


def sparse_lstm(
    x: Tensor, h: Tensor, c: Tensor, ih: Weight, hh: Weight, norm: Norm | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer over a sequence, by the fastest way that serves it.

    Args:
        x: `[T, M, E]`; `[M, E]` or `[E]` for one step, `[T, E]` for one row. Its shape must fit that of h.
        h, c: `[..., M, H]`; not written to.
        ih, hh: `[4H, E]` and `[4H, H]` with their biases, gates in the order input, forget, cell, output.
        norm: LayerNorm of gates and cells.
        reverse: from the last step to the first.

    Returns:
        `(y, h, c)`: y like x with H columns, h and c after the last step in their own shapes.
    """
    if (low := autocast_dtype(x.device.type)) is not None:
        x, h, c = (t.to(ih.packed.x_dtype) for t in (x, h, c))
        with torch.autocast(x.device.type, enabled=False):
            y, h, c = sparse_lstm(x, h, c, ih, hh, norm, reverse)
        return y.to(low), h.to(low), c.to(low)
    trained = () if norm is None else norm[:4]
    if not wants_grad(x, h, c, ih.packed.values, ih.bias, hh.packed.values, hh.bias, *trained):
        if _takes_strips(x, h, ih, hh):
            xs, h0, c0 = (t.contiguous() for t in _as_steps(x, h, c))
            of_x, of_h = ((w.packed, w.packed.index(w.pathway), w.bias) for w in (ih, hh))  # type: ignore[arg-type]
            return _in_shape(strips.lstm(xs, h0, c0, of_x, of_h, norm, reverse), x, h)
        if _served(ih, hh):
            return _whole(x, h, c, ih, hh, norm, reverse)
    return compose(x, h, c, ih, hh, norm, reverse)


def check_state(x: Tensor, h: Tensor, c: Tensor, ih: PackedWeight, hh: PackedWeight, rows: tuple[int, ...]) -> None:
    """Refuse x `[..., E]`, h and c `[*rows, H]` that do not fit the weights or each other, in words."""
    hidden = hh.shape[1]
    if ih.shape[0] != 4 * hidden or hh.shape[0] != 4 * hidden:
        raise ValueError(f"w_ih is {ih.shape}, w_hh {hh.shape}; want [4H, E] and [4H, H]")
    if x.shape[-1] != ih.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; w_ih {ih.shape} takes [..., {ih.shape[1]}]")
    if h.shape != (*rows, hidden) or c.shape != h.shape:
        raise ValueError(f"h has shape {tuple(h.shape)}, c {tuple(c.shape)}; want {(*rows, hidden)} for both")
    for name, tensor in (("x", x), ("h", h), ("c", c)):
        if tensor.device != ih.device or hh.device != ih.device:
            raise ValueError(f"{name} is on {tensor.device}, the weights on {ih.device} and {hh.device}; move one")
        if tensor.dtype != ih.x_dtype and autocast_dtype(x.device.type) is None:
            raise TypeError(f"{name}.dtype = {tensor.dtype}; the weights are {ih.dtype} and take {ih.x_dtype}")
    if ih.x_dtype != hh.x_dtype:
        raise TypeError(f"w_ih.dtype = {ih.dtype}, w_hh.dtype = {hh.dtype}; they must take the same activations")


def sparse_lstm_cell(
    x: Tensor,
    state: State,
    w_ih: PackedWeight,
    w_hh: PackedWeight,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    pathway: str | Tensor | None = None,
) -> State:
    """One step of an LSTM with packed weights; `nn.LSTMCell` with the weights as arguments.

    Args:
        x: `[M, E]` or `[E]`, in the dtype that the weights take (float32 for int8).
        state: (h, c), each `[M, H]` or `[H]`; not modified.
        w_ih: `[4H, E]`, gates in the order input, forget, cell, output.
        w_hh: `[4H, H]`.
        b_ih, b_hh: `[4H]`.
        pathway: a name, or a LongTensor `[M]` of indices into the weights' pathways (a batch of several languages,
            which the fused kernel does not serve: slower); needed when the weights have more than one.

    Returns:
        (h, c) after the step, in new tensors.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or device. KeyError: unknown pathway.
        BackendUnavailable: a forced backend cannot serve this.
    """
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state is a {type(state).__name__}; want a pair of tensors (h, c)")
    h, c = state
    for name, tensor in (("x", x), ("h", h), ("c", c)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; want a Tensor")
    ih, hh = Weight(w_ih, b_ih, pathway), Weight(w_hh, b_hh, pathway)
    prepared = getattr(w_hh, "_lstm_prepared", None)
    if prepared is not None and x.dim() == 2 and x.size(0) == len(h) and x.size(1) == w_ih.shape[1]:
        try:
            if (result := prepared.run(x, h, c, ih, hh)) is not None:
                return result[1:]
        except RuntimeError:
            pass  # something does not fit: the checks below find the words
    for name, weight in (("w_ih", w_ih), ("w_hh", w_hh)):
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"{name} is a {type(weight).__name__}; want a PackedWeight")
    if x.dim() not in (1, 2):
        raise ValueError(f"x has shape {tuple(x.shape)}; want [M, E] or [E]")
    check_state(x, h, c, w_ih, w_hh, tuple(x.shape[:-1]))
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None and (bias.shape != w_ih.shape[:1] or bias.dtype != w_ih.x_dtype):
            raise ValueError(
                f"{name} is {bias.dtype} {tuple(bias.shape)}; want {w_ih.x_dtype} of shape ({w_ih.shape[0]},)"
            )
    _, h, c = sparse_lstm(x, h, c, ih, hh)
    if not torch.compiler.is_compiling():
        w_hh._lstm_prepared = Prepared()  # type: ignore[attr-defined]
        w_hh._lstm_prepared.keep(ih, hh)  # type: ignore[attr-defined]
    return h, c
