"""Two processes over gloo against one: the same masks, and a plain error where they part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_pathways.prune.distributed import fingerprint

WORKER = Path(__file__).with_name("processes_worker.py")


def launch(world, folder):
    """Run the worker in `world` processes; what each has written, by rank."""
    outs = [folder / f"{world}-{rank}.json" for rank in range(world)]
    command = [sys.executable, str(WORKER)]
    running = [
        subprocess.Popen([*command, str(rank), str(world), str(folder / f"meet-{world}"), str(out)])
        for rank, out in enumerate(outs)
    ]
    codes = [process.wait(timeout=120) for process in running]
    assert codes == [0] * world
    return [json.loads(out.read_text()) for out in outs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return {"alone": launch(1, folder)[0], "pair": launch(2, folder)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lap", "dynamic", "dynamic-B"])
def test_two_processes_decide_the_masks_of_one(runs, method):
    first, second = runs["pair"]
    assert first[method] == second[method]
    assert first[method] == runs["alone"][method]
    assert any(0 in mask for layer in first[method].values() for mask in layer.values())


@pytest.mark.slow
def test_different_weights_are_reported_with_the_layer(runs):
    for result in runs["pair"]:
        assert result["other_weights"].startswith("2: the processes have different masks at step 4")


@pytest.mark.slow
def test_different_initial_masks_are_reported_with_the_layer(runs):
    for result in runs["pair"]:
        assert result["other_masks"].startswith("2: the processes have different masks at step 0")


@pytest.mark.slow
def test_different_pathways_are_reported_with_the_ranks(runs):
    for result in runs["pair"]:
        assert result["other_pathway"].startswith(
            "step 3: the processes have batches of different pathways (rank 0: en, rank 1: fr)"
        )


def test_fingerprint_tells_masks_apart():
    draw = torch.Generator().manual_seed(0)
    masks = [torch.rand(37, 11, generator=draw) < 0.3 for _ in range(200)]
    for mask in masks[:100]:  # near ones: the first kept block swapped with the first pruned one
        near = mask.clone().flatten()
        near[[int(near.int().argmax()), int(near.int().argmin())]] = torch.tensor([False, True])
        masks.append(near.view_as(mask))
    assert len({int(fingerprint(mask)) for mask in masks}) == len(masks)
    assert int(fingerprint(torch.zeros(5, 5, dtype=torch.bool))) == 0
    assert int(fingerprint(masks[0])) == int(fingerprint(masks[0].flatten()))
