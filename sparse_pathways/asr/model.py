"""The recogniser: torchaudio's Emformer RNN-T, its tokenizer and feature statistics, and a CTC head for training."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.models import emformer_rnnt_model

from .config import ModelConfig
from .features import MELS
from .text import Tokenizer

ARCHITECTURE = "streaming_rnnt"


class Recogniser(nn.Module):
    """A streaming multilingual RNN-T.

    Args:
        config: Sizes; `vocab` must be that of the tokenizer.
        tokenizer: Sentence pieces shared by all languages. The blank is symbol `tokenizer.size`, the last one.
        languages: Languages the model is meant for.
        with_ctc: Have the CTC head, which training needs and recognition does not.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, languages: Sequence[str], with_ctc: bool = True
    ) -> None:
        super().__init__()
        if config.vocab != tokenizer.size:
            raise ValueError(f"config.vocab = {config.vocab}, but the tokenizer has {tokenizer.size} pieces")
        self.config = config
        self.tokenizer = tokenizer
        self.languages = tuple(languages)
        self.blank = tokenizer.size
        self.rnnt = emformer_rnnt_model(
            input_dim=MELS,
            encoding_dim=config.encoding,
            num_symbols=tokenizer.size + 1,
            segment_length=config.segment_frames,
            right_context_length=config.right_context_frames,
            time_reduction_input_dim=config.d_model // config.stride,
            time_reduction_stride=config.stride,
            transformer_num_heads=config.heads,
            transformer_ffn_dim=config.ffn,
            transformer_num_layers=config.layers,
            transformer_dropout=config.dropout,
            transformer_activation="gelu",
            transformer_left_context_length=config.left_context,
            transformer_max_memory_size=0,
            transformer_weight_init_scale_strategy="depthwise",
            transformer_tanh_on_mem=True,
            symbol_embedding_dim=config.embedding,
            num_lstm_layers=config.lstm_layers,
            lstm_layer_norm=True,
            lstm_layer_norm_epsilon=1e-3,
            lstm_dropout=config.predictor_dropout,
        )
        self.ctc = nn.Linear(config.encoding, tokenizer.size + 1) if with_ctc else None
        self.register_buffer("mean", torch.zeros(MELS))
        self.register_buffer("inv_std", torch.ones(MELS))

    mean: Tensor
    inv_std: Tensor

    def normalise(self, feats: Tensor) -> Tensor:
        """Log-mel features `[..., 80]` to mean 0 and deviation 1 per bin, by the statistics of the training data."""
        return (feats - self.mean) * self.inv_std

    def encode(self, feats: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole utterances.

        Every utterance is filled with zeros (mean frames) up to whole segments and followed by one right context of
        zeros. A stream sees the same, so its result, that of the utterance alone and that in a batch are one.

        Args:
            feats: `[B, T, 80]`, not normalised; frames past an utterance's length may hold anything.
            lengths: `[B]`, frames of each utterance, at most T.

        Returns:
            Encodings `[B, T', encoding]` and their lengths `[B]`, in encoder frames of whole segments.
        """
        if feats.dim() != 3 or feats.shape[2] != MELS or lengths.shape != feats.shape[:1]:
            raise ValueError(f"feats {tuple(feats.shape)}, lengths {tuple(lengths.shape)}; want [B, T, {MELS}] and [B]")
        if bool((lengths > feats.shape[1]).any()):
            raise ValueError(f"lengths reach {int(lengths.max())}, but feats has {feats.shape[1]} frames")
        lengths = lengths.to(feats.device)
        segment = self.config.segment_frames
        whole = ((lengths + segment - 1) // segment).clamp_min(1) * segment
        inside = torch.arange(feats.shape[1], device=feats.device) < lengths[:, None]
        normal = torch.where(inside[:, :, None], self.normalise(feats), 0.0)
        total = int(whole.max()) + self.config.right_context_frames
        padded = functional.pad(normal, (0, 0, 0, total - feats.shape[1]))  # a negative pad cuts unused frames off
        return self.rnnt.transcribe(padded, whole)

    def forward(
        self, feats: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, ctc_only: bool = False
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """What the losses need.

        Args:
            feats: `[B, T, 80]` as in `encode`, with `lengths [B]`.
            targets: `[B, U]` pieces, with `target_lengths [B]`.
            ctc_only: Leave predictor and joiner out.

        Returns:
            Joiner logits `[B, T', U + 1, V]` (None if `ctc_only`), CTC logits `[B, T', V]`, encoder lengths `[B]`.
        """
        if self.ctc is None:
            raise RuntimeError("this recogniser was made without its CTC head and cannot be trained")
        encodings, encoded_lengths = self.encode(feats, lengths)
        ctc = self.ctc(encodings)
        if ctc_only:
            return None, ctc, encoded_lengths
        history = functional.pad(targets, (1, 0), value=self.blank)
        predictions, _, _ = self.rnnt.predict(history, target_lengths + 1, None)
        logits, _, _ = self.rnnt.join(encodings, encoded_lengths, predictions, target_lengths + 1)
        return logits, ctc, encoded_lengths

    @property
    def packed_config(self) -> dict[str, Any]:
        """All that `build` needs, as plain JSON data; stored in every file of the model."""
        return {
            "architecture": ARCHITECTURE,
            "model": asdict(self.config),
            "languages": list(self.languages),
            "tokenizer": base64.b64encode(self.tokenizer.to_bytes()).decode(),
            "ctc": self.ctc is not None,
        }


def build(config: dict[str, Any]) -> Recogniser:
    """An untrained recogniser from its `packed_config`.

    Raises:
        ValueError: the configuration is not one of this architecture.
    """
    try:
        if config["architecture"] != ARCHITECTURE:
            raise ValueError(f"architecture = {config['architecture']!r}; want {ARCHITECTURE!r}")
        tokenizer = Tokenizer.from_bytes(base64.b64decode(config["tokenizer"], validate=True))
        return Recogniser(ModelConfig(**config["model"]), tokenizer, config["languages"], config["ctc"])
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"not the configuration of a recogniser: {error!r}") from error


def new(config: ModelConfig, tokenizer: Tokenizer, languages: Sequence[str]) -> Recogniser:
    """An untrained recogniser for a tokenizer, whatever number of pieces that came out with."""
    return Recogniser(replace(config, vocab=tokenizer.size), tokenizer, languages)


def prunable(module: nn.Module, name: str) -> bool:
    """Which layers get masks: the linear layers of the Emformer (attention, feed-forward) and of the predictor's LSTM.

    Embedding and joiner belong to single symbols, hence to languages, and stay dense; so does what is small.
    """
    return isinstance(module, nn.Linear) and name.startswith(
        ("rnnt.transcriber.transformer.", "rnnt.predictor.lstm_layers.")
    )
