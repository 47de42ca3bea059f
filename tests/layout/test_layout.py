import copy
import pickle

import pytest
import torch

import sparse_pathways as sp

CASES = [((40, 12), (8, 1)), ((37, 29), (8, 1)), ((37, 29), (4, 4)), ((33, 50), (16, 16)), ((5, 3), (8, 4))]


def random_mask(shape, block, rng, density=0.4):
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    mask = torch.rand(grid, generator=rng) < density
    mask[0] = False  # an empty block row
    mask[-1] = True  # a dense one
    return mask


@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
def test_index_lists_equal_a_loop(shape, block, rng):
    mask = random_mask(shape, block, rng)
    layout = sp.BlockLayout.from_mask(mask, block, shape)
    kept = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask[i, j]]
    rows = [i for i in range(mask.shape[0]) for _ in range(int(layout.crow[i]), int(layout.crow[i + 1]))]
    assert list(zip(rows, layout.col.tolist(), strict=True)) == kept
    turned = sorted(kept, key=lambda block: (block[1], block[0]))
    columns = [j for j in range(mask.shape[1]) for _ in range(int(layout.crow_t[j]), int(layout.crow_t[j + 1]))]
    assert list(zip(layout.row_t.tolist(), columns, strict=True)) == turned
    assert [kept[i] for i in layout.pos_t.tolist()] == turned
    assert layout.num_blocks == len(kept)
    assert layout.density == pytest.approx(len(kept) / mask.numel())
    assert torch.equal(layout.to_mask(), mask)


def test_ids_are_16_bit_where_they_fit():
    assert (
        sp.BlockLayout.from_mask(torch.ones(1, 65536, dtype=torch.bool), (8, 1), (8, 65536)).col.dtype == torch.uint16
    )
    wide = sp.BlockLayout.from_mask(torch.ones(1, 65537, dtype=torch.bool), (8, 1), (8, 65537))
    assert wide.col.dtype == torch.int32 and int(wide.col[-1]) == 65536


@pytest.mark.parametrize("same_count", [True, False])
def test_update_in_place_keeps_memory_when_counts_are_equal(same_count, rng):
    mask = torch.rand(5, 7, generator=rng) < 0.5
    other = mask.flip(0).flip(1) if same_count else ~mask & (torch.rand(5, 7, generator=rng) < 0.5)
    layout = sp.BlockLayout.from_mask(mask, (8, 1), (40, 7))
    before = layout.col
    assert layout.update_(other) is layout
    assert torch.equal(layout.to_mask(), other)
    assert (layout.col is before) == same_count


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_layouts_and_packed_weights_can_be_copied(clone, rng):
    mask = torch.rand(5, 7, generator=rng) < 0.5
    assert torch.equal(clone(sp.BlockLayout.from_mask(mask, (8, 1), (40, 7))).to_mask(), mask)
    packed = sp.PackedWeight.pack(torch.randn(40, 7, generator=rng), {"a": mask, "b": ~mask})
    assert torch.equal(clone(packed).unpack("b"), packed.unpack("b"))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(5, 6, dtype=torch.bool), ValueError, r"needs the grid \(5, 7\)"),
        (torch.ones(5, 7), TypeError, "want torch.bool"),
        (torch.ones(35, dtype=torch.bool), ValueError, "want two dimensions"),
    ],
    ids=["grid", "dtype", "flat"],
)
def test_bad_masks_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        sp.BlockLayout.from_mask(mask, (8, 1), (40, 7))
    with pytest.raises(error, match=message):
        sp.PackedWeight.pack(torch.zeros(40, 7), mask)


@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_unpack_gives_the_masked_weight_of_each_pathway(shape, block, dtype, rng):
    weight = torch.randn(shape, generator=rng)
    masks = {name: random_mask(shape, block, rng) for name in ("en", "fr")}
    packed = sp.PackedWeight.pack(weight, masks, block, dtype)
    assert packed.dtype == dtype and packed.pathways == ("en", "fr") and packed.shape == shape
    union = masks["en"] | masks["fr"]
    for name, mask in [*masks.items(), (None, union)]:
        expected = torch.where(sp.expand_mask(mask, block, shape), weight, 0).to(dtype)
        assert torch.equal(packed.unpack(name), expected)
        assert packed.density(name) == pytest.approx(float(mask.double().mean()))
        assert torch.equal(packed.mask(name), mask)
    alone = packed.select("fr")
    assert torch.equal(alone.unpack(), packed.unpack("fr")) and alone.nbytes < packed.nbytes


def test_int8_is_within_half_a_step_per_output(rng):
    weight = torch.randn(37, 29, generator=rng) * torch.logspace(-3, 3, 37)[:, None]
    mask = random_mask((37, 29), (8, 1), rng)
    packed = sp.PackedWeight.pack(weight, mask, dtype=torch.int8)
    dense = torch.where(sp.expand_mask(mask, (8, 1), (37, 29)), weight, 0)
    step = dense.abs().amax(1, keepdim=True) / 127
    assert ((packed.unpack() - dense).abs() <= step * 0.5001).all()


def test_packing_refuses_what_it_cannot_hold():
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sp.PackedWeight.pack(torch.full((8, 4), float("nan")), mask, dtype=torch.int8)
    with pytest.raises(TypeError, match="float weight"):
        sp.PackedWeight.pack(torch.zeros(8, 4, dtype=torch.int32), mask)
    with pytest.raises(TypeError, match="dtype = torch"):
        sp.PackedWeight.pack(torch.zeros(8, 4), mask, dtype=torch.int32)
    with pytest.raises(KeyError, match="pathway = 'de' is not known; choose one of default"):
        sp.PackedWeight.pack(torch.zeros(8, 4), mask).index("de")


def test_nbytes_counts_values_and_indices():
    packed = sp.PackedWeight.pack(torch.zeros(16, 4), torch.ones(2, 4, dtype=torch.bool))
    assert packed.nbytes == 16 * 4 * 4 + 3 * 4 + 8 * 2
