import pytest

from sparse_pathways.asr.config import TrainConfig


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


def test_learning_rate_rises_holds_and_falls(tmp_path):
    config = TrainConfig(data=tmp_path, out=tmp_path, steps=1000, lr=1.0, warmup=100, hold=0.5, final_lr=0.1)
    rates = [config.learning_rate(step) for step in (0, 49, 99, 300, 500, 750, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.5, 0.1])
