"""Prune a small Hugging Face model, built from a config, with its Trainer. `python examples/hugging_face.py`

Needs the extra `transformers`.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import sparse_pathways as sp
from sparse_pathways.integrations.transformers import PruningCallback


def questions(count: int) -> list[dict[str, torch.Tensor]]:
    """Is there more of symbol 1 than of symbol 2?"""
    draw = torch.Generator().manual_seed(count)
    tokens = torch.randint(1, 6, (count, 16), generator=draw)
    labels = ((tokens == 1).sum(1) > (tokens == 2).sum(1)).long()
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def main(steps: int = 300) -> dict[str, float]:
    """Train and prune; returns what it prints."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)

    sp.sparsify_(model, block=(8, 1), filter_fn=lambda module, name: "encoder" in name)
    pruning = PruningCallback(sp.methods.adaptive(sparsity=0.8, steps=steps, score="gradient"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-3, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=questions(4000), callbacks=[pruning]).train()

    test = questions(500)
    with torch.inference_mode():
        logits = model.eval()(torch.stack([one["input_ids"] for one in test])).logits
    right = (logits.argmax(-1) == torch.stack([one["labels"] for one in test])).float().mean()
    return {"accuracy": float(right), "density": sp.density(model)["total"], "decisions": len(pruning.events)}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3g}")
