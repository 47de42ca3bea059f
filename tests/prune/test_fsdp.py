"""FSDP2 on two processes, through torchrun: the masks of one process, also where a shard cuts a block in two."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("fsdp_worker.py")
pytest.importorskip("torch.distributed.fsdp")


def load_worker():
    spec = importlib.util.spec_from_file_location("fsdp_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp") / "rank"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), str(out)]
    subprocess.run([sys.executable, *command], check=True, timeout=300)
    return [torch.load(f"{out}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["lap-magnitude", "lap-gradient", "dynamic", "dynamic-learned", "dynamic-gates", "dynamic-B", "gradual"]
)
def test_two_sharded_processes_decide_the_masks_of_one(sharded, method):
    worker = load_worker()
    alone = worker.train(worker.PLANS[method], 0, 1)
    for result in sharded:
        for name, (weight, masks) in alone.items():
            for language in worker.LANGUAGES:
                assert torch.equal(result[method][name][1][language], masks[language]), (name, language)
            torch.testing.assert_close(result[method][name][0], weight, rtol=1e-4, atol=1e-6)
    kept = [int(mask.sum()) for _, masks in alone.values() for mask in masks.values()]
    assert 0 < max(kept) < 50
