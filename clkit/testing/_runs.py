"""The small runs that the checks look at: a network, a stream of unequal parts, and what a run ends with."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import NMC, Predictor, StreamCallback
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.schema import STREAM
from clkit.stream.resume import capture_random_state, restore_random_state
from clkit.testing.entries import Entry

__all__ = ["Setting", "Trial", "batch_of", "fit", "isolated", "loader", "seed", "settings", "small_module", "snapshot"]

IMAGE = (1, 4, 4)  # a method may turn, cut and mix images
INPUTS, FEATURES, CLASSES = 16, 8, 6

# Unequal parts, and a longer one after a shorter one: equal ones would hide lost batches.
SAMPLES = (9, 8, 5, 12, 11, 7)  # of each class; 2, 3 and 1 classes
BATCHES = (4, 6, 2)  # of each part
BATCH_SIZE = 5

EXACT = "64-true"  # in float32 the network itself rounds otherwise where batches are cut otherwise
FOLLOWED = ("format", "batches")  # what every StreamCallback saves of the stream


CLASSIFIER = "net.3"
"""Where :class:`SmallModule` has its classifier."""


class SmallModule(pl.LightningModule):
    """Two layers with dropout, so that a change of the global random state shows in the weights.

    With a learning rate of 0 the network stays as it is, and any batch is taken.
    """

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Dropout(0.2), nn.Linear(FEATURES, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs.flatten(1))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        if self.rate == 0:
            return sum((parameter.sum() for parameter in self.parameters()), torch.zeros(())) * 0
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)  # its moments would show a step too many


class StoppedError(RuntimeError):
    """What stops a run on purpose."""


def batch_of(rows: int, start: int) -> tuple[Tensor, Tensor]:
    """Return images (rows, 1, 4, 4) and labels, a function of ``start``."""
    generator = torch.Generator().manual_seed(start)
    targets = torch.arange(start, start + rows) % 4
    return torch.randn(rows, *IMAGE, generator=generator) + targets[:, None, None, None], targets


def stream() -> StreamDataModule:
    """Return six classes in three unequal parts of 4, 6 and 2 batches."""
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(SAMPLES)])
    noise = torch.randn(len(targets), *IMAGE, generator=torch.Generator().manual_seed(0))
    inputs = noise + targets[:, None, None, None]
    train, test = TensorDataset(inputs, targets), TensorDataset(inputs[::2], targets[::2])
    scenario = ClassIncremental(first_experience_classes=2, classes_per_experience=3)
    return StreamDataModule(Custom(train, test), scenario, batch_size=BATCH_SIZE)


def loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """Return a loader that hands these batches out as they are."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set


def seed(value: int) -> None:
    """Set the global generators of torch, NumPy and Python."""
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002  the global generator is what is checked to be left alone
    random.seed(value)


def small_module(**options: Any) -> SmallModule:
    """Return a new module, always of the same weights."""
    seed(0)
    return SmallModule(**options)


def trainer(folder: Path, callbacks: Sequence[Any], **options: Any) -> pl.Trainer:
    """Return a trainer without output on one CPU process; its files land in ``folder``."""
    return pl.Trainer(callbacks=list(callbacks), **{**quiet(folder, callbacks), **options})


def quiet(folder: Path, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return arguments of such a trainer."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,  # evaluating_changes_nothing has them
        "default_root_dir": str(folder),
    }


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
    """Fit once, always from the same weights and random state, on the stream or on given batches.

    ``run`` is a trainer made elsewhere with its own callbacks, ``resume`` a checkpoint to go on from; ``options`` are
    those of the trainer.
    """
    if module is None:
        module = small_module()
    if batches is not None:
        options["max_epochs"] = 1
    if run is None:
        run = trainer(folder, callbacks, **options)
    seed(1 if resume is None else 99)  # whoever resumes has drawn other numbers
    data: dict[str, Any] = {"datamodule": stream()} if batches is None else {"train_dataloaders": loader(batches)}
    if resume is not None:
        data |= {"ckpt_path": str(resume), "weights_only": True}
    run.fit(module, **data)
    return module, run


@contextmanager
def isolated() -> Iterator[None]:
    """Leave the random state of the process as it was, and keep Lightning's advice to itself."""
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


def snapshot(callback: Any, volatile: Sequence[str] = (), *, followed: bool = True) -> dict[str, Any]:
    """Copy what a callback has learned: its state, its place in the stream where ``followed``, and its scores."""
    left_out = {*volatile, *(FOLLOWED if isinstance(callback, StreamCallback) and not followed else ())}
    state = {key: value for key, value in copy.deepcopy(callback.state_dict()).items() if key not in left_out}
    if isinstance(callback, Predictor):
        features = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        state["scores(features)"] = callback.scores(features).detach().clone()
    return state


@dataclass(frozen=True)
class Setting:
    """What a method runs with: a callback under a strategy, or a strategy with a head that learns beside it."""

    entry: Entry
    folder: Path  # for the files of its runs
    strategy: str | None = None  # that a callback runs under; none where the method is a strategy

    def trainer(self, method: Any, callbacks: Sequence[Any] = (), **options: Any) -> pl.Trainer:
        """Make a trainer with the method and these callbacks."""
        if self.strategy is None:
            return trainer(self.folder, callbacks, strategy=method, **options)
        return trainer(self.folder, [method, *callbacks], **{"strategy": self.strategy, **options})

    def run(self, *, method: Any = None, beside: Sequence[Any] = (), **options: Any) -> Trial:
        """Fit once with the method (a new one by default) and further callbacks; options are those of a fit."""
        method = self.entry.make() if method is None else method
        callback = NMC() if self.strategy is None else method
        strategy = method if self.strategy is None else self.strategy
        module, run = fit(self.folder, [callback, *beside], **{"strategy": strategy, **options})
        return Trial(self, callback, module, run)

    def fixed_module(self) -> SmallModule:
        """Make a network that stays as it is under a callback and takes any batch; a strategy trains its network."""
        return small_module() if self.strategy is None else small_module(rate=0)


@dataclass(frozen=True)
class Trial:
    """A run that ended."""

    setting: Setting
    callback: Any  # the method, or the head beside it
    module: pl.LightningModule
    trainer: pl.Trainer

    def learned(self, *, followed: bool = True) -> dict[str, Any]:
        """Copy what the callback learned, and its place in the stream where ``followed``."""
        return snapshot(self.callback, self.setting.entry.volatile, followed=followed)

    def weights(self) -> dict[str, Any]:
        """Copy the network's state, under its own keys where it was compiled."""
        return dict(copy.deepcopy(getattr(self.module, "_orig_mod", self.module).state_dict()))

    def saved(self) -> dict[str, Any]:
        """Save a checkpoint, ``end.ckpt``, and load it as Lightning does."""
        path = self.setting.folder / "end.ckpt"
        self.trainer.save_checkpoint(path)
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
        return checkpoint

    def own_part(self) -> dict[str, Any]:
        """Give what of a strategy's checkpoint neither Lightning writes nor whatever follows a stream."""
        return {key: value for key, value in self.saved().items() if key not in {*_plain_keys(), STREAM}}

    def outcome(self) -> dict[str, Any]:
        """Give all that two equal runs must share; of a strategy also its file but for the progress of loops."""
        found = {"weights": self.weights(), "learned": self.learned()}
        if self.setting.strategy is None:
            found |= {f"file/{key}": value for key, value in self.saved().items() if key not in ("loops", "callbacks")}
        return found


@cache
def _plain_keys() -> frozenset[str]:
    with TemporaryDirectory() as folder:
        _, run = fit(Path(folder), [])
        run.save_checkpoint(f"{folder}/plain.ckpt")
        return frozenset(torch.load(f"{folder}/plain.ckpt", weights_only=True))


def settings(entry: Entry, folder: Path) -> list[Setting]:
    """List what a method is run with: a callback with a network that trains with dropout, and with a frozen one."""
    if entry.kind == "strategy":
        return [Setting(entry, folder)]
    return [Setting(entry, folder, name) for name in ("auto", "gradient_free")[: 1 if entry.needs_gradients else 2]]
