"""The one place that words errors: shapes, dtypes, blocks, pathway names, files."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable

import torch
from torch import Tensor

Block = tuple[int, int]


class FormatError(ValueError):
    """A file that is missing, truncated, damaged or not of the expected format.

    Attributes:
        path: the file.
        reason: what is wrong with it, one line.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = os.fspath(path)
        self.reason = " ".join(str(reason).split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


def check_block(block: Block) -> Block:
    """Return `block` as a tuple of two positive ints, or raise."""
    if not isinstance(block, (tuple, list)) or len(block) != 2 or not all(isinstance(b, int) for b in block):
        raise TypeError(f"block = {block!r}; want two ints (R outputs, C inputs), for example (8, 1)")
    if min(block) < 1:
        raise ValueError(f"block = {tuple(block)}; both sizes must be at least 1")
    return int(block[0]), int(block[1])


def grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Block grid (NB, KB) of a weight of `shape` (N, K): edge blocks count as one."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def check_matrix(name: str, value: Tensor) -> Tensor:
    """Refuse anything but a 2-D tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; want a Tensor")
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; want two dimensions")
    return value


def check_mask(mask: Tensor, block: Block, shape: tuple[int, int], name: str = "mask") -> Tensor:
    """Refuse a block mask that is not bool or not of the grid of `shape` and `block`."""
    check_matrix(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}.dtype = {mask.dtype}; want torch.bool (True = kept block)")
    if tuple(mask.shape) != grid(shape, block):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; a weight {tuple(shape)} in blocks {block} "
            f"needs the grid {grid(shape, block)}"
        )
    return mask


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Refuse a share outside [0, 1]."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"{name} = {sparsity!r}; want a number between 0 and 1, such as 0.7")
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"{name} = {sparsity}; want a share between 0 and 1 (0.7, not 70)")
    return float(sparsity)


def check_names(pathways: Iterable[str]) -> tuple[str, ...]:
    """Pathway names as a tuple: at least one, distinct, non-empty strings."""
    if isinstance(pathways, str):
        raise TypeError(f'pathways = {pathways!r}; want a sequence of names, for example ("{pathways}",)')
    names = tuple(pathways)
    if not names:
        raise ValueError("pathways is empty; want at least one name")
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"pathways holds {name!r}; want non-empty strings")
    if len(set(names)) != len(names):
        raise ValueError(f"pathways = {names}; names must be distinct")
    return names


def unknown_pathway(name: object, known: Iterable[str]) -> KeyError:
    """The error for a pathway that is not there."""
    return UnknownPathway(f"pathway = {name!r} is not known; choose one of {', '.join(known)}")


class UnknownPathway(KeyError):
    """A KeyError whose text is a sentence, not the repr of a key."""

    def __str__(self) -> str:
        return str(self.args[0])


def refuse_second_derivative() -> None:
    """Called by the backward formulas: they are not differentiable themselves, and torch would only warn."""
    if torch.is_grad_enabled():
        raise RuntimeError("a block-sparse product has no second derivative; leave out create_graph=True")
