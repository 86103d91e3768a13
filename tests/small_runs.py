"""Small things to train, and a trainer that says and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Two layers and a classifier for flat digits."""

    def __init__(self, width: int = 16, classes: int = 10, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.hidden(inputs)))))


class LitSmall(pl.LightningModule):
    """A module as in Lightning's own tutorials, which has never heard of clkit."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = SmallNet(**options)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", accuracy, batch_size=len(batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:  # Lightning's hook of `trainer.test`, no test
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class LitPlain(pl.LightningModule):
    """What heirs need beside a network and its forward: a cross-entropy, and plain gradient steps."""

    rate = 0.05

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def quiet_trainer(folder: Path, **options: Any) -> pl.Trainer:
    """A trainer on one CPU process whose files land in a folder; it saves checkpoints where a callback wants to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        # so that a test sees the values of each
        **({} if options.get("barebones") else {"log_every_n_steps": 1}),
        "logger": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in options.get("callbacks") or []),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(**{**defaults, **options})


def hooks_of(module: nn.Module) -> int:
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks) for part in module.modules()
    )


def merge_and_forget(parts: list[Any], features: Tensor, targets: Tensor) -> None:
    """Join five parts, in an order of no meaning, into the first; one of them learns rows that are taken out last."""
    parts[3].update(features, targets)
    parts[1].merge(parts[4])
    parts[3].merge(parts[1])
    parts[0].merge(parts[2])
    parts[0].merge(parts[3])
    parts[0].subtract(features, targets)


def run_settings(source: str, callbacks: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    """Settings of a gradient-free run of two experiences over features, which keeps its checkpoints in ``runs/r/v``."""
    scenario = {"class_path": "ClassIncremental", "init_args": {"experiences": 2}}
    return {
        "model": {"class_path": "TimmClassifier", "init_args": {"backbone": "identity"}},
        "data": {"class_path": "StreamDataModule", "init_args": {"source": source, "scenario": scenario, **data}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "strategy": "gradient_free",
            "enable_model_summary": False,
            "callbacks": [*callbacks, {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}],
            "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "r", "version": "v"}}],
        },
    }


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of settings: a value in a place that dots lead to; ``data.batch_size`` is one of ``init_args``."""
    *places, name = path.split(".")

    def change(settings: dict[str, Any]) -> None:
        for place in places:
            settings = settings[place]
            settings = settings["init_args"] if place != "trainer" else settings
        settings[name] = value

    return change
