"""Figures of uncertainty: what it costs to answer, whether it comes true, and how it changes along a stream.

Each function returns the figure and its axes, as those of :mod:`clkit.metrics.figures` do. Uncertainties and losses are
as for :mod:`clkit.metrics.ranking`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from clkit.errors import ArgumentError
from clkit.metrics import ranking
from clkit.metrics.calibration import Bins
from clkit.metrics.figures import COLOURS, DASHES, MARKERS, floats, own_axes
from clkit.metrics.functional import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_around_learning",
    "plot_histograms",
    "plot_loss_by_uncertainty",
    "plot_precision_recall",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_roc",
]

_GREY = "0.55"
_HISTOGRAM_BINS = 30


def plot_risk_coverage(
    uncertainty: Array, loss: Array, ax: Axes | None = None, threshold: float | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw the mean loss of the surest samples against their share, with that of an oracle and of chance.

    The area under the curve is AURC, that between curve and oracle E-AURC. A ``threshold`` marks the samples whose
    uncertainty is not above it.

    Example:
        >>> figure, axes = plot_risk_coverage([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 1])
        >>> [line.get_label() for line in axes.lines]
        ['by uncertainty', 'oracle', 'at random']
    """
    risk, best = ranking.risk_coverage(uncertainty, loss).numpy(), ranking.risk_coverage(loss, loss).numpy()
    figure, axes = own_axes(ax, width=5.2, height=3.6)
    share = 100 * np.arange(1, len(risk) + 1) / max(len(risk), 1)
    axes.plot(share, risk, color=COLOURS[0], linestyle=DASHES[0], linewidth=1.8, label="by uncertainty", zorder=3)
    axes.plot(share, best, color=COLOURS[1], linestyle=DASHES[1], linewidth=1.6, label="oracle", zorder=2)
    mean = [risk[-1]] * 2 if len(risk) else []
    axes.plot([0, 100][: len(mean)], mean, color=_GREY, linestyle=DASHES[3], label="at random", zorder=1)
    if threshold is not None and len(risk):
        kept = int((ranking.in_order(uncertainty, loss)[0] <= threshold).sum())
        if kept:
            axes.plot(share[kept - 1], risk[kept - 1], "o", color=COLOURS[2], markersize=7, label="threshold", zorder=4)
    axes.set(xlabel="answered (%)", ylabel="mean loss of what is answered", title=title or "", xlim=(0, 100))
    axes.set_ylim(bottom=0.0)
    return figure, _finished(axes)


def plot_loss_by_uncertainty(
    uncertainty: Array, loss: Array, ax: Axes | None = None, bins: int = 10, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw the mean loss of groups of equally many samples, from the surest to the least sure.

    It rises where the uncertainty ranks well. Samples of equal uncertainty have the mean of their losses.

    Example:
        >>> figure, axes = plot_loss_by_uncertainty([0.1, 0.5, 0.6, 0.9], [0, 0, 1, 1], bins=2)
        >>> [float(bar.get_height()) for bar in axes.patches]
        [0.0, 1.0]
    """
    each = ranking.expected_losses(uncertainty, loss)
    parts = [part.mean() for part in np.array_split(each, max(1, min(bins, len(each)))) if len(part)]
    figure, axes = own_axes(ax, width=5.2, height=3.6)
    place = np.arange(1, len(parts) + 1)
    axes.bar(place, parts, color=COLOURS[0], edgecolor="white")
    axes.set_xticks(place, [str(number) for number in place])
    axes.set(xlabel="groups of equal size, surest first", ylabel="mean loss", title=title or "")
    return figure, _finished(axes, legend=False)


def plot_roc(
    uncertainty: Array,
    positive: Array,
    ax: Axes | None = None,
    tpr: float | None = None,
    title: str | None = None,
) -> tuple[Figure, Axes]:
    """Draw the share of positive samples that a threshold finds against its share of false alarms, in percent.

    ``tpr`` marks the point with the fewest false alarms that finds this share.

    Example:
        >>> figure, axes = plot_roc([0.1, 0.4, 0.2, 0.8], [0, 0, 1, 1])
        >>> axes.lines[0].get_xdata().tolist()
        [0.0, 0.0, 50.0, 50.0, 100.0]
    """
    taken, hits = ranking.counts_from_the_top(uncertainty, positive)
    figure, axes = own_axes(ax, width=4.2, height=3.8)
    misses = taken - hits
    if hits[-1] and misses[-1]:
        x, y = 100 * misses / misses[-1], 100 * hits / hits[-1]
        axes.plot(x, y, color=COLOURS[0], linewidth=1.8, zorder=3)
        axes.plot([0, 100], [0, 100], color=_GREY, linestyle=DASHES[3], zorder=1)
        if tpr is not None:
            first = int((hits / hits[-1] >= tpr).argmax())
            label = f"{100 * tpr:g} % found, {x[first]:.1f} % false alarms"
            axes.plot(x[first], y[first], "o", color=COLOURS[2], markersize=7, label=label, zorder=4)
    axes.set(xlabel="false alarms (%)", ylabel="found (%)", title=title or "", xlim=(0, 100), ylim=(0, 100.5))
    return figure, _finished(axes, legend=tpr is not None)


def plot_precision_recall(
    uncertainty: Array, positive: Array, ax: Axes | None = None, title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw which share of the alarms is right against the share of positive samples found, in percent.

    The area under these steps is the average precision; the dotted line is chance.

    Example:
        >>> figure, axes = plot_precision_recall([0.1, 0.4, 0.2, 0.8], [0, 0, 1, 1])
        >>> axes.lines[0].get_xdata().tolist()
        [0.0, 50.0, 50.0, 100.0, 100.0]
    """
    taken, hits = ranking.counts_from_the_top(uncertainty, positive)
    figure, axes = own_axes(ax, width=4.2, height=3.8)
    if hits[-1] and hits[-1] != taken[-1]:
        recall, precision = 100 * hits / hits[-1], 100 * hits[1:] / taken[1:]
        axes.step(recall, np.append(precision[0], precision), where="pre", color=COLOURS[0], linewidth=1.8, zorder=3)
        axes.axhline(precision[-1], color=_GREY, linestyle=DASHES[3], zorder=1)
    axes.set(xlabel="found (%)", ylabel="right among alarms (%)", title=title or "", xlim=(0, 100), ylim=(0, 102))
    return figure, _finished(axes, legend=False)


def plot_reliability(bins: Bins, ax: Axes | None = None, title: str | None = None) -> tuple[Figure, Axes]:
    """Draw what came of each group against its confidence; on the diagonal probabilities come true.

    The area of a point is the share of the samples in its group, a line shows its error.

    Example:
        >>> from clkit.metrics.calibration import equal_width_bins
        >>> figure, axes = plot_reliability(equal_width_bins([0.25, 0.75, 0.75], [0, 1, 1], bins=2))
        >>> axes.collections[-1].get_offsets().tolist()
        [[0.25, 0.0], [0.75, 1.0]]
    """
    confidence, outcome, count = (each.numpy() for each in bins)
    figure, axes = own_axes(ax, width=4.2, height=3.8)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=DASHES[3], zorder=1)
    axes.vlines(confidence, confidence, outcome, color=COLOURS[1], linewidth=1.4, zorder=2)
    axes.scatter(
        confidence,
        outcome,
        s=15 + 250 * count / max(count.sum(), 1),
        color=COLOURS[0],
        edgecolor="white",
        zorder=3,
        clip_on=False,
    )
    axes.set(xlabel="predicted probability", ylabel="share that came true", title=title or "", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    return figure, _finished(axes, legend=False)


def plot_histograms(
    groups: Mapping[str, Array],
    ax: Axes | None = None,
    threshold: float | None = None,
    xlabel: str = "uncertainty",
    title: str | None = None,
) -> tuple[Figure, Axes]:
    """Draw how uncertainties are spread in several groups, such as classes learned and classes of the future.

    All groups have the same bins and an area of 1. Infinite values are not drawn, and the legend says how many.

    Example:
        >>> figure, axes = plot_histograms({"seen": [0.1, 0.2, 0.2], "future": [0.7, 0.9]}, threshold=0.5)
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['seen (3)', 'future (2)', 'threshold']
    """
    values = {name: ranking.numbers(f"groups[{name!r}]", each, infinite=True) for name, each in groups.items()}
    finite = {name: each[np.isfinite(each)] for name, each in values.items()}
    together = np.concatenate([*finite.values(), np.zeros(0)])
    edges = np.histogram_bin_edges(together, _HISTOGRAM_BINS) if len(together) else np.linspace(0, 1, 2)
    figure, axes = own_axes(ax, width=5.2, height=3.6)
    for index, (name, each) in enumerate(values.items()):
        left = len(each) - len(finite[name])
        label = f"{name} ({len(each)}{f', {left} infinite' if left else ''})"
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        heights = np.histogram(finite[name], edges, density=True)[0] if len(finite[name]) else np.zeros(len(edges) - 1)
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(heights, edges, color=colour, linestyle=dash, linewidth=1.6, label=label)
    if threshold is not None and np.isfinite(threshold):
        axes.axvline(threshold, color=COLOURS[2], linestyle=DASHES[3], label="threshold")
    axes.set(xlabel=xlabel, ylabel="density", title=title or "")
    axes.set_ylim(0.0, 1.3 * axes.get_ylim()[1])  # room for the legend
    return figure, _finished(axes)


def plot_around_learning(
    table: Array, learned: Array, ax: Axes | None = None, ylabel: str = "mean uncertainty", title: str | None = None
) -> tuple[Figure, Axes]:
    """Draw the uncertainty of each class before and after it was learned: a thin line a class, a thick one their mean.

    ``table`` (T, K) is the mean uncertainty of the test samples of each class after each stage, ``NaN`` where not
    evaluated; ``learned`` (K,) says in which stage, from 0, the class was learned. An
    :class:`~clkit.errors.ArgumentError` if the two do not fit.

    Example:
        >>> figure, axes = plot_around_learning([[0.1, 0.7], [0.2, 0.1]], learned=[0, 1])
        >>> axes.lines[-1].get_xdata().tolist(), axes.lines[-1].get_ydata().round(3).tolist()
        ([-1, 0, 1], [0.7, 0.1, 0.2])
    """
    values, at = floats("table", table, 2), floats("learned", learned, 1)
    if at.shape != values.shape[1:] or not np.isin(at, np.arange(len(values))).all():
        raise ArgumentError(
            f"learned must be a stage from 0, below {len(values)}, for each of {values.shape[1]} classes"
        )
    from matplotlib.ticker import MaxNLocator

    stages = np.arange(len(values))[:, None] - at.astype(np.int64)
    figure, axes = own_axes(ax, width=5.2, height=3.6)
    for column in range(values.shape[1]):
        axes.plot(stages[:, column], values[:, column], color=_GREY, linewidth=0.7, alpha=0.7, zorder=2)
    known = ~np.isnan(values)
    places = np.unique(stages[known])
    means = np.array([values[known & (stages == place)].mean() for place in places])
    line: dict[str, Any] = {"marker": MARKERS[0], "markerfacecolor": "white", "linewidth": 2.0, "zorder": 3}
    axes.axvline(-0.5, color=COLOURS[1], linestyle=DASHES[1], linewidth=1.2, label="learned here", zorder=1)
    axes.plot(places, means, color=COLOURS[0], label="mean of the classes", **line)
    axes.set(xlabel="stages since the class was learned", ylabel=ylabel, title=title or "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if known.any() and values[known].min() >= 0:
        axes.set_ylim(bottom=0.0)
    return figure, _finished(axes)


def _finished(axes: Axes, legend: bool = True) -> Axes:
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(handlelength=3.0)
    return axes
