"""What an error predictor costs beside scikit-learn's own forest, and how its state grows with the stream.

    python benchmarks/deup.py [--threads 1] [--only fit predict state stream features record] [--rounds 5] [--json FILE]

* fit: 4,096 records of six features, 0/1 errors and monotone signs, beside the bare RandomForestRegressor, taking
  turns; goal: at most 1.2 times (checks and the copy into tensors).
* predict: 64 rows, the size of a batch, beside scikit-learn's predict; goal: at most 0.5 times.
* state: bytes of the records and the memory in a file, after a stream and after one 100 times as long; goal: at most
  1.01 times. Beside them those of the predictor, whose trees have at most 511 nodes each.
* stream: a batch of 64 rows of 768 features offered to a full memory of 1,024 rows, and 64 records to a full table of
  4,096, early in a stream and late; goal: late at most 1.5 times early.
* features: the six features of 64 rows of 768, 100 classes and a memory of 1,000, beside the bare products that they
  rest on (two triangular solves, a product with the means and one with the memory); goal: at most 2 times. A snapshot
  beside the Cholesky factorisation in it, and the scores of 1,000 left-out rows beside plain ones, without goals.
* record: what ``DEUP`` adds to a training batch of 64 images of 64 px while nearest means learn from a resnet18, in a
  Trainer, beside the network's forward of that batch; goal: at most 0.01 times.

Needs no data; a minute on one core. Exit status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import io
import json
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
from sklearn.ensemble import RandomForestRegressor
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import DEUP, NMC
from clkit.methods import (
    AnalyticHead,
    ErrorPredictor,
    ErrorRecords,
    FeatureMemory,
    FeatureStatistics,
    Snapshot,
    stationarising_features,
)
from clkit.models import TimmClassifier

RECORDS, FEATURES, BATCH = 4096, 6, 64
MEMORY, WIDTH, CLASSES = 1024, 768, 100
NAMES = ["log_maha", "gap", "log_leverage", "log_knn", "confidence", "margin"]
SIGNS = [1, -1, 1, 1, 1, 1]
ROUNDS = 5


def in_turns(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the best time of the CPU of each call, of rounds that take turns after one to warm up."""
    taken = []
    for _ in range(rounds + 1):
        row = []
        for run in runs:
            start = time.process_time()
            run()
            row.append(time.process_time() - start)
        taken.append(row)
    return [min(column) for column in zip(*taken[1:], strict=True)]


def records(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, errors that depend on them, and weights."""
    draws = torch.Generator().manual_seed(0)
    phi = torch.randn(number, FEATURES, generator=draws, dtype=torch.float64)
    error = (torch.rand(number, generator=draws) < torch.sigmoid(2 * phi[:, 0] - phi[:, 1] - 2)).double()
    return phi, error, 0.5 + torch.rand(number, generator=draws, dtype=torch.float64)


def both(number: int) -> tuple[ErrorPredictor, RandomForestRegressor, tuple[Tensor, Tensor, Tensor]]:
    """The predictor, scikit-learn's forest of the same settings, and records for both."""
    theirs = RandomForestRegressor(
        50, max_depth=8, min_samples_leaf=10, max_features=0.5, monotonic_cst=SIGNS, random_state=0, n_jobs=1
    )
    return ErrorPredictor(signs=SIGNS), theirs, records(number)


def measure_fit(rounds: int, number: int = RECORDS) -> dict[str, float]:
    """Time of a refit, ours and the bare one."""
    ours, theirs, (phi, error, weight) = both(number)
    single = phi.float().numpy()
    runs = [
        lambda: ours.fit(phi, error, weight),
        lambda: theirs.fit(single, error.numpy(), sample_weight=weight.numpy()),
    ]
    seconds, bare = in_turns(runs, rounds)
    return {"fit_s": seconds, "bare_s": bare, "ratio": seconds / bare}


def measure_predict(rounds: int, number: int = RECORDS) -> dict[str, float]:
    """Time for a batch, ours and scikit-learn's, and by how much the two differ."""
    ours, theirs, (phi, error, weight) = both(number)
    ours.fit(phi, error, weight)
    theirs.fit(phi.float().numpy(), error.numpy(), sample_weight=weight.numpy())
    rows = phi[:BATCH].clone()
    numbers = rows.float().numpy()
    seconds, bare = in_turns(
        [lambda: [ours.predict(rows) for _ in range(20)], lambda: [theirs.predict(numbers) for _ in range(20)]], rounds
    )
    difference = float(np.abs(ours.predict(rows).numpy() - theirs.predict(numbers)).max())
    return {"predict_s": seconds / 20, "bare_s": bare / 20, "ratio": seconds / bare, "largest_difference": difference}


def after(batches: int, capacity: int, rows: int, width: int) -> tuple[ErrorRecords, FeatureMemory]:
    """Records and a memory that have seen so many batches of ten classes."""
    table, memory = ErrorRecords(capacity), FeatureMemory(rows)
    draws = torch.Generator().manual_seed(0)
    for number in range(batches):
        ids = torch.arange(number * BATCH, (number + 1) * BATCH)
        phi = torch.randn(BATCH, FEATURES, generator=draws)
        table.add("prequential", phi, phi[:, 0].abs(), ids, step=number)
        table.add("novel", phi, torch.ones(BATCH), ids, step=number)
        memory.add(torch.randn(BATCH, width, generator=draws), ids % 10, ids)
    return table, memory


def size(*parts: Any) -> int:
    """Bytes of the states in a file."""
    file = io.BytesIO()
    torch.save([each.state_dict() for each in parts], file)
    return file.tell()


def measure_state(batches: int = 130, capacity: int = RECORDS, rows: int = MEMORY, width: int = 64) -> dict[str, float]:
    """Bytes after a stream that fills everything, and after one of 100 times its length."""
    found = {}
    for name, number in (("short", batches), ("long", 100 * batches)):
        table, memory = after(number, capacity, rows, width)
        predictor = ErrorPredictor()
        predictor.fit(*table.training_set())
        found |= {f"{name}_bytes": size(table, memory), f"{name}_predictor_bytes": size(predictor)}
    return {**found, "growth": found["long_bytes"] / found["short_bytes"]}


def measure_stream(rounds: int, batches: int = 200, rows: int = MEMORY, width: int = WIDTH) -> dict[str, float]:
    """Time of a batch after some, and after ten times as many."""
    draws = torch.Generator().manual_seed(1)
    features, phi = torch.randn(BATCH, width, generator=draws), torch.randn(BATCH, FEATURES, generator=draws)

    def offered(table: ErrorRecords, memory: FeatureMemory, start: int) -> Callable[[], None]:
        place = [start]

        def run() -> None:
            for _ in range(20):
                ids = torch.arange(place[0], place[0] + BATCH)
                place[0] += BATCH
                memory.add(features, ids % 10, ids)
                table.add("prequential", phi, phi[:, 0].abs(), ids)

        return run

    runs = [offered(*after(number, RECORDS, rows, width), number * BATCH) for number in (batches, 10 * batches)]
    early, late = in_turns(runs, rounds)
    return {"early_s": early / 20, "late_s": late / 20, "growth": late / early}


def measure_features(rounds: int, width: int = WIDTH, classes: int = CLASSES, memory: int = 1000) -> dict[str, float]:
    """Time of the features of a batch, of a snapshot and of leaving rows out, each beside what it rests on."""
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(30 * classes, width, generator=draws)
    targets = torch.arange(len(rows)) % classes
    statistics, head = FeatureStatistics(width, scatter=True), AnalyticHead(width)
    for learner in (statistics, head):
        learner.update(rows, targets)
    snapshot = Snapshot.of(statistics, memory=(rows[:memory], targets[:memory]))
    batch, scores = rows[:BATCH].double(), torch.randn(BATCH, classes, generator=draws)
    kept, factor = rows[:memory].double(), snapshot.factor

    def six() -> Tensor:
        return stationarising_features(NAMES, snapshot, batch, scores, probabilities=False)

    def bare() -> tuple[Tensor, ...]:
        white, lifted = (torch.linalg.solve_triangular(factor, batch.T, upper=False).T for _ in range(2))
        return white @ snapshot.white_means.T, lifted, batch @ kept.T

    covariance = statistics.scatter + torch.eye(width)
    runs: list[Callable[[], Any]] = [
        six,
        bare,
        lambda: Snapshot.of(statistics),
        lambda: torch.linalg.cholesky(covariance),
        lambda: head.leave_one_out(rows[:memory], targets[:memory]),
        lambda: head(rows[:memory]),
    ]
    names = ("six_s", "bare_s", "snapshot_s", "cholesky_s", "left_out_s", "scores_s")
    found = dict(zip(names, in_turns(runs, rounds), strict=True))
    return {**found, "ratio": found["six_s"] / found["bare_s"]}


class TimedDEUP(DEUP):
    """Adds up its own time over training batches, without forwards that it happens to ask for first."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.own_s = self.forward_s = 0.0
        self.batches = 0
        network.register_forward_pre_hook(lambda *_: self._begin())
        network.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._since = time.perf_counter()

    def _end(self) -> None:
        self.forward_s += time.perf_counter() - self._since

    def _timed(self, run: Callable[[], None]) -> None:
        before, since = self.forward_s, time.perf_counter()
        run()
        self.own_s += time.perf_counter() - since - (self.forward_s - before)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Freeze what heads say."""
        if batch_idx == 3:  # the first ones warm up
            self.own_s = self.forward_s = 0.0
            self.batches = 0
        self.batches += 1
        self._timed(lambda: super(TimedDEUP, self).on_train_batch_start(trainer, pl_module, batch, batch_idx))

    def on_batch(self, trainer: Any, module: Any, stage: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Record the errors on a batch that is about to be learned."""
        run = super().on_batch
        self._timed(lambda: run(trainer, module, stage, batch_idx, dataloader_idx))


def measure_record(batches: int = 40) -> dict[str, float]:
    """Time that the callback adds to a batch, and that of the network's forward, in one run."""
    torch.manual_seed(0)
    count = batches * BATCH
    images = TensorDataset(torch.rand(count, 3, 64, 64), torch.arange(count) % 10)
    module = TimmClassifier("resnet18", num_classes=10)
    deup = TimedDEUP(module.network)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about loaders without workers and runs without a logger
        trainer = pl.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            strategy="gradient_free",
            callbacks=[NMC(), deup],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(images, batch_size=BATCH))
    assert deup.batches == batches - 3
    own, forward = deup.own_s / deup.batches, deup.forward_s / deup.batches
    return {"own_s": own, "forward_s": forward, "ratio": own / forward}


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=["fit", "predict", "state", "stream", "features", "record"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    missed = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")

    def told(what: str, figures: dict[str, float], **goals: float) -> None:
        found[what] = figures
        print(f"{what}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        for name, most in goals.items():
            if figures[name] > most:
                missed.append(f"{what}: {name} {figures[name]:.3g}, goal {most:g}")

    if "fit" in options.only:
        told("fit", measure_fit(options.rounds), ratio=1.2)
    if "predict" in options.only:
        told("predict", measure_predict(options.rounds), ratio=0.5, largest_difference=1e-12)
    if "state" in options.only:
        told("state", measure_state(), growth=1.01)
    if "stream" in options.only:
        told("stream", measure_stream(options.rounds), growth=1.5)
    if "features" in options.only:
        told("features", measure_features(options.rounds), ratio=2.0)
    if "record" in options.only:
        told("record", measure_record(), ratio=0.01)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "threads": options.threads, **found}, indent=1))
    for what in missed:
        print(f"MISSED: {what}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
