"""How well and how fast a recogniser works: word error rates, agreement of two forms of one model, latency, operators.

All figures come from the same utterances, loaded once (`load_examples`). Times are taken on one pinned thread, the
contenders taking turns on every utterance, so that a change in the machine's load meets them all.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import jiwer
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparse_pathways.asr import decode
from sparse_pathways.asr.corpus import SAMPLE_RATE, Utterance, read_audio
from sparse_pathways.asr.features import LogMel
from sparse_pathways.asr.model import Recogniser
from sparse_pathways.asr.text import normalise
from sparse_pathways.asr.transcribe import Streamer, language_pathway

Name = TypeVar("Name", bound=Hashable)

PACKED_OPERATORS = "sparse_pathways::"  # all the operators of the package: products and LSTM steps


@dataclass(frozen=True)
class Example:
    """One utterance ready for decoding."""

    language: str
    reference: str
    """Normalised transcript."""
    wave: Tensor
    """`[S]` samples at 16 kHz."""
    features: Tensor
    """`[T, 80]` frames, not normalised by the model."""

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.wave) / SAMPLE_RATE


class LanguageResult(TypedDict):
    """Errors of one model on one language."""

    wer: float
    errors: int
    words: int
    deletions: int
    utterances: int
    hypotheses: list[str]


class Latency(TypedDict):
    """Milliseconds of computation per second of audio: median over utterances, with the middle 80 %."""

    median: float
    p10: float
    p90: float


class OperatorProfile(TypedDict):
    """How often the packed product ran while decoding, and its share of the operators' time."""

    operator: str
    calls: int
    share: float
    top: list[tuple[str, int, float]]


def load_examples(utterances: Sequence[Utterance]) -> list[Example]:
    """Read audio and compute features of `utterances`; `sp.FormatError` names the first bad file."""
    log_mel = LogMel()
    examples = []
    for utterance in utterances:
        wave = read_audio(utterance)
        reference = normalise(utterance.text, utterance.language)
        examples.append(Example(utterance.language, reference, wave, log_mel(wave)))
    return examples


def evaluate(model: Recogniser, examples: Sequence[Example], *, batch: int = 16) -> dict[str, LanguageResult]:
    """Decode `examples` greedily in batches of one language and count word errors.

    Args:
        model: dense, masked or packed; set to eval mode, the pathway of each language is chosen for its batches.
        examples: from `load_examples`, any order.
        batch: utterances decoded at once; grouped by length.

    Returns:
        Result per language, in the order of their first examples; `hypotheses` in the order of the examples.

    Raises:
        ValueError: a language the model does not know.
    """
    model.eval()
    by_language: dict[str, list[Example]] = {}
    for example in examples:
        by_language.setdefault(example.language, []).append(example)
    return {language: _evaluate_language(model, language, own, batch) for language, own in by_language.items()}


def _evaluate_language(model: Recogniser, language: str, examples: Sequence[Example], batch: int) -> LanguageResult:
    hypotheses = [""] * len(examples)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].features))
    with language_pathway(model, language), torch.inference_mode():
        for begin in range(0, len(by_length), batch):
            chosen = by_length[begin : begin + batch]
            features = [examples[i].features for i in chosen]
            lengths = torch.tensor([len(f) for f in features])
            enc, enc_lengths = model.encode(torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths)
            for i, tokens in zip(chosen, decode.greedy(model, enc, enc_lengths), strict=True):
                hypotheses[i] = model.tokenizer.decode(tokens)
    counts = jiwer.process_words([e.reference for e in examples], hypotheses)
    errors = counts.substitutions + counts.deletions + counts.insertions
    words = counts.hits + counts.substitutions + counts.deletions
    return LanguageResult(
        wer=counts.wer,
        errors=errors,
        words=words,
        deletions=counts.deletions,
        utterances=len(examples),
        hypotheses=hypotheses,
    )


def average_wer(results: Mapping[str, LanguageResult]) -> float:
    """Mean of the languages' word error rates, every language counting the same."""
    return statistics.fmean(result["wer"] for result in results.values())


def agreement(first: Mapping[str, LanguageResult], second: Mapping[str, LanguageResult]) -> float:
    """Share of utterances on which two evaluations of the same examples gave the same text."""
    if first.keys() != second.keys():
        raise ValueError(f"the evaluations cover {list(first)} and {list(second)}; want the same languages")
    same = [
        a == b
        for language in first
        for a, b in zip(first[language]["hypotheses"], second[language]["hypotheses"], strict=True)
    ]
    return statistics.fmean(same)


def dense_bytes(model: Recogniser) -> int:
    """Bytes that the parameters take in dense fp32, without the CTC head that only training needs."""
    numbers = (parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("ctc."))
    return 4 * sum(numbers)


def select_per_language(examples: Sequence[Example], count: int) -> list[Example]:
    """Take `count` examples of every language, spread over its range of lengths."""
    chosen = []
    for language in dict.fromkeys(example.language for example in examples):
        own = sorted((e for e in examples if e.language == language), key=lambda e: len(e.wave))
        take = min(count, len(own))
        chosen += [own[(2 * i + 1) * len(own) // (2 * take)] for i in range(take)]
    return chosen


@contextlib.contextmanager
def pinned_thread() -> Iterator[str]:
    """One torch thread on one core for the duration of the block; yields a description of what could be done."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if cores is None:
            yield "one thread, not pinned (this system has no CPU affinity)"
        else:
            os.sched_setaffinity(0, {max(cores)})
            yield f"one thread, pinned to core {max(cores)}"
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def stream(model: Recogniser, example: Example, *, chunk_s: float = 0.16) -> tuple[str, float]:
    """Transcribe one example as a stream; returns the text and the seconds of computation it took."""
    pieces = example.wave.split(round(chunk_s * SAMPLE_RATE))
    streamer = Streamer(model, example.language)
    begin = time.perf_counter()
    for samples in pieces:
        streamer.push(samples)
    streamer.finish()
    return streamer.text, time.perf_counter() - begin


def latency(
    contenders: Mapping[Name, Recogniser], examples: Sequence[Example], *, repeats: int = 3
) -> tuple[dict[Name, Latency], str]:
    """Time streaming transcription, features and search included.

    Args:
        contenders: models by name.
        examples: utterances to transcribe; each is transcribed `repeats` times by every contender, taking turns, and
            the median of these counts for the utterance.
        repeats: runs per utterance and contender.

    Returns:
        Figures per contender, and how the thread was pinned.
    """
    samples: dict[Name, list[float]] = {name: [] for name in contenders}
    with pinned_thread() as pinned:
        for model in contenders.values():
            stream(model, examples[0])
        for example in examples:
            runs: dict[Name, list[float]] = {name: [] for name in contenders}
            for _ in range(repeats):
                for name, model in contenders.items():
                    runs[name].append(stream(model, example)[1])
            for name, seconds in runs.items():
                samples[name].append(1e3 * statistics.median(seconds) / example.seconds)
    return {name: _spread(values) for name, values in samples.items()}, pinned


def _spread(values: Sequence[float]) -> Latency:
    p10, median, p90 = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    return Latency(median=float(median), p10=float(p10), p90=float(p90))


def operator_profile(model: Recogniser, examples: Sequence[Example], *, top: int = 6) -> OperatorProfile:
    """Record the operators of streaming transcription and find the packed product among them.

    Args:
        model: usually packed.
        examples: utterances to transcribe.
        top: how many of the costliest operators to list, each as (name, calls, milliseconds of its own); the packed
            product comes after them if it is not among them.
    """
    with pinned_thread():
        stream(model, examples[0])
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for example in examples:
                stream(model, example)
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    packed = [event for event in events if event.key.startswith(PACKED_OPERATORS)]
    costly = sorted(events, key=lambda event: event.self_cpu_time_total, reverse=True)
    costly = costly[:top] + [event for event in packed if event not in costly[:top]]
    return OperatorProfile(
        operator=f"{PACKED_OPERATORS}*",
        calls=sum(event.count for event in packed),
        share=sum(event.self_cpu_time_total for event in packed) / total,
        top=[(event.key, event.count, event.self_cpu_time_total / 1e3) for event in costly],
    )
