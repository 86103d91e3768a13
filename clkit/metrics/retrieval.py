r"""How well queries find their class in a gallery, where both may be features of different models.

All functions take queries (Q, d) and a gallery (G, d), floating-point features of any length, with int64 class ids of
their rows, any ids from 0; rows of class -1 are left out. Features are compared by their cosine; a zero feature has
cosine 0 with all. Queries and gallery are of different images: a query that is in the gallery finds itself. Every query
must have its class in the gallery. No score depends on the order of the gallery, or on the ids; products are computed
in blocks, in float32, or in float64 if both sides are.

A :class:`~clkit.errors.BatchError` says what of this does not hold; nothing else is raised but where it is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.errors import ArgumentError, BatchError
from clkit.metrics._stream_metric import integers

__all__ = [
    "Pairs",
    "average_precisions",
    "draw_pairs",
    "identification",
    "identified",
    "mean_average_precision",
    "pairwise_compatibility",
    "recall_at_k",
    "recalled",
    "verification",
    "verified",
]

_SHORTEST = 1e-12  # length up to which a feature has no direction
_BLOCK = 2**24  # cosines that are held at a time, 64 MiB in float32
_THRESHOLDS = np.arange(0, 4, 0.001)  # of squared distances of unit vectors


def identification(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Return the share of queries that are nearest to the template of their class.

    A template is the mean of the gallery's unit features of a class, scaled to length 1. Of equally near templates that
    of another class counts, so that features without information do not score. As in arXiv 2405.02581, whose code takes
    the number of a template for its class, which holds for ids 0 … n - 1 alone.

    Example:
        >>> gallery, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([30, 7])
        >>> queries = torch.tensor([[2.0, 1.0], [0.1, 0.3], [1.0, 0.0], [0.9, 0.0]])
        >>> identification(queries, torch.tensor([30, 7, 7, 30]), gallery, labels)
        0.75
    """
    return _mean(identified(queries, query_labels, gallery, gallery_labels))


def identified(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> Tensor:
    """Return for each query 1 if :func:`identification` finds its class, else 0, float64."""
    sides = _Sides(queries, query_labels, gallery, gallery_labels)
    rows = sides.gallery.double()
    sums = rows.new_zeros(len(sides.classes), rows.shape[1]).index_add_(0, sides.gallery_at, rows)
    templates = F.normalize(sums, dim=1, eps=_SHORTEST)  # of a mean it is that of the sum
    found = []
    for cosines, at in sides.blocks(templates, sides.queries.double()):
        own = cosines.gather(1, at[:, None])
        found.append((cosines >= own).sum(dim=1) == 1)
    return torch.cat(found).double() if found else rows.new_zeros(0)


def recall_at_k(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int = 1) -> float:
    """Return the share of queries with a row of their class among their ``k`` nearest.

    Of equally near rows those of other classes come first. An :class:`~clkit.errors.ArgumentError` if ``k`` is below 1.

    Example:
        >>> gallery, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([5, 2, 2])
        >>> queries, ids = torch.tensor([[1.0, 0.1], [1.0, 0.2]]), torch.tensor([5, 2])
        >>> recall_at_k(queries, ids, gallery, labels), recall_at_k(queries, ids, gallery, labels, k=2)
        (0.5, 1.0)
    """
    return _mean(recalled(queries, query_labels, gallery, gallery_labels, k))


def recalled(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int = 1) -> Tensor:
    """Return for each query 1 if a row of its class is among the ``k`` nearest, else 0, float64."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ArgumentError(f"k must be an integer of at least 1, got {k!r}")
    sides = _Sides(queries, query_labels, gallery, gallery_labels)
    found = []
    for cosines, at in sides.blocks(sides.gallery):
        same = sides.gallery_at == at[:, None]
        best = cosines.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((cosines >= best) & ~same).sum(dim=1) < k)
    return torch.cat(found).double() if found else sides.queries.new_zeros(0).double()


def mean_average_precision(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Return the mean over queries of the average precision of the whole gallery in their order.

    The average precision is the mean, over gallery rows of the query's class, of the share of this class among the rows
    that are at least as near; it is that of scikit-learn, ties included.

    Example:
        >>> gallery, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([5, 2, 2])
        >>> mean_average_precision(torch.tensor([[1.0, 0.1]]), torch.tensor([2]), gallery, labels)  # (1/2 + 2/3) / 2
        0.5833333333333333
    """
    return _mean(average_precisions(queries, query_labels, gallery, gallery_labels))


def average_precisions(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> Tensor:
    """Return the average precision of each query, float64."""
    sides = _Sides(queries, query_labels, gallery, gallery_labels)
    found = []
    for cosines, at in sides.blocks(sides.gallery):
        ranked, order = cosines.sort(dim=1, descending=True)
        same = (sides.gallery_at == at[:, None]).gather(1, order)
        places = torch.arange(same.shape[1], device=same.device)
        ends = F.pad(ranked[:, :-1] != ranked[:, 1:], (0, 1), value=True)  # where a group of equals ends
        last = torch.where(ends, places, len(places)).flip(1).cummin(dim=1).values.flip(1)
        precisions = same.cumsum(dim=1).gather(1, last).double() / (last + 1)
        found.append((precisions * same).sum(dim=1) / same.sum(dim=1))
    return torch.cat(found) if found else sides.queries.new_zeros(0).double()


def pairwise_compatibility(new: Tensor, old: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return in which shares of all pairs of images the new model brings classes together, and keeps them apart.

    The formal definition of compatible models wants, for each two images, the new feature of one to be no farther from
    the old feature of the other than its old feature is where they are of one class, and no nearer where they are not.
    It never holds for all pairs, so it is no criterion; distances are 1 - cosine. As in arXiv 2405.02581.

    Args:
        new: (n, d) features by the new model.
        old: (n, d) features of the same images by the old one.
        labels: (n,) class ids; rows of -1 are left out.

    Returns:
        The shares for pairs of one class and of two, in [0, 1]; ``NaN`` where there is none.

    Example:
        >>> old = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> new = torch.tensor([[1.0, 0.2], [1.0, 0.0], [0.0, 1.0]])
        >>> pairwise_compatibility(new, old, torch.tensor([5, 5, 2]))
        (1.0, 0.75)
    """
    sides = _Sides(new, labels, old, labels)
    before = _Sides(old, labels, old, labels).queries.to(sides.queries.dtype)
    kept, pairs = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    numbers = torch.arange(len(sides.at), device=old.device)
    start = 0
    for (after, at), (own, _) in zip(sides.blocks(sides.gallery), sides.blocks(sides.gallery, before), strict=True):
        others = numbers[start : start + len(at), None] != numbers
        same = sides.gallery_at == at[:, None]
        for kind, (of_kind, holds) in enumerate(((same, after >= own), (~same, after <= own))):
            kept[kind] += int((of_kind & others & holds).sum())
            pairs[kind] += int((of_kind & others).sum())
        start += len(at)
    shares = (kept.double() / pairs).tolist()  # 0 of 0 is NaN
    return shares[0], shares[1]


class Pairs(NamedTuple):
    """Pairs to verify: the query row, the gallery row (P,) int64, and whether they are of one class (P,) bool."""

    query: Tensor
    gallery: Tensor
    same: Tensor


def draw_pairs(query_labels: Tensor, gallery_labels: Tensor, number: int = 6000, *, seed: int = 0) -> Pairs:
    """Draw pairs of a query and a gallery row at random, half of them of one class, in turns.

    So each part of ten consecutive ones, as :func:`verification` cuts them, has as many of either kind. Draws are with
    replacement, and a function of labels and seed alone.

    Args:
        query_labels: (Q,) class ids; -1 is not drawn.
        gallery_labels: (G,) class ids.
        number: Of pairs, at least 2 and even.
        seed: Of the draws.

    Raises:
        ArgumentError: If the number is not even, or below 2.
        BatchError: If there are no pairs of one class, or of two.

    Example:
        >>> pairs = draw_pairs(torch.tensor([4, 9]), torch.tensor([9, 4, 4]), number=4)
        >>> pairs.same.tolist(), (torch.tensor([4, 9])[pairs.query] == torch.tensor([9, 4, 4])[pairs.gallery]).tolist()
        ([True, False, True, False], [True, False, True, False])
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 2 or number % 2:
        raise ArgumentError(f"number must be an even integer of at least 2, got {number!r}")
    ours = _labels("query_labels", query_labels).cpu().numpy()
    theirs = _labels("gallery_labels", gallery_labels).cpu().numpy()
    order = theirs.argsort(kind="stable")
    order = order[theirs[order] >= 0]
    first, behind = (theirs[order].searchsorted(ours, side) for side in ("left", "right"))
    same_number, other_number = behind - first, len(order) - (behind - first)
    rng = np.random.default_rng(seed)
    query, gallery = np.empty(number, np.int64), np.empty(number, np.int64)
    for kind, (numbers, word) in enumerate(((same_number, "one class"), (other_number, "two classes"))):
        able = np.flatnonzero((ours >= 0) & (numbers > 0))
        if not able.size:
            raise BatchError(f"query_labels and gallery_labels have no pair of {word}, so nothing can be verified")
        rows = able[rng.integers(able.size, size=number // 2)]
        at = (rng.random(number // 2) * numbers[rows]).astype(np.int64)
        # of one class: within its rows; of two: anywhere else, past its rows where they come first
        place = first[rows] + at if kind == 0 else at + np.where(at >= first[rows], same_number[rows], 0)
        query[kind::2], gallery[kind::2] = rows, order[place]
    same = torch.arange(number) % 2 == 0
    return Pairs(torch.from_numpy(query), torch.from_numpy(gallery), same)


def verification(first: Tensor, second: Tensor, same: Tensor, folds: int = 10) -> float:
    """Return how well pairs of one class are told from pairs of two by a threshold on their distance.

    The squared Euclidean distance of unit features is compared with thresholds 0, 0.001, …, 3.999. The one that is best
    on all folds but one is tried on that one, and the mean over folds is returned; folds are contiguous, in the order
    given. The protocol of arXiv 2111.07632 and 2211.09032 (after "Labeled Faces in the Wild"), with 6000 pairs, as
    :func:`draw_pairs` draws them.

    Args:
        first: (P, d) features of the query model.
        second: (P, d) features of the gallery model.
        same: (P,) bool, whether a pair is of one class.
        folds: Number of parts, at least 2 and at most P.

    Raises:
        ArgumentError: If there are fewer pairs than folds.

    Example:
        >>> ends = torch.eye(2).repeat(10, 1)
        >>> verification(ends, ends[torch.arange(20) // 2 * 2], torch.arange(20) % 2 == 0)
        1.0
    """
    rows, others = _features("first", first), _features("second", second)
    if rows.shape != others.shape or same.shape != (len(rows),) or same.dtype != torch.bool:
        raise BatchError(
            f"first, second and same must be (P, d), (P, d) and (P,) bool, got {tuple(first.shape)}, "
            f"{tuple(second.shape)} and {tuple(same.shape)} {same.dtype}"
        )
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= len(rows):
        raise ArgumentError(f"folds must be an integer from 2 to the {len(rows)} pairs, got {folds!r}")
    distances = (rows - others).double().square().sum(dim=1).cpu().numpy()
    alike = same.cpu().numpy()
    accepted_from = _THRESHOLDS.searchsorted(distances, side="right")  # a distance below a threshold is accepted
    right, sizes = [], []
    for part, kind in zip(np.array_split(accepted_from, folds), np.array_split(alike, folds), strict=True):
        accepted, refused = (np.bincount(part[which], minlength=len(_THRESHOLDS) + 1) for which in (kind, ~kind))
        right.append((np.cumsum(accepted) + refused.sum() - np.cumsum(refused))[:-1])
        sizes.append(len(part))
    table = np.array(right)
    elsewhere = table.sum(axis=0) - table
    chosen = elsewhere.argmax(axis=1)
    return float(np.mean(table[np.arange(folds), chosen] / np.array(sizes)))


def verified(
    queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, number: int = 6000, *, seed: int = 0
) -> float:
    """Return :func:`verification` of pairs that :func:`draw_pairs` draws from queries and gallery."""
    sides = _Sides(queries, query_labels, gallery, gallery_labels)
    pairs = draw_pairs(sides.at, sides.gallery_at, number, seed=seed)
    first, second = sides.queries[pairs.query.to(queries.device)], sides.gallery[pairs.gallery.to(gallery.device)]
    return verification(first, second, pairs.same)


class _Sides:
    """Queries and gallery of unit length without unlabelled rows, with the position of each row's class."""

    def __init__(self, queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> None:
        both = queries.dtype == gallery.dtype == torch.float64
        sides = []
        for name, features, ids in (("query", queries, query_labels), ("gallery", gallery, gallery_labels)):
            rows = _features("queries" if name == "query" else name, features)
            labels = _labels(f"{name}_labels", ids)
            if labels.shape != rows.shape[:1]:
                raise BatchError(f"{name}_labels has {len(labels)} entries for {len(rows)} rows: give one of each")
            known = labels >= 0
            sides.append(((rows if both else rows.float())[known], labels[known].to(rows.device)))
        (self.queries, wanted), (self.gallery, own) = sides
        if self.queries.shape[1] != self.gallery.shape[1]:
            raise BatchError(
                f"queries are {self.queries.shape[1]} wide and the gallery {self.gallery.shape[1]}: features of models "
                "of other widths cannot be compared"
            )
        self.classes, self.gallery_at = torch.unique(own, return_inverse=True)
        absent = torch.unique(wanted[~torch.isin(wanted, self.classes)]).tolist()
        if absent:
            raise BatchError(f"query_labels has classes {absent[:10]}, of which the gallery has no row: leave them out")
        self.at = torch.searchsorted(self.classes, wanted)

    def blocks(self, rows: Tensor, queries: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the cosines of some queries with all rows, and the positions of their classes."""
        queries = self.queries if queries is None else queries
        size = max(1, _BLOCK // max(1, len(rows)))
        with torch.autocast(rows.device.type, enabled=False):
            for part, at in zip(torch.split(queries, size), torch.split(self.at, size), strict=True):
                if len(part):
                    yield part @ rows.T, at


def _features(name: str, features: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.dtype.is_floating_point:
        seen = f"{features.dtype} of shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features)
        raise BatchError(f"{name} must be floating-point features of shape (rows, d), got {seen}")
    rows = features.detach()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if not bool(torch.isfinite(rows).all()):
        bad = torch.nonzero(~torch.isfinite(rows).all(dim=1)).flatten().tolist()
        raise BatchError(f"{name} has rows {bad[:10]} with values that are not finite")
    return F.normalize(rows, dim=1, eps=_SHORTEST)


def _labels(name: str, labels: Tensor) -> Tensor:
    ids = integers(name, labels).detach()
    if len(ids) and int(ids.min()) < -1:
        raise BatchError(f"{name} contains {int(ids.min())}: class ids are from 0, and -1 is unlabelled")
    return ids


def _mean(values: Tensor) -> float:
    if not len(values):
        raise BatchError("queries has no labelled rows, so there is nothing to score")
    return float(values.mean())
