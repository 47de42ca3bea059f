"""The command `sparse-pathways`: one module per subcommand, imported when it is asked for.

A wrong argument or an unusable file ends with one line on stderr and exit code 2 (`--debug` adds the traceback);
Ctrl-C with one line and exit code 130.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata

SUBCOMMANDS = {
    "data": "make or import a speech corpus (synthetic, asterisk, mls)",
    "train": "train a dense recogniser",
    "prune": "prune a trained recogniser: one mask for all languages, or one pathway each",
    "pack": "turn a pruned recogniser into a packed model file",
    "transcribe": "print what is said in audio files, while they stream",
    "bench": "time every packed layer against the fastest dense one",
    "evaluate": "compare recognisers: word error rates, latency, sizes",
    "env": "print what this machine is and what the package found on it",
    "report": "draw an HTML report of a run folder, or update a README table",
}

EXAMPLE = """\
from nothing to text:
  sparse-pathways data synthetic --out runs/data
  sparse-pathways train --data runs/data --out runs/dense
  sparse-pathways prune --data runs/data --start runs/dense --out runs/dynamic70 --sparsity 0.7
  sparse-pathways pack runs/dynamic70 --out model.safetensors
  sparse-pathways transcribe model.safetensors --language fr some.wav

`sparse-pathways SUBCOMMAND --help` explains the options of one step and shows examples."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for a user's error, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except SystemExit as stop:  # --help, --print_config, --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as interrupt:  # a training run says where it stopped
        print(f"sparse-pathways: {str(interrupt) or 'interrupted; run the same command again'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has left: nothing to say, and nowhere to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        from sparse_pathways.cli.parsing import is_users, word_error

        if debug or not is_users(error):
            raise
        print(f"sparse-pathways: {word_error(error)}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if words and words[0] in SUBCOMMANDS:
        return importlib.import_module(f"sparse_pathways.cli.{words[0]}").main(words[1:])
    if words == ["--version"]:
        print(f"sparse-pathways {metadata.version('sparse-pathways')}")
        return 0
    if words in ([], ["-h"], ["--help"]):
        print(_help())
        return 0
    raise ValueError(f"no subcommand {words[0]!r}; choose one of {', '.join(SUBCOMMANDS)} (sparse-pathways --help)")


def _help() -> str:
    lines = [
        "usage: sparse-pathways [--help] [--version] SUBCOMMAND ... [--debug]",
        "",
        "Streaming multilingual speech recognition with block-sparse pathways: one weight, one mask per language.",
        "",
        "subcommands:",
        *(f"  {name:<12}{summary}" for name, summary in SUBCOMMANDS.items()),
        "",
        "options:",
        "  --version   print the version",
        "  --debug     show the traceback of an error",
        "",
        EXAMPLE,
    ]
    return "\n".join(lines)
