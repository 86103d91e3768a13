"""The figures of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from clkit.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HasFigures", "draw_figures", "save_figures"]

MOST_COLUMNS = 3


@runtime_checkable
class HasFigures(Protocol):
    """A strategy or callback with figures of its own for a run's folder; found by this form, never by type."""

    def run_figures(self) -> Mapping[str, Figure]:
        """Figures by file name without ``.png``; called at the end of a fit, on one process, where figures are drawn.

        Drawing changes nothing that is learned.
        """


def draw_figures(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Draws the accuracy matrix of each predictor and the accuracy over time of all.

    Args:
        folder: Where the PNG files go.
        results: Metrics of each predictor, as in ``results.json``.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    from clkit.metrics.figures import plot_accuracy_matrix, plot_accuracy_over_time

    shown = {name: summary for name, summary in results.items() if summary["accuracy_matrix"]}
    columns = min(len(shown), MOST_COLUMNS)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, summary) in zip(panels, shown.items(), strict=False):
        plot_accuracy_matrix(_numbers(summary["accuracy_matrix"]), ax=axes, title=name)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    matrix = folder / "accuracy_matrix.png"
    _save(figure, matrix)
    curves = {name: [_number(value) for value in summary["accuracy_seen"]] for name, summary in shown.items()}
    over_time, _ = plot_accuracy_over_time(curves)
    path = folder / "accuracy_over_time.png"
    _save(over_time, path)
    return [matrix, path]


def save_figures(folder: Path, parts: Iterable[Any]) -> list[Path]:
    """Save the figures of those parts of a trainer that have some.

    Args:
        folder: Where the PNG files go; made if there is none.
        parts: Strategy and callbacks. Where two have a figure of one name, the later one's name gets a number.

    Returns:
        The files.
    """
    files: list[Path] = []
    for part in parts:
        if not isinstance(part, HasFigures):
            continue
        for name, figure in part.run_figures().items():
            path, number = folder / f"{name}.png", 2
            while path in files:
                path, number = folder / f"{name}_{number}.png", number + 1
            folder.mkdir(parents=True, exist_ok=True)
            _save(figure, path)
            files.append(path)
    return files


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as draft:
        figure.savefig(draft, dpi=150, format="png")


def _numbers(rows: list[list[float | None]]) -> list[list[float]]:
    return [[_number(value) for value in row] for row in rows]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
