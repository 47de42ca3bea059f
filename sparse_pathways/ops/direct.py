"""`packed_linear` without torch's dispatcher, where the package was built for the torch and the Python that run.

The kernels are on torch's stable ABI and serve any torch; the direct call (csrc/torch/direct.cpp) is on its own C++ ABI
and serves one. Elsewhere the operator is called, which gives the same numbers about a microsecond later.
"""

from __future__ import annotations

import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch

from sparse_pathways.ops import library
from sparse_pathways.ops.prepared import packed_linear

_ABI = f"{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
PATH = library.PATH.with_name(f"libsparse_pathways_direct-{_ABI}.so")


def _load(operator: Any) -> tuple[Any, str | None]:
    """The function to call, and why it is the operator if it is."""
    if library.MISSING is not None:
        return operator, "there are no CPU kernels"
    if not PATH.exists():
        return (
            operator,
            f"not built for torch {torch.__version__} and this Python: reinstall sparse-pathways beside them",
        )
    name = "sparse_pathways._direct"
    loader = ExtensionFileLoader(name, str(PATH))
    spec = spec_from_file_location(name, PATH, loader=loader)
    assert spec is not None
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
        module.bind(torch.ops.sparse_pathways.direct_calls(), operator)
    except ImportError as error:
        return operator, f"{PATH.name} does not load: {error}"
    return module.linear, None


# The operator without its overload's own Python frame, which torch.compile needs and which never comes here.
linear, MISSING = _load(packed_linear._op)
