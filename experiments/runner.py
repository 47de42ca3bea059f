"""Runs what is missing: each stage and each measurement as a process of its own, as many at a time as asked for.

Killed at any moment it can be started again: a stage goes on from its last checkpoint, what is done is skipped.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import measure
from experiments.stages import Cell, Study, all_stages, needs, run_config, stages_of

DONE = "model.pt"
TRIES = 2
POLL_S = 1.0


@dataclass(frozen=True)
class Places:
    """Folders: training runs and corpus (outside git), results (inside)."""

    runs: Path
    results: Path

    @property
    def data(self) -> Path:
        """The corpus."""
        return self.runs / "data"

    def result(self, cell: Cell) -> Path:
        """The result file of a cell."""
        return self.results / f"{cell.title}.json"


def ensure_corpus(study: Study, places: Places) -> None:
    """Synthesise the corpus if it is not there.

    Raises:
        FileNotFoundError: a corpus that must be imported is missing.
    """
    if (places.data / "manifest.jsonl").is_file():
        return
    if isinstance(study.corpus, str):
        raise FileNotFoundError(f"{places.data} has no corpus; import {study.corpus} there (`sparse-pathways data`)")
    from sparse_pathways.asr.synthetic import synthesise

    synthesise(study.corpus, places.data)


def is_measured(cell: Cell, key: str, places: Places) -> bool:
    """Whether the cell's result is there and belongs to its present settings."""
    path = places.result(cell)
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # measured again
        return False
    return found["key"] == key and found["format"] == measure.FORMAT


@dataclass(frozen=True)
class Job:
    """A process to run: a stage (`cell` None) or the measurement of a cell."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...]  # stage keys


def open_jobs(study: Study, cells: tuple[Cell, ...], places: Places) -> Iterator[Job]:
    """What is left to do, in the order of the cells, the stages of each before its measurement."""
    stages = all_stages(study, cells)
    offered: set[str] = set()
    for cell in cells:
        own = stages_of(study, cell)
        if is_measured(cell, own[-1].key, places):
            continue
        for stage in (stages[one.key] for one in own):  # of several cells: in the folder that the first one named
            if stage.key not in offered and not (stage.folder(places.runs) / DONE).is_file():
                offered.add(stage.key)
                yield Job(stage.title, ("stage", stage.key), tuple(needs(stage)))
        yield Job(f"measure {cell.title}", ("measure", cell.title), (own[-1].key,))


def run_stage(study: Study, cells: tuple[Cell, ...], key: str, places: Places, threads: int) -> None:
    """Train one stage in this process, which does nothing else."""
    from sparse_pathways.asr.loop import end_processes
    from sparse_pathways.asr.train import prune_phase, train

    stages = all_stages(study, cells)
    if key not in stages:
        raise SystemExit(f"no stage {key}; `status` names the next one")
    stage = stages[key]
    config = run_config(stage, stages, places.runs, places.data, threads)
    with _counting_cost(stage.folder(places.runs) / measure.COST):
        if stage.phase is None:
            train(config)
        else:
            folders = {name: stages[one].folder(places.runs) for name, one in stage.models.items()}
            prune_phase(config, stage.phase, folders)
    end_processes()
    (stage.folder(places.runs) / "checkpoint.pt").unlink(missing_ok=True)  # thrice the size of the model


@contextmanager
def _counting_cost(path: Path) -> Iterator[None]:
    """Keep the CPU seconds of this process, and of those before it that were cut off, in a file.

    Of several processes (torchrun) the first one counts for all.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    before = json.loads(path.read_text())["cpu_s"] if path.is_file() else 0.0
    stop = threading.Event()

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"cpu_s": before + processes * time.process_time()}))
        partial.replace(path)

    def keep_saving() -> None:
        while not stop.wait(10.0):
            save()

    thread = threading.Thread(target=keep_saving, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        save()


def run_measurement(study: Study, cells: tuple[Cell, ...], title: str, places: Places, threads: int) -> None:
    """Measure one cell in this process."""
    import torch

    torch.set_num_threads(threads)
    cell = next((cell for cell in cells if cell.title == title), None)
    if cell is None:
        raise SystemExit(f"no cell {title}; there are {', '.join(cell.title for cell in cells[:3])}, ...")
    stages = all_stages(study, cells)
    own = [stages[stage.key] for stage in stages_of(study, cell)]
    result = measure.measure(cell, own, places.runs, places.data)
    measure.write(places.result(cell), result)


class Runner:
    """The processes that run now, and what waits for them.

    Args:
        command: words that start this program, before the words of a job.
        study, cells, places: what to do, and where.
        processes: at a time.
        threads: of each process.
    """

    def __init__(
        self,
        command: list[str],
        study: Study,
        cells: tuple[Cell, ...],
        places: Places,
        processes: int,
        threads: int,
    ) -> None:
        self.command, self.study, self.cells, self.places = command, study, cells, places
        self.processes, self.threads = processes, threads
        self.running: dict[Job, subprocess.Popen[bytes]] = {}
        self.failures: dict[str, int] = {}
        self.stopping = False

    def run(self) -> int:
        """Until nothing is left, or a signal stops it; the number of jobs that failed."""
        self.places.runs.mkdir(parents=True, exist_ok=True)
        with _only_one(self.places.runs / "runner.lock"):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: self._stop())
            try:
                while self._start() or self.running:
                    time.sleep(POLL_S)
                    self._collect()
            finally:
                self._stop()
                for process in self.running.values():
                    process.wait()
        return sum(count >= TRIES for count in self.failures.values())

    def _start(self) -> bool:
        """Fill the free places; whether anything runs or could be started."""
        if self.stopping:
            return False
        done = {path.parent.name.rpartition("-")[2] for path in self.places.runs.glob(f"*/{DONE}")}
        done -= {word for job in self.running for word in job.words}  # a stage that still counts its cost
        for job in open_jobs(self.study, self.cells, self.places):
            if len(self.running) >= self.processes:
                return True
            if job in self.running or self.failures.get(job.name, 0) >= TRIES or not done.issuperset(job.after):
                continue
            log = (self.places.runs / "runner.log").open("ab")
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            words = [*self.command, *job.words, "--threads", str(self.threads)]
            self.running[job] = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
            self._say(f"started {job.name}")
        return False

    def _collect(self) -> None:
        for job, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[job]
            if code != 0 and not self.stopping:
                self.failures[job.name] = self.failures.get(job.name, 0) + 1
            self._say(f"{'done' if code == 0 else f'exit code {code}:'} {job.name}")

    def _stop(self) -> None:
        self.stopping = True
        for process in self.running.values():
            process.terminate()  # training writes a checkpoint

    def _say(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, flush=True)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock file, or refuse."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SystemExit(f"{path} is held: a runner is at work in this folder already") from error
        yield


def main_command() -> list[str]:
    """The words that start this program again."""
    return [sys.executable, "-m", "experiments"]


def describe(study: Study, cells: tuple[Cell, ...], places: Places) -> dict[str, Any]:
    """How much is done: cells measured and in all, steps left."""
    measured = [cell.title for cell in cells if is_measured(cell, stages_of(study, cell)[-1].key, places)]
    stages = all_stages(study, cells)
    open_keys = all_stages(study, [cell for cell in cells if cell.title not in measured])
    left = [stages[key] for key in open_keys if not (stages[key].folder(places.runs) / DONE).is_file()]
    return {
        "cells": len(cells),
        "measured": len(measured),
        "stages_left": len(left),
        "steps_left": sum(stage.config["steps"] for stage in left),
        "next": next((" ".join(job.words) for job in open_jobs(study, cells, places)), "nothing"),
    }
