"""Pruning inside Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_pathways.checks import FormatError
from sparse_pathways.nn import sparse_layers
from sparse_pathways.prune import PruneEvent, Pruner, PruningPlan

FILE = "pruner.pt"


class PruningCallback(TrainerCallback):
    """Decides masks after every optimiser step of a Trainer.

    Convert the model first. With several pathways, choose that of a batch by `sp.set_pathway(model, name)` in
    `compute_loss`; the callback steps the pathway that is active then. The Pruner's state is saved with every
    checkpoint, as `pruner.pt` in its folder, and read from there when training is resumed.

    What `save_pretrained` writes has the masks, but `from_pretrained` builds the dense model: make that from its
    config, convert it with `sparsify_`, then load the file into it (`safetensors.torch.load_model`).

    Args:
        plan: as for `Pruner`.

    Attributes:
        pruner: made when training starts.
        events: decisions so far, in order.
    """

    def __init__(self, plan: PruningPlan) -> None:
        self.plan = plan
        self.pruner: Pruner | None = None
        self.events: list[PruneEvent] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the Pruner, from the checkpoint's state if training is resumed."""
        saved = _read(_folder(args, state) / FILE) if state.global_step else None
        if saved is None and self.pruner is not None:
            raise RuntimeError(
                "trainer.train() was called a second time: the plan has run; resume from a checkpoint, or make another "
                "PruningCallback with the plan of what is to follow"
            )
        self.pruner = Pruner(kwargs["model"], self.plan, kwargs["optimizer"], state=saved)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimiser's step, before gradients are zeroed."""
        assert self.pruner is not None
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):  # gradients have overflowed float16
            return
        event = self.pruner.step(next(iter(sparse_layers(kwargs["model"]).values())).active)
        if event is not None:
            self.events.append(event)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Beside the model and optimiser of the checkpoint."""
        folder = _folder(args, state)
        if state.is_world_process_zero and self.pruner is not None and folder.is_dir():
            torch.save(self.pruner.state_dict(), folder / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimiser go."""
        if self.pruner is not None:
            self.pruner.detach()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FormatError(path, "no such file; the checkpoint was not written with this callback")
    return torch.load(path, weights_only=True)
