"""Figures of a replay memory and its prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from clkit.errors import ArgumentError
from clkit.metrics.figures import LARGEST_WITH_NUMBERS, Values, _axes, _floats, _heat_map, _names, _shades, _thinned

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["plot_memory_balance", "plot_prototype_history", "plot_prototype_similarity"]


MOST_BOUNDARIES = 60  # vertical lines; with more, they would hide what they divide


MOST_PANELS = 12


def plot_memory_balance(
    steps: Sequence[int],
    counts: Sequence[Mapping[int, int]],
    ax: Axes | None = None,
    boundaries: Sequence[int] = (),
    title: str | None = None,
) -> tuple[Figure, Axes]:
    """Draws how many rows of each class a replay memory holds over time as a heat map; blank where it holds none.

    Classes stand in the order in which they came into the memory, so that those of a class-incremental stream form
    stairs.

    Args:
        steps: n numbers of training batches done, ascending, at any distances.
        counts: For each step the rows in memory by class id.
        ax: Axes to draw on; default: those of a new figure.
        boundaries: Numbers of batches done when an experience ended, each drawn as a vertical line; more than 60 are
            left out.
        title: Title of the axes.

    Returns:
        The figure and its axes.

    Raises:
        ArgumentError: If steps and counts differ in number, or steps do not ascend.

    Example:
        >>> figure, axes = plot_memory_balance([1, 10, 20], [{7: 4}, {7: 3, 2: 1}, {7: 2, 2: 2}], boundaries=[10])
        >>> [tick.get_text() for tick in axes.get_yticklabels()]
        ['7', '2']
    """
    from matplotlib.colors import PowerNorm

    times = _floats("steps", steps, ndim=1)
    if len(counts) != len(times):
        raise ArgumentError(f"counts has {len(counts)} entries: give one for each of the {len(times)} steps")
    if (np.diff(times) <= 0).any():
        raise ArgumentError("steps must ascend: give each step once, in the order of the stream")
    classes = list(dict.fromkeys(label for held in counts for label in sorted(held) if held[label]))
    rows = np.array([[held.get(label, 0) for held in counts] for label in classes], dtype=np.float64)
    rows = np.where(rows == 0, np.nan, rows).reshape(len(classes), len(times))
    figure, axes = _axes(ax, width=7.0, height=min(max(0.3 * len(classes), 2.0), 5.4) + 1.0)
    if rows.size:
        # From the batch that brought a count to the one that brought the next.
        edges = np.append(times - 1, times[-1])
        # Roots, since the few rows a class has late in the stream would all look the same beside the first class's.
        most = float(np.nanmax(rows))
        shades = PowerNorm(0.5, vmin=0, vmax=most)
        mesh = axes.pcolormesh(edges, np.arange(len(classes) + 1) - 0.5, rows, cmap=_shades(), norm=shades)
        whole = np.unique((most * np.linspace(0, 1, 6) ** 2).round())
        bar = figure.colorbar(mesh, ax=axes, label="rows in memory", pad=0.02, ticks=whole.tolist())
        bar.outline.set_visible(False)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(len(classes) - 0.5, -0.5)
        _lines_between(axes, len(classes), [step for step in boundaries if edges[0] < step < edges[-1]])
    shown = _thinned(len(classes))
    axes.set_yticks(shown, [str(classes[index]) for index in shown])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="training step", ylabel="class, in order of arrival", title=title or "")
    return figure, axes


def plot_prototype_similarity(
    ids: Values,
    means: Values,
    ax: Axes | None = None,
    title: str | None = None,
    *,
    scale: bool = True,
    numbers: bool = True,
    lowest: float | None = None,
) -> tuple[Figure, Axes]:
    """Draws the cosines between class means as a heat map; blank for a mean of length zero.

    Args:
        ids: (K,) class ids.
        means: (K, p) a mean for each.
        ax: Axes to draw on; default: those of a new figure.
        title: Title of the axes.
        scale: Whether to draw what the shades mean beside it.
        numbers: Whether to write the cosines into the cells of up to 12 classes.
        lowest: Cosine of the palest shade, the same where figures are compared; default: the first of 0, -0.5 and -1
            that no cosine is below.

    Returns:
        The figure and its axes.

    Raises:
        ArgumentError: If ``means`` is not two-dimensional or has not a row for each class.

    Example:
        >>> figure, axes = plot_prototype_similarity([3, 8], [[1.0, 0.0], [3.0, 4.0]])
        >>> [text.get_text() for text in axes.texts]
        ['1', '0.60', '0.60', '1']
    """
    cosines = _cosines(means)
    labels = _names("ids", [f"{label:.0f}" for label in _floats("ids", ids, ndim=1)], len(cosines))
    lowest = _lowest([cosines]) if lowest is None else lowest
    texts = [[f"{value:.2f}".replace("1.00", "1").replace("-", "\N{MINUS SIGN}") for value in row] for row in cosines]
    figure, axes = _heat_map(cosines, texts, labels, labels, ax, lowest=lowest, numbers=numbers)
    axes.set(xlabel="class", ylabel="class", title=title or "", aspect="equal")
    if scale:
        _cosine_scale(figure, axes, [axes])
    return figure, axes


def plot_prototype_history(
    snapshots: Sequence[tuple[int, Values, Values]], title: str | None = None
) -> tuple[Figure, list[Axes]]:
    """Draws the cosines between class means after several experiences, a panel each; of more than 12 some evenly.

    Classes stand in the order in which they first appear, the same in all panels.

    Args:
        snapshots: For each the number of the experience, (K,) class ids and (K, p) means.
        title: Title of the figure.

    Returns:
        A new figure and the axes of its panels.

    Raises:
        ArgumentError: As for :func:`plot_prototype_similarity`.

    Example:
        >>> figure, panels = plot_prototype_history([(1, [3], [[1.0]]), (2, [1, 3], [[1.0], [-1.0]])])
        >>> [tick.get_text() for tick in panels[1].get_xticklabels()]
        ['3', '1']
    """
    from matplotlib.figure import Figure

    arrival: dict[int, int] = {}
    for _, ids, _ in snapshots:
        for label in sorted(_floats("ids", ids, ndim=1).astype(int).tolist()):
            arrival.setdefault(label, len(arrival))
    number = min(len(snapshots), MOST_PANELS)
    shown = [snapshots[index] for index in np.linspace(0, len(snapshots) - 1, number).round().astype(int)]
    lowest = _lowest([_cosines(means) for _, _, means in shown])
    columns = max(min(number, 3 if number <= 6 else 4), 1)
    lines = max(-(-number // columns), 1)
    figure = Figure(figsize=(2.6 * columns + 1.0, 2.7 * lines + 0.3), dpi=150, layout="compressed")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (experience, ids, means) in zip(panels, shown, strict=False):
        labels, rows = _floats("ids", ids, ndim=1).astype(int), _floats("means", means, ndim=2)
        if len(labels) == len(rows):  # else it is refused in a moment
            order = np.argsort([arrival[label] for label in labels.tolist()])
            labels, rows = labels[order], rows[order]
        name = f"after experience {experience}"
        plot_prototype_similarity(labels, rows, axes, name, scale=False, numbers=False, lowest=lowest)
        axes.set(xlabel="", ylabel="")
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
    for axes in panels[number:]:
        axes.set_axis_off()
    used = panels[:number]
    if used:
        figure.supxlabel("class", fontsize=10)
        figure.supylabel("class", fontsize=10)
        _cosine_scale(figure, used[0], panels)
    if title:
        figure.suptitle(title)
    return figure, used


def _lines_between(axes: Axes, classes: int, boundaries: Sequence[int]) -> None:
    """White between classes where there are few, dashes at boundaries that show on any shade."""
    from matplotlib.patheffects import withStroke

    if classes <= LARGEST_WITH_NUMBERS:
        for row in range(1, classes):
            axes.axhline(row - 0.5, color="white", linewidth=1.2)
    if len(boundaries) <= MOST_BOUNDARIES:
        for step in boundaries:
            line = axes.axvline(step, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
            line.set_path_effects([withStroke(linewidth=2.4, foreground="white")])


def _cosines(means: Values) -> Floats:
    rows = _floats("means", means, ndim=2)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, lengths, out=np.full_like(rows, np.nan), where=lengths > 0)
    cosines: Floats = np.clip(units @ units.T, -1.0, 1.0)
    return cosines


def _lowest(cosines: Sequence[Floats]) -> float:
    """0, or -0.5 or -1 where there are cosines below."""
    smallest = min((float(np.nanmin(each)) for each in cosines if not np.isnan(each).all()), default=0.0)
    return min(math.floor(2 * smallest) / 2, 0.0)


def _cosine_scale(figure: Figure, axes: Axes, beside: Sequence[Axes]) -> None:
    if not axes.images:
        return
    bar = figure.colorbar(axes.images[-1], ax=list(beside), label="cosine", ticks=[-1, -0.5, 0, 0.5, 1], shrink=0.9)
    bar.outline.set_visible(False)
