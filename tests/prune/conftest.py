import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_pathways as sp

sys.path.insert(0, str(Path(__file__).parent))  # for plain_methods.py

LANGUAGES = ("en", "fr")


class Toy:
    """A two-layer model, its optimisers and batches: all that the tests of the Pruner train."""

    @staticmethod
    def make_model(languages=LANGUAGES, block=(4, 1)):
        torch.manual_seed(1)
        return sp.sparsify_(nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 6)), block, languages)

    @staticmethod
    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    @staticmethod
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)

    @staticmethod
    def train(model, pruner, optimizer, names, seed=0, after=lambda step, name, event: None):
        """One optimiser step per name; the batches depend on `seed` alone."""
        draw = torch.Generator().manual_seed(seed)
        for step, name in enumerate(names, 1):
            x, y = torch.randn(8, 10, generator=draw), torch.randn(8, 6, generator=draw)
            with sp.pathway(model, name):
                loss = (model(x) - (y if name == "en" else -y)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after(step, name, pruner.step(name))

    @staticmethod
    def turns(steps):
        return [LANGUAGES[(step // 2) % 2] for step in range(steps)]

    @staticmethod
    def layers_of(model):
        return sp.sparse_layers(model)

    @staticmethod
    def kept(model, name):
        return [int(layer.mask(name).sum()) for layer in Toy.layers_of(model).values()]

    @staticmethod
    def target(model, sparsity):
        return [round((1 - sparsity) * layer.mask().numel()) for layer in Toy.layers_of(model).values()]

    @staticmethod
    def fixed_masks(model, sparsity=0.5):
        draw = torch.Generator().manual_seed(11)
        for layer in Toy.layers_of(model).values():
            for name in layer.pathways:
                layer.set_mask_(sp.topk_mask(torch.rand(layer.mask().shape, generator=draw), sparsity), name)


@pytest.fixture
def toy():
    return Toy


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices of a few hundred numbers: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
