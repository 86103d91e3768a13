"""The small runs that the checks look at: a network, a stream of unequal parts, and a quiet trainer."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.stream.resume import capture_random_state, restore_random_state

__all__ = ["SmallModule", "batch_of", "fit", "isolated", "loader", "probe", "seed", "stream", "trainer"]

IMAGE = (1, 4, 4)  # a method may turn, cut and mix images
INPUTS, FEATURES, CLASSES = 16, 8, 6

# Unequal parts, and a longer one after a shorter one: equal ones would hide lost batches.
SAMPLES = (9, 8, 5, 12, 11, 7)  # of each class; 2, 3 and 1 classes
BATCHES = (4, 6, 2)  # of each part
BATCH_SIZE = 5


class SmallModule(pl.LightningModule):
    """Two layers with dropout, so that a change of the global random state shows in the weights.

    Args:
        rate: Learning rate; with 0 the network stays as it is, and any batch is taken.
    """

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Dropout(0.2), nn.Linear(FEATURES, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, 6)."""
        logits: Tensor = self.net(inputs.flatten(1))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy, or a loss of 0 with gradients of 0 where nothing shall be trained."""
        logits = self(batch[0])
        if self.rate == 0:
            return sum((parameter.sum() for parameter in self.parameters()), torch.zeros(())) * 0
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log a loss."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Runs the forward."""
        self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Logits (B, 6)."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, whose moments would show a step too many."""
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class StoppedError(RuntimeError):
    """What stops a run on purpose."""


def batch_of(rows: int, start: int) -> tuple[Tensor, Tensor]:
    """Images (rows, 1, 4, 4) and labels, a function of ``start``."""
    generator = torch.Generator().manual_seed(start)
    targets = torch.arange(start, start + rows) % 4
    return torch.randn(rows, *IMAGE, generator=generator) + targets[:, None, None, None], targets


def probe() -> Tensor:
    """Features (7, 8) of no sample, on which predictions are compared."""
    return torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def stream(**options: Any) -> StreamDataModule:
    """Six classes in three unequal parts of 4, 6 and 2 batches."""
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(SAMPLES)])
    noise = torch.randn(len(targets), *IMAGE, generator=torch.Generator().manual_seed(0))
    inputs = noise + targets[:, None, None, None]
    train, test = TensorDataset(inputs, targets), TensorDataset(inputs[::2], targets[::2])
    scenario = ClassIncremental(first_experience_classes=2, classes_per_experience=3)
    return StreamDataModule(Custom(train, test), scenario, **{"batch_size": BATCH_SIZE, **options})


def loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """Hands these batches out as they are."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set


def seed(value: int) -> None:
    """Set the global generators of torch, NumPy and Python."""
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002  the global generator is what is checked to be left alone
    random.seed(value)


def random_bits() -> Any:
    """Return the global random state in a form that can be compared."""
    state = capture_random_state()
    return [str(value.tolist() if isinstance(value, Tensor) else value) for value in _flat(state)]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in _flat(part)]
    return [value]


def trainer(folder: Path, callbacks: Sequence[Any], **options: Any) -> pl.Trainer:
    """Return a trainer without output on one CPU process; its files land in ``folder``."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(
    folder: Path,
    callbacks: Sequence[Any],
    *,
    module: pl.LightningModule | None = None,
    batches: Sequence[Any] | None = None,
    resume: Path | None = None,
    run: pl.Trainer | None = None,
    **options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """One fit, always from the same weights and random state.

    Args:
        folder: Where files of the run land.
        callbacks: The trainer's callbacks.
        module: The module; a new :class:`SmallModule` by default.
        batches: Training batches as they are, in place of the stream.
        resume: A checkpoint to go on from; whoever resumes has drawn other numbers.
        run: A trainer made elsewhere, with its own callbacks.
        options: Of the trainer.
    """
    if module is None:
        module = small_module()
    if batches is not None:
        options["max_epochs"] = 1
    if run is None:
        run = trainer(folder, callbacks, **options)
    seed(1 if resume is None else 99)
    data: dict[str, Any] = {"datamodule": stream()} if batches is None else {"train_dataloaders": loader(batches)}
    if resume is not None:
        data |= {"ckpt_path": str(resume), "weights_only": True}
    run.fit(module, **data)
    return module, run


def small_module(**options: Any) -> SmallModule:
    """Return a new module, always of the same weights."""
    seed(0)
    return SmallModule(**options)


@contextmanager
def isolated() -> Iterator[None]:
    """Leaves the random state of the process as it was, and keeps Lightning's advice to itself."""
    logger = logging.getLogger("lightning.pytorch")
    level, random_state = logger.level, capture_random_state()
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        restore_random_state(random_state)
