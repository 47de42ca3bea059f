import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices of a few hundred numbers: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
