"""Lists of many masks, rebuilt in place. The CUDA kernel is proven in tests/cuda; here, what it is given."""

import ctypes

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.layout.bcsr import NAMES, reference_lists, rows_of
from sparse_pathways.ops import static

GRIDS, BLOCKS = [(6, 9), (1, 40), (33, 5)], [(16, 16), (8, 1), (4, 2)]
SHAPES = [(n * r, k * c) for (n, k), (r, c) in zip(GRIDS, BLOCKS, strict=True)]


def masks_of(share, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(grid, generator=draw) < share for grid in GRIDS]


def assert_lists(layouts, masks):
    for layout, mask, block, shape in zip(layouts, masks, BLOCKS, SHAPES, strict=True):
        exact = sp.BlockLayout.from_mask(mask, block, shape)
        count = exact.num_blocks
        assert layout.num_blocks == count and layout.is_static and torch.equal(layout.to_mask(), mask)
        for name in NAMES:
            one, other = getattr(layout, name), getattr(exact, name)
            assert one.dtype == other.dtype and torch.equal(one[: other.numel()].int(), other.int()), name
        assert torch.equal(layout.rows()[:count].int(), exact.rows().int())


def at(address, count, dtype):
    """The memory that an address of the table names."""
    size = count * dtype.itemsize
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8).view(dtype)


class Kernel:
    """What csrc/cuda/lists.cu does with its arguments, on the CPU."""

    def lists_jobs(self, rows, cols):
        return 2 * (max(1, -(-rows // 8)) + max(1, -(-cols // 32)))

    def lists_work(self, rows, cols):
        return 2 + rows + cols + rows * max(1, -(-cols // 32))

    def mask_lists(self, table, first, ticket, jobs):
        assert first[-1] == jobs and first.numel() == len(table) + 1 and ticket.tolist() == [0, 0]
        for mask, rows, cols, capacity, bits, crow, col, row, crow_t, row_t, pos_t, state, work in table.tolist():
            kept = at(mask, rows * cols, torch.bool).view(rows, cols)
            state, work = at(state, 3, torch.int32), at(work, self.lists_work(rows, cols), torch.int32)
            assert not work.any()
            count = int(kept.sum())
            fits = count <= capacity
            found = reference_lists(kept if fits else torch.zeros_like(kept))
            for address, size, values in (
                (bits, found[0].numel(), reference_lists(kept)[0]),
                (crow, rows + 1, found[1]),
                (col, count * fits, found[2]),
                (crow_t, cols + 1, found[3]),
                (row_t, count * fits, found[4]),
                (pos_t, count * fits, found[5]),
                (row, count * fits, rows_of(found[1], found[2])),
            ):
                if size:
                    at(address, size, values.dtype).copy_(values)
            state.copy_(torch.tensor([count, not fits, state[2] + 1]))


@pytest.fixture
def kernel(monkeypatch):
    """As if the masks were on a device with the compiled kernel."""
    one = Kernel()

    class Ops:
        class sparse_pathways:
            class lists_jobs:
                default = staticmethod(one.lists_jobs)

            class lists_work:
                default = staticmethod(one.lists_work)

            class mask_lists:
                default = staticmethod(one.mask_lists)

    class Torch:
        ops = Ops

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(static, "torch", Torch())
    monkeypatch.setattr(static, "_launches", lambda device: True)


@pytest.mark.parametrize("way", ["one by one", "one launch"])
def test_lists_follow_masks_that_change_in_place(way, request):
    if way == "one launch":
        request.getfixturevalue("kernel")
    masks = masks_of(0.3)
    layouts = sp.StaticLayouts(masks, BLOCKS, SHAPES, [mask.numel() for mask in masks])
    assert layouts.one_launch == (way == "one launch")
    assert_lists(layouts.layouts, masks)
    layouts.check(builds=1)
    places = [getattr(layout, name).data_ptr() for layout in layouts.layouts for name in (*NAMES, "row", "needed")]
    for mask, other in zip(masks, masks_of(0.6, seed=1), strict=True):
        mask.copy_(other)
    with pytest.raises(RuntimeError, match=r"the lists of masks\[0\] were built 1 times; want 2"):
        layouts.check(builds=2)
    layouts.build()
    layouts.check(builds=2)
    assert_lists(layouts.layouts, masks)
    assert places == [getattr(one, name).data_ptr() for one in layouts.layouts for name in (*NAMES, "row", "needed")]


@pytest.mark.parametrize("way", ["one by one", "one launch"])
def test_a_mask_beyond_its_capacity_is_named(way, request):
    if way == "one launch":
        request.getfixturevalue("kernel")
    masks = masks_of(0.3)
    capacities = [mask.numel() for mask in masks]
    capacities[1] = int(masks[1].sum())
    layouts = sp.StaticLayouts(masks, BLOCKS, SHAPES, capacities)
    masks[1].fill_(True)
    with pytest.raises(RuntimeError, match=r"capacity|keeps more than"):
        layouts.build()
        layouts.check()
    if way == "one launch":
        assert not layouts.layouts[1].crow.any()  # nothing reads past the end
        with pytest.raises(RuntimeError, match="keeps 40 blocks"):
            _ = layouts.layouts[1].num_blocks
    masks[1].fill_(False)
    layouts.build()
    layouts.check()
    assert_lists(layouts.layouts, masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(masks=[]), "masks is empty"),
        (dict(blocks=BLOCKS[:2]), r"blocks has 2 entries for 3 masks"),
        (dict(capacities=[0, 1, 1]), r"capacities\[0\] = 0; want 1 to 54"),
        (dict(masks=[torch.ones(9, 6, dtype=torch.bool).T, *masks_of(0.3)[1:]]), r"masks\[0\]: want contiguous masks"),
    ],
    ids=["empty", "lengths", "capacity", "strides"],
)
def test_bad_arguments_are_named(change, message):
    masks = masks_of(0.3)
    given = {"masks": masks, "blocks": BLOCKS, "shapes": SHAPES, "capacities": [mask.numel() for mask in masks]}
    with pytest.raises(ValueError, match=message):
        sp.StaticLayouts(**(given | change))


def test_training_goes_on_with_the_rebuilt_lists():
    torch.manual_seed(0)
    masks = masks_of(0.4)
    layouts = sp.StaticLayouts(masks[:1], BLOCKS[:1], SHAPES[:1], [masks[0].numel()])
    weight, x = torch.randn(SHAPES[0], requires_grad=True), torch.randn(5, SHAPES[0][1])
    for seed in (1, 2):
        masks[0].copy_(masks_of(0.4, seed)[0])
        layouts.build()
        y = sp.masked_linear(x, weight, layouts.layouts[0])
        torch.testing.assert_close(y, x @ (weight * sp.expand_mask(masks[0], BLOCKS[0], SHAPES[0])).T)
