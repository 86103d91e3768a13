"""Shared by all tests: threads, quiet Lightning, and small things to train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


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

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture(autouse=True)
def warnings_are_given(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked with ``warns(message)`` gives that warning; every other one is an error."""
    with ExitStack() as stack:
        for mark in request.node.iter_markers("warns"):
            stack.enter_context(pytest.warns(UserWarning, match=mark.args[0]))
        yield


@pytest.fixture
def lit_small() -> Callable[..., LitSmall]:
    """Makes the small module, always with the same start."""

    def make(**options: Any) -> LitSmall:
        torch.manual_seed(0)
        return LitSmall(**options)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """A quiet trainer on one CPU process whose files land in the test's folder."""

    def make(**options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        }
        return pl.Trainer(**{**defaults, **options})

    return make
