import dataclasses
import random
import re

import numpy as np
import pytest
import soundfile
import torch

from sparse_pathways.asr.config import LANGUAGES, CorpusConfig
from sparse_pathways.asr.corpus import read_audio, read_manifest
from sparse_pathways.asr.synthetic import add_noise, sentence, sentences, split_of, synthesise
from sparse_pathways.asr.text import normalise

SMALL = CorpusConfig(languages=("fr", "it"), train=3, dev=1, test=2, workers=1)
MANY = CorpusConfig(languages=("fr", "it"), train=50, dev=1, test=1, workers=1)  # more than one process speaks at once


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_corpus_whatever_the_number_of_workers(tmp_path):
    synthesise(MANY, tmp_path / "one", progress=False)
    synthesise(dataclasses.replace(MANY, workers=2), tmp_path / "two", progress=False)
    synthesise(dataclasses.replace(MANY, seed=1), tmp_path / "other", progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert files(tmp_path / "one") != files(tmp_path / "other")


def test_manifest_describes_the_files(tmp_path):
    utterances = read_manifest(synthesise(SMALL, tmp_path, progress=False))
    assert len(utterances) == 2 * (3 + 1 + 2)
    for utterance in utterances:
        info = soundfile.info(utterance.audio)
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC")
        assert info.duration == utterance.duration
        assert 0.5 < utterance.duration < 8
        assert utterance.split in utterance.id and utterance.language in utterance.id


def test_test_voices_are_not_heard_in_training(tmp_path):
    config = dataclasses.replace(SMALL, train=12, test=6)
    utterances = read_manifest(synthesise(config, tmp_path, progress=False))
    voices = {split: {u.speaker for u in utterances if u.split == split} for split in ("train", "dev", "test")}
    assert not voices["test"] & (voices["train"] | voices["dev"])
    assert {voice.rpartition("-")[2] for voice in voices["test"]} <= {"m7", "f4"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_belong_to_one_split_and_are_in_normal_form(language):
    rng = random.Random(5)
    drawn = {split: {sentence(language, split, rng) for _ in range(2000)} for split in ("train", "dev", "test")}
    assert not drawn["train"] & drawn["test"] and not drawn["train"] & drawn["dev"] and not drawn["dev"] & drawn["test"]
    for text in set.union(*drawn.values()):
        assert normalise(text, language) == text
    training_words = {word for text in drawn["train"] for word in text.split()}
    assert {word for text in drawn["test"] for word in text.split()} <= training_words


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_slot_has_words_and_every_word_a_slot(language):
    grammar = sentences()[language]
    slots = {slot for template in grammar["templates"] for slot in re.findall(r"\{(\w+)\}", template)}
    assert slots == grammar["words"].keys()


def test_one_sentence_in_ten_is_for_test():
    splits = [split_of(f"sentence number {index}") for index in range(4000)]
    assert abs(splits.count("test") / 4000 - 0.1) < 0.02
    assert abs(splits.count("dev") / 4000 - 0.05) < 0.02


@pytest.mark.parametrize("ratio_db", [0.0, 20.0, 40.0])
def test_noise_has_the_ratio_asked_for(ratio_db):
    rng = np.random.default_rng(0)
    speech = np.sin(np.arange(20_001) / 10).astype(np.float32)
    noise = add_noise(speech, ratio_db, rng).astype(np.float64) - speech
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(ratio_db, abs=0.05)


def test_language_without_sentences(tmp_path):
    with pytest.raises(ValueError, match="no sentences for xx; want some of en, fr, it, nl"):
        synthesise(dataclasses.replace(SMALL, languages=("en", "xx")), tmp_path, progress=False)


def test_voice_espeak_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"train_voices: espeak-ng has no variant nobody; it has .*f1.*m1"):
        synthesise(dataclasses.replace(SMALL, train_voices=("nobody",)), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"train": 0}, r"CorpusConfig\.train = 0; want at least 1"),
        ({"test_voices": ("m1",)}, "test_voices shares m1"),
        ({"rate": (200, 100)}, r"CorpusConfig\.rate = \(200, 100\)"),
        ({"languages": ("en", "en")}, r"CorpusConfig\.languages"),
        ({"dev_voices": ()}, r"CorpusConfig\.dev_voices is empty"),
    ],
    ids=["count", "voices", "range", "languages", "no-voices"],
)
def test_config_refuses(fields, reason):
    with pytest.raises(ValueError, match=reason):
        CorpusConfig(**fields)


def test_telephone_speech_has_nothing_above_4_khz(tmp_path):
    config = CorpusConfig(languages=("fr",), train=2, dev=1, test=1, workers=1, telephone=0.99, noise_db=(40.0, 40.0))
    for utterance in read_manifest(synthesise(config, tmp_path, progress=False)):
        power = torch.fft.rfft(read_audio(utterance)).abs().square()
        above = power[len(power) * 9 // 16 :].sum()  # from 4.5 kHz on: what the filters and 16 bits leave
        assert above < 1e-3 * power.sum()
