"""Dynamic pathways of two languages in torchaudio's Emformer RNN-T, on noise that stands for speech.

`python examples/rnnt.py`; for real speech: `sparse-pathways prune`.
"""

import torch
from torchaudio.functional import rnnt_loss
from torchaudio.models import emformer_rnnt_model

import sparse_pathways as sp

LANGUAGES = ("en", "fr")
SYMBOLS = 20  # the last one is the blank


def small_rnnt() -> torch.nn.Module:
    """torchaudio's model with small sizes."""
    return emformer_rnnt_model(
        input_dim=80, encoding_dim=64, num_symbols=SYMBOLS, segment_length=16, right_context_length=4,
        time_reduction_input_dim=16, time_reduction_stride=4, transformer_num_heads=4, transformer_ffn_dim=128,
        transformer_num_layers=2, transformer_dropout=0.0, transformer_activation="gelu",
        transformer_left_context_length=8, transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True, symbol_embedding_dim=32,
        num_lstm_layers=1, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3, lstm_dropout=0.0,
    )  # fmt: skip


def batch(language: str, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Four utterances: every symbol is four frames of its own spectrum, other symbols in each language."""
    first = 0 if language == "en" else 10
    targets = torch.randint(first, first + 9, (4, 8), generator=draw, dtype=torch.int32)
    spectra = torch.randn(SYMBOLS, 80, generator=torch.Generator().manual_seed(0))
    frames = spectra[targets.long()].repeat_interleave(4, 1)
    frames = torch.nn.functional.pad(frames + 0.1 * torch.randn(frames.shape, generator=draw), (0, 0, 0, 4))
    return frames, torch.full((4,), 32), targets, torch.full((4,), 8, dtype=torch.int32)


def main(steps: int = 120) -> dict[str, float]:
    """Train and prune; returns what it prints."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    model = small_rnnt()

    sp.sparsify_(model, block=(8, 1), pathways=LANGUAGES, filter_fn=lambda module, name: "joiner" not in name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    plan = sp.methods.dynamic_asr_pathways(LANGUAGES, sparsity=0.7, steps=steps)
    pruner = sp.Pruner(model, plan, optimizer)
    losses = []
    for step in range(steps):
        language = LANGUAGES[step % 2]
        frames, lengths, targets, target_lengths = batch(language, draw)
        with sp.pathway(model, language):
            history = torch.nn.functional.pad(targets, (1, 0), value=SYMBOLS - 1)
            logits, logit_lengths, _, _ = model(frames, lengths, history, target_lengths + 1)
            loss = rnnt_loss(logits.contiguous(), targets, logit_lengths.int(), target_lengths, blank=SYMBOLS - 1)
        loss.backward()
        optimizer.step()
        pruner.step(language)
        optimizer.zero_grad()
        losses.append(loss.item())

    return {
        "first loss": losses[0],
        "last loss": sum(losses[-10:]) / 10,
        "density": sp.density(model)["total"],
        "IoU of the languages": float(sp.overlap(model)["total"][0, 1]),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3g}")
