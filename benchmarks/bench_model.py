"""One streaming chunk through an encoder of emformer_rnnt_base's size (fewer layers): dense against packed at 70 %.

A chunk is 4 encoder frames and 1 frame of right context, 160 ms of audio after the time reduction by 4; one stream.
Dense layers stay nn.Linear ("F.linear") or hold oneDNN's packed weight ("oneDNN"). Masks are random.
"""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import baselines
import pytest
import torch
from comparison import Suite
from torch import Tensor, nn
from torchaudio.models import Emformer

import sparse_pathways as sp

LAYERS = 4  # of emformer_rnnt_base's 20: 50 MB of dense weights, beyond L2 like the whole model
DIM, HEADS, FFN, SEGMENT, RIGHT_CONTEXT, LEFT_CONTEXT = 512, 8, 2048, 4, 1, 30
SPARSITY = 0.7
TURNS = 9
PACKED = "packed 70 %"


class Chunk(NamedTuple):
    """Input of one call of `Emformer.infer` in the middle of a stream."""

    frames: Tensor
    lengths: Tensor
    states: list[list[Tensor]]

    def through(self, model: nn.Module) -> Tensor:
        """The encoder frames that `model` gives; `infer` changes the lists of the states, so it gets copies."""
        return model.infer(self.frames, self.lengths, [list(state) for state in self.states])[0]


def _linears_to_sparse_with_random_masks_(model: nn.Module) -> None:
    sp.sparsify_(model)
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, sp.SparseLinear):
            scores = torch.rand(module.masks["default"].shape, generator=rng)
            module.set_mask_(sp.topk_mask(scores, SPARSITY))


@functools.cache
def contenders() -> dict[str, nn.Module]:
    """The encoder in every form, and "masked", the dense weights with zeros that the packed form must reproduce."""
    torch.manual_seed(0)
    dense = Emformer(
        DIM, HEADS, FFN, LAYERS, SEGMENT, left_context_length=LEFT_CONTEXT, right_context_length=RIGHT_CONTEXT
    )
    dense.eval().requires_grad_(False)
    models = {"F.linear": dense}
    if torch.backends.mkldnn.is_available():
        models["oneDNN"] = baselines.prepack_(copy.deepcopy(dense), rows=SEGMENT + RIGHT_CONTEXT)
    sparse = copy.deepcopy(dense)
    _linears_to_sparse_with_random_masks_(sparse)
    models["masked"] = _baked(sparse)
    models[PACKED] = sp.pack_(sparse)
    return models


def _baked(sparse: nn.Module) -> nn.Module:
    """A copy with nn.Linears that hold zeros where the mask prunes."""
    model = copy.deepcopy(sparse)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, sp.SparseLinear):
                setattr(module, name, child.to_linear())
    return model


@functools.cache
def chunk(states_of: str) -> Chunk:
    """The chunk after a second of other chunks, with the states which the model `states_of` has then."""
    rng = torch.Generator().manual_seed(1)
    lengths = torch.tensor([SEGMENT + RIGHT_CONTEXT])
    states = None
    for _ in range(LEFT_CONTEXT // SEGMENT + 1):
        frames = torch.randn(1, SEGMENT + RIGHT_CONTEXT, DIM, generator=rng)
        _, _, states = contenders()[states_of].infer(frames, lengths, states)
    return Chunk(frames, lengths, states)


def _check(contender: str) -> None:
    """float32 rounding through four layers; the reference is another form of the same weights."""
    reference = "masked" if contender == PACKED else "F.linear"
    given = chunk(reference)
    expected, answer = given.through(contenders()[reference]), given.through(contenders()[contender])
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contender", ["F.linear", "oneDNN", PACKED] * TURNS)
def bench_streaming_chunk(take_turn: Callable[..., None], request, contender):
    if request.config.getoption("--cold"):
        pytest.skip("--cold is for single layers; this model is larger than L2 anyway")
    if contender not in contenders():
        pytest.skip(f"this build of torch has no {contender}")
    _check(contender)
    model, given = contenders()[contender], chunk("F.linear")
    take_turn(
        lambda: given.through(model),
        suite=Suite("encoder", "Emformer.infer on one chunk of 160 ms, float32, block 8x1", "model"),
        group=f"{LAYERS} layers of 512/2048",
        contender=contender,
        dense=contender != PACKED,
    )
