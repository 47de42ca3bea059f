import numpy as np
import pytest
import soundfile

import sparse_pathways as sp
from sparse_pathways.asr.corpus import read_audio, read_manifest
from sparse_pathways.asr.mls import import_mls


@pytest.fixture
def root(tmp_path):
    """A folder in the layout of Multilingual LibriSpeech: two languages, one to three clips per split."""
    for folder, kind in (("mls_dutch", "flac"), ("mls_french", "opus")):
        for split, numbers in (("train", (0, 1, 2)), ("dev", (3,)), ("test", (4,))):
            base = tmp_path / "mls" / folder / split
            audio = base / "audio" / "11" / "22"
            audio.mkdir(parents=True)
            names = [f"11_22_{number:06d}" for number in numbers]
            for index, name in enumerate(names):
                samples = 0.1 * np.sin(np.arange(16_000 + 1600 * index) / 20)
                soundfile.write(
                    audio / f"{name}.{kind}",
                    samples,
                    16_000,
                    format="OGG" if kind == "opus" else None,
                    subtype="OPUS" if kind == "opus" else None,
                )
            (base / "transcripts.txt").write_text("".join(f"{n}\tL\u2019Été nummer {n[-1]}\n" for n in names))
            (base / "segments.txt").write_text(
                "".join(f"{n}\thttp://x/y.mp3\t{10.0:.2f}\t{11.0 + 0.1 * i:.2f}\n" for i, n in enumerate(names))
            )
        for part, name in ((0, "11_22_000000"), (1, "11_22_000002")):
            handles = tmp_path / "mls" / folder / "train" / "limited_supervision" / "1hr" / str(part) / "handles.txt"
            handles.parent.mkdir(parents=True)
            handles.write_text(name + "\n")
    return tmp_path / "mls"


def test_import(root, tmp_path):
    utterances = read_manifest(import_mls(root, ("nl", "fr"), tmp_path / "corpus"))
    assert [(u.language, u.split) for u in utterances[:5]] == [("nl", "train")] * 3 + [("nl", "dev"), ("nl", "test")]
    second = utterances[1]
    assert (second.id, second.speaker) == ("mls-nl-11_22_000001", "mls-nl-11")
    assert second.text == "l'été nummer 1"
    assert second.duration == pytest.approx(1.1)
    assert [u.audio.suffix for u in (utterances[0], utterances[-1])] == [".flac", ".opus"]
    for utterance in utterances:
        assert len(read_audio(utterance)) == pytest.approx(16_000 * utterance.duration, abs=1)


def test_published_subset_of_the_training_split(root, tmp_path):
    utterances = read_manifest(import_mls(root, ("nl",), tmp_path / "corpus", train_subset="1hr"))
    assert [u.id[-1] for u in utterances if u.split == "train"] == ["0", "2"]
    with pytest.raises(sp.FormatError, match=r"holds no handles\.txt"):
        import_mls(root, ("nl",), tmp_path / "corpus", train_subset="9hr")
    with pytest.raises(ValueError, match="train_subset = '10hr'"):
        import_mls(root, ("nl",), tmp_path / "corpus", train_subset="10hr")


def test_language_mls_does_not_have(root, tmp_path):
    with pytest.raises(ValueError, match="MLS has no 'sv'; want some of de, en"):
        import_mls(root, ("nl", "sv"), tmp_path)


def test_layout_that_is_not_there(root, tmp_path):
    with pytest.raises(sp.FormatError, match=r"mls_italian/train/segments\.txt: no such file"):
        import_mls(root, ("it",), tmp_path)
    transcripts = root / "mls_dutch" / "train" / "transcripts.txt"
    transcripts.write_text(transcripts.read_text() + "11_22_9 no tab\n")
    with pytest.raises(sp.FormatError, match="line 4: want 2 cells"):
        import_mls(root, ("nl",), tmp_path)
