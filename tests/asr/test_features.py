import pytest
import torch
import torchaudio

from sparse_pathways.asr.features import FeatureStream, LogMel


def reference(wave):
    """The definition, frame by frame, in float64: Hann window, power spectrum, HTK mel triangles, floor, log."""
    filters = torchaudio.functional.melscale_fbanks(201, 0.0, 8000.0, 80, 16_000).double()
    window = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(400, dtype=torch.float64) / 400)
    frames = []
    for start in range(0, len(wave) - 400 + 1, 160):
        power = torch.fft.rfft(wave[start : start + 400].double() * 32767 * window).abs() ** 2
        energy = power @ filters
        frames.append(energy.clamp_min(100.0).log())
    return torch.stack(frames)


@pytest.fixture
def wave(rng):
    return 0.1 * torch.randn(16_123, generator=rng) * torch.linspace(0, 1, 16_123)


def test_equals_the_definition(wave):
    torch.testing.assert_close(LogMel()(wave).double(), reference(wave), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)])
def test_number_of_frames(samples, frames):
    assert LogMel()(torch.zeros(2, samples)).shape == (2, frames, 80)


def test_digital_silence_and_rounding_noise_look_alike():
    rounding = torch.randint(-1, 2, (1600,), generator=torch.Generator().manual_seed(0)) / 2 / 32768
    quiet = LogMel()(torch.zeros(1600))
    assert (quiet == quiet[0, 0]).all()
    assert (LogMel()(rounding) - quiet).abs().mean() < 0.2


@pytest.mark.parametrize("sizes", [[1], [159], [160], [400], [5000], [0, 7, 4000, 333]], ids=str)
def test_stream_equals_whole_recording(wave, sizes):
    log_mel = LogMel()
    stream = FeatureStream(log_mel)
    pieces, start, turn = [], 0, 0
    wave = wave[:3000] if sizes == [1] else wave
    while start < len(wave):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(wave[start : start + size]))
        start, turn = start + size, turn + 1
    torch.testing.assert_close(torch.cat(pieces), log_mel(wave), atol=1e-4, rtol=0)
