"""What is known of an edit that was made in a run, and how it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.errors import ArgumentError, StateError
from clkit.methods import EditResult
from clkit.methods._edit_arguments import edit_ids
from clkit.methods._edit_log import EditLog
from clkit.schema import (
    FLOATS,
    Instance,
    Many,
    Named,
    Numbers,
    OneOf,
    Real,
    Table,
    Whole,
    read_own,
    saved_entry,
)

__all__ = [
    "FeatureShift",
    "LoggedEdit",
    "RunEdit",
    "check_inner",
    "check_log",
    "edits_by_task",
    "feature_shift",
    "open_edits",
    "read_logged",
]

Route = Literal["editor", "exact"]


@dataclass(frozen=True)
class FeatureShift:
    """How far the features of the reference moved.

    Attributes:
        cosine: Mean cosine between the features of an image before and after the edit.
        recall_before: Share of images, searched among all others, whose nearest has their label, with features from
            before the edit; ``None`` without labels.
        recall_after: The same with features of the edited network, searched among those from before it.
    """

    cosine: float
    recall_before: float | None
    recall_after: float | None


@dataclass(frozen=True, kw_only=True)
class RunEdit(EditResult):
    """What became of an edit of a run; ``id`` is its number in the callback's log.

    Attributes:
        route: ``"editor"``, weights of the network were changed, or ``"exact"``, the sums of a head, in which the
            images count ``scale`` times. Scores of a head are no probabilities: what is called so is then their
            softmax, in which alone an order means anything, and near-ties are not counted.
        head: The name of that head.
        task: Whose network was changed, in a run with a network for each task.
        features: How features of the reference moved, where that was asked for or a simplex head needs them to stay.
        stale: The callbacks whose knowledge is of the network, or of the head, as it was before the edit.
    """

    route: Route
    head: str | None = None
    task: int | None = None
    features: FeatureShift | None = None
    stale: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: EditResult, **more: Any) -> RunEdit:
        """Return a result with what a run knows beside it."""
        return cls(**{**{field.name: getattr(result, field.name) for field in fields(EditResult)}, **more})


@dataclass(frozen=True, eq=False)
class LoggedEdit:
    """An edit in the log of a run.

    Attributes:
        id: Its number, from 0; numbers are never given twice.
        route: See :class:`RunEdit`, as for ``head``, ``task`` and ``scale``.
        head: Where its images are counted.
        task: Whose network was changed.
        inner: Its number in the editor's own log.
        label: The labels that were wanted.
        before: The answers before it.
        after: The answers after it.
        probability_before: Of the wanted labels.
        probability_after: Likewise.
        scale: What the proposal was multiplied by, or how often the images count.
        drop: What it cost on the reference, see :class:`~clkit.methods.LocalityReport`.
        epoch: Of the trainer when it was made.
        step: Likewise.
        committed: Whether it cannot be taken back any more.
        features: (B, D) float64, of the images, as the head learned them.
    """

    id: int
    route: Route
    head: str | None
    task: int | None
    inner: int | None
    label: list[Any]
    before: list[Any]
    after: list[Any]
    probability_before: list[float]
    probability_after: list[float]
    scale: float
    drop: float | None
    epoch: int
    step: int
    committed: bool = False
    features: Tensor | None = None

    @classmethod
    def of(cls, result: RunEdit, **more: Any) -> LoggedEdit:
        """Return the entry of an edit that was made."""
        return cls(
            route=result.route,
            head=result.head,
            task=result.task,
            label=result.label,
            before=result.prediction_before,
            after=result.prediction_after,
            probability_before=result.probability_before,
            probability_after=result.probability_after,
            scale=result.scale,
            drop=None if result.locality is None else result.locality.drop,
            **more,
        )

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return features (n, D) and targets (n,) as a head has learned them, one for each time."""
        assert self.features is not None
        count = round(self.scale)
        return self.features.repeat(count, 1), torch.tensor(self.label, dtype=torch.int64).repeat(count)

    def commit(self) -> LoggedEdit:
        """Return the same as one that cannot be taken back."""
        return replace(self, committed=True, features=None)

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


_ENTRY: Table = {
    "id": Whole(),
    "route": OneOf(("editor", "exact")),
    "head": Instance(str | None),
    "task": Whole(optional=True),
    "inner": Whole(optional=True),
    "label": Instance(list),
    "before": Instance(list),
    "after": Instance(list),
    "probability_before": Many(Instance(float | list)),
    "probability_after": Many(Instance(float | list)),
    "scale": Real(),
    "drop": Instance(float | None),
    "epoch": Whole(),
    "step": Whole(),
    "committed": OneOf((False, True)),
    "features": Instance(Tensor | None),
}


def read_logged(entries: list[Any], next_id: int, owner: str) -> list[LoggedEdit]:
    """Return the edits of a saved log, or raise a StateError."""
    found = []
    for entry in entries:
        saved = read_own(entry, _ENTRY, owner)
        exact, rows = saved["route"] == "exact", saved["features"]
        fits = (saved["head"] is not None) == exact and (saved["inner"] is None) == exact
        if exact and not saved["committed"]:
            fits = fits and isinstance(rows, Tensor) and all(type(each) is int and each >= 0 for each in saved["label"])
            if fits:
                Numbers((len(saved["label"]), "D"), torch.float64)._read(rows, f"{owner}: features", {})
        elif rows is not None:
            fits = False
        if not fits:
            raise StateError(
                f"{owner} has an edit {saved['id']} whose parts do not belong together; the file is damaged"
            )
        found.append(LoggedEdit(**saved))
    ids = [entry.id for entry in found]
    if len(set(ids)) < len(ids) or any(each >= next_id for each in ids):
        raise StateError(f"{owner} has edits with the numbers {ids}, and the next is {next_id}; the file is damaged")
    return found


def check_log(state: Any, owner: str) -> EditLog:
    """Return a saved log of an editor for weights of the shapes that it says, or raise a StateError."""
    bank = saved_entry(state, "bank", Named(Numbers((...,), FLOATS)), owner)
    log = EditLog()
    log.load_state_dict(state, bank)
    return log


def check_inner(entries: Iterable[LoggedEdit], logs: Mapping[int | None, EditLog], owner: str) -> None:
    """Raise a StateError where edits of the network do not stand in the editor's own log of their task."""
    for entry in entries:
        inner = [] if entry.task not in logs else [each.id for each in logs[entry.task].records]
        if entry.route == "editor" and entry.inner not in inner:
            raise StateError(f"{owner} has an edit {entry.id} that the editor's log does not have; the file is damaged")


def open_edits(log: Iterable[LoggedEdit], ids: Iterable[int]) -> list[LoggedEdit]:
    """Return edits of a log that can be taken back, or raise an ArgumentError."""
    known = {entry.id: entry for entry in log}
    found = {}
    for each in edit_ids(ids):
        if each not in known:
            raise ArgumentError(f"there is no edit {each!r} in the log, which has {sorted(known)}")
        if known[each].committed:
            raise ArgumentError(f"edit {each} was committed: it cannot be taken back any more")
        found[each] = known[each]
    return list(found.values())


def edits_by_task(entries: Iterable[LoggedEdit]) -> dict[int | None, list[LoggedEdit]]:
    """Return the edits of the network that are open, by the task whose network it is."""
    found: dict[int | None, list[LoggedEdit]] = {}
    for entry in entries:
        if entry.route == "editor" and not entry.committed:
            found.setdefault(entry.task, []).append(entry)
    return found


def feature_shift(before: Tensor, after: Tensor, labels: Tensor | None) -> FeatureShift:
    """Compare features (R, D) of the same images.

    Example:
        >>> old, new = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> feature_shift(old, new, torch.tensor([3, 3]))
        FeatureShift(cosine=0.5, recall_before=1.0, recall_after=1.0)
    """
    old, new = (F.normalize(each.double(), dim=1) for each in (before, after))
    cosine = float((old * new).sum(dim=1).mean())
    if labels is None or len(old) < 2:
        return FeatureShift(cosine, None, None)
    recalls = []
    for queries in (old, new):
        near = (queries @ old.T).fill_diagonal_(-2.0).argmax(dim=1)
        recalls.append(float((labels[near] == labels).double().mean()))
    return FeatureShift(cosine, *recalls)
