"""What a user may choose: the model, the synthetic corpus, a training run, a pruning run.

The demo's recipe is the set of defaults below. Every class checks itself; the command line takes its help from the
docstrings.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "fr", "it", "nl")


SCORES = ("magnitude", "gradient", "movement", "learned")


def _at_least(owner: object, minimum: float, *names: str) -> None:
    for name in names:
        if getattr(owner, name) is None or not getattr(owner, name) >= minimum:
            raise ValueError(f"{type(owner).__name__}.{name} = {getattr(owner, name)}; want at least {minimum}")


def _share(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) is None or not 0.0 <= getattr(owner, name) < 1.0:
            raise ValueError(f"{type(owner).__name__}.{name} = {getattr(owner, name)}; want a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A streaming Emformer RNN-T, about 3.8 million parameters as it stands.

    Args:
        d_model: Width of the encoder.
        heads: Attention heads.
        ffn: Inner width of the feed-forward blocks.
        layers: Emformer layers.
        segment_frames: Input frames (10 ms) the encoder takes at a time; a multiple of stride.
        right_context_frames: Input frames of look-ahead after a segment; a multiple of stride.
        stride: Input frames joined into one encoder frame (8: 80 ms).
        left_context: Encoder frames of past that attention may look at.
        dropout: Dropout in the encoder; a run of a few epochs has no use for it, a long one wants 0.1.
        encoding: Width of the vectors that encoder and predictor give to the joiner.
        embedding: Width of the predictor (symbol embedding and LSTM).
        lstm_layers: LSTM layers of the predictor.
        predictor_dropout: Dropout after each LSTM layer.
        vocab: Sentence pieces wanted, without the blank; a small corpus may yield fewer. Fewer pieces make longer
            targets, and the CTC loss needs more encoder frames than pieces: 128 would be too few for a fifth of the
            synthetic sentences.
    """

    d_model: int = 256
    heads: int = 4
    ffn: int = 1024
    layers: int = 4
    segment_frames: int = 32
    right_context_frames: int = 8
    stride: int = 8
    left_context: int = 15
    dropout: float = 0.0
    encoding: int = 256
    embedding: int = 256
    lstm_layers: int = 1
    predictor_dropout: float = 0.2
    vocab: int = 192

    def __post_init__(self) -> None:
        _at_least(self, 1, "d_model", "heads", "ffn", "layers", "segment_frames", "right_context_frames", "stride")
        _at_least(self, 1, "left_context", "encoding", "embedding", "lstm_layers", "vocab")
        _share(self, "dropout", "predictor_dropout")
        for name, divisor in (
            ("d_model", "heads"),
            ("d_model", "stride"),
            ("segment_frames", "stride"),
            ("right_context_frames", "stride"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"ModelConfig.{name} = {getattr(self, name)}; want a multiple of {divisor} = "
                    f"{getattr(self, divisor)}"
                )


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A corpus spoken by espeak-ng: short commands, times, dates and numbers in four languages.

    No sentence is in two splits, and no voice of the test split is heard in training.

    Args:
        languages: Which of the languages of sentences.json.
        train: Utterances per language to train on.
        dev: Utterances per language to follow training with.
        test: Utterances per language for the reported word error rate.
        train_voices: Voice variants of espeak-ng heard in training.
        dev_voices: Voice variants of the dev split.
        test_voices: Voice variants of the test split.
        rate: Lowest and highest speaking rate, in words a minute.
        pitch: Lowest and highest base pitch, 0 to 100.
        pitch_range: Lowest and highest liveliness of the pitch, 0 to 100.
        telephone: Share of the utterances that lose all above 4 kHz, as a recording at 8 kHz has.
        silence_s: Shortest and longest silence before and after the speech, in seconds.
        noise_db: Lowest and highest ratio of speech to added noise, in decibels.
        level_db: Lowest and highest peak level, in decibels below full scale (0: full scale).
        seed: Same seed, same corpus.
        workers: Processes that synthesise.
    """

    languages: tuple[str, ...] = LANGUAGES
    train: int = 1500
    dev: int = 40
    test: int = 150
    train_voices: tuple[str, ...] = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3")
    dev_voices: tuple[str, ...] = ("f5",)
    test_voices: tuple[str, ...] = ("m7", "f4")
    rate: tuple[int, int] = (140, 210)
    pitch: tuple[int, int] = (30, 70)
    pitch_range: tuple[int, int] = (30, 70)
    telephone: float = 0.25
    silence_s: tuple[float, float] = (0.0, 0.15)
    noise_db: tuple[float, float] = (30.0, 60.0)
    level_db: tuple[float, float] = (3.0, 20.0)
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        _at_least(self, 1, "train", "dev", "test", "workers")
        _at_least(self, 0, "seed")
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise ValueError(f"CorpusConfig.languages = {self.languages}; want at least one, each once")
        _share(self, "telephone")
        for name in ("rate", "pitch", "pitch_range", "silence_s", "noise_db", "level_db"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"CorpusConfig.{name} = {(low, high)}; want 0 <= lowest <= highest")
        splits = {name: set(getattr(self, f"{name}_voices")) for name in ("train", "dev", "test")}
        for name, voices in splits.items():
            if not voices:
                raise ValueError(f"CorpusConfig.{name}_voices is empty; want at least one voice")
        if shared := splits["test"] & (splits["train"] | splits["dev"]):
            raise ValueError(
                f"CorpusConfig.test_voices shares {', '.join(sorted(shared))} with train_voices or dev_voices; "
                "the test split must have voices of its own"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has. Steps are optimiser steps; a batch is of one language.

    Args:
        data: Corpus folder (or its manifest); the splits "train" and "dev" are used.
        out: Folder of the run: checkpoint.pt, model.pt, log.jsonl, config.json.
        steps: Optimiser steps.
        batch: Utterances per process and step.
        lr: Highest learning rate of AdamW.
        warmup: Steps over which the learning rate rises to lr.
        hold: Share of the steps after which it falls, linearly.
        final_lr: Learning rate at the last step, as a share of lr.
        weight_decay: Decoupled weight decay.
        clip: Largest norm of the gradient.
        ctc_weight: Weight of the CTC loss beside the RNN-T loss.
        bands: Frequency bands hidden per utterance (SpecAugment).
        band_bins: Widest hidden band, in mel bins.
        spans: Time spans hidden per utterance.
        span_frames: Longest hidden span, in frames of 10 ms; never more than a fifth of the utterance.
        language_alpha: Languages are drawn in proportion to their hours to this power (1: as they are, 0: all alike).
        seed: Same seed, data and number of processes, same run.
        threads: CPU threads per process; 0 leaves PyTorch's choice.
        mixed_precision: "no", or "bf16" on hardware that has it.
        eval_every: Steps between word error rates on the dev split.
        checkpoint_every: Steps between checkpoints; one is also written when the run is interrupted.
        progress: Show a progress bar.
    """

    data: Path
    out: Path
    steps: int
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 100
    hold: float = 0.4
    final_lr: float = 0.02
    weight_decay: float = 0.01
    clip: float = 5.0
    ctc_weight: float = 0.5
    bands: int = 2
    band_bins: int = 15
    spans: int = 1
    span_frames: int = 12
    language_alpha: float = 0.5
    seed: int = 0
    threads: int = 0
    mixed_precision: str = "no"
    eval_every: int = 500
    checkpoint_every: int = 500
    progress: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch", "eval_every", "checkpoint_every")
        _at_least(self, 0, "warmup", "weight_decay", "ctc_weight", "seed", "threads", "language_alpha")
        _at_least(self, 0, "bands", "band_bins", "spans", "span_frames")
        _share(self, "hold")
        for name in ("lr", "clip", "final_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{type(self).__name__}.{name} = {getattr(self, name)}; want more than 0")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"{type(self).__name__}.mixed_precision = {self.mixed_precision!r}; want 'no' or 'bf16'")

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, constant, linear decay."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = (1 - step / self.steps) / (1 - self.hold)
        return self.lr * rise * min(1.0, max(self.final_lr, fall))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A dense training run, and the demo's recipe.

    Args:
        steps: Optimiser steps.
        ctc_only_steps: Steps at the start with the CTC loss alone. Without them the predictor learns the sentences by
            heart before the encoder hears anything, and the model never recovers.
        model: Sizes of the model.
    """

    steps: int = 1600
    ctc_only_steps: int = 300
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 0, "ctc_only_steps")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(RunConfig):
    """A pruning run: decide masks while training on from a dense or an already pruned model.

    Args:
        start: Trained model: a run folder or its model.pt. A pruned one keeps its masks and is pruned further.
        steps: Optimiser steps; the sparsity is reached after half of them.
        lr: Highest learning rate of AdamW.
        warmup: Steps over which the learning rate rises to lr.
        method: A method of sp.methods, such as "lap" (one mask for all languages) or "dynamic_asr_pathways" (one
            pathway per language).
        score: What ranks the blocks: "magnitude", "gradient", "movement" or "learned"; None: the method's own choice,
            with dynamic_asr_pathways |w * g| over a long average (what experiments/results.md found best).
        sparsity: Share of blocks removed in the end.
        block: Outputs by inputs of a block; must be that of the start model if it is pruned already.
        scope: "layer": every layer gets the sparsity. "global": all layers together, their blocks are ranked as one;
            given, it holds for source, too.
            None: global with dynamic_asr_pathways (found best, too), layer with other methods.
        interval: Steps (with a mask per language: of that language) between two decisions; None: from steps.
        freeze: Step after which the masks stay; None: after 70 % of the steps.
        options: Further arguments of the method in sp.methods, such as {"dense_grad": false} or {"levels": 6}.
        source: Make the masks to begin with first: "lsp" by one run per language, "lap" by one run on all of them; the
            method then trains on from these. None: the masks of the start model.
        source_sparsity: Of the masks that source makes; None: the final sparsity.
        source_steps: Steps of the run, or of each run, that source makes.
        distil: Weight of the distance between the outputs of the model and those of the start model, beside the other
            losses. 0: the start model does not teach.
    """

    start: Path
    steps: int = 400
    lr: float = 5e-4
    warmup: int = 50
    method: str = "dynamic_asr_pathways"
    score: str | None = None
    sparsity: float = 0.7
    block: tuple[int, int] = (8, 1)
    scope: str | None = None
    interval: int | None = None
    freeze: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    source_sparsity: float | None = None
    source_steps: int = 250
    distil: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "sparsity")
        _at_least(self, 1, "source_steps")
        _at_least(self, 0, "distil")
        for name in ("interval", "freeze"):
            if getattr(self, name) is not None:
                _at_least(self, 1, name)
        if len(self.block) != 2 or any(side < 1 for side in self.block):
            raise ValueError(
                f"PruneConfig.block = {self.block}; want outputs by inputs, both at least 1, such as (8, 1)"
            )
        if self.score not in (None, *SCORES):
            raise ValueError(f"PruneConfig.score = {self.score!r}; want one of {', '.join(SCORES)}")
        if self.scope not in (None, "layer", "global"):
            raise ValueError(f"PruneConfig.scope = {self.scope!r}; want layer, global or nothing")
        if self.source not in (None, "lap", "lsp"):
            raise ValueError(f"PruneConfig.source = {self.source!r}; want lap, lsp or nothing")
        if self.source_sparsity is not None and not 0.0 <= self.source_sparsity <= self.sparsity:
            raise ValueError(
                f"PruneConfig.source_sparsity = {self.source_sparsity}; want a share of at most sparsity = "
                f"{self.sparsity}"
            )
