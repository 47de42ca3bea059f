"""SparseLSTM: `nn.LSTM` with block masks, for training. Its inference form is in lstm_packed.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparse_pathways.checks import Block, check_block, check_names
from sparse_pathways.layout import PackedWeight
from sparse_pathways.mask import expand_mask, pack_bits
from sparse_pathways.nn.linear import PackedLinear, SparseLinear
from sparse_pathways.nn.lstm_packed import PackedLSTM, as_class, configuration


class _StraightThrough(torch.autograd.Function):
    """Zero where pruned, whatever is there; the gradient passes as if nothing were pruned."""

    @staticmethod
    def forward(ctx, weight, kept):  # type: ignore[no-untyped-def]
        return torch.where(kept, weight, 0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


class GateLinear(SparseLinear):
    """One weight of a SparseLSTM as a sparse layer: masks of its own, the parameters of the LSTM."""

    def __init__(self, lstm: SparseLSTM, name: str, block: Block, names: tuple[str, ...]) -> None:
        """`name`: what follows `weight_` in the LSTM, for example `ih_l0`."""
        nn.Module.__init__(self)
        self._owner = (lstm, name)  # in a tuple: a child must not hold its parent as a child
        self.out_features, self.in_features = self.weight.shape
        self._set_up(block, names)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The LSTM's."""
        lstm, name = self._owner
        return lstm._parameters[f"weight_{name}"]  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The LSTM's."""
        lstm, name = self._owner
        return lstm._parameters.get(f"bias_{name}")

    def masked_weight(self, gated: bool = True) -> Tensor:
        """Dense `[4H, in]`, zero where pruned; what is stored there cannot be seen in it. `gated`: with its gates."""
        layout, weight = self.layout(), self.gated_weight() if gated else self.weight
        if layout.num_blocks == self._grid[0] * self._grid[1]:
            return weight
        kept = expand_mask(layout.to_mask(), self.block, layout.shape)
        return _StraightThrough.apply(weight, kept) if self.dense_grad else torch.where(kept, weight, 0)


class SparseLSTM(nn.LSTM):
    """`nn.LSTM` with block masks: its signature, parameters and outputs, and one mask per weight and pathway.

    Every weight `weight_ih_l0` has a child `ih_l0`, a SparseLinear that reads this module's parameters and holds the
    masks; its buffer `ih_l0.block_mask` is all that the state dict has beyond that of nn.LSTM, so a dense checkpoint
    loads. Training and unpacked inference run PyTorch's own LSTM on the masked weights; `pack_` makes it fast.

    Raises:
        ValueError: `proj_size` is given; projections are not supported.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block: Block = (8, 1),
        pathways: Iterable[str] = ("default",),
    ) -> None:
        """Like nn.LSTM; every mask starts with all blocks kept."""
        _check_projection(proj_size)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device, dtype=dtype
        )
        self._set_up(check_block(block), check_names(pathways))

    def _set_up(self, block: Block, names: tuple[str, ...]) -> None:
        for key in list(self._parameters):
            if key.startswith("weight_"):
                name = key.removeprefix("weight_")
                setattr(self, name, GateLinear(self, name, block, names))

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, block: Block = (8, 1), pathways: Iterable[str] = ("default",)) -> SparseLSTM:
        """Take over the parameters of `lstm` (the same tensors, not copies)."""
        _check_projection(lstm.proj_size)
        sparse = as_class(lstm, cls)
        sparse._set_up(check_block(block), check_names(pathways))
        return sparse

    def to_lstm(self) -> nn.LSTM:
        """A plain nn.LSTM with the weights of the active pathway, zero where pruned."""
        lstm = nn.LSTM(**configuration(self), device=self.gates["ih_l0"].weight.device, dtype=self.weight_ih_l0.dtype)
        with torch.no_grad():
            for key, parameter in lstm.named_parameters():
                kind, _, name = key.partition("_")
                parameter.copy_(self.gates[name].masked_weight(gated=False) if kind == "weight" else getattr(self, key))
        return lstm.train(self.training)

    @property
    def gates(self) -> dict[str, GateLinear]:
        """{"ih_l0": ..., "hh_l0": ...}: the weights as sparse layers."""
        return {name: child for name, child in self._modules.items() if isinstance(child, GateLinear)}

    @property
    def pathways(self) -> tuple[str, ...]:
        """Names of the pathways."""
        return self.ih_l0.pathways  # type: ignore[union-attr, return-value]

    @property
    def active(self) -> str:
        """Name of the pathway that `forward` uses; assigning it switches every weight."""
        return self.ih_l0.active  # type: ignore[union-attr, return-value]

    @active.setter
    def active(self, name: str) -> None:
        for gate in self.gates.values():
            gate._index(name)
        for gate in self.gates.values():
            gate.active = name

    def set_mask_(self, weight: str, mask: Tensor, pathway: str | None = None) -> SparseLSTM:
        """Change the mask of one weight ("ih_l0"), of one pathway or of all of them (None)."""
        if weight not in self.gates:
            raise KeyError(f"weight = {weight!r} is not known; choose one of {', '.join(self.gates)}")
        self.gates[weight].set_mask_(mask, pathway)
        return self

    def pack(self, dtype: torch.dtype | None = None, quantise_x: bool = True) -> PackedLSTM:
        """The inference form; `dtype` of the packed values, default each weight's; `quantise_x` as for `pack_`."""
        layers = {
            name: PackedLinear(gate.pack(dtype, quantise_x=quantise_x), gate.bias, gate.active)
            for name, gate in self.gates.items()
        }
        return PackedLSTM(configuration(self), layers).train(self.training)

    @classmethod
    def from_packed(cls, packed: PackedLSTM) -> SparseLSTM:
        """The training form of a packed LSTM: the same masks; pruned weights come back as zero."""
        first: PackedWeight = packed._modules["ih_l0"].packed  # type: ignore[union-attr, assignment]
        dtype = first.x_dtype
        sparse = cls(
            **configuration(packed), device=first.device, dtype=dtype, block=first.block, pathways=first.pathways
        )
        with torch.no_grad():
            for name, gate in sparse.gates.items():
                layer: PackedLinear = packed._modules[name]  # type: ignore[assignment]
                gate.weight.copy_(layer.packed.unpack())
                if gate.bias is not None and layer.bias is not None:
                    gate.bias.copy_(layer.bias)
                for one in layer.pathways:
                    gate.set_mask_(layer.packed.mask(one), one)
                gate.active = layer.active
        return sparse.train(packed.training)

    def forward(self, input, hx=None):  # type: ignore[no-untyped-def]
        """As nn.LSTM, PackedSequence included, with the active pathway's masks."""
        masked = as_class(self, nn.LSTM)
        masked._flat_weight_refs = [None] * len(self._flat_weights_names)  # these are not parameters: do not refresh
        masked._flat_weights = [
            self.gates[key.removeprefix("weight_")].masked_weight() if key.startswith("weight_") else getattr(self, key)
            for key in self._flat_weights_names
        ]
        return nn.LSTM.forward(masked, input, hx)

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing = {f"{prefix}{name}.block_mask": gate for name, gate in self.gates.items()}
        missing = {key: gate for key, gate in missing.items() if key not in state_dict}
        if missing and prefix + "weight_ih_l0" in state_dict:
            warnings.warn(
                "a dense checkpoint is loaded into a sparse model: weights are replaced, masks stay as they are",
                stacklevel=2,
            )
            for key, gate in missing.items():
                bits = gate.block_mask
                if bits.is_meta:
                    bits = pack_bits(torch.ones(len(gate.pathways), gate._grid[0] * gate._grid[1], dtype=torch.bool))
                state_dict[key] = bits


def _check_projection(proj_size: int) -> None:
    if proj_size:
        raise ValueError(f"proj_size = {proj_size}; a sparse LSTM has no projection: use 0, or leave this layer dense")
