"""The files of a run: ``results.json`` and tables as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_results"]

ClassTable = tuple[dict[int, int], dict[int, int], dict[tuple[int, int], int]]


def write_results(
    folder: Path, document: Mapping[str, Any], classes: Mapping[str, ClassTable], names: Mapping[int, str]
) -> None:
    """Writes ``results.json``, ``accuracy.csv``, ``per_class.csv`` and ``confusion_<predictor>.csv``.

    Args:
        folder: Where to.
        document: What ``results.json`` holds.
        classes: For each predictor, after its last stage: correct by class, total by class, and samples by
            (class, predicted class).
        names: Class names by id; may be empty.
    """
    # written beside and moved over, so that a run killed meanwhile leaves the last whole file
    draft = folder / "results.json.part"
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(folder / "results.json")
    _write_accuracy(folder / "accuracy.csv", document["predictors"])
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["predictor", "class", "name", "samples", "correct", "accuracy"])
        for predictor, (correct, total, _) in classes.items():
            for label, n in sorted(total.items()):
                hits = correct.get(label, 0)
                writer.writerow([predictor, label, names.get(label, ""), n, hits, f"{hits / n:.6f}"])
    for predictor, (_, total, pairs) in classes.items():
        columns = sorted({predicted for _, predicted in pairs} | set(total))
        with (folder / f"confusion_{predictor}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class \\ predicted", *columns])
            for label in sorted(total):
                writer.writerow([label, *[pairs.get((label, column), 0) for column in columns]])


def _write_accuracy(path: Path, predictors: Mapping[str, Mapping[str, Any]]) -> None:
    width = max((len(row) for summary in predictors.values() for row in summary["accuracy_matrix"]), default=0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["predictor", "stage", "accuracy_seen", *[f"experience_{j + 1}" for j in range(width)]])
        for predictor, summary in predictors.items():
            rows = zip(summary["accuracy_matrix"], summary["accuracy_seen"], strict=True)
            for stage, (row, seen) in enumerate(rows, start=1):
                writer.writerow([predictor, stage, _cell(seen), *[_cell(value) for value in row]])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
