"""Optimiser step to target sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pathways.checks import check_sparsity


def check_steps(name: str, value: int) -> None:
    """Refuse a count of optimiser steps that is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} = {value!r}; want a whole number of optimiser steps")


@dataclass(frozen=True)
class Constant:
    """The same sparsity at every step."""

    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "Constant.sparsity")

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
        check_sparsity(self.initial, "Cubic.initial")
        check_sparsity(self.final, "Cubic.final")
        check_steps("Cubic.begin", self.begin)
        check_steps("Cubic.end", self.end)
        if not 0 <= self.begin <= self.end:
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
        for step, _ in self.levels:
            check_steps("Milestones.levels", step)
        object.__setattr__(self, "levels", tuple((int(step), float(level)) for step, level in self.levels))
        if not self.levels:
            raise ValueError("Milestones.levels is empty; want ((step, sparsity), ...)")
        for _, level in self.levels:
            check_sparsity(level, "Milestones.levels")
        steps = [step for step, _ in self.levels]
        if steps != sorted(set(steps)) or steps[0] < 0:
            raise ValueError(f"Milestones.levels has steps {steps}; want rising steps from 0 on")

    def __call__(self, step: int) -> float:
        """Sparsity in [0, 1] after `step` optimiser steps."""
        reached = [level for start, level in self.levels if start <= step]
        return reached[-1] if reached else 0.0


Schedule = Constant | Cubic | Milestones
