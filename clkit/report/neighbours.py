"""What a search found, to look at: some queries and their nearest rows, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from clkit.methods import Neighbours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_image", "neighbours_table", "plot_neighbours"]

RIGHT, WRONG, UNKNOWN = "#009E73", "#D55E00", "#999999"  # green and red that the colour blind can tell apart
_LARGE = 64  # pixels from which a drawn image is smoothed


def neighbours_table(
    names: Sequence[str], labels: Sequence[int], found: Neighbours, class_names: Mapping[int, str], title: str
) -> Table:
    """Return a row for each query: its name and label, and the labels and cosines of its nearest, nearest first.

    Args:
        names: Of Q queries, such as their row numbers.
        labels: Their labels; -1 for none.
        found: What is nearest to them, (Q, k).
        class_names: Names by label; a label without one stands as its number.
        title: Of the table.

    Example:
        >>> import torch
        >>> found = Neighbours(torch.tensor([[0.9, 0.5]]), torch.tensor([[4, 2]]), torch.tensor([[7, 1]]))
        >>> neighbours_table(["digits/test/0"], [7], found, {}, "nearest").row_count
        1
    """
    long = any(len(_label(each, class_names)) > 3 for each in found.labels.flatten().tolist())
    gap = "\n" if long else " "
    table = Table(title=title, title_justify="left")
    table.add_column("query", no_wrap=True)
    table.add_column("label", no_wrap=True)
    for place in range(found.labels.shape[1]):
        table.add_column("nearest" if place == 0 else f"{place + 1}", justify="right", min_width=6)
    for name, label, others, scores in zip(names, labels, found.labels.tolist(), found.scores.tolist(), strict=True):
        cells = [
            Text(f"{_label(other, class_names)}{gap}{score:.3f}", style=_colour(label, other))
            for other, score in zip(others, scores, strict=True)
        ]
        table.add_row(name, _label(label, class_names), *cells)
    return table


def plot_neighbours(
    queries: Sequence[Tensor],
    nearest: Sequence[Sequence[Tensor]],
    labels: Sequence[int],
    found: Neighbours,
    class_names: Mapping[int, str],
) -> Figure:
    """Draw each query and, right of it, its nearest images: framed green where the label is the same, else orange.

    Args:
        queries: Q images (C, H, W), uint8 or in [0, 1]; of other than one channel the first three are drawn.
        nearest: Those of the (Q, k) nearest rows.
        labels: As for :func:`neighbours_table`, like those below.
        found: What is nearest.
        class_names: Names by label.

    Example:
        >>> import torch
        >>> found = Neighbours(torch.tensor([[0.9]]), torch.tensor([[4]]), torch.tensor([[7]]))
        >>> image = torch.zeros(1, 8, 8)
        >>> figure = plot_neighbours([image], [[image]], [7], found, {})
        >>> [axes.get_title() for axes in figure.axes]
        ['7', '7 0.900']
    """
    from matplotlib.figure import Figure

    rows, columns = len(queries), found.labels.shape[1]
    figure = Figure(figsize=(1.15 * (columns + 1) + 0.35, 1.3 * rows + 0.3), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1.15 * columns), wspace=0.04, squeeze=False)[0]
    left.suptitle("query", fontsize=9)
    right.suptitle("nearest in the gallery: label and cosine", fontsize=9)
    shown = left.subplots(rows, 1, squeeze=False)[:, 0], right.subplots(rows, columns, squeeze=False)
    scores, others = found.scores.tolist(), found.labels.tolist()
    for row, label in enumerate(labels):
        draw_image(shown[0][row], queries[row], _label(label, class_names), None)
        for column, other in enumerate(others[row]):
            cosine = f"{scores[row][column]:.3f}".replace("-", "\N{MINUS SIGN}")
            title = f"{_label(other, class_names)} {cosine}"
            draw_image(shown[1][row, column], nearest[row][column], title, _colour(label, other))
    return figure


def draw_image(axes: Any, image: Tensor, title: str, colour: str | None) -> None:
    """Draw an image (C, H, W), uint8 or in [0, 1], in a frame."""
    pixels = (image / 255 if not image.is_floating_point() else image).clamp(0, 1)
    grey = len(pixels) < 3
    smooth = "antialiased" if max(pixels.shape[1:]) >= _LARGE else "nearest"
    drawn = pixels[0] if grey else pixels[:3].permute(1, 2, 0)
    axes.imshow(drawn.cpu().numpy(), cmap="gray" if grey else None, vmin=0, vmax=1, interpolation=smooth)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, pad=3, color=colour or "black")
    axes.spines[:].set(color=colour or UNKNOWN, linewidth=0.8 if colour is None else 2.5)


def _colour(label: int, other: int) -> str:
    if label < 0 or other < 0:
        return UNKNOWN
    return RIGHT if label == other else WRONG


def _label(label: int, names: Mapping[int, str]) -> str:
    return "-" if label < 0 else names.get(label, str(label))
