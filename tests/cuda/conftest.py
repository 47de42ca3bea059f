"""The CUDA kernels are proven on the host: see emulation.py."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for emulation.py and mutations.py, which the model uses as well


@pytest.fixture
def thorough() -> None:
    """The long part of the proof: `make prove`."""
    if not os.environ.get("SPARSE_PATHWAYS_PROVE"):
        pytest.skip("part of `make prove` (SPARSE_PATHWAYS_PROVE=1)")
