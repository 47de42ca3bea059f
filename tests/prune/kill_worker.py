"""Trains 30 steps with a checkpoint every 5, from the last one on. FOLDER [STEP at which it is killed]."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import sparse_pathways as sp

LANGUAGES = ("en", "fr")

if __name__ == "__main__":
    folder, killed_at = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = sp.sparsify_(nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 6)), (4, 1), LANGUAGES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = sp.Pruner(model, sp.methods.dynamic_asr_pathways(LANGUAGES, 0.7, steps=30), optimizer)
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    if (folder / "checkpoint.pt").exists():
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    while pruner.steps < 30:
        draw = torch.Generator().manual_seed(pruner.steps)
        name = LANGUAGES[pruner.steps // 2 % 2]
        with sp.pathway(model, name):
            model(torch.randn(8, 10, generator=draw)).square().mean().backward()
        optimizer.step()
        pruner.step(name)
        optimizer.zero_grad()
        if pruner.steps == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if pruner.steps % 5 == 0:
            torch.save({key: part.state_dict() for key, part in parts.items()}, folder / "partial.pt")
            (folder / "partial.pt").replace(folder / ("end.pt" if pruner.steps == 30 else "checkpoint.pt"))
