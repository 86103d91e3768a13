"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from clkit.report.comparison import METRICS, ComparisonRow
from clkit.report.intervals import Interval

__all__ = ["comparison_table", "evaluation_table", "seeds_table", "stage_table"]

MOST_COLUMNS = 8  # experiences shown one by one; more would not fit a terminal


def stage_table(results: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Accuracies after the last stage: one row a predictor, in per cent.

    ``seen`` is the accuracy on all of them, ``mean`` its mean over the stages so far (average incremental accuracy),
    ``forgets`` the points that the experiences lost since their best stage (forgetting).

    Args:
        results: Metrics of each predictor, as in ``results.json``.
        title: What stands above.

    Example:
        >>> from clkit.metrics.functional import summarize
        >>> stage_table({"nmc": summarize([[9]], [[10]])}, "after experience 1").row_count
        1
    """
    table = _table(f"{title} (accuracy, %)")
    rows = {name: summary["accuracy_matrix"][-1] for name, summary in results.items() if summary["accuracy_matrix"]}
    width = max((len([value for value in row if value is not None]) for row in rows.values()), default=0)
    shown = range(width) if width <= MOST_COLUMNS else range(0)
    for j in shown:
        table.add_column(f"exp {j + 1}", justify="right", no_wrap=True)
    table.add_column("seen", justify="right", style="bold", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("forgets", justify="right", no_wrap=True)
    for name, row in rows.items():
        summary = results[name]
        table.add_row(
            name,
            *[_percent(row[j] if j < len(row) else None) for j in shown],
            _percent(summary["accuracy_seen"][-1]),
            _percent(summary["average_incremental_accuracy"]),
            _percent(summary["forgetting"]),
        )
    return table


def evaluation_table(accuracies: Mapping[str, tuple[Mapping[int, float], float | None]], title: str) -> Table:
    """Return one evaluation, in per cent: one row a predictor.

    Args:
        accuracies: For each predictor the accuracy on each experience, and on all of them together.
        title: What stands above.
    """
    table = _table(f"{title} (accuracy, %)")
    columns = sorted({j for row, _ in accuracies.values() for j in row})
    shown = columns if len(columns) <= MOST_COLUMNS else []
    for j in shown:
        table.add_column(f"exp {j + 1}", justify="right", no_wrap=True)
    table.add_column("all", justify="right", style="bold")
    for name, (row, seen) in accuracies.items():
        table.add_row(name, *[_percent(row.get(j)) for j in shown], _percent(seen))
    return table


def comparison_table(curves: Mapping[str, list[float | None]], title: str, notes: Mapping[str, str]) -> Table:
    """Accuracy after each stage for several runs, in per cent.

    Args:
        curves: For each row its accuracy on all experiences seen, stage by stage.
        title: What stands above.
        notes: What a row is, shown beside its name.
    """
    table = _table(f"{title} (accuracy, %)")
    table.add_column("backbone", no_wrap=True)
    for i in range(max(len(curve) for curve in curves.values())):
        table.add_column(f"stage {i + 1}", justify="right", no_wrap=True)
    for name, curve in curves.items():
        table.add_row(name, notes.get(name, ""), *[_percent(value) for value in curve])
    return table


def seeds_table(rows: Sequence[ComparisonRow], title: str, caption: str) -> Table:
    """Return the means over several seeds with the half-widths of their intervals, in per cent.

    Args:
        rows: One row a predictor of a method; lines part the outer ones from the others.
        title: What stands above.
        caption: What stands below.

    Example:
        >>> run = {"average_accuracy": 0.8, "final_accuracy": 0.8, "average_incremental_accuracy": 0.9, "forgetting": 0}
        >>> seeds_table([ComparisonRow("nmc", "nmc", "nmc", False, [run, run])], "digits", "").row_count
        1
    """
    table = _table(f"{title} (%)", caption=caption or None, caption_justify="left")
    for head in METRICS.values():
        table.add_column(head, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends = following is None or following.outer != row.outer
        table.add_row(row.name, *[_interval(row.interval(metric)) for metric in METRICS], end_section=ends)
    return table


def _interval(value: Interval | None) -> str:
    if value is None:
        return "-"
    mean, half_width = value
    return _percent(mean) if half_width is None else f"{_percent(mean)} ± {_percent(half_width):>4}"


def _table(title: str, **options: Any) -> Table:
    table = Table(title=title, title_justify="left", **options)
    table.add_column("predictor", no_wrap=True)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
