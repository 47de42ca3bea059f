"""Pruning inside Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import lightning

from sparse_pathways.nn import sparse_layers
from sparse_pathways.prune import PruneEvent, Pruner, PruningPlan


class PruningCallback(lightning.Callback):
    """Decides masks after every optimiser step of a Trainer.

    Convert the model first, and choose the pathway of a batch in `training_step` by `sp.set_pathway(self, name)`; the
    callback steps the pathway that is active then. Checkpoints of the Trainer hold the Pruner's state.

    Args:
        plan: as for `Pruner`.

    Attributes:
        pruner: made when training starts.
        events: decisions so far, in order; each is also logged, as `prune/density` and `prune/iou`.
    """

    def __init__(self, plan: PruningPlan) -> None:
        self.plan = plan
        self.pruner: Pruner | None = None
        self.events: list[PruneEvent] = []
        self._saved: dict[str, Any] | None = None
        self._steps = 0
        self._scale = 0.0  # of the gradients, before the last optimiser step

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Make the Pruner, from the checkpoint's state if there is one."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"configure_optimizers gives {len(trainer.optimizers)} optimizers; want one")
        self.pruner = Pruner(pl_module, self.plan, trainer.optimizers[0], state=self._saved)
        self._steps = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Any
    ) -> None:
        """Keep what tells a step from one that the gradient scaler skips."""
        self._scale = _scale(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gradients are still there: Lightning zeroes them before the next backward."""
        if self.pruner is None or trainer.global_step == self._steps:
            return  # gradients are still being accumulated
        self._steps = trainer.global_step
        if _scale(trainer) < self._scale:  # gradients have overflowed float16: the step was skipped
            return
        event = self.pruner.step(next(iter(sparse_layers(pl_module).values())).active)
        if event is not None:
            self.events.append(event)
            pl_module.log_dict({"prune/density": event.density, "prune/iou": event.iou})

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let the optimiser go."""
        if self.pruner is not None:
            self._saved = self.pruner.state_dict()
            self.pruner.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"pruner": self.pruner.state_dict() if self.pruner is not None else self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before training starts."""
        self._saved = state_dict["pruner"]


def _scale(trainer: lightning.Trainer) -> float:
    """Factor of the gradients under float16 mixed precision, which falls where a step is skipped; 0.0 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 0.0 if scaler is None else float(scaler.get_scale())
