"""Tables for the terminal, in per cent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from clkit.methods.sparse import TaskReport
from clkit.report.comparison import COMPARED, ComparisonRow, Interval

__all__ = ["curves_table", "evaluation_table", "seeds_table", "stage_table", "topology_table"]

MOST_COLUMNS = 8  # experiences shown one by one; more would not fit a terminal


def stage_table(results: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Return the accuracies after the last stage, a row for the metrics of each predictor as in ``results.json``.

    ``seen`` is the accuracy on all of them, ``mean`` its mean over the stages so far (average incremental accuracy),
    ``forgets`` the points that the experiences lost since their best stage (forgetting).

    Example:
        >>> from clkit.metrics.functional import summarize
        >>> stage_table({"nmc": summarize([[9]], [[10]])}, "after experience 1").row_count
        1
    """
    rows = {name: summary["accuracy_matrix"][-1] for name, summary in results.items() if summary["accuracy_matrix"]}
    shown = _shown(sorted({j for row in rows.values() for j, value in enumerate(row) if value is not None}))
    table = _table(f"{title} (accuracy, %)", [*_experiences(shown), "seen", "mean", "forgets"], bold="seen")
    for name, row in rows.items():
        summary = results[name]
        values = [row[j] if j < len(row) else None for j in shown]
        values += [summary["accuracy_seen"][-1], summary["average_incremental_accuracy"], summary["forgetting"]]
        table.add_row(name, *map(_percent, values))
    return table


def evaluation_table(accuracies: Mapping[str, tuple[Mapping[int, float], float | None]], title: str) -> Table:
    """Return one evaluation: for each predictor the accuracy on each experience, and on all of them together."""
    shown = _shown(sorted({j for row, _ in accuracies.values() for j in row}))
    table = _table(f"{title} (accuracy, %)", [*_experiences(shown), "all"], bold="all")
    for name, (row, seen) in accuracies.items():
        table.add_row(name, *[_percent(row.get(j)) for j in shown], _percent(seen))
    return table


def curves_table(curves: Mapping[str, list[float | None]], title: str, notes: Mapping[str, str]) -> Table:
    """Return the accuracy after each stage on all experiences seen, a row for each curve, its note beside its name."""
    table = _table(f"{title} (accuracy, %)", ())
    table.add_column("backbone", no_wrap=True)
    for i in range(max(len(curve) for curve in curves.values())):
        table.add_column(f"stage {i + 1}", justify="right", no_wrap=True)
    for name, curve in curves.items():
        table.add_row(name, notes.get(name, ""), *map(_percent, curve))
    return table


def seeds_table(rows: Sequence[ComparisonRow], title: str, caption: str) -> Table:
    """Return the means over several seeds with the half-widths of their intervals, outer rows set off by a line.

    Example:
        >>> run = {"average_accuracy": 0.8, "final_accuracy": 0.8, "average_incremental_accuracy": 0.9, "forgetting": 0}
        >>> seeds_table([ComparisonRow("nmc", "nmc", "nmc", False, [run, run])], "digits", "").row_count
        1
    """
    table = _table(f"{title} (%)", COMPARED.values(), caption=caption or None, caption_justify="left")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends = following is None or following.outer != row.outer
        table.add_row(row.name, *[_interval(row.interval(metric)) for metric in COMPARED], end_section=ends)
    return table


def topology_table(reports: Sequence[TaskReport]) -> Table:
    """Return what each task of sparse training takes of the connections, a row a task, in per cent.

    ``in mask`` connections belong to the task, and those that are ``not 0`` do something; ``reused`` ones were learned
    by earlier tasks, ``free`` ones are in no mask so far, and ``explored`` is what was in the mask at some time of the
    task. Experiences count from 1 as in the other tables; the first is task 0 of ``activate``, ``export`` and
    ``--task``.

    Example:
        >>> topology_table([TaskReport(0, 0.1, 1000, 100, 98, 0, 900, 0.15)]).row_count
        1
    """
    total = reports[-1].total if reports else 0
    table = Table(
        title=f"sparse sub-networks (% of {total:,} connections)",
        title_justify="left",
        caption="exp 1 is task 0 of activate(), export() and --task",
        caption_justify="left",
    )
    for head in ("experience", "asked", "in mask", "not 0", "reused", "free", "explored"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in reports:
        shares = [number / each.total for number in (each.active, each.nonzero, each.reused, each.free)]
        table.add_row(f"exp {each.task + 1}", *map(_percent, (each.density, *shares, each.explored)))
    return table


def _table(title: str, heads: Iterable[str], bold: str = "", **options: Any) -> Table:
    table = Table(title=title, title_justify="left", **options)
    table.add_column("predictor", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, style="bold" if head == bold else None)
    return table


def _shown(experiences: Sequence[int]) -> Sequence[int]:
    return experiences if len(experiences) <= MOST_COLUMNS else []


def _experiences(shown: Sequence[int]) -> list[str]:
    return [f"exp {j + 1}" for j in shown]


def _interval(value: Interval | None) -> str:
    if value is None:
        return "-"
    mean, half_width = value
    return _percent(mean) if half_width is None else f"{_percent(mean)} ± {_percent(half_width):>4}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
