"""`sp.recommend`: structure, sanity and errors. How close it comes is printed by benchmarks/prediction.py."""

import importlib
import math

import pytest
import torch
from torch import nn

import sparse_pathways as sp
from sparse_pathways.nn import calibrate
from sparse_pathways.nn.calibrate import TimeModel, dense_kernels, fit
from sparse_pathways.ops import backends

MODULE = importlib.import_module("sparse_pathways.nn.recommend")  # sparse_pathways.nn.recommend is the function


def model_of(*shapes, density=None, pathways=("default",)):
    model = nn.Sequential(*(nn.Linear(k, n) for n, k in shapes))
    if density is not None:
        sp.sparsify_(model, pathways=pathways)
        for layer, (n, k) in zip(model, shapes, strict=True):
            layer.set_mask_(torch.arange(-(-n // 8) * k).view(-1, k) % 100 < 100 * density)
    return model


@pytest.fixture
def known_times(monkeypatch):
    """A machine of 10 us a call, 1 ns a dense weight and 2 ns a kept one, whatever the caches."""
    sparse = TimeModel(((10.0, 2e-3, 0.0, 0.0),) * 3)
    dense = TimeModel(((10.0, 1e-3, 0.0, 0.0),) * 3)
    monkeypatch.setattr(MODULE, "sparse_model", lambda *_: sparse)
    monkeypatch.setattr(MODULE, "dense_model", lambda *_: dense)


def test_a_real_calibration():
    model = model_of((64, 48), (40, 100), density=0.25)
    rng = torch.get_rng_state()
    rows = sp.recommend(model, rows=2)
    assert [row.layer for row in rows] == ["0", "1"]
    for row, layer in zip(rows, model, strict=True):
        assert row.shape == (layer.out_features, layer.in_features)
        assert (row.block, row.dtype, row.rows) == ((8, 1), torch.float32, 2)
        assert row.density == layer.layout().density
        assert row.sparse_kernel == backends.select("cpu", torch.float32, (8, 1))
        assert row.dense_kernel in dense_kernels(torch.float32)
        assert 0 < row.sparse_us < 1e6 and 0 < row.dense_us < 1e6
        assert row.speedup == row.dense_us / row.sparse_us
        assert row.pays == (row.speedup > 1)
        assert row.break_even_sparsity is None or 0 <= row.break_even_sparsity <= 1
    assert torch.equal(torch.get_rng_state(), rng)  # the caller's random numbers are not touched
    again = sp.recommend(model, rows=2)
    assert again == rows  # from the cache: measured again, some digit would differ


def test_time_grows_with_density():
    us = [sp.recommend(model_of((256, 256), density=share), rows=2)[0].sparse_us for share in (0.1, 0.3, 0.6, 1.0)]
    assert us == sorted(us)


def test_break_even_and_verdict(known_times):
    dense = sp.recommend(model_of((256, 256)), rows=1)[0]
    assert (dense.density, dense.pays) == (1.0, False)
    assert dense.break_even_sparsity == pytest.approx(0.51)  # the first whole percent at which it is faster
    below, above = (sp.recommend(model_of((256, 256), density=share), rows=1)[0] for share in (0.6, 0.3))
    assert not below.pays and above.pays
    weights = 256 * 256
    assert above.speedup == pytest.approx((10 + 1e-3 * weights) / (10 + 2e-3 * weights * 0.3), rel=0.02)


def test_never(monkeypatch, known_times):
    monkeypatch.setattr(MODULE, "sparse_model", lambda *_: TimeModel(((1e6, 0.0, 0.0, 0.0),) * 3))
    row = sp.recommend(model_of((256, 256)), rows=1)[0]
    assert row.break_even_sparsity is None
    assert "at no sparsity" in str(row)


def test_kinds_of_layers(known_times):
    model = nn.ModuleDict({"dense": nn.Linear(64, 32), "own": nn.LSTM(8, 8), "sparse": model_of((32, 64), density=0.5)})
    before = sp.recommend(model, rows=4)
    assert [row.layer for row in before] == ["dense", "sparse.0"]
    packed = sp.pack(model)
    assert sp.recommend(packed, rows=4) == before
    assert {row.dtype for row in sp.recommend(packed, rows=4, dtype=torch.bfloat16)} == {torch.bfloat16}
    assert sp.recommend(nn.Linear(8, 8, device="meta"), rows=1)[0].layer == ""


def test_the_text_is_a_table(known_times):
    rows = sp.recommend(model_of((512, 256), (64, 64)), rows=8)
    lines = str(rows).splitlines()
    assert len(lines) == 3
    assert "512 x 256" in lines[1] and "predicted" in lines[0] and "sparsity on" in lines[1]
    assert len({line.index(" 8 ") for line in lines[1:]}) == 1


def test_the_density_is_that_of_the_active_pathway(known_times):
    model = model_of((64, 100), density=0.5, pathways=("en", "fr"))
    model[0].set_mask_(torch.ones(8, 100, dtype=torch.bool), "fr")
    assert [sp.recommend(model, 1)[0].density for model[0].active in ("en", "fr")] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(8, 8), 0), ValueError, "rows = 0; want at least 1"),
        ((nn.Linear(8, 8), 1.5), TypeError, "rows = 1.5; want an int"),
        ((nn.Linear(8, 8), 1, torch.int64), TypeError, "choose one of"),
        ((nn.ReLU(), 1), ValueError, "no linear layers"),
        (("model", 1), TypeError, "want an nn.Module"),
    ],
    ids=["rows", "rows-type", "dtype", "no-layers", "no-model"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sp.recommend(*arguments)


def test_fit_finds_exact_coefficients_and_never_a_negative_one():
    features = [(1.0, w, k, n) for w, k, n in ((10.0, 3.0, 5.0), (40.0, 8.0, 2.0), (25.0, 1.0, 9.0), (90.0, 4.0, 4.0))]
    features.append((1.0, 60.0, 9.0, 1.0))
    times = [2 + 0.5 * w + 0.25 * k for _, w, k, _ in features]
    assert fit(features, times) == pytest.approx((2, 0.5, 0.25, 0), abs=1e-9)
    falling = [100 - w for _, w, _, _ in features]
    assert min(fit(features, falling)) >= 0


def test_between_the_caches_time_grows_with_the_working_set(monkeypatch):
    monkeypatch.setattr(calibrate, "cache_kib", {2: 1024, 3: 32768}.get)
    model = TimeModel(((1.0, 1e-3, 0.0, 0.0), (1.0, 2e-3, 0.0, 0.0), (1.0, 5e-3, 0.0, 0.0)))
    mib = 2**20
    times = [model.us(1000, 8, 8, size * mib) for size in (0.5, 1, 2, 4, 8, 16, 32, 100)]
    assert times == sorted(times)
    assert (times[0], times[1], times[3], times[4], times[6], times[7]) == pytest.approx((2, 2, 3, 3, 6, 6))
    assert math.isclose(times[5], 4.5)


def test_caches_unknown(monkeypatch):
    monkeypatch.setattr(calibrate, "cache_kib", lambda level: None)
    small, middle, large = calibrate.working_sets()
    assert 0 < small < middle < large
    assert TimeModel(((1.0, 0.0, 0.0, 0.0),) * 3).us(1, 1, 1, 1e9) == 1
