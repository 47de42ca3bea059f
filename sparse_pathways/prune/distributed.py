"""Agreement between processes. Decisions are the same on all ranks by construction; here that is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A parameter or gradient in full: gathered from its shards (FSDP2), or itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds (they share memory), or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def part_like(value: Tensor, sharded: Any) -> Tensor:
    """Of a full `value`, the part that `own_part(sharded)` is of its tensor."""
    if not hasattr(sharded, "to_local"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()


def several_processes() -> bool:
    """Whether this process is one of several of an initialised process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def fingerprint(mask: Tensor) -> Tensor:
    """64-bit hash of a bool tensor of any shape, int64 scalar on its device; the same on every machine.

    The sum, modulo 2**64, of a mixed index over the True positions.
    """
    index = torch.arange(1, mask.numel() + 1, device=mask.device, dtype=torch.int64)
    index = index * -0x61C8864680B583EB  # 2**64 / golden ratio as a signed number; overflow wraps
    index = (index ^ (index >> 31)) * 0x2545F4914F6CDD1D
    return (index ^ (index >> 29)).mul_(mask.flatten()).sum()


def gathered(values: Tensor) -> list[list[int]]:
    """The int64 vector of every rank, in rank order."""
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows).tolist()


def check_same_pathway(index: int, names: Sequence[str], step: int, device: torch.device) -> None:
    """Raise RuntimeError when the ranks trained different pathways in this step."""
    indices = [row[0] for row in gathered(torch.tensor([index], device=device))]
    if len(set(indices)) > 1:
        seen = ", ".join(f"rank {rank}: {names[i]}" for rank, i in enumerate(indices))
        raise RuntimeError(
            f"step {step}: the processes have batches of different pathways ({seen}); gradients are averaged over "
            "processes, so all must draw the same pathway in a step"
        )


def check_same_masks(masks: dict[str, Tensor], step: int) -> None:
    """Raise RuntimeError naming the first layer whose masks differ between ranks.

    Args:
        masks: layer name to bool tensor of its masks.
        step: for the message.
    """
    rows = gathered(torch.stack([fingerprint(mask) for mask in masks.values()]))
    for column, name in enumerate(masks):
        if len({row[column] for row in rows}) > 1:
            raise RuntimeError(
                f"{name}: the processes have different masks at step {step}; their weights, gradients or pruner "
                "states are not the same (is the model wrapped in DistributedDataParallel?)"
            )
