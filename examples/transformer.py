"""Dynamic pathways of two tasks in torch.nn.Transformer: copy, and reverse. `python examples/transformer.py`"""

import torch
from torch import nn

import sparse_pathways as sp

TASKS = ("copy", "reverse")
SYMBOLS, LENGTH, WIDTH = 12, 6, 64


class Seq2Seq(nn.Module):
    """Embedding, learned positions, nn.Transformer, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 1, WIDTH)  # the last one starts a sequence
        self.position = nn.Parameter(torch.randn(LENGTH + 1, WIDTH) * 0.1)
        self.core = nn.Transformer(WIDTH, 4, 2, 2, 128, dropout=0.0, batch_first=True)
        self.classify = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, source: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Logits of the next symbol: source `[B, L]`, symbols before each `[B, L]` -> `[B, L, symbols]`."""
        causal = nn.Transformer.generate_square_subsequent_mask(before.shape[1])
        inputs = [self.embed(s) + self.position[: s.shape[1]] for s in (source, before)]
        return self.classify(self.core(*inputs, tgt_mask=causal, tgt_is_causal=True))


def main(steps: int = 500) -> dict[str, float]:
    """Train and prune; returns what it prints."""
    torch.manual_seed(0)
    model = Seq2Seq()

    sp.sparsify_(model, block=(8, 1), pathways=TASKS, filter_fn=lambda module, name: name.startswith("core"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pruner = sp.Pruner(model, sp.methods.dynamic_asr_pathways(TASKS, sparsity=0.8, steps=steps), optimizer)
    right = {}
    for step in range(steps):
        task = TASKS[step % 2]
        source = torch.randint(SYMBOLS, (64, LENGTH))
        wanted = source if task == "copy" else source.flip(1)
        before = nn.functional.pad(wanted[:, :-1], (1, 0), value=SYMBOLS)
        with sp.pathway(model, task):
            logits = model(source, before)
        nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
        pruner.step(task)
        optimizer.zero_grad()
        right[task] = float((logits.argmax(-1) == wanted).float().mean())

    overlap = float(sp.overlap(model)["total"][0, 1])
    return {**right, "density": sp.density(model)["total"], "IoU of the tasks": overlap}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3g}")
