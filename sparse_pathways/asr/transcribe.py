"""Streaming transcription: 16 kHz samples in, text out while they arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

import sparse_pathways as sp
from sparse_pathways.asr import decode
from sparse_pathways.asr.audio import load_audio
from sparse_pathways.asr.checkpoint import load_model
from sparse_pathways.asr.corpus import SAMPLE_RATE
from sparse_pathways.asr.features import FeatureStream, LogMel
from sparse_pathways.asr.model import Recogniser


def pathway_of(model: Recogniser, language: str) -> str | None:
    """Name of the pathway that serves `language`: its own, or the one for all languages; None in a dense model.

    Raises:
        ValueError: the model was not trained on `language` (names the languages it knows), or was loaded without its
            pathway.
    """
    if language not in model.languages:
        known = ", ".join(model.languages)
        raise ValueError(f"language = {language!r} is not known to this model; choose one of {known}")
    if not any(isinstance(module, sp.SparseLinear | sp.PackedLinear) for module in model.modules()):
        return None
    names = sp.pathways(model)
    if language in names:
        return language
    if len(names) > 1 or names[0] in model.languages:
        raise ValueError(f"language = {language!r} has no pathway in this model; it was loaded with {', '.join(names)}")
    return names[0]


def language_pathway(model: Recogniser, language: str) -> AbstractContextManager:
    """Context in which `model` recognises `language`; see `pathway_of`."""
    name = pathway_of(model, language)
    return contextlib.nullcontext() if name is None else sp.pathway(model, name)


class Streamer:
    """One stream of speech through a recogniser.

    The text equals that of decoding the whole recording at once: features, encoder state and decoder state are carried
    from call to call, and segments lie where `Recogniser.encode` has them. Streams of several languages may share a
    model; its active pathway is left at the language that was streamed last.

    Args:
        model: recogniser, dense, masked or packed; set to eval mode.
        language: one of `model.languages`.
        beam: hypotheses kept; 1 decodes greedily.
        max_symbols: tokens per encoder frame at most.

    Raises:
        ValueError: unknown language, or a beam below 1.
    """

    def __init__(
        self, model: Recogniser, language: str, *, beam: int = 1, max_symbols: int = decode.MAX_SYMBOLS
    ) -> None:
        if beam < 1:
            raise ValueError(f"beam = {beam}; want 1 (greedy) or more hypotheses")
        self._pathway = pathway_of(model, language)
        self._layer = None if self._pathway is None else next(iter(sp.sparse_layers(model).values()))
        self._model = model.eval()
        self._features = FeatureStream(LogMel())
        self._frames = torch.zeros(0, model.mean.shape[0])
        self._encoder_state: list[list[Tensor]] | None = None
        self._search: decode.GreedySearch | decode.BeamSearch
        self._choose_pathway()
        if beam == 1:
            self._search = decode.GreedySearch(model, 1, max_symbols)
        else:
            self._search = decode.BeamSearch(model, beam, max_symbols)
        self._shown = 0
        self._finished = False

    def push(self, samples: Tensor) -> str:
        """Take more samples.

        Args:
            samples: `[S]` float, 16 kHz, -1 .. 1; any number of them.

        Returns:
            The text that has become certain by these samples; joined, the parts give `text`.
        """
        if self._finished:
            raise ValueError("this stream is finished; make a new Streamer for the next recording")
        with torch.inference_mode():
            features = self._features.push(samples)
            if len(features):
                self._frames = torch.cat([self._frames, self._model.normalise(features)])
        config = self._model.config
        self._decode((len(self._frames) - config.right_context_frames) // config.segment_frames)
        return self._news()

    def finish(self) -> str:
        """End the recording: decode what waits for look-ahead; returns the last part of the text."""
        if not self._finished:
            self._finished = True
            self._decode(-(-len(self._frames) // self._model.config.segment_frames))
        return self._news()

    @property
    def text(self) -> str:
        """The whole text so far; with a beam, what all hypotheses agree on until `finish`."""
        return self._model.tokenizer.decode(self._search.best if self._finished else self._search.settled)

    def _news(self) -> str:
        text = self.text
        news, self._shown = text[self._shown :], len(text)
        return news

    def _choose_pathway(self) -> None:
        # Another stream may have switched the model. One layer tells: looking at all takes longer than it is worth.
        if self._layer is not None and self._pathway is not None and self._layer.active != self._pathway:
            sp.set_pathway(self._model, self._pathway)

    def _decode(self, segments: int) -> None:
        """Encode and decode the next segments; what is not there yet of their frames never comes and is zero."""
        if segments <= 0:
            return
        segment = self._model.config.segment_frames
        size = segment + self._model.config.right_context_frames
        self._choose_pathway()
        with torch.inference_mode():
            for _ in range(segments):
                chunk = self._frames[:size]
                chunk = torch.nn.functional.pad(chunk, (0, 0, 0, size - len(chunk)))
                self._frames = self._frames[segment:]
                enc, lengths, self._encoder_state = self._model.rnnt.transcribe_streaming(
                    chunk[None], torch.tensor([size]), self._encoder_state
                )
                self._search.advance(enc, lengths)


def transcribe_file(
    model: Recogniser, path: str | Path, language: str, *, beam: int = 1, chunk_s: float = 0.16
) -> Iterator[str]:
    """Stream an audio file through the recogniser, in pieces of `chunk_s` seconds as a microphone would give them.

    Yields:
        Parts of the text, as soon as they are certain; joined they are the transcript.

    Raises:
        AudioError: the file cannot be used.
        ValueError: unknown language.
    """
    wave = load_audio(path)
    streamer = Streamer(model, language, beam=beam)
    for samples in wave.split(max(1, round(chunk_s * SAMPLE_RATE))):
        yield streamer.push(samples)
    yield streamer.finish()


def open_model(path: str | Path, language: str | None = None) -> Recogniser:
    """Load a recogniser in eval mode from a packed file, or from a run folder or model.pt of `train` or `prune`.

    Args:
        path: file or folder.
        language: of a packed model keep only what serves this language, which is smaller and a little faster.

    Raises:
        sp.FormatError: missing, truncated or foreign file, or a packed model that is no recogniser.
        ValueError: the packed model was not trained on `language`.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".pt":
        return load_model(path).eval()
    model = sp.load_packed(path)
    if not isinstance(model, Recogniser):
        raise sp.FormatError(path, f"holds a packed {type(model).__name__}, want a streaming recogniser")
    if language is not None and (name := pathway_of(model, language)) is not None:
        sp.load_packed(path, model, pathways=(name,))
    return model


def packed_copy(model: Recogniser) -> Recogniser:
    """Pack a pruned recogniser for inference: kept blocks only, without the CTC head that only training needs.

    Raises:
        ValueError: the model has no masks, or is packed already.
    """
    packed = sp.pack(model)
    packed.ctc = None
    return packed.eval()
