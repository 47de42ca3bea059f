"""What this machine is and what the package found on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparse_pathways.checks import BackendUnavailable
from sparse_pathways.ops import backends, direct, library, machine

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that decide between the CPU kernels, as /proc/cpuinfo calls them.
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512vbmi"),
    *("avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


class Environment(dict[str, Any]):
    """A dict whose text is a table; JSON-able like any dict of plain values."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{key:{width}}  {_as_text(value)}" for key, value in self.items())


def _as_text(value: object) -> str:
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cpuinfo(key: str) -> str | None:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)


def _flags() -> list[str]:
    found = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [flag for flag in FLAGS if flag in found]


def cache_kib(level: int) -> int | None:
    """Size of the data cache of a level, in KiB, as the first core sees it; None where the system does not say."""
    units = {"K": 1, "M": 1024, "G": 1024 * 1024}
    for index in sorted(CACHES.glob("index*")):
        try:
            here, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if int(here) == level and kind in ("Data", "Unified"):
                return int(size[:-1]) * units[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree that runs; None for an installed package, or without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_backend() -> str:
    try:
        return backends.select("cpu", torch.float32, (8, 1))
    except BackendUnavailable as error:
        return f"none: {error}"


def _isas() -> list[str]:
    return list(backends.ISAS[: torch.ops.sparse_pathways.max_isa() + 1]) if library.MISSING is None else []


def env() -> Environment:
    """Machine, versions and backends for reports and bug reports: a JSON-able dict, printed as a table.

    Keys: `package` version, `commit` of the source tree and versions of `python`, `torch`, `triton`, `torchaudio`; the
    `cpu`, its `cores` (all, and `cores_allowed` to this process), `l1d_kib`, `l2_kib`, `l3_kib` (KiB, as one core sees
    them) and `cpu_flags` that matter to the kernels; `isa_available`, the CPU kernels that can run here, `cpu_backend`,
    the one in use, `cpu_kernels` ("loaded", or why not) and their `compiler`; `direct_calls` ("loaded", or why calls go
    through torch's dispatcher, a microsecond slower each); `threads` that torch is told to use and
    `pool_threads`, those of ours that exist by now besides the callers'; `cuda_device`; `forced_backend`. What does not
    exist or is not known is None.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return Environment(
        package=_version("sparse-pathways"),
        commit=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        torchaudio=_version("torchaudio"),
        cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        cores_allowed=allowed,
        l1d_kib=cache_kib(1),
        l2_kib=cache_kib(2),
        l3_kib=cache_kib(3),
        cpu_flags=_flags(),
        isa_available=_isas(),
        cpu_backend=_cpu_backend(),
        cpu_kernels="loaded" if library.MISSING is None else library.MISSING,
        compiler=machine.compiler(),
        direct_calls="loaded" if direct.MISSING is None else direct.MISSING,
        threads=torch.get_num_threads(),
        pool_threads=machine.pool_helpers(),
        cuda_device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        forced_backend=os.environ.get(backends.VARIABLE) or None,
    )
