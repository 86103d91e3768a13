"""What a whole trainer costs beside the learners that it drives, where the network costs nothing.

    python benchmarks/trainer.py

2000 samples of 512 features arrive in five experiences, in batches of 10, through a `Trainer` with the strategy
`gradient_free`; AEF-OCL, NMC and LDA learn from them. Beside it, in the same process and taking turns: the same trainer
without callbacks, the same heads in a bare loop, and Lightning alone with a module that does nothing. Best of several
rounds, in milliseconds a sample. Goals: the whole trainer at most 0.12 ms a sample, and of that at most 20 % for what
the three callbacks add. Exit status 1 if one is missed.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, LDA, NMC
from clkit.data import ClassIncremental, NpzFeatures, StreamDataModule
from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead
from clkit.models import TimmClassifier

SAMPLES, WIDTH, CLASSES, BATCH, ROUNDS = 2000, 512, 20, 10, 7
GOAL, GOAL_SHARE = 0.12, 0.20

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
generator = torch.Generator().manual_seed(0)
FEATURES = torch.randn(SAMPLES, WIDTH, generator=generator).relu()
TARGETS = torch.arange(SAMPLES) // (SAMPLES // CLASSES)


class Nothing(pl.LightningModule):
    """Lightning's own cost: a step that returns at once."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Learns nothing."""

    def configure_optimizers(self) -> None:
        """There is nothing to optimise."""


def trainer(**options: Any) -> pl.Trainer:
    """A quiet trainer on one CPU."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


class Clock(pl.Callback):
    """Seconds from the first batch to the last: what a long stream costs, without the start of a fit."""

    seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loop begins."""
        self._start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loop is over."""
        Clock.seconds = time.perf_counter() - self._start


def stream(file: Path, *callbacks: pl.Callback) -> float:
    """One stream through clkit's strategy."""
    datamodule = StreamDataModule(NpzFeatures(str(file)), ClassIncremental(5), batch_size=BATCH)
    module = TimmClassifier("identity", model_kwargs={"in_features": WIDTH})
    trainer(max_epochs=-1, strategy="gradient_free", callbacks=[*callbacks, Clock()]).fit(module, datamodule=datamodule)
    return Clock.seconds


def lightning_alone() -> float:
    """The same number of batches, five epochs, through Lightning and a plain loader."""
    part = TensorDataset(FEATURES[: SAMPLES // 5], TARGETS[: SAMPLES // 5])
    trainer(max_epochs=5, callbacks=[Clock()]).fit(Nothing(), DataLoader(part, batch_size=BATCH))
    return Clock.seconds


def bare_loop() -> float:
    """The heads alone, on batches that lie ready."""
    heads = [AnalyticHead(WIDTH, balance="pfg"), NearestMeanHead(WIDTH), LDAHead(WIDTH)]
    start = time.perf_counter()
    for first in range(0, SAMPLES, BATCH):
        for head in heads:
            head.update(FEATURES[first : first + BATCH], TARGETS[first : first + BATCH])
    return time.perf_counter() - start


def main() -> int:
    """Prints the table; returns the exit status."""
    best: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "features.npz"
        part = {"f_train": FEATURES.numpy(), "y_train": TARGETS.numpy()}
        np.savez(file, **part, f_test=part["f_train"][:: SAMPLES // CLASSES], y_test=np.arange(CLASSES))
        cases: dict[str, Callable[[], float]] = {
            "Lightning alone": lightning_alone,
            "heads in a bare loop": bare_loop,
            "trainer, gradient_free": lambda: stream(file),
            "trainer with AEF-OCL, NMC, LDA": lambda: stream(file, AEFOCL(), NMC(), LDA()),
        }
        for _ in range(ROUNDS):
            for name, run in cases.items():
                best[name] = min(best.get(name, math.inf), run())
    print(f"{SAMPLES} x {WIDTH} features, batches of {BATCH}, {torch.get_num_threads()} threads, best of {ROUNDS}")
    for name, seconds in best.items():
        print(f"{name:<32} {1000 * seconds / SAMPLES:7.4f} ms a sample")
    whole = best["trainer with AEF-OCL, NMC, LDA"]
    share = (whole - best["trainer, gradient_free"]) / whole
    print(f"the whole trainer: {1000 * whole / SAMPLES:.3f} ms a sample (goal: at most {GOAL})")
    print(f"added by the three callbacks: {share:.0%} of it (goal: at most {GOAL_SHARE:.0%})")
    return int(1000 * whole / SAMPLES > GOAL or share > GOAL_SHARE)


if __name__ == "__main__":
    sys.exit(main())
