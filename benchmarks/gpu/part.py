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


def environment() -> Iterator[dict]:
    """The machine; ends badly without a device."""
    import triton

    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
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
