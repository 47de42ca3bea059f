"""Streaming gives the text of the whole recording, in every form of the model and for every size of the pieces."""

import copy

import pytest
import soundfile
import torch

import sparse_pathways as sp
from sparse_pathways.asr import decode
from sparse_pathways.asr.features import LogMel
from sparse_pathways.asr.transcribe import Streamer, language_pathway, open_model, packed_copy, transcribe_file


@torch.inference_mode()
def offline(model, wave, language):
    """Decode the whole recording at once."""
    features = LogMel()(wave)
    with language_pathway(model, language):
        enc, lengths = model.encode(features[None], torch.tensor([len(features)]))
        return model.tokenizer.decode(decode.greedy(model, enc, lengths)[0])


def stream(streamer, wave, piece):
    parts = [streamer.push(samples) for samples in wave.split(piece)]
    return [*parts, streamer.finish()]


# segments are 16 frames = 2560 samples, look-ahead 8 frames, windows 400 samples
LENGTHS = {
    "one_frame": 400,
    "in_first_segment": 2100,
    "segments_and_look_ahead": 4080,
    "whole_segments": 7920,
    "long": 47_111,
}


@pytest.mark.parametrize("samples", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("piece", [1600, 5000, 100_000])
def test_streaming_equals_offline(form, sound, samples, piece):
    wave = sound(3.0, seed=5)[:samples]
    streamer = Streamer(form, "fr")
    parts = stream(streamer, wave, piece)
    assert "".join(parts) == streamer.text == offline(form, wave, "fr")


def test_text_comes_while_it_streams(recogniser, sound):
    wave = sound(4.0, seed=6)
    parts = stream(Streamer(recogniser, "en"), wave, 1600)
    assert sum(bool(part) for part in parts) > 3
    assert len(set("".join(parts))) > 3  # real text, not one letter over and over


def test_one_sample_at_a_time(recogniser, sound):
    wave = sound(0.3, seed=7)
    assert "".join(stream(Streamer(recogniser, "en"), wave, 1)) == offline(recogniser, wave, "en")


def test_nothing_heard_nothing_said(recogniser):
    assert stream(Streamer(recogniser, "en"), torch.zeros(399), 100) == [""] * 5


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_streams_of_two_languages_share_a_model(kind, pruned, packed, sound):
    model = {"masked": pruned, "packed": packed}[kind]
    wave = sound(3.0, seed=8)
    english, french = Streamer(model, "en"), Streamer(model, "fr")
    for samples in wave.split(2000):
        english.push(samples)
        french.push(samples)
    english.finish()
    french.finish()
    assert english.text == offline(model, wave, "en")
    assert french.text == offline(model, wave, "fr")
    assert english.text != french.text  # the pathways differ


@pytest.mark.parametrize("beam", [2, 4])
def test_beam_parts_join_to_the_text(recogniser, sound, beam):
    streamer = Streamer(recogniser, "en", beam=beam)
    parts = stream(streamer, sound(2.0, seed=9), 1600)
    assert "".join(parts) == streamer.text != ""


def test_a_shared_mask_serves_every_language(recogniser, sound):
    shared = sp.sparsify_(copy.deepcopy(recogniser), pathways=("all",))
    wave = sound(1.0, seed=10)
    assert offline(shared, wave, "en") == offline(shared, wave, "fr") == offline(recogniser, wave, "fr")


def test_wrong_use(recogniser):
    with pytest.raises(ValueError, match="language = 'de' is not known to this model; choose one of en, fr"):
        Streamer(recogniser, "de")
    with pytest.raises(ValueError, match="beam = 0"):
        Streamer(recogniser, "en", beam=0)
    streamer = Streamer(recogniser, "en")
    streamer.finish()
    with pytest.raises(ValueError, match="finished"):
        streamer.push(torch.zeros(10))


def test_file_at_another_rate(recogniser, sound, tmp_path):
    path = tmp_path / "some.wav"
    soundfile.write(path, sound(2.0, seed=11).numpy(), 22050)
    parts = list(transcribe_file(recogniser, path, "en"))
    assert len(parts) > 5 and "".join(parts)


def test_packed_file_opens_and_says_the_same(pruned, packed_file, sound):
    opened = open_model(packed_file)
    wave = sound(2.0, seed=12)
    assert opened.languages == pruned.languages and opened.ctc is None
    assert offline(opened, wave, "fr") == offline(pruned, wave, "fr")


def test_opened_for_one_language(packed_file, sound):
    whole, french = open_model(packed_file), open_model(packed_file, "fr")
    wave = sound(2.0, seed=12)
    assert sp.pathways(french) == ("fr",) and sp.pathways(whole) == ("en", "fr")
    assert offline(french, wave, "fr") == offline(whole, wave, "fr")
    with pytest.raises(ValueError, match="language = 'en' has no pathway in this model; it was loaded with fr"):
        Streamer(french, "en")  # not by the mask of another language
    with pytest.raises(ValueError, match="choose one of en, fr"):
        open_model(packed_file, "de")


def test_packed_copy_leaves_the_model_alone(pruned):
    keys = list(pruned.state_dict())
    twin = packed_copy(pruned)
    assert twin.ctc is None and pruned.ctc is not None and list(pruned.state_dict()) == keys


def test_a_packed_model_of_something_else(tmp_path):
    path = tmp_path / "other.safetensors"
    sp.save_packed(sp.pack_(sp.sparsify_(torch.nn.Sequential(torch.nn.Linear(8, 8)))), path)
    with pytest.raises(sp.FormatError, match=r"other\.safetensors"):
        open_model(path)
