"""Search for the most likely tokens: batched greedy RNN-T decoding, and beam search for one stream.

Greedy decoding is exact frame-by-frame decoding (at every encoder frame emit tokens until blank wins or `max_symbols`
are out), arranged to ask the joiner about several frames at once: as long as blank wins, the predictor does not move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchaudio.models import RNNTBeamSearch

if TYPE_CHECKING:
    from sparse_pathways.asr.model import Recogniser

MAX_SYMBOLS = 6
"""Tokens per encoder frame at most: an over-pruned or untrained model never falls silent by itself."""

_WINDOW = 8
"""Encoder frames shown to the joiner at once."""


class GreedySearch:
    """Greedy decoding of a batch whose encoder frames may come in pieces.

    Args:
        model: recogniser in eval mode, its pathway chosen (now and whenever frames come).
        batch: rows decoded side by side.
        max_symbols: tokens per encoder frame at most.

    Attributes:
        tokens: per row the token ids so far, without blanks.
    """

    def __init__(self, model: Recogniser, batch: int, max_symbols: int = MAX_SYMBOLS) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self._model = model
        self._max_symbols = max_symbols
        device = model.mean.device
        blank = torch.full((batch, 1), model.blank, device=device)  # blank is also the start symbol
        with torch.inference_mode():
            self._predicted, _, self._memory = model.rnnt.predict(blank, _ones(batch, device), None)

    @torch.inference_mode()
    def advance(self, enc: Tensor, lengths: Tensor) -> None:
        """Decode further encoder frames `[B, T, D]`, of which `lengths [B]` are valid."""
        frames = enc.shape[1]
        rows = torch.arange(enc.shape[0], device=enc.device)
        position = torch.zeros_like(rows)  # frame each row is at
        emitted = torch.zeros_like(rows)  # tokens it has emitted there
        while True:
            times = position[:, None] + torch.arange(min(_WINDOW, frames), device=enc.device)
            inside = times < lengths[:, None]
            if not inside.any():
                return
            best = self._join(enc[rows[:, None], times.clamp(max=frames - 1)]).argmax(-1)
            speaks = (best != self._model.blank) & inside
            found, first = speaks.any(1), speaks.int().argmax(1)
            position = torch.where(found, position + first, times[:, -1] + 1)
            emitted = torch.where(found, torch.where(first == 0, emitted, 0) + 1, 0)
            if found.any():
                self._emit(best.gather(1, first[:, None]), found)
            full = emitted >= self._max_symbols
            position, emitted = position + full, torch.where(full, 0, emitted)

    @property
    def best(self) -> list[int]:
        """Tokens of the first row."""
        return self.tokens[0]

    settled = best  # greedy decoding never takes a token back

    def _join(self, window: Tensor) -> Tensor:
        """Token scores `[B, W, V]` of a window of encoder frames after each row's last token."""
        ones = _ones(window.shape[0], window.device)
        logits, _, _ = self._model.rnnt.join(window, ones * window.shape[1], self._predicted, ones)
        return logits[:, :, 0]

    def _emit(self, token: Tensor, found: Tensor) -> None:
        """Append `token [B, 1]` to the rows in `found` and move their predictor one step."""
        index = found.nonzero()[:, 0]
        chosen = token[index]
        for row, value in zip(index.tolist(), chosen[:, 0].tolist(), strict=True):
            self.tokens[row].append(value)
        memory = [[part[index] for part in layer] for layer in self._memory]
        predicted, _, memory = self._model.rnnt.predict(chosen, _ones(len(index), token.device), memory)
        self._predicted = self._predicted.index_copy(0, index, predicted)
        self._memory = [
            [old.index_copy(0, index, new) for old, new in zip(before, after, strict=True)]
            for before, after in zip(self._memory, memory, strict=True)
        ]


def greedy(model: Recogniser, enc: Tensor, lengths: Tensor, max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:
    """Decode a batch greedily.

    Args:
        model: recogniser in eval mode, its pathway chosen.
        enc: `[B, T, D]` encoder output.
        lengths: `[B]` valid frames.
        max_symbols: tokens per frame at most.

    Returns:
        Per row the token ids, without blanks.
    """
    search = GreedySearch(model, enc.shape[0], max_symbols)
    search.advance(enc, lengths)
    return search.tokens


def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, dtype=torch.int32, device=device)


class BeamSearch:
    """Streaming beam search over one utterance (`torchaudio.models.RNNTBeamSearch`).

    Args:
        model: recogniser in eval mode, its pathway chosen.
        width: hypotheses kept, at least 2 (use greedy decoding for 1).
        max_symbols: tokens per frame at most.
    """

    def __init__(self, model: Recogniser, width: int, max_symbols: int = MAX_SYMBOLS) -> None:
        if width < 2:
            raise ValueError(f"width = {width}: a beam search keeps 2 hypotheses or more; decode greedily for 1")
        self._search = RNNTBeamSearch(_Encoded(model), model.blank, step_max_tokens=max_symbols)
        self._width = width
        self._hypotheses: list | None = None

    @torch.inference_mode()
    def advance(self, enc: Tensor, lengths: Tensor) -> None:
        """Search on through further encoder frames `[1, T, D]`, of which `lengths [1]` are valid."""
        enc = enc[:, : int(lengths[0])]
        self._hypotheses, _ = self._search.infer(enc, lengths, self._width, None, self._hypotheses)

    @property
    def best(self) -> list[int]:
        """Tokens of the best hypothesis."""
        return [] if self._hypotheses is None else self._hypotheses[0][0][1:]

    @property
    def settled(self) -> list[int]:
        """Tokens all hypotheses agree on: later audio can only add to them."""
        if self._hypotheses is None:
            return []
        shared = []
        for column in zip(*(hypothesis[0][1:] for hypothesis in self._hypotheses), strict=False):
            if len(set(column)) > 1:
                break
            shared.append(column[0])
        return shared


class _Encoded:
    """What `RNNTBeamSearch` needs of an RNN-T, for frames that the encoder has already seen."""

    def __init__(self, model: Recogniser) -> None:
        self.predict = model.rnnt.predict
        self.join = model.rnnt.join

    def transcribe_streaming(self, enc: Tensor, length: Tensor, state: None) -> tuple[Tensor, Tensor, None]:
        """Pass encoder frames through."""
        return enc, length, state
