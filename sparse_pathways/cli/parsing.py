"""Parsers of the subcommands: help made from the configs' docstrings, errors worded in one line."""

import argparse
import itertools
import os
import re
from dataclasses import fields
from typing import Any, TypeVar

import jsonargparse

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help with examples left as they are written."""


class Parser(jsonargparse.ArgumentParser):
    """Parser of one subcommand; raises on wrong arguments instead of leaving the process."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help text with plain type names (`Path` rather than `<class 'Path'>`)."""
        return _plain_types(super().format_help(*args, **kwargs))

    def parse_args(self, args: list[str], **kwargs: Any) -> jsonargparse.Namespace:  # type: ignore[override]
        """Parse with `--config FILE` first, wherever it stands: options typed beside it win over the file."""
        front: list[str] = []
        rest: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--config":
                front += [word, *itertools.islice(words, 1)]
            else:
                (front if word.startswith("--config=") else rest).append(word)
        return super().parse_args([*front, *rest], **kwargs)

    def config(self, config_class: type[Config], namespace: jsonargparse.Namespace) -> Config:
        """Build the dataclass whose fields were added by `add_class_arguments`; its own checks run here."""
        values = self.instantiate(namespace)
        return config_class(**{field.name: values[field.name] for field in fields(config_class)})  # type: ignore[arg-type]


def make_parser(usage: str, summary: str, example: str) -> Parser:
    """Begin the parser of one subcommand.

    Args:
        usage: the subcommand as typed, and after it what it cannot do without.
        summary: what it does; sentences.
        example: command lines shown below the options.
    """
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines())
    return Parser(
        usage=f"sparse-pathways {usage} [options]",
        description=summary,
        epilog=epilog,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
    )


def add_config_options(parser: Parser, config_class: type) -> None:
    """Add `--config FILE`, `--print_config` and one option for every field of `config_class`."""
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the options below; options typed here win over it"
    )
    parser.add_class_arguments(config_class)


def is_users(error: Exception) -> bool:
    """Whether a user can cause this error, rather than a bug of ours.

    `sp.FormatError` and `AudioError` are ValueErrors; a FloatingPointError is a loss that diverged.
    """
    from sparse_pathways.checks import BackendUnavailable  # here, because it imports torch, which help does not need

    kinds = (ValueError, TypeError, KeyError, OSError, ImportError, FloatingPointError, argparse.ArgumentError)
    return isinstance(error, (*kinds, BackendUnavailable))


def is_first_process() -> bool:
    """Whether this process speaks for all: torchrun starts several, and one line is enough."""
    return os.environ.get("RANK", "0") == "0"


def word_error(error: Exception) -> str:
    """What is wrong, in one line without Python's class notation."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        text = f"{error.filename}: no such file"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    text = re.sub(r'Parser key "([^"]+)":', r"--\1:", _plain_types(text))
    return " ".join(text.split()) or type(error).__name__


def _plain_types(text: str) -> str:
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
