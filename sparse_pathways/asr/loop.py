"""The training loop, on accelerate: one process on a CPU or a GPU, or several through torchrun.

All that is random in a step follows from (seed, step, rank): a run that was interrupted goes on, bit for bit, as if it
had not been.
"""

import json
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from tqdm import tqdm

import sparse_pathways as sp

from .batches import Batch, Corpus, Sampler, spec_augment
from .checkpoint import CHECKPOINT, MODEL, model_content, read, write
from .config import RunConfig
from .corpus import read_manifest
from .evaluate import average_wer, evaluate, load_examples
from .loss import distillation_loss, transducer_loss
from .model import Recogniser
from .transcribe import language_pathway

LOG = "log.jsonl"
DESCRIPTION = "config.json"
LOG_EVERY = 20  # steps
_AGREE_EVERY = 4  # steps between two questions to all processes whether one was asked to stop
_MAY_DIFFER = {"out", "threads", "eval_every", "checkpoint_every", "progress"}  # between sittings of one run


def read_description(folder: Path) -> dict[str, Any]:
    """What kind of run a folder holds: its configuration, its phase, the number of processes."""
    try:
        return json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise sp.FormatError(Path(folder) / DESCRIPTION, f"is no description of a run: {error}") from error


class Run:
    """One run folder and what is in it so far.

    Args:
        config: Of a training or pruning run.
        phase: What a pruning run does.

    Attributes:
        checkpoint: Content of the run's checkpoint, None at the beginning.
        finished: The run is done.
        device: Where this process computes.

    Raises:
        ValueError: the folder holds a run with another configuration.
        sp.FormatError: the checkpoint is damaged.
    """

    def __init__(self, config: RunConfig, phase: sp.Phase | None = None) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        # CTC-only steps leave predictor and joiner without gradients
        ddp = DistributedDataParallelKwargs(find_unused_parameters=getattr(config, "ctc_only_steps", 0) > 0)
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else accelerate does not see that torchrun started several
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[ddp],
        )
        self.device = self._accelerator.device
        self.checkpoint_path = Path(config.out) / CHECKPOINT
        self.checkpoint = read(self.checkpoint_path) if self.checkpoint_path.is_file() else None
        described = json.dumps(asdict(config), default=lambda path: str(Path(path).resolve()))
        self._described = {
            "kind": type(config).__name__,
            "processes": self._accelerator.num_processes,
            **json.loads(described),
            **({} if phase is None else {"phase": phase.to_dict()}),
        }
        if self.checkpoint is not None:
            self._check_same_run(self.checkpoint["run"])
        self.finished = (
            self.checkpoint is not None
            and self.checkpoint["step"] == config.steps
            and (Path(config.out) / MODEL).is_file()
        )
        if self._accelerator.is_main_process and not self.finished:
            Path(config.out).mkdir(parents=True, exist_ok=True)
            (Path(config.out) / DESCRIPTION).write_text(json.dumps(self._described, indent=2) + "\n")

    def _check_same_run(self, earlier: dict[str, Any]) -> None:
        names = (earlier.keys() | self._described.keys()) - _MAY_DIFFER
        if changed := sorted(name for name in names if earlier.get(name) != self._described.get(name)):
            name = changed[0]
            raise ValueError(
                f"out = {self.config.out} holds a run with {name} = {earlier.get(name)}, not "
                f"{self._described.get(name)}; choose another folder, or delete this one to start over"
            )

    def load_corpus(self, languages: tuple[str, ...] | None = None) -> Corpus:
        """The training split; one process per machine computes its features, if need be."""
        with self._accelerator.local_main_process_first():
            return Corpus(self.config.data, "train", languages, self._shows)

    @property
    def _shows(self) -> bool:
        return self.config.progress and self._accelerator.is_main_process

    def fit(
        self,
        model: Recogniser,
        optimizer: Optimizer,
        corpus: Corpus,
        pruner: Any = None,
        ctc_only_steps: int = 0,
        teacher: Recogniser | None = None,
    ) -> Path:
        """Train to the last step, from the checkpoint if there is one; returns the run folder.

        Args:
            model: On `self.device`.
            optimizer: Of the model's parameters.
            corpus: What to draw batches from.
            pruner: Decides masks after every step.
            ctc_only_steps: Steps at the start without the RNN-T loss.
            teacher: Model whose outputs are to be followed, with the weight `config.distil`.
        """
        fit = _Fit(self.config, self._accelerator, self._described, model, optimizer, corpus, pruner, ctc_only_steps)
        fit.teacher = None if teacher is None else teacher.to(self.device).eval().requires_grad_(False)
        if self.checkpoint is not None:
            fit.restore(self.checkpoint)
        fit.run()
        return self.config.out


def end_processes() -> None:
    """What a program ends with that torchrun may have started: the process group and its threads.

    A thread of gloo that outlives the interpreter can abort a process whose work is done (PyTorch issue 190489).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Fit:
    """The state of a run that moves."""

    teacher: Recogniser | None = None

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        described: dict[str, Any],
        model: Recogniser,
        optimizer: Optimizer,
        corpus: Corpus,
        pruner: Any,
        ctc_only_steps: int,
    ) -> None:
        self.config, self.accelerator, self.described = config, accelerator, described
        self.model, self.optimizer, self.pruner = model, optimizer, pruner
        self.corpus, self.sampler = corpus, Sampler(corpus, config.batch, config.seed, config.language_alpha)
        self.ctc_only_steps = ctc_only_steps
        self.step = 0
        self.wrapped = accelerator.prepare_model(model)
        self.fill = model.mean.cpu()
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.summed = 0
        self.log_path = Path(config.out) / LOG
        self.dev = self._load_dev() if accelerator.is_main_process else []

    def _load_dev(self) -> list[Any]:
        utterances = [
            utterance
            for utterance in read_manifest(self.config.data)
            if utterance.split == "dev" and utterance.language in self.corpus.languages
        ]
        device = self.accelerator.device
        return [replace(example, features=example.features.to(device)) for example in load_examples(utterances)]

    # --- files --------------------------------------------------------------------------------------------------------

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint; later lines of the log, from a sitting that was cut off, are dropped."""
        self.model.load_state_dict(checkpoint["model"]["state"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.pruner is not None:
            self.pruner.load_state_dict(checkpoint["pruner"])
        self.step = checkpoint["step"]
        if self.accelerator.is_main_process and self.log_path.is_file():
            lines = self.log_path.read_text().splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
            self.log_path.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def save(self) -> None:
        """Write the checkpoint, once for all processes."""
        if self.accelerator.is_main_process:
            write(
                self.log_path.with_name(CHECKPOINT),
                {
                    "run": self.described,
                    "step": self.step,
                    "model": model_content(self.model),
                    "optimizer": self.optimizer.state_dict(),
                    "pruner": self.pruner.state_dict() if self.pruner is not None else None,
                },
            )
        self.accelerator.wait_for_everyone()

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the log."""
        if self.accelerator.is_main_process:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **record}) + "\n")

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps that are left, then the model file."""
        config = self.config
        if self.accelerator.is_main_process and self.step == 0:
            self.log_path.unlink(missing_ok=True)
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=Path(config.out).name,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,  # seconds; a log file needs no animation
            disable=not (config.progress and self.accelerator.is_main_process),
        )
        self.model.train()
        with bar, _stop_signals(alone=self.accelerator.num_processes == 1) as stop:
            while self.step < config.steps:
                self.one_step()
                bar.update()
                if self.step % LOG_EVERY == 0 or self.step == config.steps:
                    bar.set_postfix_str(self.report(), refresh=False)
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    self.evaluate(bar)
                last = self.step == config.steps
                stopping = not last and self.asked_to_stop(stop)
                if last or stopping or self.step % config.checkpoint_every == 0:
                    self.save()
                if stopping:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step} of {config.steps}, checkpoint written to {config.out}; "
                        "run the same command again to go on"
                    )
        if self.pruner is not None:
            self.log({"masks": sp.mask_report(self.model, self.pruner.pathways)})
        if self.accelerator.is_main_process:
            write(self.log_path.with_name(MODEL), model_content(self.model))
        self.accelerator.wait_for_everyone()

    def one_step(self) -> None:
        """Draw, augment, forward, backward, update, prune."""
        config, rank = self.config, self.accelerator.process_index
        language, indices = self.sampler.draw(self.step, self.accelerator.num_processes)
        batch = self.corpus.collate(indices[rank :: self.accelerator.num_processes], self.model.tokenizer)
        seed = (config.seed, self.step, rank)
        batch = spec_augment(
            batch, self.fill, seed, config.bands, config.band_bins, config.spans, config.span_frames
        ).to(self.accelerator.device)
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step)
        with sp.pathway(self.model, language) if self.pruner is not None else nullcontext():
            loss = self.losses(batch)
            self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        event = self.pruner.step(language) if self.pruner is not None else None
        self.optimizer.zero_grad()
        if event is not None:
            self.log({"event": {k: v for k, v in asdict(event).items() if k != "step"}})

    def losses(self, batch: Batch) -> Tensor:
        """The training loss of a batch, per target token."""
        ctc_only = self.step < self.ctc_only_steps
        logits, ctc_logits, lengths = self.wrapped(
            batch.feats, batch.lengths, batch.targets, batch.target_lengths, ctc_only
        )
        tokens = batch.target_lengths.sum()
        ctc = functional.ctc_loss(
            ctc_logits.float().log_softmax(-1).transpose(0, 1),
            batch.targets,
            lengths,
            batch.target_lengths,
            blank=self.model.blank,
            reduction="sum",
            zero_infinity=True,
        )
        parts = {"ctc": ctc / tokens}
        if ctc_only:
            loss = parts["ctc"]
        else:
            rnnt = transducer_loss(logits, batch.targets, lengths, batch.target_lengths, self.model.blank)
            parts["rnnt"] = rnnt.sum() / tokens
            loss = parts["rnnt"] + self.config.ctc_weight * parts["ctc"]
            if self.teacher is not None:
                parts["distil"] = self.distance(self.teacher, batch, logits, ctc_logits, lengths)
                loss = loss + self.config.distil * parts["distil"]  # type: ignore[attr-defined]
        for name, value in (parts | {"loss": loss}).items():
            self.sums[name] += value.detach()
        self.summed += 1
        return loss

    def distance(
        self, teacher: Recogniser, batch: Batch, logits: Tensor, ctc_logits: Tensor, lengths: Tensor
    ) -> Tensor:
        """How far the outputs are from the teacher's: joiner, and CTC by its weight."""
        with torch.no_grad(), language_pathway(teacher, batch.language):
            wanted, wanted_ctc, _ = teacher(batch.feats, batch.lengths, batch.targets, batch.target_lengths)
        joiner = distillation_loss(logits, wanted, lengths, batch.target_lengths + 1)
        return joiner + self.config.ctc_weight * distillation_loss(ctc_logits, wanted_ctc, lengths)

    def report(self) -> str:
        """Log the means since the last report; returns them for the progress bar."""
        record = {name: round(float(value) / self.summed, 5) for name, value in self.sums.items()}
        self.sums.clear()
        self.summed = 0
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        if self.pruner is not None:
            masks = sp.mask_report(self.model, self.pruner.pathways)["total"]
            record["sparsity"] = round(1 - sum(masks["density"].values()) / len(masks["density"]), 5)
            record |= {name: round(masks[name], 5) for name in ("overlap", "union", "core", "dead_rows")}
            explored = self.pruner.explored().values()
            record["explored"] = round(sum(explored) / len(explored), 5)
        if not all(np.isfinite(value) for value in record.values()):
            raise FloatingPointError(f"the loss is not finite at step {self.step}: {record}; try a lower lr")
        self.log(record)
        shown = {"loss": "loss {:.2f}", "lr": "lr {:.1e}", "sparsity": "sparsity {:.2f}"}
        return " ".join(form.format(record[name]) for name, form in shown.items() if name in record)

    def evaluate(self, bar: tqdm) -> None:
        """Log the word error rate on the dev split; the other processes wait."""
        if self.dev:
            results = evaluate(self.model, self.dev)
            average = average_wer(results)
            self.log({"wer": {name: round(result["wer"], 5) for name, result in results.items()}, "wer_mean": average})
            rates = "  ".join(f"{name} {result['wer']:.1%}" for name, result in results.items())
            bar.write(f"step {self.step}: dev word error rate {average:.1%}  ({rates})")
            self.model.train()
        self.accelerator.wait_for_everyone()

    def asked_to_stop(self, stop: threading.Event) -> bool:
        """Whether any process was asked to stop; several ask each other now and then, so that all stop together."""
        if self.accelerator.num_processes == 1:
            return stop.is_set()
        if self.step % _AGREE_EVERY:
            return False
        asked = torch.tensor(float(stop.is_set()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)


@contextmanager
def _stop_signals(alone: bool) -> Iterator[threading.Event]:
    """An event that SIGINT (Ctrl-C) and SIGTERM set.

    A second signal acts as if nobody were listening, if the process is alone. One of several hears every Ctrl-C twice,
    from the terminal and from torchrun, which kills by itself what does not end in time.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def heard(number: int, frame: Any) -> None:
        stop.set()
        if alone:
            for each, handler in before.items():
                signal.signal(each, handler)

    for number in before:
        signal.signal(number, heard)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
