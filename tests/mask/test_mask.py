import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import sparse_pathways as sp
from sparse_pathways.mask import Constant, Cubic, Milestones, block_dots, global_masks, nm_mask, pack_bits, unpack_bits
from sparse_pathways.mask.score import reference_dots


def slow_scores(weight, block, norm):
    """Oracle: one block after the other."""
    (n, k), (r, c) = weight.shape, block
    rows = []
    for i in range(0, n, r):
        tiles = [weight[i : i + r, j : j + c].double() for j in range(0, k, c)]
        rows.append([float(t.abs().sum() if norm == "l1" else t.square().sum().sqrt()) for t in tiles])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(16, 5), (17, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("block", [(8, 1), (4, 4), (16, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_scores_equal_a_loop_over_blocks(shape, block, norm, rng):
    weight = torch.randn(shape, generator=rng)
    torch.testing.assert_close(sp.block_scores(weight, block, norm), slow_scores(weight, block, norm).float())


@pytest.mark.parametrize("shape", [(1, 1), (17, 7), (16, 40), (600, 300)], ids=str)
@pytest.mark.parametrize("block", [(8, 1), (4, 4), (3, 5), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dots_equal_a_loop_over_blocks(shape, block, dtype, rng):
    a, e = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    (n, k), (r, c) = shape, block
    product = a.double() * e.double()
    tiles = [[product[i : i + r, j : j + c].sum() for j in range(0, k, c)] for i in range(0, n, r)]
    expected = torch.tensor(tiles).float()
    for found in (block_dots(a, e, block), block_dots(a.T.contiguous().T, e, block), reference_dots(a, e, r, c)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * (r * c) ** 0.5)


def test_dots_of_huge_blocks_lose_nothing():
    ones = torch.ones(1 << 15, 1 << 10)
    assert float(block_dots(ones, ones, (1 << 62, 1 << 62))) == 1 << 25
    assert block_dots(ones, ones, (1 << 15, 1))[0].tolist() == [1 << 15] * (1 << 10)


def test_dots_of_unlike_matrices_are_refused():
    with pytest.raises(ValueError, match=r"a is \(8, 4\), e is \(4, 8\); want the same shape"):
        block_dots(torch.ones(8, 4), torch.ones(4, 8))


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    sparsity=st.floats(0, 1),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_topk_keeps_the_exact_count_and_the_best_with_ties_to_the_lower_index(rows, cols, sparsity, levels, seed):
    scores = torch.randint(levels, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    keep = round((1 - sparsity) * rows * cols)
    order = sorted(range(rows * cols), key=lambda i: (-float(scores.flatten()[i]), i))
    expected = torch.zeros(rows * cols, dtype=torch.bool)
    expected[order[:keep]] = True
    assert torch.equal(sp.topk_mask(scores, sparsity), expected.view(rows, cols))


def test_topk_of_infinite_scores_keeps_them():
    mask = sp.topk_mask(torch.tensor([[1.0, float("inf"), -float("inf"), 2.0]]), 0.5)
    assert mask.tolist() == [[False, True, False, True]]


def test_topk_refuses_nan_and_names_the_block():
    with pytest.raises(ValueError, match=r"scores\[1, 2\] is NaN"):
        sp.topk_mask(torch.tensor([[1.0, 2, 3], [4, 5, float("nan")]]), 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, 70])
def test_topk_refuses_a_sparsity_that_is_no_share(sparsity):
    with pytest.raises(ValueError, match="not 70"):
        sp.topk_mask(torch.zeros(2, 2), sparsity)


def test_expand_mask_covers_edge_blocks():
    mask = torch.tensor([[True, False], [False, True]])
    expected = torch.zeros(5, 3, dtype=torch.bool)
    expected[:4, :2] = True
    expected[4:, 2:] = True
    assert torch.equal(sp.expand_mask(mask, (4, 2), (5, 3)), expected)


@given(st.lists(st.booleans(), max_size=40))
def test_bits_round_trip(flags):
    flags = torch.tensor(flags, dtype=torch.bool)
    bits = pack_bits(flags)
    assert bits.shape == (-(-len(flags) // 8),)
    assert torch.equal(unpack_bits(bits, len(flags)), flags)


def test_cubic_schedule_is_monotone_and_exact_at_its_ends():
    schedule = Cubic(0.2, 0.9, begin=10, end=50)
    levels = [schedule(step) for step in range(80)]
    assert levels[:11] == [0.2] * 11 and levels[50:] == [0.9] * 30
    assert all(a <= b for a, b in itertools.pairwise(levels))
    assert schedule(30) == pytest.approx(0.9 - 0.7 / 8)


def test_other_schedules():
    assert Constant(0.3)(99) == 0.3
    stairs = Milestones(((5, 0.2), (10, 0.7)))
    assert [stairs(step) for step in (0, 4, 5, 9, 10, 99)] == [0.0, 0.0, 0.2, 0.2, 0.7, 0.7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(70), "Constant.sparsity = 70"),
        (lambda: Cubic(0.0, 0.7, begin=50, end=10), "Cubic.begin = 50, end = 10"),
        (lambda: Milestones(((5, 0.2), (5, 0.7))), "rising steps"),
        (lambda: Milestones(()), "empty"),
    ],
    ids=["constant", "cubic", "steps", "empty"],
)
def test_bad_schedules_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("block", [(0, 1), (8, -1)], ids=str)
def test_bad_blocks_are_refused(block):
    with pytest.raises(ValueError, match="block = "):
        sp.block_scores(torch.zeros(8, 8), block)


def test_nm_mask_keeps_the_highest_of_every_group():
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0, -1.0, 7.0]])
    mask = nm_mask(scores, 2, 4)
    assert mask.int().tolist() == [[1, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]]  # ties: the lower index
    assert nm_mask(scores, 1, 4).int().tolist() == [[0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="keep = 3 of group = 2"):
        nm_mask(scores, 3, 2)
    with pytest.raises(ValueError, match="NaN"):
        nm_mask(scores * torch.nan, 1, 2)


def test_global_masks_rank_all_layers_together():
    scores = [torch.tensor([[9.0, 8.0], [1.0, 2.0]]), torch.tensor([[7.0, 3.0, 0.5, 0.1]])]
    masks = global_masks(scores, 0.5)
    assert [mask.int().flatten().tolist() for mask in masks] == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert [int(mask.sum()) for mask in global_masks(scores, 0.75)] == [2, 0]
    assert [int(mask.sum()) for mask in global_masks(scores, 0.75, floor=1.0)] == [1, 1]
    low = [one - 100 for one in scores]  # scores below zero are scores
    assert [mask.tolist() for mask in global_masks(low, 0.5)] == [mask.tolist() for mask in masks]
    with pytest.raises(ValueError, match="floor = 2"):
        global_masks(scores, 0.5, floor=2)
    with pytest.raises(ValueError, match="scores is empty"):
        global_masks([], 0.5)
