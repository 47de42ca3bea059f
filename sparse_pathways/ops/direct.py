"""`packed_linear` without torch's dispatcher, where the package was built for the torch and the Python that run.

The kernels are on torch's stable ABI and serve any torch; the direct call (csrc/torch/direct.cpp) is on its own C++ ABI
and serves one. Elsewhere `through_operator` is called, which gives the same numbers about a microsecond later.
"""

from __future__ import annotations

import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
from torch import Tensor

from sparse_pathways.ops import library
from sparse_pathways.ops.prepared import is_plain_call, packed_linear

_ABI = f"{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
PATH = library.PATH.with_name(f"libsparse_pathways_direct-{_ABI}.so")

# The operator without its overload's own Python frame, which torch.compile needs and which never comes here.
_operator = packed_linear._op


def through_operator(
    x: Tensor,
    handle: int,
    residual: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    version: int | None,
    pointer: int,
) -> Tensor | None:
    """`packed_linear(x, handle, residual)` while its answer is right: `values` is still of `version` (None: not
    counted) and at `pointer`, no derivative is wanted, and nobody but the kernel has a say. Else None."""
    if not is_plain_call() or (version is not None and version != values._version) or pointer != values.data_ptr():
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias, residual)):
        return None
    return _operator(x, handle, residual)


def _load() -> tuple[Any, str | None]:
    """The function to call, and why it is `through_operator` if it is."""
    if library.MISSING is not None:
        return through_operator, "there are no CPU kernels"
    if not PATH.exists():
        return (
            through_operator,
            f"not built for torch {torch.__version__} and this Python; to build them, install Python's headers "
            "(Python.h) and sparse-pathways again, with pip install --no-build-isolation",
        )
    name = "sparse_pathways._direct"
    loader = ExtensionFileLoader(name, str(PATH))
    spec = spec_from_file_location(name, PATH, loader=loader)
    assert spec is not None
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
        module.bind(torch.ops.sparse_pathways.direct_calls(), through_operator)
    except (ImportError, RuntimeError) as error:  # RuntimeError: kernels of an older build
        return through_operator, f"{PATH.name} does not load: {error}"
    return module.linear, None


linear, MISSING = _load()
