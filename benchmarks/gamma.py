"""The ridge strength that the sums choose, against all others, on real features and handwritten digits.

    CLKIT_DATA=FOLDER python benchmarks/gamma.py

For each set of features, without and with a random lift, and each way to balance the classes: accuracy on the test rows
with ``gamma=1``, with ``gamma="auto"`` and with the strength that is best on those test rows, which nobody knows
beforehand. Then the same for LDA and its ``shrinkage``. Exit status 0 if ``"auto"`` is nowhere more than 0.3 points
below the best one, 1 if it is, 2 if the data is not there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from circumstances import data_folder
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

from clkit.methods import AnalyticHead, LDAHead

SETS = {
    "CIFAR-100": "features_cifar100_tf_efficientnet_lite0.npz",
    "Caltech-101": "features_caltech101_tf_efficientnet_lite0.npz",
    "traffic signs": "features_gtsrb_tf_efficientnet_lite0.npz",
    "digits": "",  # of scikit-learn: pixels / 16, even rows to learn, odd ones to test
}
STEPS = 10.0 ** (np.arange(-24, 9) / 4)  # strengths to compare with, as factors of the mean eigenvalue
TOLERANCE = 0.3  # points
LIFT = 2048
DEEP_SLDA = 1e-4  # its shrinkage


class Samples(NamedTuple):
    """Features and class ids of both parts."""

    train: Tensor
    train_ids: Tensor
    test: Tensor
    test_ids: Tensor


class Row(NamedTuple):
    """Accuracies in per cent: with the fixed setting, the chosen one and the best one; and the two strengths."""

    title: tuple[str, ...]
    fixed: float
    auto: float
    best: float
    chosen: float
    best_at: float


def samples(name: str, folder: Path) -> Samples:
    """Return one set in float64."""
    if not SETS[name]:
        images, ids = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images / 16), torch.from_numpy(ids.astype(np.int64))
        return Samples(x[::2], y[::2], x[1::2], y[1::2])
    with np.load(folder / SETS[name], allow_pickle=False) as data:
        arrays = [data["f_train"].astype(float), data["y_train"].astype(np.int64)]
        arrays += [data["f_test"].astype(float), data["y_test"].astype(np.int64)]
    return Samples(*map(torch.from_numpy, arrays))


def learned(head: Any, data: Samples) -> Any:
    """Return the head after one pass."""
    for start in range(0, len(data.train), 512):
        head.update(data.train[start : start + 512], data.train_ids[start : start + 512])
    return head


def accuracy(predicted: Tensor, data: Samples) -> float:
    """Return the share of right ids in per cent."""
    return 100 * float((predicted == data.test_ids).double().mean())


def best_of(predict: Callable[[float], Tensor], scale: float, data: Samples) -> tuple[float, float]:
    """Return the accuracy of the best strength on the test rows, and that strength; the smaller of equals."""
    reached = [accuracy(predict(float(scale * step)), data) for step in STEPS]
    place = int(np.argmax(reached))
    return reached[place], float(scale * STEPS[place])


def ridge_row(name: str, lift: int | None, balance: Any, data: Samples) -> Row:
    """Compare the strengths of a ridge head."""
    options: dict[str, Any] = {"expansion_dim": lift, "balance": balance}
    fixed = learned(AnalyticHead(data.train.shape[1], **options), data)
    auto = learned(AnalyticHead(data.train.shape[1], gamma="auto", **options), data)
    gram, sums = balanced_system(fixed)
    values, vectors = torch.linalg.eigh(gram)
    moments, design = vectors.T @ sums.T, fixed.feature_map(data.test) @ vectors

    def predict(gamma: float) -> Tensor:
        scores = design @ (moments / (values.clamp(min=0) + gamma)[:, None])
        ids: Tensor = fixed.classes[scores.argmax(dim=1)]
        return ids

    best, best_at = best_of(predict, float(values.mean()), data)
    title = (name, "raw" if lift is None else f"lift {lift}", balance)
    chosen = accuracy(auto.predict(data.test), data)
    return Row(title, accuracy(fixed.predict(data.test), data), chosen, best, auto.chosen_gamma, best_at)


def balanced_system(head: AnalyticHead) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix and the class sums (k, D) with what balances the classes."""
    gram, sums = head.statistics.gram, head.statistics.sums
    for position, rows, weight in head._pseudo_rows():
        gram += weight * rows.T @ rows
        if position is not None:
            sums[position] += weight * rows.sum(dim=0)
    return gram, sums


def lda_row(name: str, data: Samples) -> Row:
    """Compare the strengths of LDA: what is added to the diagonal of the within-class scatter."""
    auto = learned(LDAHead(data.train.shape[1]), data)
    fixed = learned(LDAHead(data.train.shape[1], shrinkage=DEEP_SLDA), data)
    means = auto.statistics.means
    origin = means.mean(dim=0)
    values, vectors = torch.linalg.eigh(auto.statistics.scatter)
    means, design = (means - origin) @ vectors, (data.test - origin) @ vectors

    def predict(gamma: float) -> Tensor:
        weight = means / (values.clamp(min=0) + gamma)
        ids: Tensor = auto.classes[(design @ weight.T - (weight * means).sum(dim=1) / 2).argmax(dim=1)]
        return ids

    best, best_at = best_of(predict, float(values.mean()), data)
    reached = [accuracy(head.predict(data.test), data) for head in (fixed, auto)]
    return Row((name,), *reached, best, auto.chosen_gamma, best_at)


def table(title: str, names: Sequence[str], rows: Sequence[Row]) -> Table:
    """The rows, and how far the chosen strength lies below the best one."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in names[: len(rows[0].title)]:
        made.add_column(name, no_wrap=True)
    for name in names[len(rows[0].title) :]:
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = [f"{value:.2f}" for value in (row.fixed, row.auto, row.best, row.auto - row.best)]
        made.add_row(*row.title, *figures, f"{row.chosen:.3g}", f"{row.best_at:.3g}")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sets", default=",".join(SETS), help="which sets, with commas between (default: all)")
    parser.add_argument("--lift", type=int, default=LIFT, help=f"units of the lift (default: {LIFT})")
    options = parser.parse_args(arguments)
    names = options.sets.split(",")
    if unknown := [name for name in names if name not in SETS]:
        parser.error(f"--sets: {', '.join(map(repr, unknown))} is not one of {', '.join(SETS)}")
    if (folder := data_folder("gamma", [SETS[name] for name in names if SETS[name]])) is None:
        return 2
    ridge, lda = [], []
    for name in names:
        data = samples(name, folder)
        for lift in (None, options.lift):
            for balance in ("none", "pfg") if lift else ("none", "pfg", "expected"):
                ridge.append(ridge_row(name, lift, balance, data))
        lda.append(lda_row(name, data))
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    columns = ("gamma = 1", "auto", "best", "auto - best", "gamma chosen", "gamma best")
    console.print(table("ridge, accuracy in per cent", ("features", "", "balance", *columns), ridge))
    columns = (f"{DEEP_SLDA:g}", *columns[1:])
    console.print(table("LDA, accuracy in per cent", ("features", *columns), lda))
    below = [" ".join(row.title) for row in [*ridge, *lda] if row.auto < row.best - TOLERANCE - 1e-9]
    console.print(f"more than {TOLERANCE} points below the best: {'; '.join(below) or 'nowhere'}", markup=False)
    return int(bool(below))


if __name__ == "__main__":
    sys.exit(main())
