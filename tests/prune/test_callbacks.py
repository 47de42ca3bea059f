"""Callbacks of Lightning and Hugging Face's Trainer: the masks of a plain loop, also over a checkpoint and with
accumulated gradients."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparse_pathways as sp

LANGUAGES = ("en", "fr")
STEPS = 12
PLAN = replace(sp.methods.dynamic_asr_pathways(LANGUAGES, 0.6, steps=STEPS), interval=2)


def data():
    draw = torch.Generator().manual_seed(0)
    return [(LANGUAGES[i // 2 % 2], torch.randn(8, 10, generator=draw)) for i in range(STEPS)]


def target(name, x):
    return x[:, :6] * (1 if name == "en" else -1)


def plain(toy, accumulate=1):
    model = toy.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sp.Pruner(model, replace(PLAN), optimizer)
    for number, (name, x) in enumerate(data(), 1):
        sp.set_pathway(model, name)
        ((model(x) - target(name, x)).square().mean() / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            pruner.step(name)
            optimizer.zero_grad()
    return model


def assert_same(model, wanted):
    for name, layer in sp.sparse_layers(wanted).items():
        found = model.get_submodule(name)
        assert torch.equal(found.block_mask, layer.block_mask), name
        torch.testing.assert_close(found.weight, layer.weight)


def lightning_module(model):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            ((name,), x) = batch[0], batch[1][0]
            sp.set_pathway(self, name)
            return (self.model(x) - target(name, x)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module(model)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(toy, tmp_path, accumulate):
    lightning = pytest.importorskip("lightning")
    from sparse_pathways.integrations.lightning import PruningCallback

    def fit(module, batches, checkpoint=None, epochs=1):
        callback = PruningCallback(PLAN)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=[callback], default_root_dir=tmp_path, logger=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
            enable_checkpointing=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(batches, batch_size=1, shuffle=False)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer, callback

    module = lightning_module(toy.make_model())
    trainer, callback = fit(module, data())
    assert_same(module.model, plain(toy, accumulate))
    assert callback.pruner.steps == STEPS // accumulate and len(callback.events) > 0
    if accumulate == 1:  # half, saved, and the other half
        first = lightning_module(toy.make_model())
        trainer, _ = fit(first, data()[:6])
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        second = lightning_module(toy.make_model())
        _, callback = fit(second, data()[6:], tmp_path / "half.ckpt", epochs=2)
        assert callback.pruner.steps == STEPS
        assert_same(second.model, module.model)


@pytest.mark.slow
def test_lightning_passes_over_steps_that_the_scaler_skips(toy, tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    from sparse_pathways.integrations.lightning import PruningCallback

    callback = PruningCallback(PLAN)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)  # overflows until it is small enough
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )  # fmt: skip
    trainer.fit(lightning_module(toy.make_model()), torch.utils.data.DataLoader(data(), batch_size=1, shuffle=False))
    assert trainer.global_step == STEPS and 0 < callback.pruner.steps < STEPS
    assert callback.pruner.steps == STEPS - round(-torch.tensor(scaler.get_scale() / 2.0**22).log2().item())


@pytest.mark.slow
def test_transformers(toy, tmp_path):
    transformers = pytest.importorskip("transformers")
    from sparse_pathways.integrations.transformers import PruningCallback

    class Model(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, language):
            name = LANGUAGES[int(language[0])]
            sp.set_pathway(self, name)
            x = x[0]
            return {"loss": (self.inner(x) - target(name, x)).square().mean()}

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *arguments):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def fit(model, stop=None, resume=None):
        callback = PruningCallback(PLAN)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "hf"), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
            save_strategy="steps", save_steps=6, logging_strategy="no", disable_tqdm=True, use_cpu=True,
            lr_scheduler_type="constant", max_grad_norm=0.0, remove_unused_columns=False,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        items = [{"x": x, "language": LANGUAGES.index(name)} for name, x in data()]
        trainer = Ordered(model, arguments, train_dataset=items, callbacks=[callback], optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return callback

    straight = Model(toy.make_model())
    callback = fit(straight)
    assert_same(straight.inner, plain(toy))
    assert callback.pruner.steps == STEPS and len(callback.events) > 0
    resumed = Model(toy.make_model())
    callback = fit(resumed, resume=str(tmp_path / "hf" / "checkpoint-6"))
    assert callback.pruner.steps == STEPS
    assert_same(resumed.inner, straight.inner)
    assert copy.deepcopy(callback.plan) == PLAN
