"""`sparse-pathways data SOURCE`: make or import a corpus (a folder with manifest.jsonl and audio files)."""

from collections import Counter
from pathlib import Path

from sparse_pathways.cli.parsing import add_config_options, make_parser

SOURCES = {
    "synthetic": "speak sentences in four languages with espeak-ng: nothing to download",
    "asterisk": "import the recorded prompts of Debian's asterisk-core-sounds packages",
    "mls": "import Multilingual LibriSpeech folders",
}


def main(words: list[str]) -> int:
    """Run `sparse-pathways data` with the words after it."""
    if words and words[0] in SOURCES:
        return {"synthetic": _synthetic, "asterisk": _asterisk, "mls": _mls}[words[0]](words[1:])
    if words in ([], ["-h"], ["--help"]):
        print("usage: sparse-pathways data SOURCE ...\n\nMake or import a corpus.\n\nsources:")
        print("\n".join(f"  {name:<12}{summary}" for name, summary in SOURCES.items()))
        print("\n`sparse-pathways data SOURCE --help` explains the options of one source.")
        return 0
    raise ValueError(f"no source {words[0]!r}; choose one of {', '.join(SOURCES)}")


def _synthetic(words: list[str]) -> int:
    from sparse_pathways.asr.config import CorpusConfig

    parser = make_parser(
        "data synthetic --out OUT",
        "Speak a corpus with espeak-ng: sentences in English, French, Italian and Dutch, several voices, rates,\n"
        "pitches and noise. Sentences and voices of the test split are kept out of training.",
        "sparse-pathways data synthetic --out runs/data\n"
        "sparse-pathways data synthetic --out runs/small --train 200 --languages '[en, fr]'",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make, with manifest.jsonl and flac files")
    add_config_options(parser, CorpusConfig)
    args = parser.parse_args(words)
    config = parser.config(CorpusConfig, args)
    from sparse_pathways.asr.synthetic import synthesise

    return _summarise(synthesise(config, args.out))


def _asterisk(words: list[str]) -> int:
    parser = make_parser(
        "data asterisk --out OUT",
        "Import the prompts of Debian's asterisk-core-sounds-{en,fr,it} packages, with their transcripts: human\n"
        "voices at 8 kHz, as an extra test set. The packages must be installed (or unpacked) first.",
        "apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav\n"
        "sparse-pathways data asterisk --out runs/prompts",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make, with manifest.jsonl and flac files")
    parser.add_argument("--root", type=Path, default=Path("/"), help="folder the packages were unpacked to")
    args = parser.parse_args(words)
    from sparse_pathways.asr.asterisk import import_prompts

    return _summarise(import_prompts(args.root, args.out))


def _mls(words: list[str]) -> int:
    parser = make_parser(
        "data mls ROOT --out OUT",
        "Import Multilingual LibriSpeech: ROOT holds mls_english, mls_french, … as published. Audio stays where it is.",
        "sparse-pathways data mls /data/mls --languages en fr it nl --out runs/mls",
    )
    parser.add_argument("root", type=Path, help="folder that holds the mls_<language> folders")
    parser.add_argument("--languages", nargs="+", default=["en", "fr", "it", "nl"], help="language codes to import")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, with manifest.jsonl")
    parser.add_argument("--train_subset", default="all", help="part of the train split: all, 9hr or 1hr")
    args = parser.parse_args(words)
    from sparse_pathways.asr.mls import import_mls

    return _summarise(import_mls(args.root, tuple(args.languages), args.out, args.train_subset))


def _summarise(manifest: Path) -> int:
    from sparse_pathways.asr.corpus import SPLITS, read_manifest

    utterances = read_manifest(manifest)
    count = Counter((u.language, u.split) for u in utterances)
    hours = {language: 0.0 for language, _ in sorted(count)}
    for utterance in utterances:
        hours[utterance.language] += utterance.duration / 3600
    print(f"{manifest}: {len(utterances)} utterances, {sum(hours.values()):.2f} h")
    for language, total in hours.items():
        splits = ", ".join(f"{split} {count[language, split]}" for split in SPLITS if count[language, split])
        print(f"  {language}  {total:.2f} h  {splits}")
    return 0
