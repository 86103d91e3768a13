"""What else moves when a network is edited: reference images, a report on them, and bounds that no edit may break."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clkit.arguments import check_arguments, in_short
from clkit.errors import ArgumentError, BatchError
from clkit.features.batch import read_inputs
from clkit.methods._checks import check_probability
from clkit.methods._edit_objective import Objective

__all__ = ["EditReference", "Guard", "LocalityReport"]

_CHUNK = 256  # images that go through the network at a time
_MOST_LOST = 3  # classes that are named


@dataclass(frozen=True)
class Guard:
    """Bounds on what an edit may do to answers that it is not about, on images of an :class:`EditReference`.

    The drop is the loss of accuracy where the reference has labels, else the share of answers that changed.

    Args:
        max_drop: Of one edit, against the state just before it, from 0 to 1.
        max_total_drop: Of all edits together, against the weights without any, from 0 to 1.
        policy: ``"scale"`` makes an edit of a given scale smaller until it is within bounds, and refuses it where the
            answer is then not the wanted one; ``"refuse"`` refuses it at once; ``"warn"`` applies it and says so.

    Raises:
        ArgumentError: If a value is not allowed.
    """

    max_drop: float = 0.02
    max_total_drop: float = 0.05
    policy: Literal["scale", "refuse", "warn"] = "scale"

    def __post_init__(self) -> None:
        check_arguments(Guard, vars(self))
        check_probability("max_drop", self.max_drop)
        check_probability("max_total_drop", self.max_total_drop)

    def unseen(self, reference: EditReference | None) -> str:
        """Return what the guard cannot see of a reference, in words; empty where it sees what it bounds."""
        if reference is None:
            return (
                "the guard has no reference, so that nothing is known of other answers; pass reference=…, a few "
                "hundred images, or guard=None"
            )
        if self.max_drop and 1 / len(reference) > self.max_drop:
            return (
                f"the reference has {len(reference)} images, too few to see a drop of max_drop={self.max_drop}; give a "
                "few hundred"
            )
        return ""

    def broken_by(self, report: LocalityReport) -> str:
        """Return which bound a report breaks, in words; empty where none is."""
        for name, drop, bound in (
            ("max_drop", report.drop, self.max_drop),
            ("max_total_drop", report.total_drop, self.max_total_drop),
        ):
            if drop > bound:
                what = "accuracy" if report.accuracy_before is not None else "share of unchanged answers"
                return f"the {what} on {report.images} reference images drops by {drop:.4f}, above {name}={bound}"
        return ""


@dataclass(frozen=True)
class LocalityReport:
    """What an edit did to the answers on reference images.

    Attributes:
        images: Their number R; nothing smaller than 1/R is seen.
        agreement: Share whose answer did not change.
        near_ties: How many had two answers less than 0.05 apart before the edit: those that are easiest to disturb.
        near_tie_agreement: Share of these whose answer did not change; ``None`` where there are none.
        kl: Mean KL divergence of the answers before and after.
        accuracy_before: Share that is answered rightly before the edit; ``None`` without labels.
        accuracy_after: Likewise after it.
        drop: What a :class:`Guard` bounds: the loss of accuracy by this edit, without labels 1 - ``agreement``.
        total_drop: The same against the network without any edit.
        lost: Classes that were answered before and are no more: of each the images lost, the worst three.
    """

    images: int
    agreement: float
    near_ties: int
    near_tie_agreement: float | None
    kl: float
    accuracy_before: float | None
    accuracy_after: float | None
    drop: float
    total_drop: float
    lost: dict[int, int]


class EditReference:
    """Images whose answers an edit shall leave alone, with or without labels.

    Args:
        data: A tensor of images (R, …), a pair of images and labels, or an iterable of batches of either, such as a
            loader; batches may be mappings with the usual keys, too (``image`` and ``label``). A few hundred images say
            enough, since they run with every edit.

    Raises:
        ArgumentError: If there are none, or of several sizes, some have labels and some have none, or values are not
            finite.

    Example:
        >>> len(EditReference([(torch.zeros(3, 2), torch.tensor([0, 1, 1])), (torch.ones(1, 2), torch.tensor([0]))]))
        4
    """

    def __init__(self, data: Any) -> None:
        batches = [data] if isinstance(data, Tensor | Mapping) or _is_pair(data) else data
        if not isinstance(batches, Iterable):
            raise ArgumentError(f"reference must be images, or batches of them, got {in_short(data)}")
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in batches:
            try:
                x, y = read_inputs(batch)
            except BatchError:
                x = y = None
            if not isinstance(x, Tensor) or x.ndim < 2:
                raise ArgumentError(f"a batch of reference must be images, or images and labels, got {in_short(batch)}")
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise ArgumentError("reference has images with values that are not finite; leave them out")
            if images and x.shape[1:] != images[0].shape[1:]:
                seen = f"{tuple(images[0].shape[1:])} and {tuple(x.shape[1:])}"
                raise ArgumentError(f"reference must have images of one size, got {seen}; bring them to that of a run")
            images.append(x.detach().cpu())
            labels += [] if y is None else [y.detach().cpu()]
        if not sum(map(len, images)):
            raise ArgumentError("reference has no images; leave it out (reference=None), or give a few hundred")
        if labels and [len(each) for each in labels] != [len(each) for each in images]:
            raise ArgumentError("reference must have a label for each image, or for none")
        self.images = torch.cat(images)
        self.labels = torch.cat(labels) if labels else None

    def __len__(self) -> int:
        """Return R."""
        return len(self.images)

    def without(self, x: Tensor) -> EditReference:
        """Return the same without images that are among some others (B, …)."""
        if x.shape[1:] != self.images.shape[1:]:
            return self
        own = x.detach().cpu().flatten(1)
        theirs = self.images.to(own.dtype).flatten(1)  # a network in half precision was given its own
        kept = ~torch.stack([(theirs == row).all(dim=1) for row in own]).any(dim=0)
        if bool(kept.all()):
            return self
        return EditReference(self.images[kept] if self.labels is None else (self.images[kept], self.labels[kept]))

    def logits(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the network's logits of all images, (R, C) on the CPU."""
        return torch.cat([run(part).cpu() for part in self.parts()])

    def parts(self) -> Sequence[Tensor]:
        """Return the images in parts that go through a network at a time."""
        return torch.split(self.images, _CHUNK)

    def report(self, objective: Objective, original: Tensor, before: Tensor, after: Tensor) -> LocalityReport:
        """Compare logits (R, C) of the network without edits, before this edit, and after it."""
        n = len(self)
        was, now = objective.answers(before), objective.answers(after)
        same, ties = _equal(was, now), objective.near_ties(before)
        right: list[Tensor] | None = None
        gone = was[~same] if was.ndim == 1 else was[:0, 0]  # several labels an image are of no one class
        drop, total = n - int(same.sum()), n - int(_equal(objective.answers(original), now).sum())
        if self.labels is not None:
            y = objective.targets("the labels of reference", self.labels, n, after.device)
            right = [objective.hits(each, y) for each in (original, before, after)]
            first, then, at_last = (int(each.sum()) for each in right)
            drop, total = then - at_last, first - at_last
            gone = y[right[1] & ~right[2]] if y.ndim == 1 else gone
        counts = gone.bincount()
        worst = counts.argsort(descending=True, stable=True)[:_MOST_LOST].tolist()
        return LocalityReport(
            images=n,
            agreement=int(same.sum()) / n,
            near_ties=int(ties.sum()),
            near_tie_agreement=int(same[ties].sum()) / int(ties.sum()) if bool(ties.any()) else None,
            kl=float(objective.divergence(before.float(), after.float()).double().mean()),
            accuracy_before=None if right is None else int(right[1].sum()) / n,
            accuracy_after=None if right is None else int(right[2].sum()) / n,
            drop=drop / n,
            total_drop=total / n,
            lost={each: int(counts[each]) for each in worst if counts[each]},
        )


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """Return whether each row has the same answer, (R,) bool."""
    same = one == other
    return same if same.ndim == 1 else same.all(dim=1)


def _is_pair(data: Any) -> bool:
    """Whether this is (images, labels) rather than a list of two batches of images."""
    if not isinstance(data, tuple | list) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        return False
    return data[0].ndim != data[1].ndim or not data[1].is_floating_point()
