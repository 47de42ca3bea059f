"""Triton's interpreter with its memory watched: what compute-sanitizer does on a device, here element by element.

The interpreter reads and writes plain addresses and runs programs one after the other, so a mask left out mostly finds
some memory, and two programs that share a place do not disturb each other. Here every tensor of a launch is a copy in a
mapping of its own, and every address that a mask lets through is looked up in it. An error is

- an address outside the tensors, or between the rows of one whose rows have a stride, read or written;
- an element that one program wrote and another reads or writes in the same launch: a device orders them anyhow.

Races within a program cannot show: it is run as one thread.
"""

import mmap

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

MARGIN = 1 << 20  # elements on both sides, never touched: an address there is still known for this tensor's
FAR = 1 << 26  # elements from row to row of a tensor made far: row 32 begins at element 2**31
NOBODY = -1
MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it


def reserve(elements: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of zeros whose memory is there only where it is touched, so its size costs nothing."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def apart(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in a mapping of its own, with margins."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    return reserve(MARGIN + span + MARGIN, dtype).as_strided(shape, strides, MARGIN)


def far_rows(matrix: Tensor) -> Tensor:
    """A copy whose rows from 32 on lie past element 2**31."""
    return apart(matrix.shape, (FAR, 1), matrix.dtype).copy_(matrix)


def far_blocks(values: Tensor) -> Tensor:
    """A pool whose last blocks are `values`; they lie past element 2**31."""
    before = 2**31 // values[0].numel()
    pool = apart((before + values.shape[0], *values.shape[1:]), values.stride(), values.dtype)
    pool[before:] = values
    return pool


class Watched:
    """A copy of a tensor, and which of its elements which program wrote."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.itemsize = tensor, tensor.dtype.itemsize
        dims = list(zip(tensor.stride(), tensor.shape, strict=True))
        self.dims = sorted(((stride, size) for stride, size in dims if size != 1), reverse=True)
        self.span = 1 + sum((size - 1) * stride for stride, size in dims) if tensor.numel() else 0
        # What is far has a mapping of its own already, and a copy of a whole pool would be there in memory.
        is_far = self.span >= 2**31
        self.copy = tensor if is_far else apart(tensor.shape, tensor.stride(), tensor.dtype).copy_(tensor)
        self.first = self.copy.data_ptr()
        self.writer: np.ndarray | None = None  # made when the first element is written

    def surrounds(self, address: int) -> bool:
        """Whether an address lies in the tensor or its margins."""
        return -MARGIN <= (address - self.first) // self.itemsize < self.span + MARGIN

    def elements(self, addresses: np.ndarray) -> np.ndarray:
        """Number of the element at each address; IndexError where there is none."""
        rest, byte = np.divmod(addresses.astype(np.int64) - self.first, self.itemsize)
        inside, element = byte == 0, np.zeros_like(rest)
        for stride, size in self.dims:
            index, rest = np.divmod(rest, stride)
            inside &= (index >= 0) & (index < size)
            element = element * size + index
        inside &= rest == 0
        if not inside.all():
            where = (int(addresses[~inside][0]) - self.first) / self.itemsize
            raise IndexError(
                f"{int((~inside).sum())} of {inside.size} addresses are outside a tensor {tuple(self.tensor.shape)} of "
                f"strides {self.tensor.stride()}; the first is {where:g} elements from its first"
            )
        return element


class Launch:
    """The tensors of one launch."""

    def __init__(self) -> None:
        self.tensors: list[Watched] = []
        self.programs: dict[tuple, int] = {}

    def begin(self, arguments: tuple) -> list:
        """The arguments, tensors replaced by watched copies."""
        self.programs, self.tensors, given = {}, [], []
        for one in arguments:
            if isinstance(one, Tensor):
                self.tensors.append(Watched(one))
                one = self.tensors[-1].copy
            given.append(one)
        return given

    def end(self) -> None:
        """Copy back what was written."""
        for one in self.tensors:
            if one.writer is not None:
                one.tensor.copy_(one.copy)

    def access(self, addresses: np.ndarray, grid_index: tuple, *, write: bool) -> None:
        """Check the addresses that one instruction of one program reads or writes: all of one tensor."""
        if not addresses.size:
            return
        address = int(addresses.flat[0])
        watched = next((one for one in self.tensors if one.surrounds(address)), None)
        if watched is None:
            raise IndexError(f"address {address:#x} is far from every tensor of the launch")
        element = watched.elements(addresses)
        program = self.programs.setdefault(grid_index, len(self.programs))
        if write and watched.writer is None:
            watched.writer = np.full(watched.tensor.numel(), NOBODY)
        if watched.writer is None:
            return
        others = (watched.writer[element] != NOBODY) & (watched.writer[element] != program)
        if others.any():
            raise RuntimeError(
                f"program {grid_index} {'writes' if write else 'reads'} {int(others.sum())} elements of a tensor "
                f"{tuple(watched.tensor.shape)} that another program of the launch wrote"
            )
        if write:
            watched.writer[element] = program


def watch() -> None:
    """Watch every launch of this process from now on."""
    launch, load, store = Launch(), InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self, pointers, mask, *options):  # type: ignore[no-untyped-def]
        launch.access(pointers.data[mask.data], self.grid_idx, write=False)
        return load(self, pointers, mask, *options)

    def checked_store(self, pointers, value, mask, *options):  # type: ignore[no-untyped-def]
        launch.access(pointers.data[mask.data], self.grid_idx, write=True)
        return store(self, pointers, value, mask, *options)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    # Where the interpreter would copy arguments from a device and back.
    GridExecutor._init_args_hst = lambda self, arguments, options: (launch.begin(arguments), options)
    GridExecutor._restore_args_dev = lambda self, *arguments: launch.end()
