"""What a comparison of recipes over several seeds shows and writes: a table, ``compare.json`` and ``compare.csv``."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from clkit._version import __version__
from clkit.metrics.functional import staged_counts, summarize
from clkit.report.results import write_json, write_tables

__all__ = ["COMPARED", "ComparisonRow", "Interval", "joint_metrics", "t_interval", "write_comparison"]

FORMAT = 1
CONFIDENCE = 0.95
COMPARED = {  # which metrics a comparison shows, with the heads of their columns
    "average_accuracy": "average\naccuracy",
    "final_accuracy": "final\naccuracy",
    "average_incremental_accuracy": "average\nincremental",
    "forgetting": "\nforgetting",
}


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval (``None`` where one value gives none)."""

    mean: float
    half_width: float | None


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of the values of independent runs and Student's confidence interval of it, ``mean ± t · s / √n``.

    Example:
        >>> mean, half_width = t_interval([0.8, 0.9])
        >>> round(mean, 6), round(half_width, 6)  # t = 12.706205 with one degree of freedom
        (0.85, 0.63531)
    """
    n, mean = len(values), fmean(values)
    if n == 1:
        return Interval(mean, None)
    from scipy.stats import t  # takes a second to import

    return Interval(mean, float(t.interval(confidence, n - 1)[1]) * stdev(values) / math.sqrt(n))


class ComparisonRow(NamedTuple):
    """One row of the table."""

    name: str  # the row's first column
    recipe: str  # the recipe that was run, "fine-tuning" or "joint"
    predictor: str  # of the recipe
    outer: bool  # whether it is fine-tuning or joint training
    runs: list[dict[str, Any]]  # for each seed its number, the run's folder and all metrics, None where not defined

    def interval(self, metric: str) -> Interval | None:
        """Return the mean over the seeds and its interval; ``None`` where a metric is not defined."""
        values = [run[metric] for run in self.runs]
        return None if None in values else t_interval(values)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return mean, half-width and both ends of each metric's interval."""
        summary: dict[str, dict[str, float | None]] = {}
        for metric in COMPARED:
            mean, half = self.interval(metric) or (None, None)
            low, high = (None, None) if mean is None or half is None else (mean - half, mean + half)
            summary[metric] = {"mean": mean, "half_width": half, "low": low, "high": high}
        return summary


def write_comparison(folder: Path, rows: Sequence[ComparisonRow], **more: Any) -> None:
    """Write ``compare.json``, with the further entries ``more``, and ``compare.csv``."""
    listed = [row._asdict() | {"summary": row.summary()} for row in rows]
    document = {"format": FORMAT, "clkit": __version__, "confidence": CONFIDENCE, **more, "rows": listed}
    write_json(folder / "compare.json", document)
    columns = [f"{metric}{end}" for metric in COMPARED for end in ("", "_low", "_high")]
    lines = []
    for row in listed:
        ends = [row["summary"][metric][end] for metric in COMPARED for end in ("mean", "low", "high")]
        cells = ["" if value is None else f"{value:.6f}" for value in ends]
        lines.append([row["name"], row["recipe"], row["predictor"], len(row["runs"]), *cells])
    write_tables(folder, {"compare.csv": [["name", "recipe", "predictor", "seeds", *columns], *lines]})


def joint_metrics(
    results: Mapping[str, Any], per_class: Path, predictor: str, stages: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return the metrics of joint training, after each stage on the classes that the stream would have brought by then.

    Where a class is in two of the ``stages``, which list the classes of each, only the final accuracy is known.
    """
    values: dict[str, Any] = dict.fromkeys(COMPARED)
    classes = [label for stage in stages for label in stage]
    if len(set(classes)) == len(classes):
        with per_class.open(newline="", encoding="utf-8") as lines:
            counts = {
                int(line["class"]): (int(line["correct"]), int(line["samples"]))
                for line in csv.DictReader(lines)
                if line["predictor"] == predictor
            }
        without = [j for j, stage in enumerate(stages) if not any(label in counts for label in stage)]
        values = summarize(*staged_counts(counts, stages), without=without)
    return {**values, "final_accuracy": results["final_accuracy"], "forgetting": None}
