"""`python -m benchmarks.update`: what one decision of masks costs at the size of torchaudio's Emformer RNN-T base.

Its 20 encoder layers and 3 predictor LSTM layers hold 69 of its 77 million parameters, and all of them are prunable.
"""

import argparse
import statistics
import time

import torch
from torch import nn

import sparse_pathways as sp

LAYER = ((512, 512), (1024, 512), (512, 512), (2048, 512), (512, 2048))  # query, key and value, output, feed-forward
LSTM = ((2048, 512), (2048, 512))
LANGUAGES = ("en", "fr", "it", "nl")


def make_model(layers: int = 20, lstm_layers: int = 3) -> nn.Module:
    """The prunable weights alone, in blocks of 8x1."""
    shapes = [shape for _ in range(layers) for shape in LAYER] + [shape for _ in range(lstm_layers) for shape in LSTM]
    modules = nn.ModuleList(nn.Linear(k, n, bias=False) for n, k in shapes)
    return sp.sparsify_(modules, block=(8, 1), pathways=LANGUAGES)


def decisions(model: nn.Module, score: str, masks: str, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of steps that decide, and of those that only watch gradients, once masks are at 70 %."""
    method = sp.methods.lap if masks == "shared" else sp.methods.dynamic_asr_pathways
    plan = method(LANGUAGES, 0.7, schedule=sp.Constant(0.7), interval=2, score=score, init="magnitude")
    pruner = sp.Pruner(model, plan)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    decided, watched = [], []
    for number in range(2 * repeats + 2):
        begin = time.perf_counter()
        event = pruner.step("en")
        spent = 1e3 * (time.perf_counter() - begin)
        if number >= 2:
            (watched if event is None else decided).append(spent)
    return decided, watched


def main() -> None:
    """Print a line per kind of decision."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args.layers)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.1f} million prunable weights, blocks 8x1, {args.threads} thread(s); median [min, max] ms")
    for score in ("magnitude", "gradient"):
        for masks in ("own", "shared"):
            decided, watched = decisions(model, score, masks, args.repeats)
            spread = f"[{min(decided):.0f}, {max(decided):.0f}]"
            text = f"{score}, {masks} mask: one decision {statistics.median(decided):.0f} {spread}"
            print(text + (f", every other step {statistics.median(watched):.0f}" if score == "gradient" else ""))


if __name__ == "__main__":
    main()
