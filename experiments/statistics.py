"""From result files to means, spreads and paired differences with intervals."""

import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """The cells of one method at one sparsity, by seed.

    Attributes:
        results: content of the result files by seed; may miss seeds that are not measured yet.
        wanted: number of seeds in the list.
    """

    name: str
    sparsity: float
    results: dict[int, dict[str, Any]]
    wanted: int

    @property
    def label(self) -> str:
        """What tables call it."""
        return next(iter(self.results.values()))["row"]

    @property
    def languages(self) -> list[str]:
        """Languages it was measured on."""
        return next(iter(self.results.values()))["languages"]

    @property
    def seeds(self) -> str:
        """How many seeds are there."""
        return f"{len(self.results)}" if len(self.results) == self.wanted else f"{len(self.results)} of {self.wanted}"

    def wer(self, language: str | None = None) -> list[float]:
        """Word error rate per seed, of a language or the mean over languages."""
        if language is None:
            return [result["wer_mean"] for result in self.results.values()]
        return [result["test"][language]["wer"] for result in self.results.values()]

    def mean(self, language: str | None = None) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.wer(language))

    def spread(self) -> float | None:
        """Standard deviation of the mean word error rate over seeds; None with one seed."""
        return statistics.stdev(self.wer()) if len(self.results) > 1 else None

    def mean_of(self, *path: str) -> float:
        """Mean over seeds of a number deep in the results."""
        values = []
        for result in self.results.values():
            value: Any = result
            for key in path:
                value = value[key]
            values.append(float(value))
        return statistics.fmean(values)


@dataclass(frozen=True)
class Difference:
    """Word error rate of one row against another, on the seeds that both have.

    Attributes:
        relative: (a - b) / b of the means over seeds and languages; below 0: a is better.
        low, high: interval of it, by resampling utterances.
        by_seed: the same of each seed alone.
    """

    relative: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    def verdict(self) -> str:
        """ "lower" or "higher" when the interval and all seeds agree, else "open"."""
        if self.high < 0 and max(self.by_seed) < 0:
            return "lower"
        if self.low > 0 and min(self.by_seed) > 0:
            return "higher"
        return "open"


class Results:
    """All result files of a folder."""

    def __init__(self, folder: Path, wanted: dict[tuple[str, float], list[int]], keys: dict[str, str]) -> None:
        """`wanted`: seeds of the list by name and sparsity. `keys`: title to key; a file with another one is stale."""
        self.wanted = wanted
        self._found: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
        self.stale: list[str] = []
        for path in sorted(folder.glob("*.json")):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise SystemExit(f"{path} is damaged ({error}); delete it to have the cell measured again") from error
            if keys.get(path.stem) != result["key"]:
                self.stale.append(path.stem)
                continue
            self._found.setdefault((result["name"], result["sparsity"]), {})[result["seed"]] = result

    @property
    def empty(self) -> bool:
        """Whether nothing of the list is there."""
        return not self._found

    def row(self, name: str, sparsity: float) -> Row | None:
        """What is there of a method at a sparsity; None: nothing yet."""
        found = self._found.get((name, sparsity))
        if not found:
            return None
        return Row(name, sparsity, dict(sorted(found.items())), len(self.wanted[name, sparsity]))

    @cached_property
    def draws(self) -> np.ndarray:
        """How often each resample takes each utterance of a language: `[RESAMPLES, utterances]`."""
        first = next(iter(next(iter(self._found.values())).values()))
        count = len(next(iter(first["test"].values()))["errors"])
        generator = np.random.default_rng(0)
        return generator.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)

    def compare(self, a: Row, b: Row) -> Difference | None:
        """Row a against row b; None when they share no seed."""
        seeds = [seed for seed in a.results if seed in b.results]
        if not seeds:
            return None
        rates = [self._resampled(row, seeds, a.languages) for row in (a, b)]
        ratios = rates[0] / rates[1] - 1
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(ratios, [tail, 100 - tail])
        means = [[_mean_wer(row.results[seed], a.languages) for seed in seeds] for row in (a, b)]
        by_seed = tuple(first / second - 1 for first, second in zip(*means, strict=True))
        relative = statistics.fmean(means[0]) / statistics.fmean(means[1]) - 1
        return Difference(relative, float(low), float(high), by_seed)

    def _resampled(self, row: Row, seeds: list[int], languages: list[str]) -> np.ndarray:
        """Mean word error rate of every resample; the same draws for all rows, so that differences are paired."""
        rates = []
        for place, language in enumerate(languages):
            draws = np.roll(self.draws, place, axis=0)  # languages are drawn apart
            for seed in seeds:
                own = row.results[seed]["test"][language]
                rates.append(draws @ np.array(own["errors"]) / (draws @ np.array(own["words"])))
        return np.mean(rates, axis=0)


def _mean_wer(result: dict[str, Any], languages: list[str]) -> float:
    return statistics.fmean(result["test"][language]["wer"] for language in languages)
