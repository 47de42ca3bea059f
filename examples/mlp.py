"""Prune a plain MLP to 90 % in 8x1 blocks while it trains, then run it packed. `python examples/mlp.py`"""

import torch
from torch import nn

import sparse_pathways as sp


def main(steps: int = 400) -> dict[str, float]:
    """Train, prune, pack; returns what it prints."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))

    sp.sparsify_(model, block=(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pruner = sp.Pruner(model, sp.methods.adaptive(sparsity=0.9, steps=steps), optimizer)
    for _ in range(steps):
        x = torch.randn(64, 64)
        loss = nn.functional.mse_loss(model(x), teacher(x))
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()

    x = torch.randn(512, 64)
    with torch.inference_mode():
        error = nn.functional.mse_loss(model(x), teacher(x)) / teacher(x).var()
        difference = (sp.pack(model)(x) - model(x)).abs().max()
    return {"density": sp.density(model)["total"], "unexplained": float(error), "packed differs by": float(difference)}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3g}")
