from dataclasses import replace

import pytest

import sparse_pathways as sp
from sparse_pathways.asr.config import PruneConfig, TrainConfig
from sparse_pathways.asr.train import pruning_method


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"steps": 0}, r"TrainConfig\.steps = 0; want at least 1"),
        ({"lr": 0.0}, r"TrainConfig\.lr = 0\.0; want more than 0"),
        ({"hold": 1.0}, r"TrainConfig\.hold = 1\.0"),
        ({"mixed_precision": "fp8"}, "mixed_precision = 'fp8'"),
    ],
    ids=["steps", "lr", "hold", "precision"],
)
def test_config_refuses(fields, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        TrainConfig(data=tmp_path, out=tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sparsity": 70}, r"PruneConfig\.sparsity = 70; want a share"),
        ({"block": (0, 1)}, r"PruneConfig\.block = \(0, 1\); want outputs by inputs, both at least 1"),
        ({"score": "size"}, r"PruneConfig\.score = 'size'; want one of magnitude, gradient, movement, learned"),
        ({"interval": 0}, r"PruneConfig\.interval = 0; want at least 1"),
        ({"freeze": -5}, r"PruneConfig\.freeze = -5; want at least 1"),
        ({"source": "imp"}, r"PruneConfig\.source = 'imp'; want lap, lsp or nothing"),
        ({"scope": "all"}, r"PruneConfig\.scope = 'all'; want layer, global or nothing"),
    ],
    ids=["sparsity", "block", "score", "interval", "freeze", "source", "scope"],
)
def test_pruning_refuses_before_it_reads_anything(fields, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        PruneConfig(data=tmp_path, out=tmp_path, start=tmp_path / "not there", **fields)


def test_learning_rate_rises_holds_and_falls(tmp_path):
    config = TrainConfig(data=tmp_path, out=tmp_path, steps=1000, lr=1.0, warmup=100, hold=0.5, final_lr=0.1)
    rates = [config.learning_rate(step) for step in (0, 49, 99, 300, 500, 750, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.5, 0.1])


def test_the_default_is_what_the_comparisons_found_best(tmp_path):
    default = PruneConfig(data=tmp_path, out=tmp_path / "out", start=tmp_path)
    plan = pruning_method(default, ("en", "nl"), 0.0)
    assert (plan.masks, plan.scope, plan.score) == ("own", "global", sp.Gradient(0.995))
    plan = pruning_method(replace(default, scope="layer", score="gradient"), ("en", "nl"), 0.0)
    assert (plan.scope, plan.score) == ("layer", sp.Gradient())
    assert pruning_method(replace(default, method="lap"), ("en", "nl"), 0.0).scope == "layer"
    assert pruning_method(replace(default, method="lap", scope="global"), ("en", "nl"), 0.0).scope == "global"
    for method in ("dynamic_asr_pathways", "asr_pathways"):  # freeze is the joint phase's, and scope all phases'
        phases = pruning_method(
            replace(default, method=method, source="lsp", source_steps=100, freeze=300, scope="global"),
            ("en", "nl"),
            0.0,
        )
        assert [phase.plan.scope for phase in phases[:2]] == ["global"] * 2
    with pytest.raises(ValueError, match="freeze = 500 is after the last of steps = 400"):
        pruning_method(replace(default, freeze=500), ("en", "nl"), 0.0)
    with pytest.raises(ValueError, match="scope is no argument of method 'asr_pathways'"):
        pruning_method(replace(default, method="asr_pathways", scope="global"), ("en", "nl"), 0.0)
    with pytest.raises(ValueError, match="scope is no setting of source = 'imp'; it takes levels, last, norm"):
        pruning_method(replace(default, method="lsp", scope="global", options={"source": "imp"}), ("en", "nl"), 0.0)
    with pytest.raises(ValueError, match="scope is no argument of method 'imp'"):
        pruning_method(replace(default, method="imp", scope="global"), ("en", "nl"), 0.0)
