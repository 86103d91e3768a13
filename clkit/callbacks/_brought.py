"""To which experience each evaluated row belongs; with plain loaders by the classes that each fit has trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.distributed import gather_objects
from clkit.errors import BatchError
from clkit.features.batch import Readings, sample_size
from clkit.features.repeats import repeated_rows
from clkit.report.results import Recorded
from clkit.schema import Many, Row, Table, Whole, read_state, saved_entry
from clkit.stream.boundaries import Boundaries
from clkit.stream.experience import Experience

__all__ = ["BroughtClasses", "experience_of_batch"]

_TABLE: Table = {
    "classes": Many(Row({"experience": Whole(), "classes": Many(Whole())})),
}
_MOST = 2**31
_ENOUGH = 64  # batches whose targets wait on their device, so that not every step has to look at them


def experience_of_batch(
    loaders: Sequence[Any], current: Experience | None, batch_idx: int, place: int
) -> tuple[int, Any]:
    """Return the index of the experience that a batch of an evaluation belongs to, and its rows if they are known.

    Those of a stream are; of plain loaders each is one experience, or the only one has the current experience.

    Args:
        loaders: All loaders of the evaluation.
        current: The experience that the run is in.
        batch_idx: Number of the batch in its loader.
        place: Number of the loader.
    """
    if hasattr(loaders[place], "expected_samples"):  # that of a stream
        experience, rows = loaders[place].batches[batch_idx]
        return int(experience), rows
    return (place if len(loaders) > 1 or current is None else current.index), None


class BroughtClasses:
    """Which classes the training of each experience brought, where no data module says which row belongs to which.

    A class belongs to the first experience that trained it, so a memory or exemplars in later training data change
    nothing. Where an experience brings no class of its own (domains, the same classes again), or none of its batches
    shows class ids, classes do not say whose a row is.
    """

    def __init__(self) -> None:
        self._classes: dict[int, set[int]] = {}  # by experience, all that it trained
        self._waiting: list[Tensor] = []
        self._index = 0
        self._owners: dict[int, int] | None = None  # class by experience, while an evaluation runs
        self._usual = 0  # the experience of the batch in work, where its classes do not say another
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
            return
        if current.index != self._index or len(self._waiting) >= _ENOUGH:
            self._settle()
            self._index = current.index
        self._waiting.append(targets.detach())

    def _settle(self) -> None:
        if self._waiting:
            labels = torch.unique(torch.cat(self._waiting)).tolist()
            known = [label for label in labels if 0 <= label < _MOST]  # no classifier has a column for others
            self._classes.setdefault(self._index, set()).update(known)
            self._waiting = []

    def classes(self) -> list[list[int]]:
        """Return the classes that each experience trained, sorted, as far as all processes have told each other."""
        count = max(self._classes, default=-1) + 1
        return [sorted(self._classes.get(index, ())) for index in range(count)]

    def share(self) -> None:
        """Put together what all processes have seen; a call on all of them."""
        self._settle()
        for classes in gather_objects(self._classes, "the classes that they trained"):
            for index, labels in classes.items():
                self._classes.setdefault(index, set()).update(labels)

    # ---- evaluation

    def begin(self, trainer: pl.Trainer) -> None:
        """Prepare an evaluation; a call on all processes."""
        self.notes, self._owners = {}, None
        current = Boundaries.of(trainer).current
        if current is None:
            return
        self.share()
        owners: dict[int, int] = {}
        if len(self._classes) <= current.index:
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
        """Return whose the rows of a batch are, as far as the batch itself tells.

        They are (B,) int64 with -1 for no experience's yet and -2 for what another process has, too, or one index for
        all. ``loaders`` are all of the evaluation, and ``place`` is the number of the batch's.
        """
        self._usual, _ = experience_of_batch(loaders, Boundaries.of(trainer).current, batch_idx, place)
        whose = self._by_class(trainer, owner, batch, several=len(loaders) > 1)
        if trainer.world_size > 1:
            inputs, targets = Readings.of(trainer).read(owner, batch, needs_targets=False)
            size = sample_size(inputs)[0] if targets is None else len(targets)
            if repeated := repeated_rows(trainer, loaders[place], batch_idx, size):
                whose = torch.full((size,), whose) if isinstance(whose, int) else whose
                whose[size - repeated :] = -2
        return whose

    def _by_class(self, trainer: pl.Trainer, owner: Any, batch: Any, several: bool) -> Tensor | int:
        current = Boundaries.of(trainer).current
        targets = Readings.of(trainer).read(owner, batch, needs_targets=False)[1]
        if current is None or targets is None or targets.ndim != 1 or targets.is_floating_point():
            return self._usual
        if self._owners is None:
            if not several and current.index > 0:
                self.notes["unknown"] = (
                    "the classes that each fit trained do not say to which experience a row belongs (they come again, "
                    f"or were not read), so all rows of the one loader count as those of experience {self._usual + 1}; "
                    "where it has others too, give a list with one loader for each experience"
                )
            return self._usual
        classes, index = torch.unique(targets.cpu(), return_inverse=True)
        found = [self._usual if label < 0 else self._owners.get(label, -1) for label in classes.tolist()]
        return torch.tensor(found, dtype=torch.int64)[index]

    def settled(self, trainer: pl.Trainer, recorded: Recorded, several: bool) -> Recorded:
        """Return what was recorded of an evaluation with the experience of each row, once all of its rows are known.

        Of several loaders each is one experience: that of its classes where each loader has those of another one, and
        else that of its place in the list, as with domains, where all loaders have the same classes.
        """
        experiences, places, current = recorded.experiences, recorded.places, Boundaries.of(trainer).current
        if several and current is not None and self._owners is not None:
            found = {
                place: set(torch.unique(experiences[(places == place) & (experiences >= 0)]).tolist())
                for place in torch.unique(places).tolist()
            }
            known = [index for each in found.values() for index in each]
            if len(known) > len(set(known)) or any(len(each) > 1 for each in found.values()):
                experiences = torch.where(experiences == -2, experiences, places)
            elif all(each <= {place} for place, each in found.items()):  # in their order: later ones are still to come
                experiences = torch.where((experiences == -1) & (places > current.index), places, experiences)
        if bool((experiences == -1).any()):
            self.notes["future"] = (
                "rows of classes that no training has brought yet, "
                "or none that was seen, belong to no experience and are not counted"
            )
        return replace(recorded, experiences=experiences)

    def one_of(self, experiences: Tensor | int, switching: Collection[Any]) -> int:
        """Return the experience of a batch, the usual one for rows of several; who switches by it is named then."""
        if isinstance(experiences, int):
            return experiences
        found = [index for index in torch.unique(experiences).tolist() if index > -2]
        if len(found) == 1 and found[0] >= 0:
            return int(found[0])
        if switching and len(found) > 1:
            names = " and ".join(type(callback).__name__ for callback in switching)
            self.notes["switched"] = (
                f"batches hold rows of several experiences, and {names} evaluated all of them as experience "
                f"{self._usual + 1}; give a list with one loader for each experience"
            )
        return self._usual

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen: plain types; with several processes a call on all of them."""
        if self._waiting or self._classes:  # of a stream nothing is seen, and nothing is exchanged
            self.share()
        return {"classes": [[index, sorted(labels)] for index, labels in self._classes.items()]}

    def load_state_dict(self, state: Any, owner: str) -> None:
        """Take it back.

        Raises:
            StateError: If it is damaged; nothing is changed then.
        """
        saved = read_state({name: saved_entry(state, name, object, owner) for name in _TABLE}, _TABLE, owner)
        self._classes = {index: set(labels) for index, labels in saved["classes"]}
        self._waiting = []
