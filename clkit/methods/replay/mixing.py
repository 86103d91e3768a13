"""Replay batches of which images are mixed from two: how often pairs are drawn, and the loss of a mixed image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_choice, check_number, check_probability
from clkit.methods.replay.contrast import check_rows, wide
from clkit.methods.replay.rows import check_labels

__all__ = [
    "MixedBatch",
    "Mixing",
    "mixed_cross_entropy",
    "mixture",
    "of_two_classes",
    "pair_counts",
    "pair_probabilities",
]

_NEAREST = 1e-6  # smallest distance of two means that is told from none


def mixed_cross_entropy(logits: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    r"""Cross-entropy of images mixed from two classes: mean of :math:`(1-\lambda)\,CE(a) + \lambda\,CE(b)`.

    Args:
        logits: (m, C), over all classes.
        first: (m,) integer class ids a.
        second: (m,) integer class ids b.
        share: (m,) share of b, in [0, 1].

    Raises:
        BatchError: If shapes or dtypes do not fit, or (seen on a CPU only) a label is not below C.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> share = torch.tensor([0.25, 0.4], dtype=torch.float64)
        >>> round(float(mixed_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([2, 1]), share)), 10)
        0.7356453667
    """
    check_rows("logits", logits)
    for name, labels in (("first", first), ("second", second)):
        check_labels(name, labels, len(logits), below=logits.shape[1])
    if share.shape != first.shape or not share.dtype.is_floating_point:
        raise BatchError(
            f"share must be floating-point numbers of shape {tuple(first.shape)}, "
            f"got {share.dtype} of shape {tuple(share.shape)}"
        )
    if not len(logits):
        return wide(logits).sum()
    costs = -F.log_softmax(wide(logits), dim=1)
    both = costs.gather(1, torch.stack([first, second], dim=1).to(costs.device, torch.int64))
    of_second = share.to(both)
    return ((1 - of_second) * both[:, 0] + of_second * both[:, 1]).mean()


def pair_probabilities(means: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return how often each pair of classes is mixed: :math:`\mathrm{softmax}(1 / \lVert \mu_i - \mu_k \rVert)`.

    For (K, p) means: (R, 2) positions i < k in lexicographic order, and (R,) float64, R = K (K - 1) / 2. Distances
    below 1e-6 count as 1e-6, so that coincident means share everything.

    Example:
        >>> pairs, probabilities = pair_probabilities(torch.tensor([[0.0], [1.0], [3.0]]))
        >>> pairs.tolist(), [round(float(q), 3) for q in probabilities]
        ([[0, 1], [0, 2], [1, 2]], [0.472, 0.242, 0.286])
    """
    means = means.detach().double()
    pairs = torch.combinations(torch.arange(len(means), device=means.device)).reshape(-1, 2)
    distances = vector_norm(means[pairs[:, 0]] - means[pairs[:, 1]], dim=1)
    return pairs, torch.softmax(1 / distances.clamp(min=_NEAREST), dim=0)


def pair_counts(
    probabilities: Tensor, total: int, generator: torch.Generator, *, rule: Literal["round", "multinomial"] = "round"
) -> Tensor:
    """Return how many of ``total`` images each of R pairs gets, (R,) int64.

    ``"round"`` rounds ``probabilities * total`` half to even, and adds or takes one at random pairs until the sum is
    right; where all round to zero, the pairs are therefore uniform whatever the probabilities. ``"multinomial"``
    draws each image's pair.

    Raises:
        ArgumentError: If the rule is none of the two, or the probabilities are none.

    Example:
        >>> pair_counts(torch.tensor([0.7, 0.2, 0.1]), 10, torch.Generator()).tolist()
        [7, 2, 1]
    """
    check_choice("pair_rule", rule, ("round", "multinomial"))
    if not len(probabilities) or not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ArgumentError(f"probabilities must be at least one number from 0 to 1, got {probabilities.tolist()}")
    if rule == "multinomial":
        if not total:
            return torch.zeros_like(probabilities, dtype=torch.int64)
        drawn = torch.multinomial(probabilities, total, replacement=True, generator=generator)
        return torch.bincount(drawn, minlength=len(probabilities))
    counts = (probabilities * total).round().long()  # half to even
    while surplus := int(counts.sum()) - total:
        eligible = torch.nonzero(counts > 0).flatten() if surplus > 0 else torch.arange(len(counts))
        order = torch.randperm(len(eligible), generator=generator)[: abs(surplus)]
        counts[eligible[order]] -= 1 if surplus > 0 else -1
    return counts


@dataclass(frozen=True)
class Mixing:
    r"""How the images of a replay batch are mixed (adaptive prototypical feedback).

    Args:
        base_rate: :math:`\rho`, share of a replay batch that is mixed among itself.
        probability: P, how often images are mixed at all.
        largest: Largest share of the second image in the first part.
        alpha: The share in the second part has the distribution Beta(alpha, alpha).
        pair_rule: ``"round"`` or ``"multinomial"``, see :func:`pair_counts`.
        pure_class: Which class an image of a pair has that is not mixed: always the ``"first"`` of the two, as
            published, or ``"either"``.
        probability_rule: ``"squared"``: one coin for the whole first part and one for each row, so that a row is
            mixed with probability P squared, as published; ``"once"``: one for each row.

    Raises:
        ArgumentError: If an argument is not allowed.
    """

    base_rate: float = 0.75
    probability: float = 0.6
    largest: float = 0.6
    alpha: float = 0.4
    pair_rule: Literal["round", "multinomial"] = "round"
    pure_class: Literal["first", "either"] = "first"
    probability_rule: Literal["squared", "once"] = "squared"

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        for name in ("base_rate", "probability", "largest"):
            check_probability(name, getattr(self, name))
        check_number("alpha", self.alpha, above=0)


class MixedBatch(NamedTuple):
    """A replay batch some of whose images are mixed from two.

    Attributes:
        images: (m, ...), ``(1 - share) * x_first + share * x_second``.
        first: (m,) int64.
        second: (m,) int64.
        share: (m,) share of the second, in [0, 1], float32 (float64 for float64 images).
    """

    images: Tensor
    first: Tensor
    second: Tensor
    share: Tensor

    @property
    def mixed(self) -> Tensor:
        """(m,) bool, whether an image is of two classes."""
        return of_two_classes(self.first, self.second, self.share)

    @property
    def labels(self) -> Tensor:
        """(m, 3) float64 on the host: first class, second class and share, as one label for each image."""
        return torch.stack([self.first.double(), self.second.double(), self.share.double()], dim=1).cpu()

    @classmethod
    def pure(cls, images: Tensor, labels: Tensor) -> MixedBatch:
        """Return images of one class each."""
        share = torch.zeros(len(images), dtype=_share_dtype(images), device=images.device)
        return cls(images, labels, labels, share)


def of_two_classes(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Return (m,) bool, whether an image is of two classes."""
    return (first != second) & (share > 0)


def mixture(x: Tensor, y: Tensor, first: Tensor, second: Tensor, share: Tensor) -> MixedBatch:
    """Return ``(1 - share) * x + share * y``."""
    share = share.to(x.device, _share_dtype(x))
    weight = share.view(-1, *[1] * (x.ndim - 1))
    return MixedBatch(((1 - weight) * x + weight * y).to(x.dtype), first, second, share)


def _share_dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32
