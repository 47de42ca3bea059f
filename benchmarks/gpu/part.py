"""One part of `run.py` in its own process: `python part.py NAME FILE`; rows go to FILE as JSON lines as they come."""

import itertools
import json
import platform
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import checkout
import torch
from run import NO_DEVICE


def try_interpreter() -> None:
    """Interpret one product, so that an interpreter that cannot run says so in a line and not in every part."""
    import numpy
    import triton
    from sparse_pathways.kernels.bcsr_linear import bcsr_linear

    start, index = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    try:
        bcsr_linear(torch.ones(1, 16), torch.ones(1, 16, 16), start, index, None, None, 16)
    except Exception as error:
        with_numpy = f"Triton {triton.__version__} with numpy {numpy.__version__}"
        sys.exit(f"the interpreter of {with_numpy} fails ({error}); that of Triton 3.6 needs numpy < 2.4")


def environment() -> Iterator[dict]:
    """The machine; ends badly without a device."""
    import triton

    if not torch.cuda.is_available():
        print("no CUDA device")
        sys.exit(NO_DEVICE)
    if checkout.PRETEND:
        try_interpreter()
    found = {"part": "environment", "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    if not checkout.PRETEND:
        properties = torch.cuda.get_device_properties(0)
        found |= {"sms": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        found |= {"memory_bytes": properties.total_memory, "capability": list(torch.cuda.get_device_capability())}
    yield found


def main() -> int:
    """Exit code: 1 if the part stopped at an error; the rows before it are kept."""
    name, path = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # the checks compare with float32
    if name == "environment":
        rows = environment()
    else:
        from parts import PARTS

        rows = itertools.chain.from_iterable(one() for one in PARTS.values()) if name == "all" else PARTS[name]()
    with open(path, "w") as file, torch.no_grad():
        try:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                file.flush()
        except Exception:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
