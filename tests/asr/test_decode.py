"""Greedy decoding against a plain frame-by-frame loop; beam search in pieces."""

import pytest
import torch

from sparse_pathways.asr import decode
from sparse_pathways.asr.features import LogMel


@pytest.fixture(scope="module")
def encoded(recogniser, sound):
    """Three utterances of different lengths: `[3, T, D]` and lengths."""
    features = [LogMel()(sound(seconds, seed)) for seed, seconds in enumerate((3.1, 1.0, 2.2))]
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    with torch.inference_mode():
        return recogniser.encode(padded, torch.tensor([len(f) for f in features]))


@torch.inference_mode()
def frame_by_frame(model, enc, length, max_symbols):
    """The textbook loop, one utterance, one frame and one token at a time."""
    one, tokens = torch.ones(1, dtype=torch.int32), []
    predicted, _, state = model.rnnt.predict(torch.tensor([[model.blank]]), one, None)
    for frame in range(int(length)):
        for _ in range(max_symbols):
            logits, _, _ = model.rnnt.join(enc[None, frame : frame + 1], one, predicted, one)
            token = int(logits.argmax())
            if token == model.blank:
                break
            tokens.append(token)
            predicted, _, state = model.rnnt.predict(torch.tensor([[token]]), one, state)
    return tokens


@pytest.mark.parametrize("max_symbols", [1, 2, 6])
def test_greedy_equals_frame_by_frame(recogniser, encoded, max_symbols):
    enc, lengths = encoded
    expected = [frame_by_frame(recogniser, row, n, max_symbols) for row, n in zip(enc, lengths, strict=True)]
    assert decode.greedy(recogniser, enc, lengths, max_symbols) == expected
    assert all(0 < len(tokens) < max_symbols * int(n) for tokens, n in zip(expected, lengths, strict=True))
    assert len({tuple(tokens) for tokens in expected}) == 3  # the utterances differ, so a mix-up would show


@pytest.mark.parametrize("piece", [1, 3, 8, 17])
def test_greedy_in_pieces_equals_the_whole(recogniser, encoded, piece):
    enc, lengths = encoded
    search = decode.GreedySearch(recogniser, len(enc))
    for begin in range(0, enc.shape[1], piece):
        frames = enc[:, begin : begin + piece]
        search.advance(frames, (lengths - begin).clamp(0, frames.shape[1]))
    assert search.tokens == decode.greedy(recogniser, enc, lengths)


def test_a_model_that_never_falls_silent_is_stopped(recogniser, encoded):
    enc, lengths = encoded
    bias = recogniser.rnnt.joiner.linear.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[recogniser.blank] = -1e9
    try:
        tokens = decode.greedy(recogniser, enc, lengths, max_symbols=3)
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert [len(row) for row in tokens] == [3 * int(n) for n in lengths]


def test_no_frames_no_tokens(recogniser, encoded):
    enc, _ = encoded
    assert decode.greedy(recogniser, enc[:, :0], torch.zeros(3, dtype=torch.int64)) == [[], [], []]
    assert decode.greedy(recogniser, enc, torch.zeros(3, dtype=torch.int64)) == [[], [], []]


def test_beam_in_pieces_equals_the_whole(recogniser, encoded):
    enc, _ = encoded
    whole, pieces = decode.BeamSearch(recogniser, 4), decode.BeamSearch(recogniser, 4)
    length = torch.tensor([enc.shape[1]])
    whole.advance(enc[:1], length)
    settled = []
    for begin in range(0, enc.shape[1], 4):
        frames = enc[:1, begin : begin + 4]
        pieces.advance(frames, torch.tensor([frames.shape[1]]))
        assert pieces.settled[: len(settled)] == settled  # what is settled is never taken back
        settled = pieces.settled
    assert pieces.best == whole.best and whole.best[: len(settled)] == settled


def test_beam_ignores_padding(recogniser, encoded):
    enc, lengths = encoded
    padded, cut = decode.BeamSearch(recogniser, 2), decode.BeamSearch(recogniser, 2)
    padded.advance(enc[1:2], lengths[1:2])
    cut.advance(enc[1:2, : int(lengths[1])], lengths[1:2])
    assert padded.best == cut.best and int(lengths[1]) < enc.shape[1]


def test_a_beam_of_one_is_refused(recogniser):
    with pytest.raises(ValueError, match="width = 1"):
        decode.BeamSearch(recogniser, 1)
