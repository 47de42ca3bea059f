import pytest
import torch
from torch import nn

import sparse_pathways as sp


def test_shares_by_hand():
    model = sp.sparsify_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), (2, 1), ("a", "b"))
    model[0].set_mask_(torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool(), "a")
    model[0].set_mask_(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool(), "b")
    report = sp.mask_report(model)
    assert report["0"] == {
        "density": {"a": 0.25, "b": 0.25},
        "overlap": pytest.approx(1 / 3),
        "union": 3 / 8,
        "core": 1 / 8,
        "dead_rows": 0.5,
    }
    assert report["total"]["density"] == {"a": 6 / 12, "b": 6 / 12}
    assert report["total"]["overlap"] == pytest.approx(5 / 7)
    assert (report["total"]["union"], report["total"]["core"]) == (7 / 12, 5 / 12)
    assert report["total"]["dead_rows"] == 1 / 3
    assert sp.mask_report(sp.pack(model)) == report
    assert sp.mask_report(model, ("a",))["0"]["overlap"] == 1.0
    for name in ("a", "b"):
        assert report["total"]["density"][name] == sp.density(model, name)["total"]
    with pytest.raises(KeyError, match="'x' is not known"):
        sp.mask_report(model, ("x",))
