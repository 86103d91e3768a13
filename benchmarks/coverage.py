"""How often sets of classes hold the true one, at each stage of a growing stream.

    CLKIT_DATA=FOLDER python benchmarks/coverage.py [--parts cifar100 caltech101 digits signs drift] [--orders 5]

Ridge (γ and shrinkage chosen from the sums), nearest means and LDA learn ten stages of ten classes of CIFAR-100 and of
Caltech-101, from kept features of a network that is not trained, and five stages of two digits, in random class orders.
After each stage sets are calibrated on a memory of 1,024 rows, each left out of the head in closed form, and measured
on the test rows of the classes so far, for nominal coverages of 80, 90 and 95 %. Beside them those calibrated on the
same rows by their plain scores.

Sets of the score "margin" hold at least the best class, so where a head is right more often than the coverage asked for
they are single classes and cover what it is right: the goal at every stage is the larger of the two, in the mean of the
orders within 1.5 points, or two standard errors of one order where its rows are few.

* signs: traffic signs (naturally imbalanced) learned at once; a common threshold and one a class.
* drift: the classes of CIFAR-100 in a stream of test rows, of which the second half gets noise; with and without the
  online rule.

Some minutes on one core. Exit status 1 if a goal is missed, 2 if the data is not there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from circumstances import data_folder
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

from clkit.methods import AnalyticHead, FeatureMemory, LDAHead, NearestMeanHead, PredictionSets

FEATURES = "features_{}_tf_efficientnet_lite0.npz"
NOMINAL = (0.8, 0.9, 0.95)
MEMORY, POINTS = 1024, 0.015
STEP, NOISE = 0.05, 2.0  # of the online rule; of the drift, in standard deviations of a feature

HEADS: dict[str, Callable[[int], Any]] = {
    "ridge": lambda width: AnalyticHead(width, gamma="auto"),
    "nearest means": NearestMeanHead,
    "LDA": LDAHead,
}


class Part(NamedTuple):
    """Features and class ids of a set."""

    train: Tensor
    targets: Tensor
    test: Tensor
    test_targets: Tensor


class Stage(NamedTuple):
    """What sets of one nominal coverage are after one stage."""

    nominal: float
    covered: float
    size: float
    single: float
    accuracy: float
    resubstituted: float  # coverage of sets from rows that were not left out
    error: float  # standard error of the coverage


def kept(name: str) -> Part:
    """Return kept features, float64."""
    with np.load(Path(os.environ.get("CLKIT_DATA", "")) / FEATURES.format(name), allow_pickle=False) as data:
        arrays = {key: data[key] for key in ("f_train", "y_train", "f_test", "y_test")}
    return Part(
        *(torch.from_numpy(each.astype(np.float64 if key[0] == "f" else np.int64)) for key, each in arrays.items())
    )


def digits() -> Part:
    """Return the handwritten digits of scikit-learn: even rows to learn, odd ones to test."""
    rows, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(rows / 16), torch.tensor(labels, dtype=torch.int64)
    return Part(x[::2], y[::2], x[1::2], y[1::2])


def measured(sets: PredictionSets, scores: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Return coverage, mean size and the share of single classes."""
    found = sets.predict(scores)
    sizes = found.sum(dim=1).double()
    hits = found[torch.arange(len(truth)), truth].double()
    return float(hits.mean()), float(sizes.mean()), float((sizes == 1).double().mean())


def stream(part: Part, head: Any, stages: int, seed: int) -> list[list[Stage]]:
    """Return by stage what sets are, one entry a nominal coverage."""
    classes = int(part.targets.max()) + 1
    order = torch.from_numpy(np.random.default_rng(seed).permutation(classes))
    memory, found = FeatureMemory(MEMORY, seed), []
    for number, new in enumerate(order.tensor_split(stages)):
        rows = torch.isin(part.targets, new).nonzero()[:, 0]
        head.update(part.train[rows], part.targets[rows])
        memory.add(part.train[rows], part.targets[rows], rows)
        known = torch.isin(part.test_targets, torch.cat(order.tensor_split(stages)[: number + 1]))
        scores, truth = head(part.test[known]), part.test_targets[known]
        accuracy = float((scores.argmax(dim=1) == truth).double().mean())
        features = memory.features.double()
        left_out, plain = head.leave_one_out(features, memory.labels), head(features)
        stage = []
        for nominal in NOMINAL:
            sets = PredictionSets(nominal)
            sets.calibrate(left_out, memory.labels)
            own = measured(sets, scores, truth)
            sets.calibrate(plain, memory.labels)
            error = np.sqrt(nominal * (1 - nominal) * (1 / len(truth) + 1 / len(features)))
            stage.append(Stage(nominal, *own, accuracy, measured(sets, scores, truth)[0], float(error)))
        found.append(stage)
    return found


def measure_stream(name: str, part: Part, stages: int, orders: int, table: Table) -> list[str]:
    """Add a set's rows to a table, and return the goals missed."""
    missed, shown = [], sorted({1, stages // 2, stages})
    for head, make in HEADS.items():
        runs = np.array([stream(part, make(part.train.shape[1]), stages, seed) for seed in range(orders)])
        mean = runs.mean(axis=0)  # stages, nominal coverages, entries
        for place, nominal in enumerate(NOMINAL):
            entries = Stage(*mean[:, place].T)
            goal = np.maximum(nominal, runs[:, :, place, 4]).mean(axis=0)
            off = np.asarray(entries.covered) - goal
            allowed = np.maximum(POINTS, 2 * np.asarray(entries.error))
            worst = int(np.abs(off).argmax())

            def at(column: Any, form: str = ".3f") -> str:
                return " ".join(f"{column[stage - 1]:{form}}" for stage in shown)

            table.add_row(
                name,
                head,
                f"{nominal:g}",
                at(entries.accuracy),
                at(entries.covered),
                at(entries.size, ".2f"),
                at(entries.single, ".2f"),
                at(entries.resubstituted),
                f"{100 * off[worst]:+.1f} ({worst + 1}), {int((np.abs(off) > POINTS).sum())} of {stages}",
            )
            late = [number + 1 for number in range(stages) if abs(off[number]) > allowed[number]]
            if late:
                missed.append(f"{name}, {head}, {nominal:g}: off at stages {late}")
    return missed


def measure_signs(part: Part, console: Console) -> None:
    """Print what a common threshold and one a class do for rare classes."""
    table = Table(
        "traffic signs", "nominal", "thresholds", "coverage", "mean of classes", "least of a class", "set size"
    )
    for head, make in HEADS.items():
        learned, memory = make(part.train.shape[1]), FeatureMemory(MEMORY)
        learned.update(part.train, part.targets)
        memory.add(part.train, part.targets, torch.arange(len(part.targets)))
        left_out, scores = learned.leave_one_out(memory.features.double(), memory.labels), learned(part.test)
        classes = part.test_targets.unique()
        for nominal in NOMINAL[:2]:
            for conditional in (False, True):
                sets = PredictionSets(nominal, class_conditional=conditional)
                sets.calibrate(left_out, memory.labels)
                hits = sets.predict(scores)
                hit = hits[torch.arange(len(scores)), part.test_targets].double()
                by_class = torch.stack([hit[part.test_targets == each].mean() for each in classes])
                cells = (hit.mean(), by_class.mean(), by_class.min())
                size = f"{float(hits.sum(dim=1).double().mean()):.2f}"
                which = "one a class" if conditional else "common"
                table.add_row(head, f"{nominal:g}", which, *(f"{float(each):.3f}" for each in cells), size)
    console.print(table)


def measure_drift(part: Part, console: Console) -> None:
    """Print the coverage before and under an injected drift, with and without the online rule."""
    table = Table(
        "drift, nominal 0.9", "online rule", "coverage before", "under drift", "set size before", "under drift"
    )
    draws = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(part.test), generator=draws)
    half = len(rows) // 2
    stream_rows, truth = part.test[rows].clone(), part.test_targets[rows]
    spread = part.train.std(dim=0)
    stream_rows[half:] += NOISE * spread * torch.randn(stream_rows[half:].shape, generator=draws, dtype=torch.float64)
    for head, make in HEADS.items():
        learned, memory = make(part.train.shape[1]), FeatureMemory(MEMORY)
        learned.update(part.train, part.targets)
        memory.add(part.train, part.targets, torch.arange(len(part.targets)))
        left_out, scores = learned.leave_one_out(memory.features.double(), memory.labels), learned(stream_rows)
        for step in (0.0, STEP):
            sets = PredictionSets(0.9, adaptive=step)
            sets.calibrate(left_out, memory.labels)
            missed, sizes = [], []
            for one, label in zip(scores.split(1), truth.split(1), strict=True):
                sizes.append(float(sets.predict(one).sum()))
                missed.append(float(sets.observe(one, label)))
            cells = [1 - np.mean(missed[:half]), 1 - np.mean(missed[half:])]
            means = [np.mean(sizes[:half]), np.mean(sizes[half:])]
            table.add_row(
                head, f"step {step:g}", *(f"{each:.3f}" for each in cells), *(f"{each:.1f}" for each in means)
            )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["cifar100", "caltech101", "digits", "signs", "drift"])
    parser.add_argument("--orders", type=int, default=5)
    options = parser.parse_args(arguments)
    needs = {"cifar100": "cifar100", "caltech101": "caltech101", "signs": "gtsrb", "drift": "cifar100"}
    files = [FEATURES.format(needs[part]) for part in options.parts if part in needs]
    if data_folder("coverage", list(dict.fromkeys(files))) is None:
        return 2
    console, missed = Console(width=170), []
    names = (
        "set",
        "head",
        "nominal",
        "accuracy",
        "coverage",
        "set size",
        "single",
        "not left out",
        "off the most, beyond",
    )
    table = Table(*names, title="after the first stage, half of them, and the last")
    for name, stages in (("cifar100", 10), ("caltech101", 10), ("digits", 5)):
        if name in options.parts:
            part = digits() if name == "digits" else kept(name)
            missed += measure_stream(name, part, stages, options.orders, table)
    if table.row_count:
        console.print(table)
    if "signs" in options.parts:
        measure_signs(kept("gtsrb"), console)
    if "drift" in options.parts:
        measure_drift(kept("cifar100"), console)
    for what in missed:
        print(f"MISSED: {what}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
