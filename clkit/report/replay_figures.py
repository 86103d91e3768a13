"""Figures of a replay memory and its prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from clkit.metrics.figures import LARGEST_WITH_NUMBERS, Values, _axes, _floats, _heat_map, _names, _shades, _thinned

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["plot_memory_balance", "plot_prototype_similarity"]


def plot_memory_balance(
    counts: Mapping[int, Mapping[int, int]], ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw how many rows of each class a replay memory held after each experience; blank where it held none.

    Classes stand in the order in which they came into the memory, so that those of a class-incremental stream form
    stairs.

    Args:
        counts: For each experience, by its number from 0, the rows in memory by class id.
        ax: Axes to draw on; default: those of a new figure.
        title: Title of the axes.

    Returns:
        The figure and its axes.

    Example:
        >>> figure, axes = plot_memory_balance({0: {7: 4}, 1: {7: 2, 2: 2}})
        >>> [tick.get_text() for tick in axes.get_yticklabels()]
        ['7', '2']
    """
    from matplotlib.colors import PowerNorm

    held = [counts[experience] for experience in sorted(counts)]
    classes = list(dict.fromkeys(label for each in held for label in sorted(each) if each[label]))
    rows = np.array([[each.get(label, 0) for each in held] for label in classes], dtype=np.float64)
    rows = np.where(rows == 0, np.nan, rows).reshape(len(classes), len(held))
    figure, axes = _axes(ax, width=7.0, height=min(max(0.3 * len(classes), 2.0), 5.4) + 1.0)
    if rows.size:
        # Roots, since the few rows a class has late in the stream would all look the same beside the first class's.
        most = float(np.nanmax(rows))
        edges = [np.arange(count + 1) - 0.5 for count in reversed(rows.shape)]
        mesh = axes.pcolormesh(*edges, rows, cmap=_shades(), norm=PowerNorm(0.5, vmin=0, vmax=most))
        whole = np.unique((most * np.linspace(0, 1, 6) ** 2).round())
        bar = figure.colorbar(mesh, ax=axes, label="rows in memory", pad=0.02, ticks=whole.tolist())
        bar.outline.set_visible(False)
        axes.set_ylim(len(classes) - 0.5, -0.5)
    if len(classes) <= LARGEST_WITH_NUMBERS:
        for row in range(1, len(classes)):
            axes.axhline(row - 0.5, color="white", linewidth=1.2)
    numbers, shown = sorted(counts), _thinned(len(classes))
    columns = _thinned(len(numbers))
    axes.set_xticks(columns, [str(numbers[index] + 1) for index in columns])
    axes.set_yticks(shown, [str(classes[index]) for index in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="after experience", ylabel="class, in order of arrival", title=title or "")
    return figure, axes


def plot_prototype_similarity(
    ids: Values, means: Values, ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw the cosines between class means as a heat map; blank for a mean of length zero.

    The palest shade is the first of 0, -0.5 and -1 that no cosine is below.

    Args:
        ids: (K,) class ids.
        means: (K, p) a mean for each.
        ax: Axes to draw on; default: those of a new figure.
        title: Title of the axes.

    Returns:
        The figure and its axes.

    Raises:
        ArgumentError: If ``means`` is not two-dimensional or has not a row for each class.

    Example:
        >>> figure, axes = plot_prototype_similarity([3, 8], [[1.0, 0.0], [3.0, 4.0]])
        >>> [text.get_text() for text in axes.texts]
        ['1', '0.60', '0.60', '1']
    """
    rows = _floats("means", means, ndim=2)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, lengths, out=np.full_like(rows, np.nan), where=lengths > 0)
    cosines: Floats = np.clip(units @ units.T, -1.0, 1.0)
    labels = _names("ids", [f"{label:.0f}" for label in _floats("ids", ids, ndim=1)], len(cosines))
    smallest = 0.0 if np.isnan(cosines).all() else float(np.nanmin(cosines))
    lowest = min(math.floor(2 * smallest) / 2, 0.0)
    texts = [[f"{value:.2f}".replace("1.00", "1").replace("-", "\N{MINUS SIGN}") for value in row] for row in cosines]
    figure, axes = _heat_map(cosines, texts, labels, labels, ax, lowest=lowest)
    axes.set(xlabel="class", ylabel="class", title=title or "", aspect="equal")
    if axes.images:
        bar = figure.colorbar(axes.images[-1], ax=axes, label="cosine", ticks=[-1, -0.5, 0, 0.5, 1], shrink=0.9)
        bar.outline.set_visible(False)
    return figure, axes
