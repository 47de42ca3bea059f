"""Whole models: dense to sparse, switch pathways, pack for inference, and look at masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparse_pathways.checks import Block, check_block, check_names, grid, unknown_pathway
from sparse_pathways.layout import PackedWeight
from sparse_pathways.nn.linear import PackedLinear, SparseLinear
from sparse_pathways.nn.lstm import GateLinear, SparseLSTM
from sparse_pathways.nn.lstm_packed import PackedLayerNormLSTM, PackedLSTM
from sparse_pathways.ops import explain_product
from sparse_pathways.ops.cuda import explain_training
from sparse_pathways.ops.masked import takes_dense

Model = TypeVar("Model", bound=nn.Module)
Layer = SparseLinear | PackedLinear


def _replace(model: nn.Module, choose: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Swap every module for which `choose` gives another one; a module used in two places stays one module."""
    done: dict[int, nn.Module | None] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in done:
            done[id(module)] = choose(name, module)
        new = done[id(module)]
        if new is None:
            continue
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    _leave_fused_paths(model)
    return model


def _leave_fused_paths(model: nn.Module) -> None:
    """Torch's fused encoder inference reads `linear1.weight` and `linear2.weight` directly, which ignores masks."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, Layer) for m in module.children()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, Layer) for m in module.modules()):
            module.use_nested_tensor = False


def sparse_layers(model: nn.Module) -> dict[str, Layer]:
    """{name: layer} of the sparse layers of a model, packed or not.

    Raises:
        ValueError: the model has none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no sparse layers; convert it with sparsify_(model) first")
    return layers


def _check_plain(name: str, module: nn.Linear | nn.LSTM) -> None:
    """Refuse what a swap would lose."""
    if isinstance(module, nn.LSTM) and module.proj_size:
        raise ValueError(f"layer {name}: proj_size = {module.proj_size} is not supported; leave it out by filter_fn")
    wanted = module._flat_weights_names if isinstance(module, nn.LSTM) else ["weight"]
    if not all(key in module._parameters for key in wanted):
        raise ValueError(
            f"layer {name}: its weight is computed (weight_norm, prune, a parametrization); make it a plain Parameter "
            "first, or leave the layer out by filter_fn"
        )
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"layer {name} has hooks, which would be lost; convert the model before adding them")


def sparsify_(
    model: Model,
    block: Block = (8, 1),
    pathways: Iterable[str] = ("default",),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Model:
    """Swap the linear layers and LSTMs of a model for sparse ones, in place; parameters stay the same tensors.

    Args:
        model: any module. A model that is itself one nn.Linear is returned as a new SparseLinear.
        block: (R, C) of every layer.
        pathways: names; all masks start with every block kept.
        filter_fn: `filter_fn(module, name) -> bool` chooses among the nn.Linear and nn.LSTM layers; default all of
            them. Subclasses are left alone: owners (nn.MultiheadAttention) read `.weight` past the forward. So is
            every other kind of layer (nn.Conv1d, nn.GRU, transformers' Conv1D of GPT-2, ...): densities are shares of
            what `sparse_layers(model)` lists, not of the model.

    Returns:
        The model.

    Raises:
        TypeError: filter_fn is no function.
        ValueError: nothing was chosen; a chosen layer has hooks or a computed weight.
    """
    block, names = check_block(block), check_names(pathways)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"filter_fn = {filter_fn!r}; want a function of module and name, such as "
            "lambda module, name: 'encoder' in name"
        )
    swapped: list[str] = []

    def choose(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) not in (nn.Linear, nn.LSTM) or (filter_fn is not None and not filter_fn(module, name)):
            return None
        swapped.append(name)
        _check_plain(name, module)  # type: ignore[arg-type]
        if isinstance(module, nn.LSTM):
            return SparseLSTM.from_lstm(module, block=block, pathways=names)
        return SparseLinear.from_linear(module, block=block, pathways=names)  # type: ignore[arg-type]

    model = _replace(model, choose)  # type: ignore[assignment]
    if not swapped:
        raise ValueError(
            f"sparsify_ found no nn.Linear or nn.LSTM to convert in {type(model).__name__}"
            + ("; filter_fn accepted none" if filter_fn is not None else "")
            + ("; it is sparse already" if any(isinstance(m, Layer) for m in model.modules()) else "")
        )
    return model


def pathways(model: nn.Module) -> tuple[str, ...]:
    """Names of the pathways of a model."""
    return next(iter(sparse_layers(model).values())).pathways


def add_pathway_(model: Model, name: str, like: str | None = None) -> Model:
    """Add a pathway to every sparse layer of a model that is not packed, in place; all others stay bit-identical.

    Args:
        model: with sparse layers.
        name: not yet a pathway.
        like: pathway whose masks it starts with; None: all blocks kept.

    Returns:
        The model. `sp.methods.new_pathway` learns the masks.

    Raises:
        ValueError: the name is taken, or the model is packed.
        KeyError: a layer does not know `like`.
    """
    layers = [layer for layer in sparse_layers(model).values() if isinstance(layer, SparseLinear)]
    if len(layers) < len(sparse_layers(model)):
        raise ValueError("model is packed; unpack_(model) before adding a pathway")
    for layer in layers:
        check_names((*layer.pathways, name))
        if like is not None and like not in layer.pathways:
            raise unknown_pathway(like, layer.pathways)
    for layer in layers:
        layer.add_pathway_(name, like)
    return model


def set_pathway(model: nn.Module, name: str) -> None:
    """Make `name` the active pathway of every sparse layer; one assignment per layer.

    Raises:
        KeyError: a layer does not know the name; no layer is switched then.
    """
    _activate(sparse_layers(model).values(), name)


def _activate(layers: Iterable[Layer], name: str) -> None:
    for layer in layers:
        if name not in layer.pathways:
            raise unknown_pathway(name, layer.pathways)
    for layer in layers:
        layer.active = name


@contextmanager
def pathway(model: nn.Module, name: str) -> Iterator[None]:
    """`set_pathway` inside a with block; the former pathways return on exit, also after an exception. Nests."""
    before = [(layer, layer.active) for layer in sparse_layers(model).values()]
    _activate([layer for layer, _ in before], name)
    try:
        yield
    finally:
        for layer, active in before:
            layer.active = active


def pack_(model: Model, dtype: torch.dtype | None = None, quantise_x: bool = True) -> Model:
    """Turn every sparse layer into its packed form, in place: from here on only kept blocks exist.

    torchaudio's `_CustomLSTM` becomes a PackedLayerNormLSTM if both of its linear layers are sparse.

    Args:
        model: with sparse layers.
        dtype: of the packed values; default each weight's.
        quantise_x: int8 only: products round each row of their input to int8, too (fastest); False: it stays float32.

    Raises:
        ValueError: no SparseLinear in the model.
    """

    def choose(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, SparseLSTM):
            return module.pack(dtype, quantise_x)
        if not isinstance(module, SparseLinear) or isinstance(module, GateLinear):
            return None
        return PackedLinear(module.pack(dtype, quantise_x=quantise_x), module.bias, module.active).train(
            module.training
        )

    if not any(isinstance(layer, SparseLinear) for layer in sparse_layers(model).values()):
        raise ValueError("model is packed already")
    return fuse_(_replace(model, choose))  # type: ignore[return-value]


def fuse_(model: nn.Module) -> nn.Module:
    """Give every LSTM whose parts are packed the fused forward."""
    return _replace(
        model, lambda name, module: PackedLayerNormLSTM.fuse(module) if PackedLayerNormLSTM.serves(module) else None
    )


def pack(model: Model, dtype: torch.dtype | None = None, quantise_x: bool = True) -> Model:
    """A packed copy, see `pack_`; the model itself stays as it is."""
    return pack_(copy.deepcopy(model), dtype, quantise_x)


def unpack_(model: Model) -> Model:
    """Turn every packed layer back into a sparse one with the same masks; pruned weights come back as zero."""

    def choose_lstm(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, PackedLSTM):
            return SparseLSTM.from_packed(module)
        return module.unfuse() if isinstance(module, PackedLayerNormLSTM) else None

    def choose(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, PackedLinear):
            return None
        packed = module.packed
        linear = nn.Linear(packed.shape[1], packed.shape[0], module.bias is not None, device="meta")
        linear.weight = nn.Parameter(packed.unpack())
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.clone())
        sparse = SparseLinear.from_linear(linear, block=packed.block, pathways=packed.pathways)
        for one in packed.pathways:
            sparse.set_mask_(packed.mask(one), one)
        sparse.active = module.active
        return sparse.train(module.training)

    sparse_layers(model)
    return _replace(_replace(model, choose_lstm), choose)  # type: ignore[return-value]


def _packed_or_mask(layer: Layer, name: str | None) -> Tensor:
    return layer.packed.mask(name or layer.active) if isinstance(layer, PackedLinear) else layer.mask(name)


def density(model: nn.Module, pathway: str | None = None) -> dict[str, float]:
    """Kept share of blocks, in [0, 1], per layer and over all of them ("total").

    Args:
        model: with sparse layers, packed or not.
        pathway: name; default each layer's active one.
    """
    kept, blocks = {}, {}
    for name, layer in sparse_layers(model).items():
        mask = _packed_or_mask(layer, pathway)
        kept[name], blocks[name] = int(mask.sum()), mask.numel()
    shares = {name: kept[name] / max(1, blocks[name]) for name in kept}  # a layer without weights has no blocks
    return {**shares, "total": sum(kept.values()) / max(1, sum(blocks.values()))}


def overlap(model: nn.Module) -> dict[str, Tensor]:
    """Intersection over union of the masks of every two pathways.

    Returns:
        Float64 `[P, P]` per layer and over all layers ("total"), in the order of `pathways(model)`; 1.0 where both
        masks are empty.
    """
    both: dict[str, Tensor] = {}
    either: dict[str, Tensor] = {}
    for name, layer in sparse_layers(model).items():
        flat = torch.stack([_packed_or_mask(layer, one).flatten() for one in layer.pathways]).double()
        both[name] = flat @ flat.T
        either[name] = flat.sum(1)[:, None] + flat.sum(1)[None] - both[name]
    both["total"], either["total"] = sum(both.values()), sum(either.values())  # type: ignore[assignment]
    return {name: torch.where(either[name] > 0, both[name] / either[name].clamp(min=1), 1.0) for name in both}


def explain(layer: Layer | PackedLSTM | PackedLayerNormLSTM | PackedWeight, rows: int) -> str:
    """One sentence: which backend serves `rows` rows through this layer, and why.

    Args:
        layer: SparseLinear, PackedLinear, a packed LSTM or PackedWeight.
        rows: M, at least 0.

    Raises:
        TypeError: another kind of layer. ValueError: rows is negative or no number.
    """
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
        raise ValueError(f"rows = {rows!r}; want a number, at least 0")
    if not isinstance(layer, SparseLinear | PackedLinear | PackedLSTM | PackedLayerNormLSTM | PackedWeight):
        raise TypeError(
            f"layer is a {type(layer).__name__}; want a SparseLinear, PackedLinear, packed LSTM or PackedWeight "
            "(sp.sparse_layers(model) has those of a model)"
        )
    if isinstance(layer, PackedLSTM | PackedLayerNormLSTM):
        return layer.explain(rows)
    if isinstance(layer, SparseLinear):
        blocks, columns = grid((layer.out_features, layer.in_features), layer.block)
        if layer.layout().num_blocks == blocks * columns:
            return "dense: nothing is pruned in the active pathway, so F.linear is the fastest product"
        if layer.weight.device.type == "cuda":
            shape = layer.out_features, layer.in_features, layer.block, layer.layout().density, layer.weight.dtype
            return f"{rows} rows, a training step: {explain_training(rows, *shape)}; pack_ the model to infer"
        if takes_dense(layer.weight.device.type, layer.weight.dtype, layer.layout(), rows):
            return (
                f"{rows} rows: dense: blocks {layer.block} at density {layer.layout().density:.2f} train faster by "
                "F.linear with the pruned weights zeroed; pack_ the model to infer"
            )
        return (
            f"{rows} rows: {explain_product(layer.weight.device.type, layer.weight.dtype, layer.block)}; "
            "for training: values are gathered from the dense weight at every call, pack_ the model to infer"
        )
    packed = layer.packed if isinstance(layer, PackedLinear) else layer
    return f"{rows} rows: " + explain_product(packed.device.type, packed.dtype, packed.block)
