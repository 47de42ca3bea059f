"""One process of test_fsdp.py, started by torchrun: train a fully sharded model, write its masks and weights. OUT."""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import sparse_pathways as sp

LANGUAGES = ("en", "fr")
STEPS = 20
m = sp.methods
PLANS = {
    "lap-magnitude": m.lap(LANGUAGES, 0.6, steps=STEPS),
    "lap-gradient": m.lap(LANGUAGES, 0.6, steps=STEPS, score="gradient"),
    "dynamic": m.dynamic_asr_pathways(LANGUAGES, 0.6, steps=STEPS),
    "dynamic-learned": m.dynamic_asr_pathways(LANGUAGES, 0.6, steps=STEPS, score="learned"),
    "dynamic-gates": m.dynamic_asr_pathways(
        LANGUAGES, 0.6, steps=STEPS, score=sp.Learned(gate="hard-concrete", scale_lr=0.01)
    ),
    "dynamic-B": m.dynamic_asr_pathways(LANGUAGES, 0.6, steps=STEPS, score="magnitude", dense_grad=False),
    "gradual": m.gradual(LANGUAGES, 0.6, steps=STEPS),
}


def make_model():
    torch.manual_seed(1)
    # 18 and 6 rows in blocks of 4: shards cut blocks in two
    return sp.sparsify_(nn.Sequential(nn.Linear(10, 18), nn.GELU(), nn.Linear(18, 6)), (4, 1), LANGUAGES)


def train(plan, rank, world):
    """20 steps of AdamW; each rank has its part of every batch. {layer: (weight, masks)}."""
    model = make_model()
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    pruner = sp.Pruner(model, plan, optimizer)
    draw = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        x, y = torch.randn(8, 10, generator=draw), torch.randn(8, 6, generator=draw)
        part = slice(rank * 8 // world, (rank + 1) * 8 // world)
        name = LANGUAGES[step // 2 % 2]
        with sp.pathway(model, name):
            loss = F.mse_loss(model(x[part]), (y if name == "en" else -y)[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(name)
    result = {}
    for name, layer in sp.sparse_layers(model).items():
        weight = layer.weight.full_tensor() if world > 1 else layer.weight
        result[name] = (weight.detach().clone(), {language: layer.mask(language) for language in LANGUAGES})
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {name: train(plan, dist.get_rank(), dist.get_world_size()) for name, plan in PLANS.items()}
    torch.save(results, f"{sys.argv[1]}-{dist.get_rank()}.pt")
    dist.barrier()  # rank 0 keeps the store: it leaves last
    dist.destroy_process_group()
    # A thread of gloo that still drops a tensor while the interpreter ends aborts the process (pytorch issue 190489):
    # leave without that ending. All that the test reads is written.
    os._exit(0)
