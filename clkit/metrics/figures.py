"""Figures of a stream: heat maps and curves of the metrics over its stages.

Each function returns the figure and its axes, which have the given ``title``. It draws on ``ax``, or on axes of a new
figure: a plain ``matplotlib.figure.Figure`` that pyplot does not know, so nothing stays open; save it with
``figure.savefig(path)``. Accuracies lie in [0, 1] and are ``NaN`` or ``None`` where not evaluated; arrays of another
shape, and names or classes of another number, raise an :class:`~clkit.errors.ArgumentError`.

Figures read in grey: heat maps use one scale that only gets darker, curves differ in marker and line style. matplotlib
is imported when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clkit.errors import ArgumentError
from clkit.metrics.functional import Array, as_floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "plot_accuracy_matrix",
    "plot_accuracy_over_time",
    "plot_class_accuracy",
    "plot_compatibility_matrix",
    "plot_confusion_matrix",
    "plot_flips",
    "plot_values",
]

Floats: TypeAlias = npt.NDArray[np.float64]

STAGE_LABEL = "after learning experience"
LARGEST_WITH_NUMBERS = 12  # rows or columns; with more, numbers in the cells cannot be read
LONGEST_UPRIGHT = 4  # characters of a label below an axis; longer ones are set aslant
LINES_INSIDE = 4  # with more curves, the legend would hide them and moves beside the axes

# Pairs of a colour and a style: the colours differ in lightness too (after Okabe and Ito's palette, which the colour
# blind can tell apart), the styles where printing in grey leaves too little of that.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")


def plot_accuracy_matrix(
    matrix: Array, ax: Axes | None = None, names: Sequence[str] | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw an accuracy matrix (T, E) as a heat map, in percent; experiences not learned yet are left blank.

    ``names`` are those of the E experiences, by default 1 … E.

    Example:
        >>> figure, axes = plot_accuracy_matrix([[1.0, None], [0.5, 0.75]])
        >>> [text.get_text() for text in axes.texts]
        ['100', '50.0', '75.0']
    """
    values = floats("matrix", matrix, ndim=2).copy()
    stages, experiences = values.shape
    values[np.triu_indices(stages, k=1, m=experiences)] = np.nan
    columns = label_texts("names", names, experiences)
    # One fixed test set has a single column but any number of stages.
    rows = columns[:stages] if stages <= experiences else label_texts("names", None, stages)
    figure, axes = heat_map(values, _percent(values), rows, columns, ax)
    axes.set(xlabel="evaluated on experience", ylabel=STAGE_LABEL, title=title or "")
    _percent_scale(figure, axes, "accuracy (%)")
    return figure, axes


def plot_class_accuracy(
    values: Array, classes: Sequence[int], ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw the accuracies (T, K) of each class after each stage as a heat map, in percent; blank where not evaluated.

    Example:
        >>> figure, axes = plot_class_accuracy([[1.0, None], [0.5, 0.75]], classes=[3, 900])
        >>> [tick.get_text() for tick in axes.get_xticklabels()]
        ['3', '900']
    """
    table = floats("values", values, ndim=2)
    columns, rows = label_texts("classes", classes, table.shape[1]), label_texts("stages", None, len(table))
    figure, axes = heat_map(table, _percent(table), rows, columns, ax)
    axes.set(xlabel="class", ylabel=STAGE_LABEL, title=title or "")
    _percent_scale(figure, axes, "accuracy (%)")
    return figure, axes


def plot_confusion_matrix(
    matrix: Array, classes: Sequence[int], ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw a confusion matrix (K, K), rows = true class, columns = predicted class.

    Numbers of samples stand in the cells, and the shades are shares of the true class.

    Example:
        >>> figure, axes = plot_confusion_matrix([[3, 1], [0, 2]], classes=[3, 900])
        >>> [text.get_text() for text in axes.texts]
        ['3', '1', '0', '2']
    """
    counts = floats("matrix", matrix, ndim=2)
    labels = label_texts("classes", classes, counts.shape[1])
    samples = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, samples, out=np.full_like(counts, np.nan), where=samples > 0)
    figure, axes = heat_map(shares, [[f"{count:.0f}" for count in row] for row in counts], labels, labels, ax)
    axes.set(xlabel="predicted class", ylabel="true class", title=title or "")
    _percent_scale(figure, axes, "share of the true class (%)")
    return figure, axes


def plot_compatibility_matrix(
    matrix: Array, ax: Axes | None = None, names: Sequence[str] | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw a compatibility matrix (T, T) as a heat map, in percent: rows search the gallery of each column's model.

    A value in brackets is not above that of the older model in its own gallery: those two models are not compatible.
    ``names`` are those of the T models, by default 1 … T.

    Example:
        >>> figure, axes = plot_compatibility_matrix([[0.5, None], [0.5, 0.75]])
        >>> [text.get_text() for text in axes.texts]
        ['50.0', '(50.0)', '75.0']
    """
    values = floats("matrix", matrix, ndim=2).copy()
    values[np.triu_indices(len(values), k=1, m=values.shape[1])] = np.nan
    labels = label_texts("names", names, values.shape[1])
    texts = _percent(values)
    for row, column in np.argwhere(values <= values.diagonal()):
        if row != column:
            texts[row][column] = f"({texts[row][column]})"
    figure, axes = heat_map(values, texts, labels, labels, ax)
    axes.set(xlabel="gallery of model", ylabel="queries of model", title=title or "")
    _percent_scale(figure, axes, "score (%)")
    return figure, axes


def plot_flips(table: Array, ax: Axes | None = None, title: str | None = None) -> tuple[Figure, Axes]:
    """Draw how many samples two systems answer rightly and wrongly, (2, 2) counts: rows the old one, columns the new.

    Negative flips are bottom left; the shades are shares of all samples.

    Example:
        >>> figure, axes = plot_flips([[2, 1], [3, 4]])
        >>> [text.get_text() for text in axes.texts]
        ['2', '1', '3', '4']
    """
    counts = floats("table", table, ndim=2)
    shares = counts / counts.sum() if counts.sum() else np.full_like(counts, np.nan)
    answers = ["wrong", "right"]
    figure, axes = heat_map(shares, [[f"{count:.0f}" for count in row] for row in counts], answers, answers, ax)
    axes.set(xlabel="new system", ylabel="old system", title=title or "")
    _percent_scale(figure, axes, "share of all samples (%)")
    return figure, axes


def plot_accuracy_over_time(
    curves: Mapping[str, Array],
    ax: Axes | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
    ylabel: str = "accuracy on all seen (%)",
    *,
    legend: bool = True,
    full_scale: bool = True,
) -> tuple[Figure, Axes]:
    """Draw (T,) values over the stages of a stream, one line for each predictor, in percent; ``NaN`` leaves a gap.

    ``names`` are those of the experiences, at least as many as the longest curve has stages, by default 1 … T.
    ``legend`` names the curves. With ``full_scale`` the vertical axis goes from 0 to 100 %, as it should for
    accuracies; else it fits the values and has a line at 0.

    Example:
        >>> figure, axes = plot_accuracy_over_time({"nmc": [1.0, 0.5], "aef_ocl": [1.0, 0.75]})
        >>> [line.get_label() for line in axes.lines], axes.lines[1].get_ydata().tolist()
        (['nmc', 'aef_ocl'], [100.0, 75.0])
    """
    lines = {name: 100 * floats(f"curves[{name!r}]", values, ndim=1) for name, values in curves.items()}
    stages = max((len(line) for line in lines.values()), default=0)
    if names is not None and len(names) < stages:
        raise ArgumentError(f"names has {len(names)} entries: the longest curve has {stages} stages, name them all")
    beside = legend and len(lines) > LINES_INSIDE
    figure, axes = own_axes(ax, width=7.0 if beside else 5.2, height=3.6)
    for index, (name, line) in enumerate(lines.items()):
        axes.plot(
            np.arange(1, len(line) + 1),
            line,
            label=name,
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.4,
            markevery=max(1, len(line) // 20),
            linewidth=1.6,
            clip_on=False,
            zorder=3,
        )
    if full_scale:
        axes.set_ylim(0, 100)
    else:
        axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    axes.set(xlabel=STAGE_LABEL, ylabel=ylabel, title=title or "")
    axes.set_xlim(0.8, max(stages, 2) + 0.2)
    _ticks_across(axes, list(names or label_texts("names", None, stages))[:stages], first=1)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and lines:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)} if beside else {"loc": "best"}
        axes.legend(handlelength=3.2, frameon=not beside, **place)
    return figure, axes


def plot_values(
    values: Mapping[str, float], ax: Axes | None = None, title: str | None = None, unit: str = "%"
) -> tuple[Figure, Axes]:
    """Draw single numbers as bars with their values, one under another; with the unit "%" they are shares from 0 to 1.

    Example:
        >>> figure, axes = plot_values({"reliability": 1.0, "generality": 0.75})
        >>> [text.get_text() for text in axes.texts]
        ['100', '75.0']
    """
    share = unit == "%"
    numbers = (100 if share else 1) * floats("values", list(values.values()), ndim=1)
    figure, axes = own_axes(ax, width=5.2, height=1.2 + 0.4 * len(numbers))
    places = np.arange(len(numbers))
    axes.barh(places, np.nan_to_num(numbers), height=0.6, color=COLOURS[0], zorder=2)
    texts = _percent(numbers[None] / 100)[0] if share else [f"{number:.3g}" for number in numbers]
    for place, number, text in zip(places, numbers, texts, strict=True):
        side = "right" if number < 0 else "left"
        axes.text(float(np.nan_to_num(number)), float(place), text, va="center", ha=side)
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    if share:
        axes.set_xlim(0, 112)  # with room for the last number
    else:
        axes.axvline(0, color="0.4", linewidth=0.8, zorder=1)
        axes.margins(x=0.2)
    axes.set(xlabel=unit, title=title or "")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def own_axes(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Return given axes and their figure, or those of a new figure of a size in inches."""
    if ax is not None:
        figure = ax.get_figure(root=True)
        if figure is None:
            raise ArgumentError("ax belongs to no figure: give axes of a figure, or none to get a new figure")
        return figure, ax
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots()


def heat_map(
    values: Floats,
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    ax: Axes | None,
    *,
    lowest: float = 0.0,
) -> tuple[Figure, Axes]:
    """Draw shades for values in [lowest, 1], and where there are few cells a text in each that has a value."""
    height, width = values.shape
    # Half an inch a cell, within what holds the labels and what fits a page.
    inner_width, inner_height = min(max(width / 2, 2.4), 8.0), min(max(height / 2, 2.0), 8.0)
    figure, axes = own_axes(ax, width=inner_width + 1.8, height=inner_height + 1.0)
    few = max(height, width) <= LARGEST_WITH_NUMBERS
    # An image of no pixels is refused by matplotlib: nothing learned yet is an empty frame.
    if values.size:
        axes.imshow(values, cmap=shades(), vmin=lowest, vmax=1.0, aspect="equal" if few else "auto")
    if few:
        for row, column in np.argwhere(~np.isnan(values)):
            shade = "white" if values[row, column] > lowest + 0.55 * (1.0 - lowest) else "black"
            axes.text(column, row, texts[row][column], ha="center", va="center", color=shade, fontsize=9)
        # Thin white lines tell neighbouring cells of equal shade apart.
        axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(height + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    _ticks_across(axes, columns, first=0)
    shown = thinned(height)
    axes.set_yticks(shown, [rows[index] for index in shown])
    return figure, axes


def shades() -> Colormap:
    """Return the scale of all heat maps."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # Without its palest part, so that an accuracy of 0 is not taken for a cell left blank.
    return ListedColormap(colormaps["Blues"](np.linspace(0.12, 1.0, 256)))


def thinned(number: int) -> list[int]:
    """Return the positions to label: all, or about ten at even distances from the first."""
    step = 1 if number <= LARGEST_WITH_NUMBERS else -(-number // 10)
    return list(range(0, number, step))


def colour_scale(figure: Figure, axes: Axes, label: str, ticks: Mapping[float, str]) -> None:
    """Say what the shades of a heat map mean, where it has any."""
    if axes.images:
        bar = figure.colorbar(axes.images[-1], ax=axes, label=label, ticks=list(ticks), shrink=0.9)
        bar.ax.set_yticklabels(ticks.values())
        bar.outline.set_visible(False)


def label_texts(argument: str, names: Sequence[Any] | None, number: int) -> list[str]:
    """Return so many names as strings, or 1 … ``number``."""
    if names is None:
        return [str(index + 1) for index in range(number)]
    if len(names) != number:
        raise ArgumentError(f"{argument} has {len(names)} entries: give one for each of the {number} columns")
    return [str(name) for name in names]


def floats(name: str, values: Array, ndim: int) -> Floats:
    """Return numbers as a float64 array."""
    table: Floats = as_floats(name, values, ndim).numpy()
    return table


def _ticks_across(axes: Axes, names: Sequence[str], first: int) -> None:
    shown = thinned(len(names))
    labels = [names[index] for index in shown]
    slanted: dict[str, Any] = {}
    if any(len(label) > LONGEST_UPRIGHT for label in labels):
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks([first + index for index in shown], labels, **slanted)


def _percent_scale(figure: Figure, axes: Axes, label: str) -> None:
    colour_scale(figure, axes, label, {0: "0", 0.25: "25", 0.5: "50", 0.75: "75", 1: "100"})


def _percent(values: Floats) -> list[list[str]]:
    # Four characters at most: 100 stands without its decimal.
    return [[f"{100 * value:.1f}".replace("100.0", "100") for value in row] for row in values]
