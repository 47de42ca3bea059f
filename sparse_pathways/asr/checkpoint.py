"""Files of a run: the trained model, and the checkpoint that a run goes on from."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import sparse_pathways as sp

from .model import Recogniser, build, prunable

FORMAT = "sparse-pathways run 1"
MODEL = "model.pt"
CHECKPOINT = "checkpoint.pt"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Save atomically: an interruption leaves the old file or the new one, never half of one."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save({"format": FORMAT, **content}, partial)
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Load what `write` saved; only tensors and plain data, so that a foreign file cannot run code.

    Raises:
        sp.FormatError: no such file, damaged, or not one of ours.
    """
    if not path.is_file():
        raise sp.FormatError(path, "no such file")
    if not zipfile.is_zipfile(path):
        raise sp.FormatError(path, "cannot be read: is cut off, or not a model")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words advise to load it without a check
        raise sp.FormatError(path, "is damaged, or holds code instead of a model; it was not run") from error
    except (RuntimeError, OSError, ValueError) as error:
        raise sp.FormatError(
            path, f"cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise sp.FormatError(path, "is not a model of this package; want a run folder, its model.pt or checkpoint.pt")
    return content


def model_content(model: Recogniser) -> dict[str, Any]:
    """All of a model, dense or with pathways."""
    layers = [module for module in model.modules() if isinstance(module, sp.SparseLinear)]
    return {
        "config": model.packed_config,
        "pathways": list(layers[0].pathways) if layers else [],
        "block": list(layers[0].block) if layers else [],
        "state": model.state_dict(),
    }


def restore_model(content: Mapping[str, Any], path: Path) -> Recogniser:
    """The model that `model_content` described.

    Raises:
        sp.FormatError: parts are missing or do not fit each other.
    """
    try:
        model = build(content["config"])
        if content["pathways"]:
            sp.sparsify_(model, tuple(content["block"]), content["pathways"], prunable)
        model.load_state_dict(content["state"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise sp.FormatError(path, f"holds no usable model: {error}") from error
    return model


def load_model(path: str | Path) -> Recogniser:
    """Load a trained recogniser, dense or with masks, in training mode.

    Args:
        path: A run folder, its model.pt or its checkpoint.pt. Of a folder, model.pt is taken; the checkpoint of an
            unfinished run only when named.

    Raises:
        sp.FormatError: missing, damaged or foreign.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / MODEL).is_file() and (path / CHECKPOINT).is_file():
            raise sp.FormatError(path, f"this run is not finished; go on with it, or name {path / CHECKPOINT}")
        path = path / MODEL
    content = read(path)
    content = content.get("model", content)
    if not isinstance(content, dict):
        raise sp.FormatError(path, "holds no usable model")
    return restore_model(content, path)
