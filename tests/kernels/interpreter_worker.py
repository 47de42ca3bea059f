"""Answers calls of the kernels' launchers over stdin and stdout, in a process started with TRITON_INTERPRET=1.

A message is a pickled bytes object that torch.save wrote: pickle alone cannot carry uint16 tensors. `kernels/` is
loaded from a folder, so that a changed copy can be tried, and needs nothing of the package around it. Every address
that a kernel reads or writes is checked (watched_memory.py).
"""

import importlib
import importlib.util
import io
import os
import pickle
import sys
import traceback
import types
from pathlib import Path

import torch
import watched_memory

ANSWERS = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a print must not land among the answers

NAME = "sparse_pathways.kernels"
torch_empty = torch.empty


def load(folder: str) -> None:
    """Make `folder` the package sparse_pathways.kernels."""
    for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
        del sys.modules[name]
    parent = sys.modules.setdefault("sparse_pathways", types.ModuleType("sparse_pathways"))
    spec = importlib.util.spec_from_file_location(
        NAME, Path(folder) / "__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = parent.kernels = package
    spec.loader.exec_module(package)


def empty_of_nan(*size, **options):
    """`torch.empty`, but an element that the kernel forgets to write is NaN."""
    tensor = torch_empty(*size, **options)
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def use_cuda_kernels_on_the_cpu() -> None:
    """The whole package, its operators for a weight stored dense on the Triton kernels."""
    import sparse_pathways.ops.masked
    from sparse_pathways.ops import cuda, stored

    for name, function in (
        (stored.STORED, cuda.stored_linear),
        (stored.STORED_DX, cuda.stored_linear_dx),
        (stored.STORED_DW, cuda.stored_linear_dw),
        (sparse_pathways.ops.masked.WEIGHT, cuda.masked_weight),
    ):
        torch.library.register_kernel(name, "cpu", function)


def train(x, weight, mask, block, bias, dy, dense_grad, capacity, dense):  # type: ignore[no-untyped-def]
    """(y, dx, dweight, dbias) of `masked_linear`, as a training step takes them, by the Triton kernels or, where
    `dense` names a product, by the dense product in its place; and which kernels were launched."""
    from triton.runtime.interpreter import InterpretedFunction

    import sparse_pathways as sp
    from sparse_pathways.ops import cuda

    launched = []
    run = InterpretedFunction.run
    InterpretedFunction.run = lambda self, *a, **k: launched.append(self.fn.__name__) or run(self, *a, **k)
    cuda.takes_dense = lambda op, *shape: op in dense
    try:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        layout = sp.BlockLayout.from_mask(mask, block, tuple(weight.shape), capacity)
        y = sp.masked_linear(leaves[0], leaves[1], layout, leaves[2], dense_grad=dense_grad)
        y.backward(dy)
    finally:
        InterpretedFunction.run = run
    return y.detach(), *(t.grad for t in leaves), launched


def far(launcher, arguments, rows, pool):  # type: ignore[no-untyped-def]
    """A launcher's result, the arguments named in `rows` (of a `Weight` its values) and `pool` moved past element
    2**31. Moved here: a message would hold all of that memory."""
    for name in rows:
        one, move = arguments[name], watched_memory.far_rows
        arguments[name] = move(one) if isinstance(one, torch.Tensor) else one._replace(values=move(one.values))
    if pool is not None:
        arguments[pool] = watched_memory.far_blocks(arguments[pool])
    return call(launcher, arguments)


def call(function: str, arguments: dict) -> object:
    """A launcher's result."""
    module, name = function.rsplit(".", 1)
    if not module.startswith("sparse_pathways."):
        module = f"{NAME}.{module}"
    return getattr(importlib.import_module(module), name)(**arguments)


def answer(message: bytes) -> object:
    function, arguments = torch.load(io.BytesIO(message), weights_only=False)
    if function in ("load", "train", "far"):
        return globals()[function](**arguments)
    return call(function, arguments)


def serve() -> None:
    import triton

    wanted = sys.argv[1]
    assert triton.__version__ == wanted, f"this process has Triton {triton.__version__}, the tests have {wanted}"
    watched_memory.watch()
    if "--package" in sys.argv:
        use_cuda_kernels_on_the_cpu()
    load(str(Path(__file__).resolve().parents[2] / "kernels"))
    torch.empty = empty_of_nan
    while True:
        try:
            message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outcome = answer(message)
        except Exception:
            outcome = traceback.format_exc()
        written = io.BytesIO()
        torch.save(outcome, written)
        pickle.dump(written.getvalue(), ANSWERS)
        ANSWERS.flush()


if __name__ == "__main__":
    serve()
