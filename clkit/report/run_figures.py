"""The figures of a run: those of its results, and those that strategies and callbacks draw of a replay memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clkit.files import atomic_write
from clkit.metrics.figures import (
    COLOURS,
    LARGEST_WITH_NUMBERS,
    colour_scale,
    floats,
    heat_map,
    label_texts,
    own_axes,
    plot_accuracy_matrix,
    plot_accuracy_over_time,
    shades,
    thinned,
)
from clkit.metrics.functional import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "draw_figures",
    "plot_layer_use",
    "plot_memory_balance",
    "plot_prototype_similarity",
    "save_figure",
    "save_figures",
]

MOST_COLUMNS = 3
MINUS = "\N{MINUS SIGN}"


def draw_figures(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the accuracy matrix of each predictor and the accuracy over time of all, from ``results.json``'s metrics."""
    from matplotlib.figure import Figure

    shown = {name: summary for name, summary in results.items() if summary["accuracy_matrix"]}
    if not shown:  # the run failed before its first row
        return
    columns = min(len(shown), MOST_COLUMNS)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, summary) in zip(panels, shown.items(), strict=False):
        plot_accuracy_matrix(summary["accuracy_matrix"], ax=axes, title=name)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    save_figure(figure, folder / "accuracy_matrix.png")
    over_time, _ = plot_accuracy_over_time({name: summary["accuracy_seen"] for name, summary in shown.items()})
    save_figure(over_time, folder / "accuracy_over_time.png")


def save_figures(folder: Path, parts: Iterable[Any]) -> None:
    """Save the figures of those parts of a trainer that have a method ``run_figures()``, by name; found by this form.

    Drawing must change nothing that is learned. Where two parts have a figure of one name, the later one's name gets a
    number.
    """
    files: set[Path] = set()
    for part in parts:
        for name, figure in part.run_figures().items() if hasattr(part, "run_figures") else ():
            path, number = folder / f"{name}.png", 2
            while path in files:
                path, number = folder / f"{name}_{number}.png", number + 1
            folder.mkdir(parents=True, exist_ok=True)
            save_figure(figure, path)
            files.add(path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_write(path) as draft:
        figure.savefig(draft, dpi=150, format="png")


def plot_layer_use(
    taken: Sequence[Mapping[str, float]],
    mask: Mapping[str, float],
    ax: Axes | None = None,
    title: str | None = None,
) -> tuple[Figure, Axes]:
    """Draw which share of each layer's connections each task was the first to take; what is left white is free.

    Args:
        taken: For each task, by layer in their order, the share that no earlier task had.
        mask: The share that the last task has, reused connections included: a line across each bar.
        ax: Axes to draw on.
        title: Of the axes.

    Example:
        >>> figure, axes = plot_layer_use([{"0.weight": 0.5, "3.weight": 0.1}], {"0.weight": 0.5, "3.weight": 0.1})
        >>> [float(bar.get_height()) for bar in axes.patches]
        [50.0, 10.0]
    """
    names = list(mask)
    parts = {name.partition(".")[0] for name in names}
    prefix = f"{parts.pop()}." if len(parts) == 1 and len(names) > 1 else ""  # of the module's one network
    figure, axes = own_axes(ax, width=max(6.5, min(0.35 * len(names) + 3.0, 13.0)), height=4.8)
    places, floor = np.arange(len(names)), np.zeros(len(names))
    colours = [shades()(0.9 - 0.75 * task / max(1, len(taken) - 1)) for task in range(len(taken))]
    bars = []
    for task, each in enumerate(taken):
        heights, label = 100 * np.array([each[name] for name in names]), f"new in exp {task + 1}"
        drawn = axes.bar(
            places, heights, 0.8, floor, color=colours[task], edgecolor="white", linewidth=0.6, label=label
        )
        bars.append(drawn)
        floor += heights
    label = f"whole mask of exp {len(taken)}"
    line = axes.hlines(
        [100 * mask[name] for name in names], places - 0.45, places + 0.45, color=COLOURS[1], label=label
    )
    ticks = thinned(len(names))
    axes.set_xticks(ticks, [names[index].removeprefix(prefix).removesuffix(".weight") for index in ticks])
    axes.tick_params(axis="x", rotation=60)
    for tick in axes.get_xticklabels():
        tick.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set_ylim(0, 101)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(ylabel="connections of the layer (%)", title=title or "")
    handles = [line, *(bars[task] for task in reversed(thinned(len(bars))))]  # from the top, as the bars stand
    axes.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, axes


def plot_memory_balance(
    counts: Mapping[int, Mapping[int, int]], ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw how many rows of each class a replay memory held after each experience; blank where it held none.

    Classes stand in the order in which they came into the memory, so that those of a class-incremental stream form
    stairs. ``counts`` has for each experience, by its number from 0, the rows in memory by class id; what else there is
    to say is in :mod:`clkit.metrics.figures`.

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
    figure, axes = own_axes(ax, width=7.0, height=min(max(0.3 * len(classes), 2.0), 5.4) + 1.0)
    if rows.size:
        # Roots, since the few rows a class has late in the stream would all look the same beside the first class's.
        most = float(np.nanmax(rows))
        edges = [np.arange(count + 1) - 0.5 for count in reversed(rows.shape)]
        mesh = axes.pcolormesh(*edges, rows, cmap=shades(), norm=PowerNorm(0.5, vmin=0, vmax=most))
        whole = np.unique((most * np.linspace(0, 1, 6) ** 2).round())
        bar = figure.colorbar(mesh, ax=axes, label="rows in memory", pad=0.02, ticks=whole.tolist())
        bar.outline.set_visible(False)
        axes.set_ylim(len(classes) - 0.5, -0.5)
    if len(classes) <= LARGEST_WITH_NUMBERS:
        for row in range(1, len(classes)):
            axes.axhline(row - 0.5, color="white", linewidth=1.2)
    numbers, shown = sorted(counts), thinned(len(classes))
    columns = thinned(len(numbers))
    axes.set_xticks(columns, [str(numbers[index] + 1) for index in columns])
    axes.set_yticks(shown, [str(classes[index]) for index in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="after experience", ylabel="class, in order of arrival", title=title or "")
    return figure, axes


def plot_prototype_similarity(
    ids: Array, means: Array, ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw the cosines between the means (K, p) of K classes as a heat map; blank for a mean of length zero.

    The palest shade is the first of 0, -0.5 and -1 that no cosine is below.

    Example:
        >>> figure, axes = plot_prototype_similarity([3, 8], [[1.0, 0.0], [3.0, 4.0]])
        >>> [text.get_text() for text in axes.texts]
        ['1', '0.60', '0.60', '1']
    """
    rows = floats("means", means, ndim=2)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, lengths, out=np.full_like(rows, np.nan), where=lengths > 0)
    cosines = np.clip(units @ units.T, -1.0, 1.0)
    labels = label_texts("ids", floats("ids", ids, ndim=1).astype(np.int64).tolist(), len(cosines))
    smallest = 0.0 if np.isnan(cosines).all() else float(np.nanmin(cosines))
    lowest = min(math.floor(2 * smallest) / 2, 0.0)
    texts = [[f"{value:.2f}".replace("1.00", "1").replace("-", MINUS) for value in row] for row in cosines]
    figure, axes = heat_map(cosines, texts, labels, labels, ax, lowest=lowest)
    axes.set(xlabel="class", ylabel="class", title=title or "", aspect="equal")
    colour_scale(figure, axes, "cosine", {tick / 2: f"{tick / 2:.1f}".replace("-", MINUS) for tick in range(-2, 3)})
    return figure, axes
