"""PackedLSTM and PackedLayerNormLSTM: inference forms of LSTMs, run by one operator a layer.

They hold ordinary PackedLinear layers, so that pathways, files and everything else that looks at layers finds them;
only the forward is their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sparse_pathways.nn.linear import PackedLinear
from sparse_pathways.ops.linear import autocast_dtype
from sparse_pathways.ops.lstm import Norm, Prepared, Weight, kernel_name, sparse_lstm

State = tuple[Tensor, Tensor]
Kind = TypeVar("Kind", bound=nn.Module)


def as_class(module: nn.Module, kind: type[Kind]) -> Kind:
    """A module of class `kind` with the attributes of `module`: the same tensors and children, its own containers."""
    new = kind.__new__(kind)
    new.__dict__.update({k: copy.copy(v) if isinstance(v, dict | list) else v for k, v in module.__dict__.items()})
    return new


def configuration(lstm: nn.Module) -> dict[str, Any]:
    """The arguments of nn.LSTM that made `lstm`, or its packed form."""
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    return {name: getattr(lstm, name) for name in names}


def _weights(ih: PackedLinear, hh: PackedLinear) -> tuple[Weight, Weight]:
    # Attributes of modules that are no plain ones take long to find.
    return Weight(ih.packed, ih._buffers["bias"], ih.active), Weight(hh.packed, hh._buffers["bias"], hh.active)


def _words(ih: PackedLinear, hh: PackedLinear, rows: int) -> str:
    name = kernel_name(ih.packed, hh.packed)
    if name == "reference":
        return f"{rows} rows: two products and PyTorch's own functions: no operator for these weights"
    return f"{rows} rows: {name}: two products into one buffer, gates and state from there, in one call"


class PackedLSTM(nn.Module):
    """Inference form of an LSTM: `nn.LSTM`'s forward, one PackedLinear per weight as children `ih_l0`, `hh_l0`, ...

    Attributes:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in nn.LSTM.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool

    def __init__(self, configuration: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> None:
        """Hold `layers`, {"ih_l0": ..., "hh_l0": ..., "ih_l0_reverse": ...}, of an nn.LSTM of this configuration."""
        super().__init__()
        for name, value in configuration.items():
            setattr(self, name, value)
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        names = [f"l{k}{suffix}" for k in range(self.num_layers) for suffix in suffixes]
        self._names = tuple((f"ih_{name}", f"hh_{name}") for name in names)
        for pair in self._names:
            for name in pair:
                setattr(self, name, layers[name])
        self._prepared = tuple(Prepared() for _ in self._names)

    def explain(self, rows: int) -> str:
        """One sentence: what serves `rows` rows."""
        return _words(*self._pair(0), rows)

    def _pair(self, number: int) -> tuple[PackedLinear, PackedLinear]:
        ih, hh = self._names[number]
        return self._modules[ih], self._modules[hh]  # type: ignore[return-value]

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """As nn.LSTM; a PackedSequence is refused.

        Raises:
            TypeError, ValueError: input or hx do not fit.
        """
        if hx is not None and len(self._names) == 1 and not self.batch_first and (fast := self._fast(input, *hx)):
            return fast
        if isinstance(input, PackedSequence):
            raise TypeError("input is a PackedSequence, which a packed LSTM does not take; pass the padded batch")
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; want [T, M, {self.input_size}], "
                f"[M, T, {self.input_size}] with batch_first, or [T, {self.input_size}]"
            )
        turned = self.batch_first and input.dim() == 3
        x = input.transpose(0, 1) if turned else input
        shape = (len(self._names), *x.shape[1:-1], self.hidden_size)
        if hx is None:
            hx = x.new_zeros(shape), x.new_zeros(shape)
        h, c = hx
        if h.shape != shape or c.shape != shape:
            raise ValueError(f"hx has shapes {tuple(h.shape)} and {tuple(c.shape)}; want {shape} for both")
        self._check_dtypes(input, h, c)
        y, h, c = self._stack(x, h, c)
        return (y.transpose(0, 1) if turned else y), (h, c)

    def _fast(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, State] | None:
        """One layer, one direction, weights as in the last call: checked by the operator; None: go the long way."""
        if x.dim() != 3 or x.size(2) != self.input_size or h.dim() != 3 or h.size(0) != 1:
            return None
        try:
            result = self._prepared[0].run(x, h, c, *_weights(*self._pair(0)))
        except RuntimeError:
            return None  # something does not fit: the long way has the words
        return None if result is None else (result[0], result[1:])

    def _check_dtypes(self, x: Tensor, h: Tensor, c: Tensor) -> None:
        packed = self._pair(0)[0].packed
        for name, tensor in (("input", x), ("hx[0]", h), ("hx[1]", c)):
            if tensor.dtype != packed.x_dtype and autocast_dtype(x.device.type) is None:
                raise TypeError(
                    f"{name}.dtype = {tensor.dtype}; the layer is {packed.dtype}, it takes {packed.x_dtype}"
                )
            if tensor.device != packed.device:
                raise ValueError(f"{name} is on {tensor.device}, the layer on {packed.device}; move one of them")

    def _stack(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, directions = [], 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs = []
            for number in range(layer * directions, (layer + 1) * directions):
                weights, prepared = _weights(*self._pair(number)), self._prepared[number]
                reverse = number % directions == 1
                result = prepared.run(x, h[number], c[number], *weights)
                if result is None:
                    result = sparse_lstm(x, h[number], c[number], *weights, reverse=reverse)
                    prepared.keep(*weights, reverse=reverse)
                y, *state = result
                outputs.append(y)
                states.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.training and self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        h, c = (torch.stack(part) for part in zip(*states, strict=True))
        return x, h, c


class PackedLayerNormLSTM(nn.Module):
    """Inference form of torchaudio's `_CustomLSTM`, with or without its LayerNorm: its forward, children and keys.

    Children `x2g`, `p2g` (PackedLinear), `g_norm`, `c_norm` (nn.LayerNorm or nn.Identity).

    Source: torchaudio/models/rnnt.py, the LSTM of the predictor; LayerNorm LSTM: Ba et al., arXiv 1607.06450.
    """

    hidden_dim: int
    _dense_class: type[nn.Module]
    _prepared: Prepared

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """True for a `_CustomLSTM` whose two linear layers are packed already."""
        children = {name: module._modules.get(name) for name in ("x2g", "p2g", "g_norm", "c_norm")}
        x2g, p2g, g_norm, c_norm = children.values()
        if type(module).__name__ != "_CustomLSTM" or not isinstance(getattr(module, "hidden_dim", None), int):
            return False
        if type(x2g) is not PackedLinear or type(p2g) is not PackedLinear:
            return False
        norms = [norm for norm in (g_norm, c_norm) if isinstance(norm, nn.LayerNorm) and norm.bias is not None]
        plain = isinstance(g_norm, nn.Identity) and isinstance(c_norm, nn.Identity)
        return plain or len(norms) == 2

    @classmethod
    def fuse(cls, module: nn.Module) -> PackedLayerNormLSTM:
        """The fused form of a module that `serves` accepts; it takes over the children."""
        fused = as_class(module, cls)
        fused._dense_class, fused._prepared = type(module), Prepared()
        return fused

    def unfuse(self) -> nn.Module:
        """The module again that `fuse` was given."""
        module = as_class(self, self._dense_class)
        del module._dense_class, module._prepared
        return module

    def explain(self, rows: int) -> str:
        """One sentence: what serves `rows` rows."""
        return _words(self._modules["x2g"], self._modules["p2g"], rows)  # type: ignore[arg-type]

    def forward(self, input: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """`input [T, B, D]`, `state` [h, c] `[B, H]` or None -> `(output [T, B, H], [h, c])`.

        Raises:
            TypeError, ValueError: input or state do not fit.
        """
        modules = self._modules
        x2g, g_norm, c_norm = modules["x2g"], modules["g_norm"], modules["c_norm"]
        norm = None
        if isinstance(g_norm, nn.LayerNorm):
            g, k = g_norm._parameters, c_norm._parameters  # type: ignore[union-attr]
            norm = Norm(g["weight"], g["bias"], k["weight"], k["bias"], g_norm.eps, c_norm.eps)  # type: ignore[arg-type, union-attr]
        weights = _weights(x2g, modules["p2g"])  # type: ignore[arg-type]
        if state is None:
            h = c = input.new_zeros(*input.shape[1:-1], self.hidden_dim)
        else:
            h, c = state
        if input.dim() == 3 and input.size(2) == weights[0].packed.shape[1]:
            if h.dim() == 2 and h.size(0) == input.size(1):
                try:
                    if (result := self._prepared.run(input, h, c, *weights, norm)) is not None:
                        return result[0], list(result[1:])
                except RuntimeError:
                    pass  # something does not fit: the checks below find the words
        return self._checked(input, h, c, weights, norm)

    def _checked(
        self, input: Tensor, h: Tensor, c: Tensor, weights: tuple[Weight, Weight], norm: Norm | None
    ) -> tuple[Tensor, list[Tensor]]:
        inputs, shape = weights[0].packed.shape[1], (*input.shape[1:-1], self.hidden_dim)
        if input.dim() != 3 or input.shape[2] != inputs or h.shape != shape or c.shape != shape:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, the state {tuple(h.shape)} and {tuple(c.shape)}; "
                f"want [T, B, {inputs}] and [B, {self.hidden_dim}]"
            )
        y, h, c = sparse_lstm(input, h, c, *weights, norm)
        self._prepared.keep(*weights, norm)
        return y, [h, c]
