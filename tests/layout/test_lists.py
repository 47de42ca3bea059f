"""Index lists and the choice of blocks: the compiled operators give what their PyTorch references give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_pathways as sp
from sparse_pathways.layout.bcsr import NAMES, reference_lists
from sparse_pathways.mask import pack_bits, unpack_bits
from sparse_pathways.mask.select import reference_topk

SIDES = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 64, 65, 130])
SHARES = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
SEEDS = st.integers(0, 2**32 - 1)


def random_mask(blocks: int, columns: int, share: float, seed: int) -> Tensor:
    return torch.rand(blocks, columns, generator=torch.Generator().manual_seed(seed)) < share


def assert_lists(layout: sp.BlockLayout, mask: Tensor) -> None:
    for name, expected in zip(NAMES, reference_lists(mask), strict=True):
        got = getattr(layout, name)
        assert got.dtype == expected.dtype, name
        assert torch.equal(got, expected), name


def layout_of(mask: Tensor) -> sp.BlockLayout:
    return sp.BlockLayout.from_mask(mask, (8, 1), (8 * mask.shape[0], mask.shape[1]))


@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES, SHARES, SEEDS)
def test_lists_of_a_mask(blocks, columns, share, seed):
    mask = random_mask(blocks, columns, share, seed)
    layout = layout_of(mask)
    assert_lists(layout, mask)
    assert torch.equal(layout.to_mask(), mask)


@settings(deadline=None, max_examples=300)
@given(SIDES, SIDES, SHARES, SHARES, SEEDS)
def test_updated_lists_are_those_of_the_new_mask(blocks, columns, share, changed, seed):
    mask = random_mask(blocks, columns, share, seed)
    other = mask ^ random_mask(blocks, columns, changed, seed + 1)
    layout = layout_of(mask)
    assert_lists(layout.updated(other), other)
    assert_lists(layout, mask)  # untouched
    memory = {name: getattr(layout, name) for name in NAMES}
    assert layout.update_(other) is layout
    assert_lists(layout, other)
    for name in NAMES:
        same_length = memory[name].shape == reference_lists(other)[NAMES.index(name)].shape
        assert (getattr(layout, name) is memory[name]) == same_length


@pytest.mark.parametrize("shape", [(65536, 2), (65537, 2), (2, 65536), (2, 65537)], ids=str)
def test_more_blocks_than_16_bits_count(shape, rng):
    mask = torch.rand(shape, generator=rng) < 0.1
    layout = layout_of(mask)
    assert_lists(layout, mask)
    other = mask.clone()
    other[-1, -1] = ~other[-1, -1]
    assert_lists(layout.updated(other), other)


def test_strided_masks(rng):
    mask = torch.rand(20, 9, generator=rng) < 0.5
    assert_lists(layout_of(mask.T), mask.T)
    assert_lists(layout_of(mask).updated(~mask.T.contiguous().T), ~mask)


@settings(deadline=None, max_examples=200)
@given(st.lists(SIDES, min_size=1, max_size=2), SEEDS)
def test_bits_and_back(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (*shape[:-1], -(-shape[-1] // 8))
    for place in mask.nonzero().tolist():
        assert bits[(*place[:-1], place[-1] // 8)] >> place[-1] % 8 & 1
    assert torch.equal(unpack_bits(bits, shape[-1]), mask)


SCORES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(deadline=None, max_examples=300)
@given(scores=st.lists(SCORES, min_size=2, max_size=80), data=st.data())
def test_chosen_blocks(dtype, scores, data):
    scores = torch.tensor(scores, dtype=dtype)
    keep = data.draw(st.integers(1, scores.numel() - 1))
    kept = torch.ops.sparse_pathways.topk_blocks(scores, keep)
    order = sorted(range(scores.numel()), key=lambda i: (-scores[i].item(), i))
    assert kept.nonzero().flatten().tolist() == sorted(order[:keep])
    assert torch.equal(kept, reference_topk(scores, keep))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_chosen_blocks_of_a_layer(dtype, ties, rng):
    scores = torch.randn(64, 512, generator=rng).abs().to(dtype)
    scores = (scores * 4).round() if ties else scores
    for sparsity in (0.001, 0.5, 0.7, 0.999):
        mask = sp.topk_mask(scores, sparsity)
        assert torch.equal(mask.flatten(), reference_topk(scores.float().flatten(), int(mask.sum())))
        assert int(mask.sum()) == round((1 - sparsity) * scores.numel())
