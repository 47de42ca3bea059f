"""The packed file: safetensors with one pool of values and one bit mask per pathway; index lists are rebuilt at load.

Per packed layer: `<layer>.values [nnz, C, R]`, `<layer>.block_mask` uint8 `[pathways, ceil(NB * KB / 8)]`,
`<layer>.scale` (int8 only) and `<layer>.bias`. Every other tensor of the model keeps its own key. The header holds the
format version, the geometry of each layer and the model's configuration.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sparse_pathways.checks import FormatError, check_names, grid, unknown_pathway
from sparse_pathways.layout import PackedWeight
from sparse_pathways.layout.packed import DTYPES
from sparse_pathways.mask import unpack_bits
from sparse_pathways.nn.convert import _replace, fuse_, sparse_layers
from sparse_pathways.nn.linear import PackedLinear, SparseLinear
from sparse_pathways.nn.lstm import SparseLSTM
from sparse_pathways.nn.lstm_packed import PackedLSTM, configuration

FORMAT, VERSION = "sparse_pathways", 1
ENTRY_POINTS = "sparse_pathways.architectures"


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a packed model; the file appears whole or not at all.

    Args:
        model: after `pack_`. Its attribute `packed_config`, if it has one, is a JSON-able dict stored in the header;
            `packed_config["architecture"]` names the builder that `load_packed` finds again.
        path: file to write.

    Raises:
        ValueError: the model has no packed layers, or still has a SparseLinear.
    """
    layers = sparse_layers(model)
    described: dict[str, dict[str, object]] = {}
    for name, layer in layers.items():
        if not isinstance(layer, PackedLinear):
            raise ValueError(f"layer {name} is not packed; call pack_(model) or pack(model) first")
        packed = layer.packed
        described[name] = {"shape": packed.shape, "block": packed.block, "pathways": packed.pathways}
        if packed.scale is not None:
            described[name]["quantise_x"] = packed.quantise_x
    header = {"version": VERSION, "layers": described, "config": getattr(model, "packed_config", None)}
    # safetensors refuses tensors that share memory; contiguous clones are what it wants.
    whole = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        # save_file would make a file that only its owner may read; a second metadata key would make its bytes differ
        # from one run to the next.
        temporary.write_bytes(save(whole, {FORMAT: json.dumps(header)}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).exists():
        raise FormatError(path, "no such file")
    if not Path(path).is_file():
        raise FormatError(path, "not a file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise FormatError(path, "a safetensors file, but not a packed model of this package")
            header = json.loads(metadata[FORMAT])
            if header["version"] != VERSION:
                raise FormatError(path, f"format version {header['version']}; this package reads {VERSION}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return {"layers": dict(header["layers"]), "config": header["config"]}, tensors
    except FormatError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(path, f"not a packed model, or truncated ({error})") from error


def _layer(path: str | os.PathLike[str], name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> PackedLinear:
    """Rebuild one layer and check everything that an index could point outside of."""
    prefix = f"{name}." if name else ""
    try:
        shape, block = tuple(map(int, entry["shape"])), tuple(map(int, entry["block"]))
        names = check_names(entry["pathways"])
        values, bits = tensors.pop(prefix + "values"), tensors.pop(prefix + "block_mask")
        if len(shape) != 2 or len(block) != 2 or min(block) < 1:
            raise ValueError(f"shape {shape}, block {block}")
        blocks, columns = grid(shape, block)  # type: ignore[arg-type]
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (len(names), -(-blocks * columns // 8)):
            raise ValueError(f"block_mask is {bits.dtype} {tuple(bits.shape)}")
        if values.dim() != 3 or tuple(values.shape[1:]) != (block[1], block[0]) or values.dtype not in DTYPES:
            raise ValueError(f"values are {values.dtype} {tuple(values.shape)}")
        scale, bias = tensors.pop(prefix + "scale", None), tensors.pop(prefix + "bias", None)
        if (values.dtype == torch.int8) != (scale is not None):
            raise ValueError("int8 values and a scale belong together")
        if scale is not None and (tuple(scale.shape) != (blocks * block[0],) or scale.dtype != torch.float32):
            raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}")
        if bias is not None and (tuple(bias.shape) != (shape[0],) or not bias.is_floating_point()):
            raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}")
        masks = unpack_bits(bits, blocks * columns).view(len(names), blocks, columns)
        named = dict(zip(names, masks, strict=True))
        packed = PackedWeight(shape, block, values, scale, named, bool(entry.get("quantise_x", True)))  # type: ignore[arg-type]
        return PackedLinear(packed, bias)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(path, f"layer {name}: {error}") from error


def _build(path: str | os.PathLike[str], config: Any) -> nn.Module:
    if not isinstance(config, dict) or "architecture" not in config:
        raise FormatError(path, "holds no model configuration; pass the model: load_packed(path, model=...)")
    found = importlib.metadata.entry_points(group=ENTRY_POINTS, name=config["architecture"])
    if not found:
        raise FormatError(
            path,
            f"architecture {config['architecture']!r} is not installed; pass the model: load_packed(path, model=...)",
        )
    try:
        return next(iter(found)).load()(config)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(path, f"configuration of the model: {error}") from error


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _lstms_of(present: dict[str, nn.Module], layers: dict[str, PackedLinear]) -> dict[str, nn.Module]:
    """{name: PackedLSTM of the file's layers} for the LSTMs of a model; the weights of dense ones join `present`."""
    lstms: dict[str, nn.Module] = {}
    for name, module in list(present.items()):
        if not isinstance(module, nn.LSTM) or f"{_prefix(name)}ih_l0" not in layers:
            continue
        sparse = module if isinstance(module, SparseLSTM) else SparseLSTM.from_lstm(module)
        present.update({_prefix(name) + child: gate for child, gate in sparse.gates.items()})
        parts = {child: layers.get(_prefix(name) + child, gate) for child, gate in sparse.gates.items()}
        lstms[name] = PackedLSTM(configuration(module), parts)
    return lstms


def load_packed(
    path: str | os.PathLike[str], model: nn.Module | None = None, pathways: Iterable[str] | None = None
) -> nn.Module:
    """Read a packed model.

    Args:
        path: file written by `save_packed`.
        model: of the same architecture, dense, sparse or packed; its layers are replaced in place. None: rebuilt from
            the configuration in the file.
        pathways: names to keep; the others' blocks are not held in memory, and a single one runs fastest. Default all.

    Returns:
        The model in eval mode, its layers PackedLinear, the first pathway active.

    Raises:
        FormatError: missing, truncated or foreign file, or one that does not fit the model.
        KeyError: a pathway that the file does not have.
    """
    header, tensors = _read(path)
    layers = {name: _layer(path, name, entry, tensors) for name, entry in header["layers"].items()}
    if pathways is not None:
        wanted = check_names(pathways)
        for layer in layers.values():
            for one in wanted:
                if one not in layer.pathways:
                    raise unknown_pathway(one, layer.pathways)
            layer.packed, layer.active = layer.packed.select(*wanted), wanted[0]
    if model is None:
        model = _build(path, header["config"])
    present = dict(model.named_modules())
    lstms = _lstms_of(present, layers)
    for name, layer in layers.items():
        there = present.get(name)
        if not isinstance(there, nn.Linear | PackedLinear):
            raise FormatError(path, f"does not fit the model: it has no linear layer {name!r}")
        if (there.out_features, there.in_features) != layer.packed.shape:
            raise FormatError(
                path,
                f"does not fit the model: layer {name} is {(there.out_features, there.in_features)}, "
                f"in the file {layer.packed.shape}",
            )
    left = [n for n, m in present.items() if isinstance(m, SparseLinear | PackedLinear) and n not in layers]
    if left:
        raise FormatError(path, f"does not fit the model: sparse layer {left[0]} is not in the file")
    owned = tuple(f"{name}." if name else "" for name in layers)
    owned += tuple(f"{_prefix(name)}{kind}_" for name in lstms for kind in ("weight", "bias"))
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith(owned)}
    for key in [*rest, *tensors]:  # before anything is replaced: a model that does not fit stays as it was
        if key not in tensors or key not in rest:
            raise FormatError(
                path, f"does not fit the model: {key} is only in the {'model' if key in rest else 'file'}"
            )
        if rest[key].shape != tensors[key].shape:
            raise FormatError(
                path,
                f"does not fit the model: {key} is {tuple(rest[key].shape)}, in the file {tuple(tensors[key].shape)}",
            )
    model = _replace(model, lambda name, module: lstms.get(name, layers.get(name)))
    model.load_state_dict(tensors, strict=False)  # the packed layers have theirs already
    return fuse_(model).eval()
