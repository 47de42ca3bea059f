"""Imports of the package go one way, files stay short. Read from the source, so no import has to run.

`checks <- mask <- layout <- ops <- nn <- prune <- asr <- cli`; `report` is read by `cli` alone and reads anything but
`asr`; `kernels` stands alone and is reached from inside functions of `ops`; `asr` is a user of the public API.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sparse_pathways"
API = ""  # the layer of the package's own __init__.py: the public names

CHAIN = ("checks", "mask", "layout", "ops", "environment", "nn", "prune")
LAYERS = {layer: {layer, *CHAIN[:i]} for i, layer in enumerate(CHAIN)}  # layer -> layers it may import
LAYERS["ops"] |= {"kernels"}
LAYERS[API] = set(CHAIN)
LAYERS["kernels"] = {"kernels"}
LAYERS["report"] = {"report", API, *CHAIN}
LAYERS["integrations"] = {"integrations", *CHAIN}
LAYERS["asr"] = {"asr", API}
LAYERS["cli"] = {"cli", "asr", "report", API, *CHAIN}

SPEECH = {"torchaudio", "sentencepiece", "soundfile", "accelerate", "jiwer", "espeakng_loader", "tqdm", "G722"}
LIBRARIES = {layer: {"torch", "numpy", "safetensors"} for layer in LAYERS}  # layer -> packages it may import
LIBRARIES["kernels"] = {"torch", "triton"}
LIBRARIES["asr"] = LIBRARIES["asr"] | SPEECH
LIBRARIES["integrations"] = LIBRARIES["integrations"] | {"lightning", "transformers"}
LIBRARIES["report"] = LIBRARIES["report"] | {"matplotlib", "jinja2"}
LIBRARIES["cli"] = LIBRARIES["asr"] | {"jsonargparse", "yaml"}


class Import(NamedTuple):
    """One imported module or name: `from a.b import c` is ("a.b", "c")."""

    module: str
    name: str | None
    line: int
    in_function: bool


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """All imports of a file, at module level and in functions, relative ones resolved, with `import_module("...")`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        in_function = id(node) in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parent = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*parent, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(source, alias.name, node.lineno, in_function)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if isinstance(node.args[0], ast.Constant):
                yield Import(node.args[0].value, None, node.lineno, in_function)


def layer_of(parts: list[str]) -> str:
    return parts[1] if len(parts) > 1 else API


def target_layer(found: Import) -> str:
    """Layer that an import within the package reaches; `from sparse_pathways import nn` reaches nn, not the API."""
    parts = found.module.split(".")
    if len(parts) == 1 and found.name in LAYERS:
        parts.append(found.name)
    return layer_of(parts)


def public_names(root: Path) -> set[str]:
    """The package's `__all__`."""
    for node in ast.parse((root / PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("sparse_pathways/__init__.py has no literal __all__")


def private_doors(tree: ast.Module, found: list[Import], public: set[str]) -> Iterator[tuple[int, str]]:
    """Names that a user of the API takes from the package and that are not public: (line, name)."""
    for one in found:
        if one.module == PACKAGE and one.name is not None and one.name not in public:
            yield one.line, one.name
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == PACKAGE
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            if node.attr not in public:
                yield node.lineno, node.attr


def import_faults(root: Path) -> list[str]:
    """Every import against the arrows, as `file:line: what`."""
    faults = []
    files = [(path, path.relative_to(root)) for path in sorted((root / PACKAGE).rglob("*.py"))]
    files += [(path, PACKAGE / path.relative_to(root)) for path in sorted((root / "kernels").rglob("*.py"))]
    for path, place in files:
        parts = list(place.with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        layer = layer_of(parts)
        where = str(path.relative_to(root))
        if layer not in LAYERS:
            faults.append(f"{where}: layer {layer!r} has no place in the order of layers")
            continue
        tree = ast.parse(path.read_text())
        found = list(imports_of(tree, ".".join(parts), is_package))
        for one in found:
            top = one.module.partition(".")[0]
            if top != PACKAGE:
                if top not in sys.stdlib_module_names and top not in LIBRARIES[layer]:
                    faults.append(f"{where}:{one.line}: {layer or 'the API'} imports the package {top!r}")
                continue
            target = target_layer(one)
            if target not in LAYERS[layer]:
                faults.append(f"{where}:{one.line}: {layer or 'the API'} imports {target or 'the API'}")
            elif target == "kernels" != layer and not one.in_function:
                faults.append(f"{where}:{one.line}: kernels are imported at module level; a machine may lack Triton")
        if layer == "asr":
            doors = private_doors(tree, found, public_names(root))
            faults += [f"{where}:{line}: asr uses {name!r}, which is not public" for line, name in doors]
    return faults


def long_files(root: Path) -> list[str]:
    """Source files over the house's limits: 400 lines of Python, 500 of C++."""
    limits = {".py": 400, ".cpp": 500, ".h": 500, ".cu": 500, ".cuh": 500}
    folders = [PACKAGE, "kernels", "csrc", "tests", "benchmarks", "experiments"]
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*")) if path.suffix in limits]
    lengths = {path: len(path.read_text().splitlines()) for path in paths}
    return [f"{p.relative_to(root)}: {n} lines" for p, n in lengths.items() if n > limits[p.suffix]]


def test_imports_follow_the_arrows():
    assert import_faults(ROOT) == []


def test_files_are_short():
    assert long_files(ROOT) == []


# --- the checks themselves: a small tree in order, then one fault at a time ----------------------------------------
GOOD = {
    "sparse_pathways/__init__.py": 'from sparse_pathways.mask import select\n\n__all__ = ["select"]\n',
    "sparse_pathways/checks.py": "import os\nimport torch\n",
    "sparse_pathways/mask/__init__.py": "from sparse_pathways.mask.select import select\n",
    "sparse_pathways/mask/select.py": "from ..checks import x\nfrom . import other\n",
    "sparse_pathways/ops/linear.py": "def f():\n    from sparse_pathways.kernels.bcsr_linear import bcsr_linear\n",
    "sparse_pathways/report/html.py": "import matplotlib\nfrom sparse_pathways.mask import select\n",
    "sparse_pathways/asr/model.py": "import torchaudio\nimport sparse_pathways as sp\nfrom .text import t\nsp.select\n",
    "sparse_pathways/cli/main.py": "from sparse_pathways import asr, report\n",
    "kernels/bcsr_linear.py": "import triton.language as tl\n",
}
FAULTS = {
    "upward": ("sparse_pathways/mask/bad.py", "from sparse_pathways.nn.linear import f", "mask imports nn"),
    "upward_in_a_function": ("sparse_pathways/ops/bad.py", "def f():\n    import sparse_pathways.nn", "ops imports nn"),
    "upward_relative": ("sparse_pathways/layout/bad.py", "from ..prune import plan", "layout imports prune"),
    "upward_in_an_init": ("sparse_pathways/mask/__init__.py", "from ..ops import linear", "mask imports ops"),
    "upward_as_a_name": ("sparse_pathways/nn/bad.py", "from sparse_pathways import prune", "nn imports prune"),
    "upward_when_type_checking": (
        "sparse_pathways/nn/bad.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sparse_pathways.asr.model import Recogniser",
        "nn imports asr",
    ),
    "by_import_module": (
        "sparse_pathways/prune/bad.py",
        'import importlib\nimportlib.import_module("sparse_pathways.asr.model")',
        "prune imports asr",
    ),
    "the_api_from_below": ("sparse_pathways/nn/bad.py", "import sparse_pathways as sp", "nn imports the API"),
    "api_imports_asr": (
        "sparse_pathways/__init__.py",
        '__all__ = ["select"]\nfrom .asr import a',
        "the API imports asr",
    ),
    "kernels_at_module_level": (
        "sparse_pathways/ops/bad.py",
        "from sparse_pathways.kernels.bcsr_linear import bcsr_linear",
        "kernels are imported at module level",
    ),
    "kernels_from_nn": ("sparse_pathways/nn/bad.py", "def f():\n    from ..kernels import x", "nn imports kernels"),
    "package_from_kernels": ("kernels/bad.py", "from sparse_pathways.checks import x", "kernels imports checks"),
    "numpy_in_kernels": ("kernels/bad.py", "import numpy", "kernels imports the package 'numpy'"),
    "report_reads_asr": ("sparse_pathways/report/bad.py", "from sparse_pathways.asr import x", "report imports asr"),
    "asr_reads_report": ("sparse_pathways/asr/bad.py", "from sparse_pathways.report import x", "asr imports report"),
    "asr_by_a_private_door": (
        "sparse_pathways/asr/bad.py",
        "from sparse_pathways.layout import x",
        "asr imports layout",
    ),
    "asr_uses_a_private_name": (
        "sparse_pathways/asr/bad.py",
        "import sparse_pathways as sp\nsp.repack_",
        "'repack_', which is not public",
    ),
    "asr_imports_a_private_name": (
        "sparse_pathways/asr/bad.py",
        "from sparse_pathways import repack_",
        "'repack_', which is not public",
    ),
    "speech_in_nn": ("sparse_pathways/nn/bad.py", "import torchaudio.models", "nn imports the package 'torchaudio'"),
    "speech_in_report": ("sparse_pathways/report/bad.py", "import soundfile", "report imports the package 'soundfile'"),
    "tests": ("sparse_pathways/nn/bad.py", "def f():\n    from tests.nn import x", "nn imports the package 'tests'"),
    "benchmarks": ("sparse_pathways/cli/bad.py", "import benchmarks.baselines", "cli imports the package 'benchmarks'"),
    "top_level_kernels": ("sparse_pathways/ops/bad.py", "from kernels import x", "ops imports the package 'kernels'"),
    "unknown_layer": ("sparse_pathways/utils.py", "", "layer 'utils' has no place"),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_tree_in_order_has_no_fault(tmp_path):
    write_tree(tmp_path, GOOD)
    assert import_faults(tmp_path) == []
    assert long_files(tmp_path) == []


@pytest.mark.parametrize(("file", "text", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(tmp_path, file, text, message):
    write_tree(tmp_path, GOOD | {file: text})
    faults = import_faults(tmp_path)
    assert len(faults) == 1, faults
    assert faults[0].startswith(file)
    assert message in faults[0]


def test_a_long_file_is_found(tmp_path):
    write_tree(tmp_path, GOOD | {"csrc/core/a.cpp": "\n" * 501, "kernels/a.py": "\n" * 401, "tests/b.py": "\n" * 400})
    assert long_files(tmp_path) == ["kernels/a.py: 401 lines", "csrc/core/a.cpp: 501 lines"]
