"""Optimiser step to target sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pathways.checks import check_count, check_sparsity, set_plain


def check_steps(name: str, value: int, least: int = 0) -> int:
    """A count of optimiser steps, as int."""
    return check_count(name, value, least, "optimiser steps")


@dataclass(frozen=True)
class Constant:
    """The same sparsity at every step."""

    sparsity: float

    def __post_init__(self) -> None:
        set_plain(self, "sparsity", check_sparsity(self.sparsity, "Constant.sparsity"))

    def __call__(self, step: int) -> float:
        """Sparsity in [0, 1] after `step` optimiser steps."""
        return self.sparsity


@dataclass(frozen=True)
class Cubic:
    """From `initial` at step `begin` to `final` at step `end`, fast first, slow last.

    Source: gradual magnitude pruning (arXiv 1710.01878), equation 1.
    """

    initial: float
    final: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            set_plain(self, name, check_sparsity(getattr(self, name), f"Cubic.{name}"))
        for name in ("begin", "end"):
            set_plain(self, name, check_steps(f"Cubic.{name}", getattr(self, name)))
        if self.begin > self.end:
            raise ValueError(f"Cubic.begin = {self.begin}, end = {self.end}; want 0 <= begin <= end (optimiser steps)")

    def __call__(self, step: int) -> float:
        """Sparsity in [0, 1] after `step` optimiser steps."""
        if step >= self.end:
            return self.final
        if step <= self.begin:
            return self.initial
        left = 1.0 - (step - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3


@dataclass(frozen=True)
class Milestones:
    """Steps of a staircase: `((step, sparsity), ...)`; before the first one nothing is pruned."""

    levels: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        try:
            pairs = [(step, level) for step, level in self.levels]
        except (TypeError, ValueError):
            raise TypeError(f"Milestones.levels = {self.levels!r}; want ((step, sparsity), ...)") from None
        name = "Milestones.levels"
        levels = tuple((check_steps(name, step), check_sparsity(level, name)) for step, level in pairs)
        if not levels:
            raise ValueError("Milestones.levels is empty; want ((step, sparsity), ...)")
        set_plain(self, "levels", levels)
        steps = [step for step, _ in levels]
        if steps != sorted(set(steps)):
            raise ValueError(f"Milestones.levels has steps {steps}; want rising steps from 0 on")

    def __call__(self, step: int) -> float:
        """Sparsity in [0, 1] after `step` optimiser steps."""
        reached = [level for start, level in self.levels if start <= step]
        return reached[-1] if reached else 0.0


Schedule = Constant | Cubic | Milestones
