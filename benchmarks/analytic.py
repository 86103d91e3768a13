"""Speed and memory of the gradient-free learners, as ratios measured side by side in one run.

    python benchmarks/analytic.py [--threads 1] [--json FILE] [--only gram nmc overhead evaluation]

Each line names what is compared, the seconds of both sides (the best of several rounds that take turns), their ratio
and the goal. Needs no data. Exit status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from bare_trainer import quiet_trainer
from scipy.linalg.blas import ssyrk
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clkit.callbacks import AEFOCL, LDA, NMC, StreamEvaluation
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.methods import AnalyticHead, NearestMeanHead
from clkit.methods._gram import add_gram_
from clkit.models import TimmClassifier

WIDTH = 2048


@dataclass
class Line:
    """One comparison: ``ratio`` = ours / theirs where lower is better, theirs / ours where ``goal`` is a speed-up."""

    what: str
    ours: float
    theirs: float
    ratio: float
    goal: str
    met: bool | None


def best_of(rounds: int, *runs: Callable[[], Any], repeats: int = 1) -> list[float]:
    """Seconds of one call of each function: the best round, the functions taking turns."""
    best = [math.inf] * len(runs)
    for _ in range(rounds):
        for position, run in enumerate(runs):
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            best[position] = min(best[position], (time.perf_counter() - start) / repeats)
    return best


def at_most(what: str, ours: float, theirs: float, goal: float | None) -> Line:
    """Ours is at most ``goal`` times theirs."""
    ratio = ours / theirs
    return Line(
        what, ours, theirs, ratio, "" if goal is None else f"<= {goal}", None if goal is None else ratio <= goal
    )


def at_least(what: str, ours: float, theirs: float, goal: float | None) -> Line:
    """Ours is at least ``goal`` times as fast."""
    ratio = theirs / ours
    return Line(
        what, ours, theirs, ratio, "" if goal is None else f">= {goal}", None if goal is None else ratio >= goal
    )


# ---- the product of an update


def gram() -> list[Line]:
    """The update of the Gram matrix beside a general product, the textbook recursion, and float32 products."""
    lines = []
    generator = torch.Generator().manual_seed(0)
    lower = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for size, goal in ((10, 1.1), (256, 0.6)):
        rows = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
        general = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        ours, theirs = best_of(
            7,
            lambda rows=rows: add_gram_(lower, rows),
            lambda rows=rows, general=general: general.addmm_(rows.T, rows),
            repeats=20 if size == 10 else 2,
        )
        lines.append(at_most(f"Gram update, D {WIDTH}, B {size} / addmm_ in float64", ours, theirs, goal))
        targets = torch.arange(size) % 10
        head = AnalyticHead(WIDTH)
        whole, theirs = best_of(
            5,
            lambda rows=rows, targets=targets, head=head: head.update(rows.float(), targets),
            lambda rows=rows, general=general: general.addmm_(rows.T, rows),
            repeats=10 if size == 10 else 2,
        )
        lines.append(at_most(f"the same with checks and class sums (head.update), B {size}", whole, theirs, None))
    return [*lines, *recursion(), *float32_products()]


def recursion() -> list[Line]:
    """The recursive least squares of the papers, as it is written there and with its products in the best order."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.arange(10)
    one_hot = torch.eye(10, dtype=torch.float64)
    state = {"R": torch.eye(WIDTH, dtype=torch.float64), "W": torch.zeros(WIDTH, 10, dtype=torch.float64)}
    eye = torch.eye(10, dtype=torch.float64)

    def as_written() -> None:
        R, W = state["R"], state["W"]
        R = R - R @ rows.T @ torch.linalg.inv(eye + rows @ R @ rows.T) @ rows @ R
        state["R"], state["W"] = R, W + R @ rows.T @ (one_hot - rows @ W)

    def in_best_order() -> None:
        R, W = state["R"], state["W"]
        projected = rows @ R
        R = R - projected.T @ torch.linalg.solve(eye + projected @ rows.T, projected)
        state["R"], state["W"] = R, W + R @ (rows.T @ (one_hot - rows @ W))

    head = AnalyticHead(WIDTH)
    ours, slow = best_of(3, lambda: head.update(rows, targets), as_written)
    again, quick = best_of(5, lambda: head.update(rows, targets), in_best_order, repeats=3)
    return [
        at_least(f"head.update, D {WIDTH}, B 10 / recursion as written", ours, slow, 50),
        at_least("the same / recursion with its products in the best order", again, quick, None),
    ]


def float32_products() -> list[Line]:
    """Whether products in float32, added into float64 sums, would pay: time and error."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, WIDTH, generator=generator).relu()
    lower = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)

    def single() -> Tensor:
        product = ssyrk(1.0, rows.numpy().T)
        lower.add_(torch.from_numpy(product.T))
        return lower

    ours, other = best_of(5, lambda: add_gram_(lower, rows.double()), single, repeats=2)
    exact = (rows.double().T @ rows.double()).tril()
    error = float((torch.from_numpy(ssyrk(1.0, rows.numpy().T).T).double().tril() - exact).abs().max() / exact.max())
    return [at_most(f"Gram update, B 256 / float32 product into float64 sums (error {error:.0e})", ours, other, None)]


# ---- nearest means


def nmc() -> list[Line]:
    """Nearest means beside scikit-learn, which fits anew, and beside the product that no prediction can do without."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 512, generator=generator)
    targets = torch.arange(5000) % 100
    flat, labels = features.numpy().astype(np.float64), targets.numpy()
    head = NearestMeanHead(512, metric="euclidean")
    head.update(features, targets)
    learner = NearestMeanHead(512, metric="euclidean")
    update, refit = best_of(
        5, lambda: learner.update(features[:256], targets[:256]), lambda: NearestCentroid().fit(flat, labels), repeats=3
    )
    centroids = NearestCentroid().fit(flat, labels)
    batch, weight = features[:256], torch.randn(512, 100, generator=generator, dtype=torch.float64)
    predict, theirs = best_of(5, lambda: head.predict(batch), lambda: centroids.predict(flat[:256]), repeats=20)
    again, product = best_of(5, lambda: head.predict(batch), lambda: batch.double() @ weight, repeats=50)
    same = bool((head.predict(features).numpy() == centroids.predict(flat)).all())
    return [
        at_least("NMC update of 256 rows / NearestCentroid refit on 5000", update, refit, 1),
        at_least(f"NMC predict of 256 rows / NearestCentroid (same answers: {same})", predict, theirs, 1),
        at_most("NMC predict / the float64 product alone (512 x 100)", again, product, None),
    ]


# ---- beside a network


def images(count: int, classes: int) -> TensorDataset:
    """Random images at 64 px."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 3, 64, 64, generator=generator), torch.arange(count) * classes // count)


class Clock(pl.Callback):
    """Seconds of the training batches: from the start of each epoch to the end of its last batch."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch begins."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch is over; this callback is the last of the list."""
        self._last = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What comes after the last batch, a boundary or a validation, is not counted."""
        self.seconds += self._last - self._start


def epoch(callbacks: list[pl.Callback], *, strategy: str, frozen: bool) -> float:
    """One pass of 640 images through a resnet18."""
    torch.manual_seed(0)
    module = TimmClassifier("resnet18", num_classes=10)
    if frozen:
        classifier = module.network.get_classifier()
        module.network.requires_grad_(False)
        classifier.requires_grad_(True)
        module.network.eval()
    clock = Clock()
    data = images(640, 10)
    datamodule = StreamDataModule(Custom(data, data), ClassIncremental(1), batch_size=32, preprocessing="unit")
    trainer(strategy=strategy, callbacks=[*callbacks, clock], limit_val_batches=0).fit(module, datamodule=datamodule)
    return clock.seconds


def trainer(**options: Any) -> pl.Trainer:
    """A quiet trainer on one CPU."""
    return quiet_trainer(
        **options,
    )


def overhead() -> list[Line]:
    """What AEF-OCL, NMC and LDA together add to an epoch of a resnet18 at 64 px."""
    lines = []
    for title, settings, goal in (
        ("gradient_free", {"strategy": "gradient_free", "frozen": False}, 1.02),
        ("only the classifier trains, eval-mode network", {"strategy": "auto", "frozen": True}, 1.02),
        ("a training network with BatchNorm (extra pass)", {"strategy": "auto", "frozen": False}, None),
    ):
        best = [math.inf, math.inf]
        for _ in range(5):
            best[0] = min(best[0], epoch([AEFOCL(), NMC(), LDA()], **settings))
            best[1] = min(best[1], epoch([], **settings))
        lines.append(at_most(f"resnet18 epoch with three callbacks / without: {title}", *best, goal))
    return lines


class EvaluationClock(StreamEvaluation):
    """Seconds in evaluation, as ``results.json`` has them."""

    @property
    def evaluated_in(self) -> float:
        """Seconds."""
        return self._seconds["evaluate"]


def evaluation() -> list[Line]:
    """Evaluating after each of 20 experiences on all seen so far, with and without kept features.

    Some rows of each experience are run again at each evaluation: 8 of 128, and 8 of 16, which cost more than half of
    what all 16 do.
    """
    lines = []
    for rows, goal in ((16, None), (128, 5)):
        seconds, matrices = {}, {}
        for keep in (1024, 0):
            torch.manual_seed(0)
            clock = EvaluationClock(table=False, files=False, keep_features=keep)
            datamodule = StreamDataModule(
                Custom(images(320, 20), images(20 * rows, 20)),
                ClassIncremental(20),
                batch_size=16,
                preprocessing="unit",
            )
            trainer(strategy="gradient_free", callbacks=[AEFOCL(), NMC(), LDA(), clock], num_sanity_val_steps=0).fit(
                TimmClassifier("resnet18", num_classes=20), datamodule=datamodule
            )
            seconds[keep], matrices[keep] = clock.evaluated_in, clock.results
        title = f"evaluating 20 experiences of {rows} rows, kept features / not"
        lines.append(at_least(f"{title} (same results: {matrices[1024] == matrices[0]})", *seconds.values(), goal))
    return lines


PARTS: dict[str, Callable[[], list[Line]]] = {"gram": gram, "nmc": nmc, "overhead": overhead, "evaluation": evaluation}


def state_bytes(head: nn.Module) -> int:
    """Size of what is saved."""
    return sum(
        value.numel() * value.element_size() for value in head.state_dict().values() if isinstance(value, Tensor)
    )


def sizes() -> None:
    """State after one batch that shows all classes, and after a thousand more."""
    generator = torch.Generator().manual_seed(0)
    for head in (AnalyticHead(512, balance="pfg"), NearestMeanHead(512)):
        head.update(torch.randn(20, 512, generator=generator), torch.arange(20))
        first = state_bytes(head)
        for _ in range(1000):
            head.update(torch.randn(10, 512, generator=generator), torch.randint(20, (10,), generator=generator))
        print(f"state of {type(head).__name__}: {first} bytes after 20 samples, {state_bytes(head)} after 10020")


def main() -> int:
    """Prints the lines; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    print(f"torch {torch.__version__}, {options.threads} threads; seconds of one call, best of several rounds")
    lines: list[Line] = []
    for name in options.only:
        for line in PARTS[name]():
            lines.append(line)
            verdict = "" if line.met is None else f"goal {line.goal}: {'met' if line.met else 'MISSED'}"
            print(f"{line.what:<78} {line.ours:10.6f} {line.theirs:10.6f}  {line.ratio:8.2f}  {verdict}", flush=True)
    sizes()
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")
    return int(any(line.met is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
