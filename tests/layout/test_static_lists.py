"""Index lists of fixed capacity: the same lists, made without asking the device, refused when too short."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_pathways as sp
from sparse_pathways.layout.bcsr import NAMES, rows_of, static_lists

GRIDS = [(1, 1), (7, 5), (1, 40), (40, 1), (33, 70)]


def random_mask(grid, share, seed=0):
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("grid", GRIDS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("spare", [0, 3])
def test_begins_with_the_exact_lists(grid, share, spare):
    mask = random_mask(grid, share)
    count = int(mask.sum())
    capacity = min(max(1, count + spare), mask.numel())
    shape = (grid[0] * 16, grid[1] * 16)
    exact = sp.BlockLayout.from_mask(mask, (16, 16), shape)
    static = sp.BlockLayout.from_mask(mask, (16, 16), shape, capacity)
    assert static.is_static and not exact.is_static
    assert static.num_blocks == exact.num_blocks == count
    assert static.density == capacity / mask.numel()
    assert torch.equal(static.to_mask(), mask)
    for name in NAMES:
        one, other = getattr(static, name), getattr(exact, name)
        assert one.dtype == other.dtype
        assert torch.equal(one[: other.shape[0]].int(), other.int())
        assert one.shape[0] == (capacity if name in ("col", "row_t", "pos_t") else other.shape[0])
    assert torch.equal(exact.rows().int(), mask.nonzero()[:, 0].int())
    assert torch.equal(static.rows()[:count].int(), exact.rows().int())
    assert exact.rows() is exact.rows()


def test_nothing_depends_on_numbers_of_the_device():
    """Under fake tensors an operator that has to look at a number, or at how many there are, raises."""
    with FakeTensorMode():
        mask = torch.ones(6, 9, dtype=torch.bool)
        lists = static_lists(mask, 20)
        assert [tuple(one.shape) for one in lists] == [(7,), (7,), (20,), (10,), (20,), (20,), (20,), (1,)]
        assert rows_of(lists[1], lists[2]).shape == (20,)
        with pytest.raises(Exception, match="nonzero"):
            mask.nonzero()


def test_update_keeps_the_memory():
    grid = (6, 9)
    layout = sp.BlockLayout.from_mask(random_mask(grid, 0.3), (16, 16), (96, 144), capacity=40)
    before = {name: getattr(layout, name).data_ptr() for name in (*NAMES, "row", "needed")}
    mask = random_mask(grid, 0.6, seed=1)
    layout.update_(mask)
    assert {name: getattr(layout, name).data_ptr() for name in before} == before
    assert torch.equal(layout.to_mask(), mask)
    assert layout.num_blocks == int(mask.sum())
    assert torch.equal(layout.rows()[: layout.num_blocks].int(), mask.nonzero()[:, 0].int())


def test_rows_follow_an_exact_update():
    layout = sp.BlockLayout.from_mask(random_mask((6, 9), 0.3), (16, 16), (96, 144))
    layout.rows()
    mask = random_mask((6, 9), 0.3, seed=1)
    layout.update_(mask)
    assert torch.equal(layout.rows().int(), mask.nonzero()[:, 0].int())


def test_more_blocks_than_the_capacity():
    with pytest.raises(RuntimeError, match="more than the 4 blocks"):
        sp.BlockLayout.from_mask(torch.ones(3, 3, dtype=torch.bool), (16, 16), (48, 48), capacity=4)


def test_what_an_overflow_leaves_is_in_bounds_and_said(monkeypatch):
    """On a device the assertion comes late: until then nothing is read out of bounds, and the host is told."""
    monkeypatch.setattr(torch, "_assert_async", lambda *a: None)
    mask = torch.ones(3, 3, dtype=torch.bool)
    layout = sp.BlockLayout.from_mask(mask, (16, 16), (48, 48), capacity=4)
    assert int(layout.crow[-1]) == int(layout.crow_t[-1]) == 4
    assert layout.pos_t.max() < 4 and layout.rows().int().max() < 3
    with pytest.raises(RuntimeError, match="keeps 9 blocks, its layout has capacity = 4"):
        _ = layout.num_blocks


@pytest.mark.parametrize("capacity", [0, -1, 10])
def test_a_capacity_outside_the_grid_is_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity = {capacity}; want 1 to 9"):
        sp.BlockLayout.from_mask(torch.ones(3, 3, dtype=torch.bool), (16, 16), (48, 48), capacity=capacity)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), lambda one: one.to("cpu")]
)
def test_copies_keep_the_capacity(copied):
    layout = sp.BlockLayout.from_mask(random_mask((6, 9), 0.3), (16, 16), (96, 144), capacity=40)
    again = copied(layout)
    assert again.is_static and again.col.shape == (40,)
    assert torch.equal(again.to_mask(), layout.to_mask())
    assert torch.equal(again.rows().int(), layout.rows().int())
