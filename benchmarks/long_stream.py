"""Whether anything grows over a long stream: time a step, time a boundary, memory, size of a checkpoint.

    python benchmarks/long_stream.py [--experiences 1000] [--batches 1000000]

First a stream of small experiences (40 samples of 64 features in batches of 10; all ten classes in each; one fixed test
set of 50 samples that is evaluated at every boundary) through a `Trainer` with AEF-OCL, NMC, LDA and their evaluation;
then a million batches through each head alone. Printed are the four curves' first and last values (medians of their
first and last twentieth). Exit status 1 if a last value is more than half above the first one.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from bare_trainer import quiet_trainer

from clkit.callbacks import AEFOCL, LDA, NMC, StreamEvaluation
from clkit.data import DomainIncremental, NpzFeatures, StreamDataModule
from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead
from clkit.methods.heads.base import Head
from clkit.models import TimmClassifier

PAGE = 4096
ALLOWED = 1.5


def resident() -> float:
    """MiB that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


class Meter(pl.Callback):
    """The four curves, one value an experience; stands last in the list."""

    def __init__(self, evaluation: StreamEvaluation) -> None:
        self.evaluation = evaluation
        self.steps: list[float] = []
        self.boundaries: list[float] = []
        self.memory: list[float] = []
        self.sizes: dict[str, list[float]] = {"heads": [], "evaluation": []}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        """Ends a boundary; begins a step."""
        now = time.perf_counter()
        if idx == 0 and self.memory:
            self.boundaries.append(self._spent + now - self._last)
        self._start = now

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ends a step."""
        self._last = time.perf_counter()
        self.steps.append(self._last - self._start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Memory now, and, every twentieth time, the size of what a checkpoint would hold of the callbacks."""
        self._spent = time.perf_counter() - self._last
        self.memory.append(resident())
        if len(self.memory) % 20 == 1:
            callbacks = [callback for callback in trainer.callbacks if callback is not self]
            self.sizes["evaluation"].append(_size([self.evaluation]))
            self.sizes["heads"].append(_size([callback for callback in callbacks if callback is not self.evaluation]))
        self._last = time.perf_counter()  # what this method does is no part of the boundary


def _size(callbacks: list[pl.Callback]) -> float:
    buffer = io.BytesIO()
    torch.save({callback.state_key: callback.state_dict() for callback in callbacks}, buffer)
    return buffer.tell() / 1024


def stream(experiences: int) -> dict[str, tuple[list[float], str]]:
    """The curves of one stream."""
    generator = np.random.default_rng(0)
    rows = 40 * experiences
    evaluation = StreamEvaluation(table=False, files=True, figures=False)
    meter = Meter(evaluation)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "features.npz"
        np.savez(
            file,
            f_train=generator.normal(size=(rows, 64)).astype(np.float32),
            y_train=np.arange(rows) % 10,
            domain_train=np.arange(rows) // 40,
            f_test=generator.normal(size=(50, 64)).astype(np.float32),
            y_test=np.arange(50) % 10,
            domain_test=np.full(50, experiences),  # a domain that is never trained: one fixed test set
        )
        trainer = quiet_trainer(
            strategy="gradient_free",
            callbacks=[AEFOCL(), NMC(), LDA(), evaluation, meter],
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        datamodule = StreamDataModule(NpzFeatures(str(file)), DomainIncremental(), batch_size=10)
        trainer.fit(TimmClassifier("identity", model_kwargs={"in_features": 64}), datamodule=datamodule)
    return {
        "a step": ([1000 * value for value in meter.steps], "ms"),
        "a boundary, evaluation and files included": ([1000 * value for value in meter.boundaries], "ms"),
        "resident memory": (meter.memory, "MiB"),
        "checkpoint: the three heads": (meter.sizes["heads"], "KiB"),
        "checkpoint: the evaluation (one row an experience)": (meter.sizes["evaluation"], "KiB"),
    }


def head_memory(head: Head, batches: int) -> tuple[list[float], str]:
    """Resident memory while a head learns that many batches of four."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, head.in_features, generator=generator)
    targets = torch.arange(400) % 10
    memory = []
    for batch in range(batches):
        at = 4 * (batch % 100)
        head.update(features[at : at + 4], targets[at : at + 4])
        if batch % max(1, batches // 100) == 0:
            memory.append(resident())
    return memory, "MiB"


def main() -> int:
    """Prints the curves' ends; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiences", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    curves = stream(options.experiences)
    for head in (AnalyticHead(16, balance="pfg"), NearestMeanHead(16), LDAHead(16)):
        curves[f"memory, {options.batches} batches through {type(head).__name__}"] = head_memory(head, options.batches)
    grown = 0
    for name, (values, unit) in curves.items():
        part = max(1, len(values) // 20)
        first, last = median(values[:part]), median(values[-part:])
        known = "one row" in name  # a record of what was measured, which has an entry for each boundary
        grown += last > ALLOWED * first and not known
        print(f"{name:<56} first {first:9.3f}  last {last:9.3f} {unit}", flush=True)
    return int(grown > 0)


if __name__ == "__main__":
    sys.exit(main())
