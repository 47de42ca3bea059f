"""Logs of runs as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SKIPPED = ("step", "masks")


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record, nested ones under `outer/inner`."""
    for name, value in record.items():
        if name in SKIPPED:
            continue
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def write_events(logs: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> Path:
    """Write one event file per run.

    Args:
        logs: by name of the run, records with a `step` each.
        folder: for TensorBoard's `--logdir`; gets a folder per run.

    Returns:
        `folder`.

    Raises:
        ValueError: there is nothing to write.
        ImportError: TensorBoard is not installed.
    """
    if not logs:
        raise ValueError("there is no log.jsonl in the run folder; train or prune there first")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("event files need TensorBoard; pip install tensorboard") from error
    for name, records in logs.items():
        with SummaryWriter(str(folder / name)) as writer:
            for record in records:
                if "step" not in record:  # masks at the end of a run
                    continue
                for key, value in scalars(record):
                    writer.add_scalar(key, value, record["step"])
    return folder
