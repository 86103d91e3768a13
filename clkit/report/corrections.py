"""Edits to look at: the log as a table, and one edit as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from clkit.methods import LocalityReport
from clkit.report.neighbours import RIGHT, UNKNOWN, draw_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["edits_table", "plot_edit"]

_BARS = 6  # classes that are drawn


def edits_table(edits: Sequence[Any], names: Mapping[int, str], title: str) -> Table:
    """Return a row for each edit of a log.

    Args:
        edits: Of :attr:`clkit.callbacks.MEND.records`.
        names: Names of classes by label; a label without one stands as its number.
        title: Of the table.

    Returns:
        The table; ``p`` of a head is the softmax of its scores, and ``elsewhere`` is by how much the accuracy on the
        reference rose or fell, or the share of unchanged answers where that has no labels.

    Example:
        >>> edits_table([], {}, "edits of run.ckpt").row_count
        0
    """
    table = Table(title=title, title_justify="left")
    for name in ("id", "where", "label", "answer", "p of label", "scale", "elsewhere", "step"):
        table.add_column(name, justify="left" if name == "where" else "right", no_wrap=True)
    for each in edits:
        where = each.head or ("network" if each.task is None else f"task {each.task}")
        answers = zip(each.before, each.after, strict=True)
        shares = zip(each.probability_before, each.probability_after, strict=True)
        table.add_row(
            f"{each.id} (committed)" if each.committed else str(each.id),
            where,
            "\n".join(_named(label, names) for label in each.label),
            "\n".join(f"{_named(old, names)} -> {_named(new, names)}" for old, new in answers),
            "\n".join(f"{old:.3f} -> {new:.3f}" for old, new in shares),
            f"{each.scale:g}",
            "-" if each.drop is None else f"{0.0 - 100 * each.drop:+.1f} %",
            str(each.step),
        )
    return table


def plot_edit(
    image: Tensor,
    before: Tensor,
    after: Tensor,
    label: int,
    *,
    equivalents: Sequence[Tensor] = (),
    locality: LocalityReport | None = None,
    names: Mapping[int, str] | None = None,
    bars: str = "probability",
    figure: Figure | None = None,
) -> Figure:
    """Draw an edit: the image, its most probable classes before and after, its equivalents, and what else moved.

    Args:
        image: (C, H, W), uint8 or in [0, 1].
        before: (C,) probabilities of the classes before the edit.
        after: Likewise after it.
        label: The label that was wanted.
        equivalents: Other views of the image.
        locality: What happened to the reference.
        names: Names of classes by label.
        bars: What ``before`` and ``after`` are; scores of a head are no probabilities.
        figure: Where to draw; by default a new figure, of a size that fits.

    Example:
        >>> import torch
        >>> figure = plot_edit(torch.zeros(1, 8, 8), torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.7]), 1)
        >>> [axes.get_title() for axes in figure.axes]
        ['wanted: 1', 'probability']
    """
    from matplotlib.figure import Figure

    parts = ["image", "bars", *(["moved"] if locality is not None else [])]
    rows = 2 if equivalents else 1
    if figure is None:
        figure = Figure(figsize=(2.2 * len(parts) + 1.2, 2.4 * rows), dpi=150, layout="constrained")
    upper, *lower = figure.subfigures(rows, 1, height_ratios=(2.4, 1)[:rows], squeeze=False)[:, 0]
    shown = dict(zip(parts, upper.subplots(1, len(parts), squeeze=False)[0], strict=True))
    known = names or {}
    draw_image(shown["image"], image, f"wanted: {_named(label, known)}", None)
    _draw_bars(shown["bars"], before, after, label, known)
    shown["bars"].set_title(bars, fontsize=8)
    if locality is not None:
        _draw_moved(shown["moved"], locality, known)
    for part in lower:
        part.suptitle("equivalents", fontsize=8)
        for axes, view in zip(part.subplots(1, len(equivalents), squeeze=False)[0], equivalents, strict=True):
            draw_image(axes, view, "", None)
    return figure


def _draw_bars(axes: Any, before: Tensor, after: Tensor, label: int, names: Mapping[int, str]) -> None:
    width = max(len(before), len(after))
    one, other = (pad(each, (0, width - len(each))) for each in (before, after))
    best = (one + other).argsort(descending=True)[:_BARS].tolist()
    best = [*best[: _BARS - 1], label] if label not in best else best
    places = range(len(best))
    axes.barh([place - 0.2 for place in places], one[best].tolist(), 0.38, color=UNKNOWN, label="before")
    axes.barh([place + 0.2 for place in places], other[best].tolist(), 0.38, color=RIGHT, hatch="//", label="after")
    axes.set_yticks(list(places), [_named(each, names) for each in best], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=6, loc="lower right")


def _draw_moved(axes: Any, locality: LocalityReport, names: Mapping[int, str]) -> None:
    ties = f"{locality.near_ties} near-ties"
    rows = {f"{locality.images} images": locality.agreement, ties: locality.near_tie_agreement}
    kept = {name: share for name, share in rows.items() if share is not None}
    axes.barh(range(len(kept)), list(kept.values()), 0.5, color=UNKNOWN)
    axes.set_yticks(range(len(kept)), list(kept), fontsize=7)
    axes.set_ylim(1.5, -0.5)  # from above, and a lone bar is no broader than one of two
    axes.set_xlim(0, 1)
    axes.tick_params(axis="x", labelsize=7)
    lost = ", ".join(f"{count} of class {_named(each, names)}" for each, count in locality.lost.items())
    then, now = locality.accuracy_before, locality.accuracy_after
    said = [] if then is None or now is None else [f"accuracy {100 * then:.1f} -> {100 * now:.1f} %"]
    axes.set_xlabel("\n".join([*said, *([f"lost: {lost}"] if lost else [])]), fontsize=7)
    axes.set_title("reference: same answer", fontsize=8)


def _named(label: Any, names: Mapping[int, str]) -> str:
    return names.get(label, str(label)) if isinstance(label, int) else str(label)
