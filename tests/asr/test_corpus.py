import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import sparse_pathways as sp
from sparse_pathways.asr.corpus import Utterance, read_audio, read_manifest, write_manifest


@pytest.fixture
def utterance(tmp_path):
    path = tmp_path / "audio" / "ramp.wav"
    path.parent.mkdir()
    soundfile.write(path, np.linspace(-0.5, 0.5, 16_000, dtype=np.float32), 16_000, subtype="FLOAT")
    return Utterance(
        id="a", audio=path, offset=0.25, duration=0.5, language="fr", text="l'été", speaker="x", split="test"
    )


def test_manifest_round_trip_after_the_corpus_has_moved(tmp_path, utterance):
    write_manifest(tmp_path / "manifest.jsonl", [utterance])
    moved = tmp_path.parent / "moved"
    shutil.move(tmp_path, moved)
    (found,) = read_manifest(moved)
    assert found.audio == moved / "audio" / "ramp.wav"
    assert (found.text, found.language, found.offset, found.duration) == ("l'été", "fr", 0.25, 0.5)
    assert len(read_audio(found)) == 8_000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: record.pop("text"), "line 2: lacks text"),
        (lambda record: record.update(duration="long"), "line 2: duration = 'long'; want float"),
        (lambda record: record.update(duration=0), "line 2: offset = 0.25, duration = 0"),
        (lambda record: record.update(split="valid"), "line 2: split = 'valid'"),
    ],
    ids=["missing", "type", "duration", "split"],
)
def test_bad_record_is_named_with_its_line(tmp_path, utterance, change, reason):
    path = write_manifest(tmp_path / "manifest.jsonl", [utterance, utterance])
    first, second = path.read_text().splitlines()
    record = json.loads(second)
    change(record)
    path.write_text(first + "\n" + json.dumps(record) + "\n")
    with pytest.raises(sp.FormatError) as error:
        read_manifest(path)
    assert reason in str(error.value)
    assert error.value.path == str(path)


def test_line_that_is_not_json(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("{\n")
    with pytest.raises(sp.FormatError, match="line 1: Expecting property name"):
        read_manifest(tmp_path)


def test_missing_manifest(tmp_path):
    with pytest.raises(sp.FormatError, match="no such manifest"):
        read_manifest(tmp_path / "nowhere")


def test_audio_is_the_part_of_the_file(utterance):
    expected = torch.linspace(-0.5, 0.5, 16_000)[4_000:12_000]
    torch.testing.assert_close(read_audio(utterance), expected)


def test_audio_of_another_rate_is_resampled_and_channels_averaged(tmp_path, utterance):
    time = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(utterance.audio, np.stack([tone, np.zeros_like(tone)], 1), 44_100, subtype="FLOAT")
    wave = read_audio(utterance)
    expected = 0.25 * torch.sin(2 * torch.pi * 440 * (0.25 + torch.arange(8_000) / 16_000))
    assert len(wave) == 8_000
    torch.testing.assert_close(wave[100:-100], expected[100:-100], atol=2e-3, rtol=0)


def test_audio_that_is_missing_short_or_not_audio(utterance):
    soundfile.write(utterance.audio, np.zeros(9_000, dtype=np.float32), 16_000)
    with pytest.raises(sp.FormatError, match=r"ends 0\.19 s before utterance 'a' does"):
        read_audio(utterance)
    utterance.audio.write_bytes(b"nonsense")
    with pytest.raises(sp.FormatError, match="audio of utterance 'a'"):
        read_audio(utterance)
    utterance.audio.unlink()
    with pytest.raises(sp.FormatError, match="audio of utterance 'a'"):
        read_audio(utterance)
