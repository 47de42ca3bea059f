"""What this machine is and what the package found on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from sparse_pathways.checks import BackendUnavailable
from sparse_pathways.ops import backends, library


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_backend() -> str:
    try:
        return backends.select("cpu", torch.float32, (8, 1))
    except BackendUnavailable as error:
        return f"none: {error}"


def env() -> dict[str, Any]:
    """Machine, versions and backends, as a JSON-able dict for reports and bug reports."""
    return {
        "package": _version("sparse-pathways"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchaudio": _version("torchaudio"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_kernels": "loaded" if library.MISSING is None else library.MISSING,
        "cpu_backend": _cpu_backend(),
        "forced_backend": os.environ.get(backends.VARIABLE) or None,
    }
