"""The files of a run: ``results.json`` and tables as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clkit.files import atomic_write

__all__ = ["ClassTable", "write_results"]

ClassTable = tuple[list[list[int]], list[list[int]]]  # [class, correct, samples] and [class, predicted, samples]


def write_results(
    folder: Path, document: Mapping[str, Any], classes: Mapping[str, ClassTable], names: Mapping[int, str]
) -> None:
    """Writes ``results.json``, ``accuracy.csv``, ``per_class.csv`` and ``confusion_<predictor>.csv``.

    Args:
        folder: Where to.
        document: What ``results.json`` holds.
        classes: For each predictor, after its last stage: class, correct and samples of each class; class, predicted
            class and samples of each pair.
        names: Class names by id; may be empty.
    """
    with atomic_write(folder / "results.json") as draft:
        draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _write_accuracy(folder / "accuracy.csv", document["predictors"])
    with _table(folder / "per_class.csv") as writer:
        writer.writerow(["predictor", "class", "name", "samples", "correct", "accuracy"])
        for predictor, (counts, _) in classes.items():
            for label, hits, n in counts:
                writer.writerow([predictor, label, names.get(label, ""), n, hits, f"{hits / n:.6f}"])
    for predictor, (counts, listed) in classes.items():
        labels = [label for label, _, _ in counts]
        pairs = {(label, predicted): n for label, predicted, n in listed}
        columns = sorted({predicted for _, predicted in pairs} | set(labels))
        with _table(folder / f"confusion_{predictor}.csv") as writer:
            writer.writerow(["class \\ predicted", *columns])
            for label in labels:
                writer.writerow([label, *[pairs.get((label, column), 0) for column in columns]])


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    with atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        yield csv.writer(file)


def _write_accuracy(path: Path, predictors: Mapping[str, Mapping[str, Any]]) -> None:
    width = max((len(row) for summary in predictors.values() for row in summary["accuracy_matrix"]), default=0)
    with _table(path) as writer:
        writer.writerow(["predictor", "stage", "accuracy_seen", *[f"experience_{j + 1}" for j in range(width)]])
        for predictor, summary in predictors.items():
            rows = zip(summary["accuracy_matrix"], summary["accuracy_seen"], strict=True)
            for stage, (row, seen) in enumerate(rows, start=1):
                writer.writerow([predictor, stage, _cell(seen), *[_cell(value) for value in row]])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
