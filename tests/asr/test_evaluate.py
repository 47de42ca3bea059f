"""Word error rates, agreement, choice of utterances, latency and operator profile on a tiny model."""

import os

import pytest
import torch

from sparse_pathways.asr import evaluate as ev
from sparse_pathways.asr.features import LogMel
from sparse_pathways.ops import library


@pytest.fixture(scope="module")
def examples(sound):
    made = []
    for number in range(6):
        wave = sound(0.6 + 0.35 * ((number * 5) % 6), seed=20 + number)
        made.append(ev.Example("en" if number % 2 else "fr", "a b c d", wave, LogMel()(wave)))
    return made


def test_batches_give_the_text_of_the_stream(form, examples):
    results = ev.evaluate(form, examples, batch=2)
    assert list(results) == ["fr", "en"]
    for language, result in results.items():
        own = [example for example in examples if example.language == language]
        assert result["hypotheses"] == [ev.stream(form, example)[0] for example in own]
        assert result["utterances"] == 3 and result["words"] == 12
    assert len({text for result in results.values() for text in result["hypotheses"]}) > 3


def test_word_errors_are_counted(recogniser, examples):
    said = ev.evaluate(recogniser, examples)["en"]["hypotheses"]
    own = [example for example in examples if example.language == "en"]
    exact = [ev.Example("en", text, e.wave, e.features) for text, e in zip(said, own, strict=True)]
    assert ev.evaluate(recogniser, exact)["en"]["wer"] == 0
    longer = [ev.Example("en", e.reference + " zzz zzz", e.wave, e.features) for e in exact]
    result = ev.evaluate(recogniser, longer)["en"]
    words = sum(len(text.split()) for text in said) + 6
    assert (result["errors"], result["deletions"], result["words"]) == (6, 6, words)
    assert result["wer"] == pytest.approx(6 / words)


def test_average_counts_languages_alike():
    assert ev.average_wer({"en": {"wer": 0.1, "words": 1000}, "nl": {"wer": 0.3, "words": 10}}) == pytest.approx(0.2)


def test_agreement():
    first = {"en": {"hypotheses": ["a", "b"]}, "fr": {"hypotheses": ["c", ""]}}
    second = {"en": {"hypotheses": ["a", "x"]}, "fr": {"hypotheses": ["c", ""]}}
    assert ev.agreement(first, second) == 0.75
    with pytest.raises(ValueError, match="same languages"):
        ev.agreement(first, {"en": first["en"]})


def test_masked_and_packed_agree(pruned, packed, examples):
    assert ev.agreement(ev.evaluate(pruned, examples), ev.evaluate(packed, examples)) == 1.0


def test_unknown_language_is_named(recogniser, examples):
    foreign = [ev.Example("de", "a", examples[0].wave, examples[0].features)]
    with pytest.raises(ValueError, match="language = 'de'"):
        ev.evaluate(recogniser, foreign)


def test_selection_spreads_over_lengths(examples):
    chosen = ev.select_per_language(examples, 1)
    assert [example.language for example in chosen] == ["fr", "en"]
    for one in chosen:  # the middle one of three
        lengths = sorted(len(example.wave) for example in examples if example.language == one.language)
        assert len(one.wave) == lengths[1]
    assert len(ev.select_per_language(examples, 99)) == len(examples)


def test_pinned_thread_is_undone():
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with pytest.raises(KeyError), ev.pinned_thread() as how:
        assert torch.get_num_threads() == 1 and len(os.sched_getaffinity(0)) == 1 and "pinned to core" in how
        raise KeyError
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


def test_latency_covers_every_contender(recogniser, pruned, packed, examples):
    models = {"dense": recogniser, "masked": pruned, "packed": packed}
    figures, pinned = ev.latency(models, examples[:2], repeats=2)
    assert list(figures) == list(models) and "one thread" in pinned
    assert all(0 < one["p10"] <= one["median"] <= one["p90"] for one in figures.values())


def test_profile_finds_the_packed_product(packed, recogniser, examples):
    example = examples[0]
    segments = -(-len(example.features) // 16)
    found = ev.operator_profile(packed, [example])
    assert found["operator"] == "sparse_pathways::*"
    assert found["calls"] >= segments * 2 * 5  # two layers of five products each, besides the predictor's
    assert 0 < found["share"] < 1 and len(found["top"]) >= 6
    if library.MISSING is None:  # a first utterance comes before the recording: by then everything is prepared
        ours = {name for name, _, _ in found["top"] if name.startswith("sparse_pathways::")}
        assert ours == {"sparse_pathways::packed_linear", "sparse_pathways::packed_lstm"}
    dense = ev.operator_profile(recogniser, [example])
    assert (dense["calls"], dense["share"]) == (0, 0)


def test_dense_bytes_leave_the_training_head_out(recogniser, packed):
    numbers = sum(p.numel() for p in recogniser.parameters())
    assert ev.dense_bytes(recogniser) == 4 * (numbers - sum(p.numel() for p in recogniser.ctc.parameters()))
