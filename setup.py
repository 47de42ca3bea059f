"""Builds the C++ kernels with CMake; everything else about the package stands in pyproject.toml.

The kernels are a plain shared library that torch loads (`torch.ops.load_library`), not a Python module, so one wheel
serves every Python: tag py3-none-<platform>. Without a C++ compiler the package installs without the library. Beside it
lies a library of direct calls that serves the torch and the Python it was built with, and is left alone by others.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"


def find_compiler() -> str | None:
    """The C++ compiler CMake will use: $CXX, or the first of the usual names on the path."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return name
    return None


def find_tool(name: str) -> str | None:
    """A build tool from the interpreter's own environment, else from the path."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


class CMakeBuild(build_ext):
    """Runs CMake and leaves the libraries in the package folder (of the wheel, or of the checkout when editable)."""

    def run(self) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None:
            raise SystemExit(
                "sparse-pathways: there is a C++ compiler but no CMake. `pip install cmake ninja` and retry."
            )
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(BUILD),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSP_OUTPUT_DIR={BUILD / 'lib'}",
        ]
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        for stale in (BUILD / "lib").glob("*.so"):
            stale.unlink()  # a library that this configuration leaves out must not be installed from an earlier one
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(BUILD), "--parallel"], check=True)
        direct = [cmake, "--build", str(BUILD), "--target", "sparse_pathways_direct"]
        if subprocess.run(direct).returncode != 0:
            print("sparse-pathways: no direct calls; calls go through torch's dispatcher (sp.env())", file=sys.stderr)
        for target in map(Path, self.get_outputs()):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".new")
            shutil.copy2(BUILD / "lib" / target.name, fresh)
            fresh.replace(target)  # a process that has the old library mapped keeps it

    def get_outputs(self) -> list[str]:
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        return [str(base / "sparse_pathways" / library.name) for library in sorted((BUILD / "lib").glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """Platform wheel without a Python tag of its own."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if self.distribution.has_ext_modules() else "any"


extensions = []
if find_compiler() is None:
    print(
        "sparse-pathways: no C++ compiler found (looked for $CXX, c++, g++, clang++). Installing without compiled "
        "kernels; products run on the PyTorch reference. Install a compiler and reinstall to get them.",
        file=sys.stderr,
    )
else:
    extensions.append(Extension("sparse_pathways.libsparse_pathways_cpu", sources=[]))

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel})
