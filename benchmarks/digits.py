"""The methods on scikit-learn's digits, through a Trainer, beside the values that the papers' equations give.

    python benchmarks/digits.py

Balanced: flat pixels / 16, train on even rows, test on odd ones, five stages of two classes. Long-tailed: the first
max(2, floor(90 · 0.6^c)) training rows of class c. The reference values are float64 NumPy computations without this
library. Last, the first-large-batch case: how exact the ridge weights are beside a QR solution. Exit status 1 if a
value is off.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import numpy as np
import torch
from bare_trainer import quiet_trainer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from clkit.callbacks import AEFOCL, NMC, PseudoFeatures, StreamEvaluation
from clkit.data import ClassIncremental, Custom, Source, StreamDataModule
from clkit.methods import AnalyticHead
from clkit.models import TimmClassifier

# A_1 … A_5, average, last, forgetting; per cent
BALANCED = {
    "ridge, gamma 1": [100.0, 99.45, 97.59, 96.67, 92.32, 97.21, 92.32, 3.59],
    "ridge, gamma 0.1": [100.0, 99.17, 97.22, 96.26, 92.54, 97.04, 92.54, 3.45],
    "NMC janson": [99.44, 95.29, 95.93, 95.42, 89.87, 95.19, 89.87, 4.47],
    "NMC euclidean": [99.44, 95.01, 95.74, 95.15, 89.87, 95.04, 89.87, 4.74],
    "NMC icarl": [99.44, 94.74, 95.56, 95.28, 90.09, 95.02, 90.09, 4.33],
    "NMC cosine": [99.44, 94.74, 95.56, 95.28, 89.98, 95.00, 89.98, 4.46],
}
# mean class accuracy: lowest and highest value that rounds to the reference
LONG_TAILED = {
    "plain ridge": (61.05, 61.15),
    "expected": (79.35, 79.45),
    "reweight": (81.45, 81.55),
    "NMC euclidean": (80.15, 80.25),
    "NMC janson": (81.75, 81.85),
    "PFG, mean of 20 seeds": (78.6, 79.7),
}
LARGE_BATCH = {"gram": 1e-8, "recursive": 1e-5}


def run(source: str | Source, heads: dict[str, Any]) -> StreamEvaluation:
    """One stream for all heads."""
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = quiet_trainer(
        strategy="gradient_free",
        callbacks=[*heads.values(), evaluation],
    )
    trainer.fit(TimmClassifier("identity"), datamodule=StreamDataModule(source, ClassIncremental(experiences=5)))
    return evaluation


def balanced(console: Console) -> bool:
    """The two tables of the method pages."""
    heads = {
        "ridge, gamma 1": AEFOCL(1.0, balance="none", name="ridge"),
        "ridge, gamma 0.1": AEFOCL(0.1, balance="none", name="weak"),
        **{f"NMC {metric}": NMC(metric, name=metric) for metric in ("janson", "euclidean", "icarl", "cosine")},
    }
    results = run("digits:flat", heads).results
    table = Table(title="balanced digits, %", title_justify="left")
    for column in ("head", "A1", "A2", "A3", "A4", "A5", "average", "last", "forgetting", "off by"):
        table.add_column(column, justify="left" if column == "head" else "right")
    right = True
    for row, reference in BALANCED.items():
        summary = results[heads[row].name]
        values = [
            *summary["accuracy_seen"],
            summary["average_incremental_accuracy"],
            summary["final_accuracy"],
            summary["forgetting"],
        ]
        off = max(abs(100 * value - expected) for value, expected in zip(values, reference, strict=True))
        right &= off < 0.01
        table.add_row(row, *[f"{100 * value:.2f}" for value in values], f"{off:.4f}")
    console.print(table)
    return right


def long_tailed(console: Console) -> bool:
    """Mean class accuracy under imbalance."""
    images, targets = load_digits(return_X_y=True)
    features, labels = torch.from_numpy(images / 16).float(), torch.from_numpy(targets).long()
    kept = np.concatenate(
        [2 * np.flatnonzero(targets[::2] == c)[: max(2, int(90 * 0.6**c))] for c in range(10)]
    )  # even rows
    source = Custom(TensorDataset(features[kept], labels[kept]), TensorDataset(features[1::2], labels[1::2]))
    heads: dict[str, Any] = {
        "plain ridge": AEFOCL(balance="none", name="plain"),
        "expected": AEFOCL(balance="expected", name="expected"),
        "reweight": AEFOCL(balance="reweight", name="reweight"),
        "NMC euclidean": NMC("euclidean", name="euclidean"),
        "NMC janson": NMC(name="janson"),
        **{
            f"pfg{seed}": AEFOCL(pseudo_features=PseudoFeatures(pfg_seed=seed), name=f"pfg{seed}") for seed in range(20)
        },
    }
    evaluation = run(source, heads)
    accuracy = {
        row: 100 * float(np.mean([correct / total for correct, total in evaluation.class_counts(head.name).values()]))
        for row, head in heads.items()
    }
    drawn = [accuracy.pop(f"pfg{seed}") for seed in range(20)]
    accuracy["PFG, mean of 20 seeds"] = float(np.mean(drawn))
    table = Table(title="long-tailed digits, mean class accuracy, %", title_justify="left")
    for column in ("head", "ours", "reference"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for row, (low, high) in LONG_TAILED.items():
        table.add_row(row, f"{accuracy[row]:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    return all(low <= accuracy[row] <= high for row, (low, high) in LONG_TAILED.items())


def large_batch(console: Console) -> bool:
    """Gamma 1e-3, features times 30, one batch of 4000 with 256 features."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 64, generator=generator, dtype=torch.float64)
    projection = torch.randn(64, 256, generator=generator, dtype=torch.float64)
    features = 30 * torch.relu(base @ projection / 8)
    targets = torch.randint(0, 10, (4000,), generator=generator)
    stacked = np.vstack([features.numpy(), np.sqrt(1e-3) * np.eye(256)])
    orthogonal, triangular = np.linalg.qr(stacked)
    wanted = np.vstack([np.eye(10)[targets.numpy()], np.zeros((256, 10))])
    exact = np.linalg.solve(triangular, orthogonal.T @ wanted)
    right = True
    for solver, tolerance in LARGE_BATCH.items():
        head = AnalyticHead(256, gamma=1e-3, solver=solver)
        head.update(features, targets)
        error = float(np.abs(head.weight.numpy() - exact).max() / np.abs(exact).max())
        console.print(f"first large batch, {solver}: relative error of W {error:.1e} (at most {tolerance:.0e})")
        right &= error <= tolerance
    return right


def main() -> int:
    """Prints everything; returns the exit status."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    console = Console()
    parts = [balanced(console), long_tailed(console), large_batch(console)]
    console.print("all values as they should be" if all(parts) else "A VALUE IS OFF")
    return int(not all(parts))


if __name__ == "__main__":
    sys.exit(main())
