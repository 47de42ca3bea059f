import os
import shutil

import numpy as np
import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.asr.batches import Corpus, Sampler, spec_augment
from sparse_pathways.asr.corpus import read_audio, read_manifest, write_manifest
from sparse_pathways.asr.features import LogMel
from sparse_pathways.asr.text import Tokenizer


@pytest.fixture
def corpus(tiny_corpus):
    return Corpus(tiny_corpus, "train", progress=False)


@pytest.fixture
def tokenizer(corpus):
    return Tokenizer.train(corpus.texts(), 60)


def test_features_are_those_of_the_audio(corpus):
    for index in (0, len(corpus.utterances) - 1):
        expected = LogMel()(read_audio(corpus.utterances[index]))
        torch.testing.assert_close(corpus.features[index], expected, atol=0.02, rtol=0)
        assert corpus.features.lengths[index] == len(expected)


def test_statistics_make_mean_0_and_deviation_1(corpus):
    mean, inv_std = corpus.features.statistics()
    frames = (torch.cat([corpus.features[i] for i in range(len(corpus.utterances))]) - mean) * inv_std
    torch.testing.assert_close(frames.mean(0), torch.zeros(80), atol=1e-3, rtol=0)
    assert (frames.std(0) - 1).abs().max() < 0.02


def test_features_are_computed_once_per_manifest(tiny_corpus, tmp_path):
    folder = shutil.copytree(tiny_corpus, tmp_path / "copy")
    Corpus(folder, "dev", progress=False)
    (made,) = folder.glob("features-dev-*.f16")
    os.utime(made, (1, 1))
    Corpus(folder, "dev", progress=False)
    assert made.stat().st_mtime == 1
    write_manifest(folder / "manifest.jsonl", read_manifest(folder)[:-1])  # another corpus now
    Corpus(folder, "dev", progress=False)
    assert len(list(folder.glob("features-dev-*.f16"))) == 2


def test_damaged_features_are_refused(tiny_corpus, tmp_path):
    folder = shutil.copytree(tiny_corpus, tmp_path / "copy")
    Corpus(folder, "dev", progress=False)
    (made,) = folder.glob("features-dev-*.f16")
    made.write_bytes(made.read_bytes()[:-100])
    with pytest.raises(sp.FormatError, match=r"does not fit the manifest; delete it and features-dev-.*json"):
        Corpus(folder, "dev", progress=False)


def test_split_or_language_that_is_not_there(tiny_corpus, tmp_path):
    write_manifest(tmp_path / "manifest.jsonl", read_manifest(tiny_corpus)[:3])
    with pytest.raises(sp.FormatError, match="no utterances in the split 'dev'"):
        Corpus(tmp_path, "dev", progress=False)
    with pytest.raises(ValueError, match="has none of fr"):
        Corpus(tiny_corpus, "train", ("en", "fr"), progress=False)


def test_batches_are_a_function_of_seed_and_step(corpus):
    def drawn(seed):
        return [Sampler(corpus, 4, seed, 0.5).draw(step, 1) for step in range(30)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    sampler = Sampler(corpus, 4, 0, 0.5)
    assert [sampler.draw(step, 1) for step in reversed(range(30))] == drawn(0)[::-1]


def test_batches_hold_one_language_and_neighbours_in_length(corpus):
    sampler, seen = Sampler(corpus, 4, 0, 0.5), set()
    for step in range(300):
        language, indices = sampler.draw(step, 1)
        assert {corpus.utterances[i].language for i in indices} == {language}
        ranks = [list(corpus.by_length[language]).index(i) for i in indices]
        assert ranks == list(range(ranks[0], ranks[0] + 4))
        seen.update(indices)
    assert seen == set(range(len(corpus.utterances)))


def test_ranks_share_language_and_utterances(corpus):
    sampler = Sampler(corpus, 2, 0, 0.5)
    language, indices = sampler.draw(7, 3)
    shares = [indices[rank::3] for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert len({i for share in shares for i in share}) == 6
    assert {corpus.utterances[i].language for i in indices} == {language}


@pytest.mark.parametrize(("alpha", "share"), [(0.0, 0.5), (0.5, 2 / 3), (1.0, 4 / 5)])
def test_alpha_weighs_languages_by_hours(corpus, alpha, share):
    corpus.features.lengths = np.array([400 if u.language == "en" else 100 for u in corpus.utterances])
    sampler = Sampler(corpus, 4, 0, alpha)
    assert sampler.shares.tolist() == pytest.approx([share, 1 - share])
    drawn = [sampler.language(step) for step in range(3000)]
    assert drawn.count("en") / 3000 == pytest.approx(share, abs=0.02)


def test_languages_of_equal_share_take_turns(corpus):
    sampler = Sampler(corpus, 4, 0, 0.0)
    rounds = [(sampler.language(step), sampler.language(step + 1)) for step in range(0, 100, 2)]
    assert set(rounds) == {("en", "nl"), ("nl", "en")}


def test_padding_of_a_batch(corpus, tokenizer):
    language, indices = Sampler(corpus, 4, 0, 0.5).draw(0, 1)
    batch = corpus.collate(indices, tokenizer)
    assert batch.language == language
    assert batch.feats.shape == (4, int(batch.lengths.max()), 80)
    for row, index in enumerate(indices):
        assert torch.equal(batch.feats[row, : batch.lengths[row]], corpus.features[index])
        pieces = batch.targets[row, : batch.target_lengths[row]].tolist()
        assert tokenizer.decode(pieces) == corpus.utterances[index].text


def test_spec_augment(corpus, tokenizer):
    batch = corpus.collate(Sampler(corpus, 4, 0, 0.5).draw(0, 1)[1], tokenizer)
    before, fill = batch.feats.clone(), torch.arange(80.0) + 100
    one = spec_augment(batch, fill, (0, 3), 2, 15, 1, 12)
    again = spec_augment(batch, fill, (0, 3), 2, 15, 1, 12)
    other = spec_augment(batch, fill, (0, 4), 2, 15, 1, 12)
    assert torch.equal(one.feats, again.feats) and not torch.equal(one.feats, other.feats)
    assert torch.equal(batch.feats, before)
    hidden = one.feats == fill
    assert hidden.any() and torch.equal(one.feats[~hidden], before[~hidden])
    for row, length in zip(hidden, batch.lengths.tolist(), strict=True):
        assert row.all(0).sum() <= 2 * 15
        assert row[:length].all(1).sum() <= min(12, length // 5)
    assert torch.equal(spec_augment(batch, fill, (0,), 0, 15, 0, 12).feats, before)


def test_texts_to_learn_pieces_from_are_balanced(tiny_corpus, tmp_path):
    utterances = [u for u in read_manifest(tiny_corpus) if u.split == "train"]
    few = [u for u in utterances if u.language == "en"] + [u for u in utterances if u.language == "nl"][:4]
    write_manifest(tmp_path / "manifest.jsonl", few)
    corpus = Corpus(tmp_path, "train", progress=False)
    dutch = {u.text for u in few if u.language == "nl"}
    sizes = [sum(len(text) for text in corpus.texts() if (text in dutch) == flag) for flag in (True, False)]
    assert sizes[1] < 2 * sizes[0] and min(sizes) > 0
