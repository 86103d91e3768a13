"""A user's project as it is, with callbacks added: nothing of theirs may change, not by one bit.

That nothing is left on the module, and that its file keeps its own keys, is in the contract of every method.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.datasets import load_digits
from small_runs import hooks_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule

Make = Callable[..., Any]


drift = pytest.mark.warns("the backbone still trains")
twice = pytest.mark.warns("the backbone trains for several epochs")


class Project(pl.LightningModule):
    """BatchNorm, dropout, metrics, an optimizer with momentum and a schedule: what a real project has."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.25))
        self.classify = nn.Linear(24, 10)
        self.train_accuracy = torchmetrics.classification.MulticlassAccuracy(10)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.body(inputs))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.train_accuracy(logits, batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/accuracy", self.train_accuracy, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", nn.functional.cross_entropy(logits, batch[1]))

    def log_test_loss(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = log_test_loss  # Lightning's hook

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


class WholeHistory(pl.Callback):
    """Every value that the user's module ever logged, step by step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def _note(self, trainer: pl.Trainer) -> None:
        self.seen.append({key: float(v) for key, v in trainer.callback_metrics.items() if key.count("/") and own(key)})

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._note(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._note(trainer)

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._note(trainer)


def own(key: str) -> bool:
    return key.startswith(("train", "val", "test"))


def loaders() -> dict[str, Any]:
    images, targets = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images / 16).float(), torch.from_numpy(targets))
    train, val = torch.utils.data.Subset(data, range(600)), torch.utils.data.Subset(data, range(600, 800))
    return {"train_dataloaders": DataLoader(train, 32, shuffle=True), "val_dataloaders": DataLoader(val, 64)}


def stream() -> dict[str, Any]:
    return {"datamodule": StreamDataModule("digits:flat", ClassIncremental(experiences=3))}


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), [np.asarray(s).tolist() for s in np.random.get_state()]  # noqa: NPY002


def train(
    make_trainer: Make, data: Callable[[], dict[str, Any]], callbacks: list[pl.Callback], **options: Any
) -> dict[str, Any]:
    """Everything that a user could look at after a run."""
    pl.seed_everything(11, verbose=False)
    module, history = Project(), WholeHistory()
    given = data()
    epochs = 2 if "datamodule" not in given else -1
    trainer = make_trainer(callbacks=[history, *callbacks], max_epochs=epochs, **options)
    trainer.fit(module, **given)
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if own(key)},
        "history": history.seen,
        "random": random_states(),
        "steps": trainer.global_step,
        "module": module,
        "trainer": trainer,
    }


def ours() -> list[pl.Callback]:
    return [AEFOCL(), NMC(), StreamEvaluation(table=False)]


@pytest.mark.parametrize("data", [pytest.param(loaders, marks=twice), pytest.param(stream, marks=drift)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_with_callbacks_equals_one_without_bit_for_bit(
    make_trainer: Make, data: Callable[[], dict[str, Any]], precision: str
) -> None:
    plain = train(make_trainer, data, [], precision=precision)
    watched = train(make_trainer, data, ours(), precision=precision)
    assert watched["weights"].keys() == plain["weights"].keys()
    for name, value in plain["weights"].items():
        assert torch.equal(watched["weights"][name], value), name
    for index, state in plain["optimizer"]["state"].items():
        momentum = watched["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"])
    assert watched["optimizer"]["param_groups"] == plain["optimizer"]["param_groups"]
    assert watched["schedule"] == plain["schedule"]
    assert watched["metrics"] == plain["metrics"]
    assert len(plain["metrics"]) >= 5
    assert watched["history"] == plain["history"]
    assert watched["steps"] == plain["steps"] > 0
    assert watched["random"] == plain["random"]


@drift
def test_a_network_in_partial_eval_mode_keeps_its_modes(make_trainer: Make) -> None:
    module = Project()
    module.body[1].eval()
    module.classify.requires_grad_(False)
    flags = {name: part.training for name, part in module.named_modules()}
    grads = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    for strategy in ("auto", "gradient_free"):
        trainer = make_trainer(strategy=strategy, callbacks=[*ours(), NMC(name="paid", forward="eval")])
        trainer.fit(module, **stream())
        trainer.validate(module, **stream(), verbose=False)
        assert {name: part.training for name, part in module.named_modules()} == flags, strategy
        assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == grads, strategy
        assert hooks_of(module) == 0


@drift
def test_heads_learn_evaluation_features_beside_training_with_batch_norm_and_dropout(make_trainer: Make) -> None:
    """With a learning rate of zero the network stands still, so the features can be computed afterwards."""

    class Still(Project):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    module = Still()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.momentum = 0.0  # the statistics stand still too
    callback = NMC(metric="euclidean")
    data = stream()
    make_trainer(callbacks=[callback]).fit(module, **data)
    images, targets = load_digits(return_X_y=True)
    module.eval()
    with torch.no_grad():
        features = module.body(torch.from_numpy(images[::2] / 16).float()).double().numpy()
    means = np.stack([features[targets[::2] == c].mean(0) for c in range(10)])
    learned = callback.head.statistics.sums / callback.head.counts[:, None]
    assert np.abs(learned.numpy() - means).max() < 1e-6
    assert callback.head.counts.tolist() == np.bincount(targets[::2]).tolist()


@drift
def test_shared_features_are_those_of_the_training_pass(make_trainer: Make) -> None:
    module = Project()
    seen: list[Tensor] = []
    module.classify.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()) if m.training else None)
    callback = NMC(metric="euclidean", forward="shared")
    make_trainer(callbacks=[callback], limit_val_batches=0).fit(module, **stream())
    total = torch.cat(seen).double().sum(0)
    assert torch.allclose(callback.head.statistics.sums.sum(0), total, rtol=1e-12)


@drift
def test_a_plain_network_costs_one_forward_a_batch(make_trainer: Make, lit_small: Make) -> None:
    calls = []
    module = lit_small()
    module.net.hidden.register_forward_hook(lambda *args: calls.append(1))
    heads = [AEFOCL(balance="none"), *(NMC(name=f"nmc{i}") for i in range(6))]
    trainer = make_trainer(callbacks=heads, limit_val_batches=0)
    trainer.fit(module, **stream())
    assert len(calls) == trainer.global_step


@drift
@pytest.mark.parametrize("forward", ["auto", "eval"])
def test_a_network_with_dropout_costs_one_extra_forward_a_batch_for_all_heads(make_trainer: Make, forward: Any) -> None:
    calls = []
    module = Project()
    module.body[0].register_forward_hook(lambda *args: calls.append(1))
    trainer = make_trainer(
        callbacks=[NMC(forward=forward), AEFOCL(balance="none", forward=forward)], limit_val_batches=0
    )
    trainer.fit(module, **stream())
    assert len(calls) == 2 * trainer.global_step
