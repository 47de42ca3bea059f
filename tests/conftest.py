"""Shared fixtures: a seeded generator and every backend of this machine."""

import pytest
import torch

from sparse_pathways.ops import backends

torch.set_num_threads(1)  # the tests' tensors are small: a second thread costs more than it saves


def cpu_backends() -> list[str]:
    """Names of the backends that can run fp32 on this CPU."""
    return [name for name in backends.NAMES if backends._why_not(name, "cpu", torch.float32, (8, 1)) is None]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20230913)


@pytest.fixture(params=cpu_backends())
def backend(request):
    """Runs the test once per CPU backend, forced: a silent fallback is an error."""
    with backends.forced(request.param):
        yield request.param
