"""To which experience each evaluated row belongs; with plain loaders by the classes that each fit has trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.distributed import gather_objects
from clkit.errors import BatchError
from clkit.features.batch import Readings, sample_size
from clkit.features.repeats import repeated_rows
from clkit.schema import Instance, Many, Row, Table, Whole, read_state, saved_entry
from clkit.stream.boundaries import Boundaries

__all__ = ["BroughtClasses"]

_TABLE: Table = {
    "classes": Many(Row({"experience": Whole(), "classes": Many(Whole())})),
    "unread": Instance(bool),
}
_ENOUGH = 64  # batches whose targets wait on their device, so that not every step has to look at them


class BroughtClasses:
    """Which classes the training of each experience brought, where no data module says which row belongs to which.

    A class belongs to the first experience that trained it, so a memory or exemplars in later training data change
    nothing. Where an experience brings no class of its own (domains, the same classes again), or its batches show no
    class ids, classes do not say whose a row is.
    """

    def __init__(self) -> None:
        self._classes: dict[int, set[int]] = {}  # by experience, all that it trained
        self._unread = False  # whether a batch showed no class ids
        self._waiting: list[Tensor] = []
        self._index = 0
        self._owners: dict[int, int] | None = None  # class by experience, while an evaluation runs
        self._in_order = True  # whether the loaders seen so far stand in the order of the experiences
        self.notes: dict[str, str] = {}
        """What a reader of the last evaluation must know, by kind."""

    # ---- training

    def see(self, trainer: pl.Trainer, owner: Any, batch: Any) -> None:
        """Note the classes of a training batch, read as ``owner`` reads it."""
        current = Boundaries.of(trainer).current
        if current is None:
            return
        try:
            targets = Readings.of(trainer).read(owner, batch, needs_targets=False)[1]
        except BatchError:
            targets = None
        if targets is None or targets.ndim != 1 or targets.is_floating_point():
            self._unread = True
            return
        if current.index != self._index or len(self._waiting) >= _ENOUGH:
            self._settle()
            self._index = current.index
        self._waiting.append(targets.detach())

    def _settle(self) -> None:
        if self._waiting:
            labels = torch.unique(torch.cat(self._waiting)).tolist()
            self._classes.setdefault(self._index, set()).update(label for label in labels if label >= 0)
            self._waiting = []

    def share(self) -> None:
        """Put together what all processes have seen; a call on all of them."""
        self._settle()
        for classes, unread in gather_objects((self._classes, self._unread), "the classes that they trained"):
            self._unread |= unread
            for index, labels in classes.items():
                self._classes.setdefault(index, set()).update(labels)

    # ---- evaluation

    def begin(self, trainer: pl.Trainer) -> None:
        """Prepare an evaluation; a call on all processes."""
        self.notes, self._owners, self._in_order = {}, None, True
        current = Boundaries.of(trainer).current
        if current is None:
            return
        self.share()
        owners: dict[int, int] = {}
        if self._unread or len(self._classes) <= current.index:
            return
        for index, classes in sorted(self._classes.items()):
            new = classes - owners.keys()
            if not new:
                return
            owners |= dict.fromkeys(new, index)
        self._owners = owners

    def of_batch(
        self, trainer: pl.Trainer, owner: Any, batch: Any, loaders: Sequence[Any], batch_idx: int, place: int
    ) -> Tensor | int:
        """Return whose the rows of a batch are.

        They are (B,) int64 with -1 for no experience's yet and for what another process has, too, or one index for
        all. ``loaders`` are all of the evaluation, and ``place`` is the number of the batch's.
        """
        whose = self._by_class(trainer, owner, batch, place, several=len(loaders) > 1)
        if trainer.world_size > 1:
            inputs, targets = Readings.of(trainer).read(owner, batch, needs_targets=False)
            size = sample_size(inputs)[0] if targets is None else len(targets)
            if repeated := repeated_rows(trainer, loaders[place], batch_idx, size):
                whose = torch.full((size,), whose) if isinstance(whose, int) else whose
                whose[size - repeated :] = -1
        return whose

    def _by_class(self, trainer: pl.Trainer, owner: Any, batch: Any, place: int, several: bool) -> Tensor | int:
        current = Boundaries.of(trainer).current
        if current is None:
            return place
        usual = place if several else current.index
        targets = Readings.of(trainer).read(owner, batch, needs_targets=False)[1]
        if targets is None or targets.ndim != 1 or targets.is_floating_point():
            return usual
        if self._owners is None:
            if not several and current.index > 0:
                self.notes["unknown"] = (
                    "the classes that each fit trained do not say to which experience a row belongs (they come again, "
                    f"or were not read), so all rows of the one loader count as those of experience {usual + 1}; where "
                    "it has others too, give a list with one loader for each experience"
                )
            return usual
        classes, index = torch.unique(targets.cpu(), return_inverse=True)
        found = [usual if label < 0 else self._owners.get(label, -1) for label in classes.tolist()]
        labelled = [experience for experience, label in zip(found, classes.tolist(), strict=True) if label >= 0]
        if several and any(experience not in (-1, place) for experience in labelled):
            self._in_order = False
        if several and place > current.index and self._in_order:  # one that is still to come
            found = [place if experience < 0 else experience for experience in found]
        elif -1 in labelled:
            self.notes["future"] = (
                "rows of classes that no training has brought yet, "
                "or none that was seen, belong to no experience and are not counted"
            )
        return torch.tensor(found, dtype=torch.int64)[index]

    def one_of(self, trainer: pl.Trainer, experiences: Tensor | int, switching: Collection[Any]) -> int:
        """Return the experience of a batch, that of the run for one of several; who switches by it is named then."""
        if isinstance(experiences, int):
            return experiences
        found = torch.unique(experiences).tolist()
        current = Boundaries.of(trainer).current
        if (len(found) == 1 and found[0] >= 0) or current is None:
            return int(found[0])
        if switching:
            names = " and ".join(type(callback).__name__ for callback in switching)
            self.notes["switched"] = (
                f"batches hold rows of several experiences, and {names} evaluated all of them as experience "
                f"{current.index + 1}; give a list with one loader for each experience"
            )
        return current.index

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen: plain types; with several processes a call on all of them."""
        if self._waiting or self._classes or self._unread:  # of a stream nothing is seen, and nothing is exchanged
            self.share()
        return {"classes": [[index, sorted(labels)] for index, labels in self._classes.items()], "unread": self._unread}

    def load_state_dict(self, state: Any, owner: str) -> None:
        """Take it back.

        Raises:
            StateError: If it is damaged; nothing is changed then.
        """
        saved = read_state({name: saved_entry(state, name, object, owner) for name in _TABLE}, _TABLE, owner)
        self._classes, self._unread = {index: set(labels) for index, labels in saved["classes"]}, saved["unread"]
        self._waiting = []
