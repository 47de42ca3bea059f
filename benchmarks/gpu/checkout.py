"""Makes `sparse_pathways` importable from this checkout, installed or not; also a pytest plugin (`-p checkout`).

A bare GPU machine has torch, Triton and pytest, and nothing is installed on it. Imported first, this puts the checkout
on the path, `kernels/` where an installation has it. With SPARSE_PATHWAYS_PRETEND=1 (dry run) there is a device that is
the CPU under Triton's interpreter: scripts and tests meant for a device run through once before they meet one.
"""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PRETEND = bool(os.environ.get("SPARSE_PATHWAYS_PRETEND"))

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import sparse_pathways  # noqa: E402

if str(ROOT) not in sparse_pathways.__path__:
    sparse_pathways.__path__.append(str(ROOT))  # sparse_pathways.kernels is ROOT/kernels


def _on_cpu(device: object) -> object:
    return "cpu" if str(device).startswith("cuda") else device


def pretend() -> None:
    """Let "cuda" mean the CPU, and the operators' CUDA functions serve it."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "a pretended device needs TRITON_INTERPRET=1"
    import sparse_pathways.ops.masked as masked
    from sparse_pathways.ops import cuda, stored

    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **options: to(self, *map(_on_cpu, args), **options)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **options: self.clone()  # type: ignore[method-assign]
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *args: "pretended device"
    for name, function in (
        (stored.STORED, cuda.stored_linear),
        (stored.STORED_DX, cuda.stored_linear_dx),
        (stored.STORED_DW, cuda.stored_linear_dw),
        (masked.CAST, cuda.masked_weight),
    ):
        torch.library.register_kernel(name, "cpu", function)


if PRETEND:
    pretend()
