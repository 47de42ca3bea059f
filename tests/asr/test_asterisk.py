import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sparse_pathways as sp
from sparse_pathways.asr.asterisk import FOLDERS, import_prompts
from sparse_pathways.asr.corpus import read_audio, read_manifest

TEXT = "\ufeff; Prompts\n\nactivated: Activated.\ndigits/1: one\nbeep: [a beep]\ndial: Press 1 now\nlost: Not here.\n"


def unpack(root, language, suffix):
    """Write what the packages of a language would install."""
    sounds = root / "usr/share/asterisk/sounds" / FOLDERS[language]
    (sounds / "digits").mkdir(parents=True)
    for key in ("activated", "digits/1", "beep", "dial"):
        tone = 0.2 * np.sin(np.arange(8_000) / 5)
        if suffix == ".wav":
            soundfile.write(sounds / f"{key}.wav", tone, 8_000)
        else:
            codec = pytest.importorskip("G722", reason="the package G722 is not installed").G722(16_000, 64_000)
            (sounds / f"{key}.g722").write_bytes(codec.encode((np.repeat(tone, 2) * 32767).astype(np.int16)))
    document = root / "usr/share/doc" / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
    document.parent.mkdir(parents=True)
    document.write_bytes(gzip.compress(TEXT.encode()))


@pytest.mark.parametrize("suffix", [".wav", ".g722"])
def test_import(tmp_path, suffix):
    unpack(tmp_path / "root", "en", suffix)
    unpack(tmp_path / "root", "it", suffix)
    utterances = read_manifest(import_prompts(tmp_path / "root", tmp_path / "corpus"))
    found = [(u.id, u.text, u.language, u.speaker) for u in utterances]
    assert found[:2] == [
        ("asterisk-en-activated", "activated", "en", "en_US_f_Allison"),
        ("asterisk-en-digits-1", "one", "en", "en_US_f_Allison"),
    ]
    assert len(found) == 4  # notes, digits and a transcript without recording are left out
    for utterance in utterances:
        wave = read_audio(utterance)
        assert len(wave) == 16_000 and 0.1 < wave.abs().max() < 0.3


def test_packages_that_are_missing(tmp_path):
    with pytest.raises(sp.FormatError, match="install asterisk-core-sounds-en and asterisk-core-sounds-en-wav"):
        import_prompts(tmp_path, tmp_path / "corpus")
    unpack(tmp_path, "fr", ".wav")
    next(tmp_path.rglob("core-sounds-fr.txt.gz")).unlink()
    with pytest.raises(sp.FormatError, match="install asterisk-core-sounds-fr beside the sounds"):
        import_prompts(tmp_path, tmp_path / "corpus")


def test_real_prompts(tmp_path):
    root = Path(os.environ.get("SPARSE_PATHWAYS_ASTERISK_ROOT", "/"))
    if not (root / "usr/share/asterisk/sounds").is_dir():
        pytest.skip(
            f"no asterisk-core-sounds packages below {root} (install them, or unpack them with dpkg -x and set "
            "SPARSE_PATHWAYS_ASTERISK_ROOT)"
        )
    utterances = read_manifest(import_prompts(root, tmp_path))
    assert len(utterances) > 300
    assert {u.split for u in utterances} == {"train", "dev", "test"}
    texts = {split: {u.text for u in utterances if u.split == split} for split in ("train", "test")}
    assert not texts["train"] & texts["test"]
