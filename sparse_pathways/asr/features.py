"""The front end: 80 log-mel energies every 10 ms, the same offline and while streaming.

torchaudio's Emformer recipe with one change: windows are not centred (no reflected samples at the edges), so a stream
that carries its last samples over gives exactly the frames of the whole recording.
"""

import warnings

import torch
import torchaudio
from torch import Tensor, nn

from .corpus import SAMPLE_RATE

WINDOW = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
MELS = 80
FLOOR = 100.0


def frame_count(samples: int) -> int:
    """Frames that `samples` samples give."""
    return max((samples - WINDOW) // HOP + 1, 0)


class LogMel(nn.Module):
    """Waveform to log-mel energies.

    The waveform is scaled to the range of 16-bit integers. Energies below FLOOR, about what rounding to 16 bits leaves,
    count as FLOOR: digital silence, the empty upper band of telephone speech and a quiet room then look alike.
    """

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # 80 triangles over 201 frequencies: the lowest one falls between two of them and stays empty, by design
            warnings.filterwarnings("ignore", "At least one mel filterbank has all zero values")
            self.mel = torchaudio.transforms.MelSpectrogram(
                SAMPLE_RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MELS, center=False
            )

    def forward(self, wave: Tensor) -> Tensor:
        """`wave [..., S]` in [-1, 1] at 16 kHz -> `[..., T, 80]`, T = (S - 400) // 160 + 1, or 0 if S < 400."""
        if wave.shape[-1] < WINDOW:
            return wave.new_zeros(*wave.shape[:-1], 0, MELS)
        return self.mel(wave * 32767).transpose(-1, -2).clamp_min(FLOOR).log()


class FeatureStream:
    """The features of one recording that arrives in pieces."""

    def __init__(self, log_mel: LogMel) -> None:
        self._log_mel = log_mel
        self._carried = torch.zeros(0)

    def push(self, samples: Tensor) -> Tensor:
        """Take the next samples `[s]`, any number; returns the frames that are now complete, `[t, 80]`."""
        wave = torch.cat([self._carried.to(samples), samples])
        frames = frame_count(len(wave))
        self._carried = wave[frames * HOP :].clone()
        return self._log_mel(wave[: (frames - 1) * HOP + WINDOW if frames else 0])
