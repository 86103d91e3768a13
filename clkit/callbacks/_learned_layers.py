"""What was learned at each layer that a run reads: sums and rows, by the point at which features are read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.callbacks._deup_parts import Records
from clkit.callbacks._known_rows import KnownRows
from clkit.distributed import gather_objects
from clkit.methods.heads.base import Head
from clkit.methods.stationarising import Snapshot
from clkit.schema import Instance, Many, Named, Table, Whole, read_own

__all__ = ["LearnedLayers"]

Leverage = Callable[[Tensor], Tensor] | None

_RANK = 2**40  # ids of samples of one process, where no stream numbers them
_MOST = 2**31  # no classifier has a column for higher ids


class LearnedLayers:
    """Sums and rows at each layer, and which classes and how many samples came.

    Args:
        settings: How much is kept.
        novelty: Whether the distance from everything learned is wanted too.
    """

    def __init__(self, settings: Records, *, novelty: bool) -> None:
        self._options: dict[str, Any] = {
            "kind": settings.memory,
            "size": settings.memory_size,
            "seed": settings.seed,
            "shrinkage": settings.shrinkage,
            "novelty": novelty,
        }
        self._known: dict[str, KnownRows] = {}
        self._kept: dict[str, KnownRows] = {}  # as they were when what heads say was brought up to date
        self._reread: dict[str, KnownRows] = {}  # by predictor, of samples kept out of training
        self._views: dict[Any, tuple[KnownRows, int, Snapshot]] = {}
        self._classes: set[int] = set()  # that training brought
        self.mixed: set[str] = set()  # layers that heads read in different passes
        self._new: list[Tensor] = []  # targets that were not looked at yet
        self.numbered = 0  # samples of this process that no stream numbers

    # ---- learning

    def ids(self, trainer: pl.Trainer, batch_idx: int, targets: Tensor) -> Tensor:
        """Return the numbers (B,) of the samples of a training batch: the rows of a stream, else those with a label."""
        loader: Any = trainer.train_dataloader
        if hasattr(loader, "rows"):
            return torch.as_tensor(loader.rows(batch_idx))
        before = (targets >= 0).cumsum(0).cpu()
        first = trainer.global_rank * _RANK + self.numbered
        self.numbered += int(before[-1]) if len(before) else 0
        return (first + before - 1).clamp(min=0)

    def learn(self, point: str, features: Tensor, targets: Tensor, ids: Tensor) -> None:
        """Learn rows at a layer: (B, D) features, (B,) targets and ids; those without a label are left out."""
        if point not in self._known:
            self._known[point] = KnownRows(features.shape[1], **self._options)
        self._known[point].learn(features.detach().double(), targets, ids)

    def see_classes(self, targets: Tensor) -> None:
        """Note which classes came."""
        self._new.append(targets.detach())
        if len(self._new) >= 64:  # so that not every step has to wait for its device
            self._look()

    def _look(self) -> None:
        if self._new:
            found = torch.unique(torch.cat(self._new)).tolist()
            self._classes.update(label for label in found if 0 <= label < _MOST)
            self._new = []

    @property
    def classes(self) -> set[int]:
        """The classes that training brought."""
        self._look()
        return self._classes

    def keep(self, point: str) -> None:
        """Keep what is known at a layer as it is now, whatever will be learned."""
        known = self._known.get(point)
        if known is not None and (point not in self._kept or self._kept[point].rows_seen != known.rows_seen):
            self._kept[point] = copy.deepcopy(known)

    def synchronize(self) -> None:
        """Put together what all processes have; a call on all of them."""
        for group in (self._known, self._kept):
            held = gather_objects((self.classes, list(group)), "the classes that came, and the layers that were read")
            self._classes.update(*(classes for classes, _ in held))
            for point in sorted(set(group).intersection(*(points for _, points in held))):
                group[point].synchronize()

    def set_alarms(self, false_alarm_rate: float) -> None:
        """Call so many samples of known classes new."""
        for known in self._known.values():
            known.set_alarm(false_alarm_rate)

    def reread(
        self, name: str, features: Tensor, targets: Tensor, ids: Tensor, false_alarm_rate: float | None
    ) -> tuple[KnownRows, Tensor]:
        """Take samples kept out of training for what is known of a predictor; return which of them have a place."""
        known = KnownRows(features.shape[1], **{**self._options, "kind": "features"})
        known.reread = True
        known.learn(features, targets, ids)
        if false_alarm_rate is not None:
            known.set_alarm(false_alarm_rate)
        self._reread[name] = known
        assert known.memory is not None
        return known, torch.isin(ids, known.memory.ids)

    # ---- what is known

    def known(self, point: str) -> KnownRows | None:
        """Return what is known at a layer, if anything."""
        return self._known.get(point)

    def known_of(self, name: str, point: str) -> KnownRows | None:
        """Return what a predictor's samples are compared with."""
        return self._reread.get(name) or self._known.get(point)

    def why_stale(self, point: str, head: Head | None) -> str:
        """Return why the rows at a layer are not in the sums of a head, each exactly once; nothing if they are."""
        known = self._known.get(point)
        if head is None or known is None:
            return "nothing was learned"
        if point in self.mixed:
            return "heads read this layer in different passes"
        seen = known.statistics
        same = head.classes.numel() == seen.classes.numel() and torch.equal(head.classes.cpu(), seen.classes.cpu())
        if not same or not torch.equal(head.counts.cpu(), seen.counts.cpu()):
            return (
                f"it has learned {int(head.counts.sum())} rows where {int(seen.counts.sum())} came: others, or the "
                "same ones again"
            )
        return ""

    def view(self, name: str, point: str, leverage: Leverage) -> Snapshot | None:
        """Return what samples are compared with for a predictor that reads a layer."""
        return self._view(name, self.known_of(name, point), leverage)

    def kept_view(self, name: str, point: str, leverage: Leverage) -> Snapshot | None:
        """Return the same as it was when :meth:`keep` was called."""
        return self._view((name, "kept"), self._kept.get(point), leverage)

    def _view(self, key: Any, known: KnownRows | None, leverage: Leverage) -> Snapshot | None:
        if known is None or not known.statistics.samples:
            return None
        held = self._views.get(key)
        if held is None or held[0] is not known or held[1] != known.statistics.version:
            held = self._views[key] = known, known.statistics.version, known.snapshot()
        found = held[2]
        return found if leverage is None else replace(found, leverage=leverage)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything: tensors and plain types."""
        groups = {"known": self._known, "kept": self._kept, "reread": self._reread}
        saved: dict[str, Any] = {
            group: {name: each.state_dict() for name, each in known.items()} for group, known in groups.items()
        }
        return {**saved, "classes": sorted(self.classes)}

    def load_state_dict(self, state: Any, owner: str) -> None:
        """Take it up.

        Raises:
            StateError: If it does not fit.
        """
        saved = read_own(state, _TABLE, owner)
        options = self._options
        for group, known in (("known", self._known), ("kept", self._kept), ("reread", self._reread)):
            kind = {"kind": "features"} if group == "reread" else {}
            for name, own in saved[group].items():
                known[name] = KnownRows.load(own, f"{owner}: {group} at {name}", **{**options, **kind})
                known[name].reread = group == "reread"
        self._classes = set(saved["classes"])


_TABLE: Table = {
    "known": Named(Instance(dict)),
    "kept": Named(Instance(dict)),
    "reread": Named(Instance(dict)),
    "classes": Many(Whole(most=_MOST)),
}
