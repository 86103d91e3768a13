"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

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


def evaluation_table(
    accuracies: Mapping[str, Mapping[int, float]], seen: Mapping[str, float | None], title: str
) -> Table:
    """One evaluation, in per cent: one row a predictor.

    Args:
        accuracies: For each predictor the accuracy on each experience.
        seen: For each predictor the accuracy on all of them.
        title: What stands above.
    """
    table = _table(f"{title} (accuracy, %)")
    columns = sorted({j for row in accuracies.values() for j in row})
    shown = columns if len(columns) <= MOST_COLUMNS else []
    for j in shown:
        table.add_column(f"exp {j + 1}", justify="right", no_wrap=True)
    table.add_column("all", justify="right", style="bold")
    for name, row in accuracies.items():
        table.add_row(name, *[_percent(row.get(j)) for j in shown], _percent(seen[name]))
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


def seeds_table(
    groups: Sequence[Mapping[str, Sequence[tuple[float, float | None] | None]]],
    metrics: Sequence[str],
    title: str,
    caption: str,
) -> Table:
    """Means over several seeds with the half-widths of their intervals, in per cent: one row a method.

    Args:
        groups: Rows that stand together, separated by lines: for each name and metric the mean and the half-width, or
            ``None`` where it is not defined; a half-width is ``None`` for a single seed.
        metrics: Heads of the columns.
        title: What stands above.
        caption: What stands below.

    Example:
        >>> groups = [{"fine-tuning": [(0.2, 0.01)]}, {"er": [(0.8, 0.02)], "nmc": [None]}]
        >>> seeds_table(groups, ["final accuracy"], "digits", "").row_count
        3
    """
    table = _table(f"{title} (%)", caption=caption or None, caption_justify="left")
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    shown = [group for group in groups if group]
    for group in shown:
        for name, values in group.items():
            table.add_row(name, *[_interval(value) for value in values])
        table.add_section()
    return table


def _interval(value: tuple[float, float | None] | None) -> str:
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
