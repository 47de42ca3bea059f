"""`sparse-pathways transcribe`: audio files to text, printed while they stream."""

import sys
from pathlib import Path

from jsonargparse.typing import PositiveInt

from sparse_pathways.cli.parsing import make_parser, word_error


def main(words: list[str]) -> int:
    """Run `sparse-pathways transcribe` with the words after it."""
    parser = make_parser(
        "transcribe MODEL AUDIO... --language LANGUAGE",
        "Print what is said in audio files. A file is fed to the recogniser piece by piece, as a microphone would,\n"
        "and words appear as soon as they are certain. Any sample rate, mono or stereo: wav, flac, ogg, opus, mp3.",
        "sparse-pathways transcribe model.safetensors --language fr some.wav\n"
        "sparse-pathways transcribe model.safetensors --language en --beam 4 first.wav second.flac",
    )
    parser.add_argument("model", type=Path, help="packed model (.safetensors) or run folder of train or prune")
    parser.add_argument("audio", type=Path, nargs="+", help="audio files")
    parser.add_argument("--language", required=True, help="language spoken, one of those the model was trained on")
    parser.add_argument("--beam", type=int, default=1, help="hypotheses kept; 1 decodes greedily, which is fastest")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="threads of the products")
    args = parser.parse_args(words)
    import torch

    from sparse_pathways.asr.audio import AudioError
    from sparse_pathways.asr.transcribe import Streamer, open_model, transcribe_file

    torch.set_num_threads(args.threads)
    model = open_model(args.model, args.language)
    Streamer(model, args.language, beam=args.beam)  # refuses a wrong language or beam before any file is read
    failed = False
    for path in args.audio:
        try:
            parts = transcribe_file(model, path, args.language, beam=args.beam)
            _print_parts(parts, label=f"{path}: " if len(args.audio) > 1 else "")
        except AudioError as error:  # the other files can still be transcribed
            print(f"sparse-pathways: {word_error(error)}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


def _print_parts(parts, label: str) -> None:
    first = next(parts)  # opens the file: nothing is printed for one that cannot be used
    print(label + first, end="", flush=True)
    for part in parts:
        print(part, end="", flush=True)
    print(flush=True)
