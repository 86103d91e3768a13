"""What a whole trainer costs beside the learners that it drives, where the network costs nothing.

    python benchmarks/trainer.py

2000 samples of 512 features arrive in five experiences, in batches of 10, in turns in one process: through a `Trainer`
of Lightning alone (a step that does nothing; a linear network trained by a plain loader; the same network on clkit's
stream), through clkit's strategies (fine-tuning and experience replay of that network; `gradient_free` without
callbacks and with AEF-OCL, NMC and LDA), through the same heads in a bare loop, and, where it is installed, Avalanche's
`Naive` and `Replay` without metrics. Best of several rounds, in milliseconds a sample.

Goals: the trainer with three heads at most 0.12 ms a sample, and of that at most 20 % for what the three callbacks add;
with Avalanche, fine-tuning and replay at most 1.3 times its loops and the three heads at most 1.5 times its plain one.
Avalanche keeps its memory at the end of an experience only, and replays nothing in the first. Exit status 1 if a goal
is missed.
"""

from __future__ import annotations

import importlib.util
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
from bare_trainer import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, LDA, NMC
from clkit.data import ClassIncremental, NpzFeatures, StreamDataModule
from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead
from clkit.models import TimmClassifier
from clkit.strategies import ERStrategy

SAMPLES, WIDTH, CLASSES, BATCH, ROUNDS = 2000, 512, 20, 10, 7
GOAL, GOAL_SHARE = 0.12, 0.20
RATE, CAPACITY = 0.01, 200
FINE, REPLAY, HEADS = "fine-tuning", "experience replay", "gradient_free, three heads"
NAIVE, AVALANCHE = "Avalanche, Naive", "Avalanche, Replay"

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


class Linear(pl.LightningModule):
    """A linear network, trained in the plainest way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=RATE)


def trainer(**options: Any) -> pl.Trainer:
    """A quiet trainer on one CPU."""
    return quiet_trainer(limit_val_batches=0, **options)


class Clock(pl.Callback):
    """Seconds from the first batch to the last: what a long stream costs, without the start of a fit."""

    seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loop begins."""
        self._start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loop is over."""
        Clock.seconds = time.perf_counter() - self._start


def stream(file: Path, module: pl.LightningModule, strategy: Any, *callbacks: pl.Callback) -> float:
    """One stream of clkit, under a strategy."""
    datamodule = StreamDataModule(NpzFeatures(str(file)), ClassIncremental(5), batch_size=BATCH)
    trainer(max_epochs=-1, strategy=strategy, callbacks=[*callbacks, Clock()]).fit(module, datamodule=datamodule)
    return Clock.seconds


def heads(file: Path, *callbacks: pl.Callback) -> float:
    """A stream without gradients."""
    return stream(file, TimmClassifier("identity", model_kwargs={"in_features": WIDTH}), "gradient_free", *callbacks)


def replay(file: Path, capacity: int) -> float:
    """Experience replay, of as many rows as are new; fine-tuning without a memory."""
    return stream(file, Linear(), ERStrategy(capacity, replay_batch=BATCH, transform=nn.Identity()))


def lightning_alone(module: pl.LightningModule) -> float:
    """The same number of batches, five epochs, through Lightning and a plain loader."""
    part = TensorDataset(FEATURES[: SAMPLES // 5], TARGETS[: SAMPLES // 5])
    trainer(max_epochs=5, callbacks=[Clock()]).fit(module, DataLoader(part, batch_size=BATCH))
    return Clock.seconds


class Labelled(TensorDataset):
    """The form in which Avalanche asks for labels."""

    targets = TARGETS.tolist()


def avalanche(memory: bool) -> float:
    """Avalanche's loop with a memory or without, and without metrics or loggers."""
    from avalanche.benchmarks import class_incremental_benchmark
    from avalanche.training import Naive, Replay
    from avalanche.training.plugins import EvaluationPlugin

    parts = {"train": Labelled(FEATURES, TARGETS)}
    experiences = class_incremental_benchmark(parts, num_experiences=5, class_order=list(range(CLASSES))).train_stream
    model = nn.Linear(WIDTH, CLASSES)
    options: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=RATE),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": BATCH,
        "evaluator": EvaluationPlugin(),
    }
    strategy = Replay(mem_size=CAPACITY, **options) if memory else Naive(**options)
    start = time.perf_counter()
    for experience in experiences:
        strategy.train(experience)
    return time.perf_counter() - start


def bare_loop() -> float:
    """The heads alone, on batches that lie ready."""
    learners = [AnalyticHead(WIDTH, balance="pfg"), NearestMeanHead(WIDTH), LDAHead(WIDTH)]
    start = time.perf_counter()
    for first in range(0, SAMPLES, BATCH):
        for head in learners:
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
            "Lightning, a step of nothing": lambda: lightning_alone(Nothing()),
            "Lightning, linear": lambda: lightning_alone(Linear()),
            "Lightning, linear, our stream": lambda: stream(file, Linear(), "auto"),
            FINE: lambda: replay(file, 0),
            REPLAY: lambda: replay(file, CAPACITY),
            "heads in a bare loop": bare_loop,
            "gradient_free": lambda: heads(file),
            HEADS: lambda: heads(file, AEFOCL(), NMC(), LDA()),
        }
        if importlib.util.find_spec("avalanche"):
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="avalanche")
            cases |= {NAIVE: lambda: avalanche(memory=False), AVALANCHE: lambda: avalanche(memory=True)}
        for _ in range(ROUNDS):
            for name, run in cases.items():
                best[name] = min(best.get(name, math.inf), run())
    print(f"{SAMPLES} x {WIDTH} features, batches of {BATCH}, {torch.get_num_threads()} threads, best of {ROUNDS}")
    for name, seconds in best.items():
        print(f"{name:<32} {1000 * seconds / SAMPLES:7.4f} ms a sample")
    whole = best[HEADS]
    share = (whole - best["gradient_free"]) / whole
    print(f"three heads: {1000 * whole / SAMPLES:.3f} ms a sample (goal: at most {GOAL})")
    print(f"added by the three callbacks: {share:.0%} of it (goal: at most {GOAL_SHARE:.0%})")
    missed = 1000 * whole / SAMPLES > GOAL or share > GOAL_SHARE
    for name, other, goal in ((FINE, NAIVE, 1.3), (REPLAY, AVALANCHE, 1.3), (HEADS, NAIVE, 1.5)):
        if other in best:
            ratio = best[name] / best[other]
            print(f"{name} / {other}: {ratio:.2f} (goal: at most {goal})")
            missed |= ratio > goal
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
