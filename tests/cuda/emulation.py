"""Builds prove_cuda: the CUDA sources as host C++ under csrc/emulation, with the checks of csrc/tests/cuda.

Two builds. "address": AddressSanitizer and UBSan on exactly sized buffers. "traced": every access of the kernels goes
through the emulator's hooks, which look for races and count. Objects are kept in build/emulation by the hash of what
they are made of, so a changed copy of one source costs one compilation.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
COMMON = ["-std=c++20", "-g1", "-O1", "-fno-omit-frame-pointer", "-Wall", "-Wextra"]
FLAVOURS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "traced": ["-DSP_EMULATION_TRACE"],
}
HOOKS = ["-fsanitize=thread"]  # of the kernels alone, and without its library: the hooks are the emulator's
Changes = dict[str, str]  # path below csrc -> text that takes the place of the file's


def compiler() -> list[str]:
    """The host compiler; GCC, since clang inlines the hooks' own bookkeeping differently."""
    return shlex.split(os.environ.get("CXX", "g++"))


def missing() -> str | None:
    """Why nothing can be built here; None if it can."""
    return None if shutil.which(compiler()[0]) else f"{compiler()[0]} is not installed"


def _headers(source: Path, changes: Changes) -> str:
    """All that `source` may include; kernels include nothing of the checks."""
    folders = ["cuda", "emulation", *(["tests/cuda"] if "tests" in source.parts else [])]
    paths = [p for folder in folders for end in ("h", "cuh") for p in sorted((SOURCES / folder).glob(f"*.{end}"))]
    paths.append(SOURCES / "core" / "types.h")
    return "".join(changes.get(str(p.relative_to(SOURCES)), p.read_text()) for p in paths)


def _object(source: Path, flavour: str, changes: Changes) -> Path:
    name = str(source.relative_to(SOURCES))
    text = changes.get(name, source.read_text())
    flags = [*COMMON, *FLAVOURS[flavour]]
    if source.suffix == ".cu" and flavour == "traced":
        flags += HOOKS
    if source.parent.name == "emulation" and flavour == "traced":
        flags += ["-O2"]
    key = hashlib.sha256(
        "\0".join([*compiler(), *flags, name, text, _headers(source.relative_to(ROOT), changes)]).encode()
    ).hexdigest()[:24]
    target = BUILD / flavour / f"{source.stem}-{key}.o"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for changed, body in changes.items():
            (Path(folder) / changed).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / changed).write_text(body)
        here = Path(folder) / name if name in changes else source
        fresh = target.with_suffix(f".{os.getpid()}")
        command = [*compiler(), *flags, f"-I{folder}", f"-I{SOURCES}", "-x", "c++", "-c", str(here), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        fresh.replace(target)
    return target


def build(flavour: str, changes: Changes | None = None, only: tuple[str, ...] = ()) -> Path:
    """Path of the program.

    Args:
        flavour: "address" or "traced".
        changes: files of csrc to replace, for faults planted on purpose.
        only: names of the sources that see the changes (a header may be part of many); default those changed.
    """
    changes = changes or {}
    only = only or tuple(Path(name).name for name in changes)
    sources = [
        *sorted((SOURCES / "cuda").glob("*.cu")),
        *sorted((SOURCES / "emulation").glob("*.cpp")),
        *sorted((SOURCES / "tests" / "cuda").glob("*.cpp")),
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: _object(s, flavour, changes if s.name in only else {}), sources))
    key = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:24]
    program = BUILD / flavour / f"prove_cuda-{key}"
    if not program.exists():
        fresh = program.with_suffix(f".{os.getpid()}")
        command = [*compiler(), "-g1", *map(str, objects), "-o", str(fresh), "-ldl", "-rdynamic"]
        if flavour == "address":
            command += FLAVOURS["address"]
        subprocess.run(command, check=True)
        fresh.replace(program)
    return program


def prove(program: Path, *arguments: str, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
    """Run it; what it prints on the way to a crash is in stdout, too."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=environment,
    )
