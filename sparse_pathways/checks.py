"""The one place that words errors: shapes, dtypes, blocks, pathway names, files."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Iterable
from typing import Any

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
    if not isinstance(block, (tuple, list)) or len(block) != 2 or not all(type(b) is int for b in block):
        raise TypeError(f"block = {block!r}; want two ints (R outputs, C inputs), for example (8, 1)")
    if min(block) < 1:
        raise ValueError(f"block = {tuple(block)}; both sizes must be at least 1")
    return block[0], block[1]


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
    """A share in [0, 1] as float."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"{name} = {sparsity!r}; want a number between 0 and 1, such as 0.7")
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"{name} = {sparsity}; want a share between 0 and 1 (0.7, not 70)")
    return float(sparsity)


def check_number(name: str, value: float) -> float:
    """A real number as float (of NumPy's, too); what is none, or a truth value, is refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} = {value!r}; want a number")
    return float(value)


def check_count(name: str, value: int, least: int, unit: str = "") -> int:
    """A whole number of at least `least` as int (of NumPy's, too)."""
    wanted = f"a whole number{' of ' if unit else ''}{unit}"
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r}; want {wanted}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}; want {wanted}")
    if count < least:
        raise ValueError(f"{name} = {count}; want at least {least}{f' ({unit})' if unit else ''}")
    return count


def set_plain(part: Any, name: str, value: Any) -> None:
    """Keep a checked value in a frozen dataclass: plain, whatever number type it came as, so that it can be saved."""
    object.__setattr__(part, name, value)


def check_names(pathways: Iterable[str]) -> tuple[str, ...]:
    """Pathway names as a tuple: at least one, distinct, non-empty strings."""
    if isinstance(pathways, str) or not isinstance(pathways, Iterable):
        example = pathways if isinstance(pathways, str) else "en"
        raise TypeError(f'pathways = {pathways!r}; want a sequence of names, for example ("{example}",)')
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
