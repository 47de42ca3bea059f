"""A user's audio files to samples: any usual rate, any number of channels, in; mono float32 at 16 kHz out.

Everything that can be wrong with a file is found here and reported as one `AudioError`, so that features and decoder
only ever see finite samples.
"""

import math
from pathlib import Path

import soundfile
import torch
from torch import Tensor

import sparse_pathways as sp
from sparse_pathways.asr.corpus import SAMPLE_RATE, resampler

MAX_RATE_TERM = 4_000
"""Largest term of the reduced ratio rate / 16000: the resampler's kernel grows with the product of both terms."""


class AudioError(sp.FormatError):
    """An audio file that cannot be used; one line with the path and the reason."""


def load_audio(path: str | Path) -> Tensor:
    """Read one audio file as mono samples at 16 kHz.

    Args:
        path: file that libsndfile reads (wav, flac, ogg, opus, mp3), any sample rate and number of channels.

    Returns:
        `[S]` float32, channels averaged, resampled to 16 kHz; full scale is -1 .. 1.

    Raises:
        AudioError: missing, a folder, empty, not audio, cut off in its header, without samples, with NaN or infinite
            samples, or at a sample rate that has no small ratio to 16 kHz.
    """
    path = Path(path)
    if path.is_dir():
        raise AudioError(path, "is a folder, want an audio file")
    if not path.exists():
        raise AudioError(path, "no such file")
    if path.stat().st_size == 0:
        raise AudioError(path, "is empty (0 bytes)")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        reason = str(error).split(": ", 1)[-1].strip().rstrip(".")
        raise AudioError(path, f"cannot be read as audio ({reason})") from error
    if len(samples) == 0:
        raise AudioError(path, "has no samples")
    wave = torch.from_numpy(samples).mean(dim=1)
    if not torch.isfinite(wave).all():
        raise AudioError(path, f"has {int((~torch.isfinite(wave)).sum())} samples that are NaN or infinite")
    if rate == SAMPLE_RATE:
        return wave
    if max(rate, SAMPLE_RATE) // math.gcd(rate, SAMPLE_RATE) > MAX_RATE_TERM:
        raise AudioError(
            path, f"has a sample rate of {rate} Hz; convert it to a usual one (8000, 16000, 44100, …) first"
        )
    return resampler(rate)(wave)
