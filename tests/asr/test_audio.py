"""Any usual audio file in, mono 16 kHz out; everything else is one clear line."""

import math

import numpy as np
import pytest
import soundfile
import torch

import sparse_pathways as sp
from sparse_pathways.asr.audio import AudioError, load_audio


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * math.pi * 440 * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_every_rate_gives_the_same_tone(tmp_path, rate, channels):
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.stack([tone(rate)] * channels, 1), rate)
    wave = load_audio(path)
    assert wave.dtype == torch.float32 and wave.dim() == 1 and abs(len(wave) - 8000) <= 1
    inner = slice(400, 7600)  # the resampler's filter runs over the ends
    assert np.abs(wave.numpy()[inner] - tone(16000)[inner]).max() < 5e-3


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([tone(16000), np.zeros(8000)], 1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path).numpy(), tone(16000) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_16"),
        ("a.wav", "PCM_24"),
        ("a.wav", "FLOAT"),
        ("a.wav", "PCM_U8"),
        ("a.flac", None),
        ("a.ogg", None),
    ],
    ids=lambda value: str(value),
)
def test_formats(tmp_path, name, subtype):
    soundfile.write(tmp_path / name, tone(16000), 16000, subtype=subtype)
    wave = load_audio(tmp_path / name).numpy()
    assert len(wave) == 8000
    assert np.corrcoef(wave, tone(16000))[0, 1] > 0.99


def wav_of(samples: np.ndarray, rate: int, path) -> bytes:
    soundfile.write(path, samples, rate, format="WAV", subtype="FLOAT")
    return path.read_bytes()


BAD = {
    "missing": (None, "no such file"),
    "zero_bytes": (b"", "is empty"),
    "no_samples": (lambda path: wav_of(np.zeros(0), 16000, path), "has no samples"),
    "cut_in_header": (lambda path: wav_of(tone(16000), 16000, path)[:20], "cannot be read as audio"),
    "noise_bytes": (bytes(range(256)) * 8, "cannot be read as audio"),
    "text": (b"bonjour\n", "cannot be read as audio"),
    "nan": (lambda path: wav_of(np.array([0.0, np.nan, 0.5]), 16000, path), "1 samples that are NaN or infinite"),
    "infinite": (lambda path: wav_of(np.array([0.0, np.inf, -np.inf]), 16000, path), "2 samples that are NaN"),
    "odd_rate": (lambda path: wav_of(tone(44101), 44101, path), "sample rate of 44101 Hz"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "some.wav"
    if content is not None:
        path.write_bytes(content(tmp_path / "made.wav") if callable(content) else content)
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert isinstance(caught.value, sp.FormatError)


def test_a_folder(tmp_path):
    with pytest.raises(AudioError, match="is a folder"):
        load_audio(tmp_path)
