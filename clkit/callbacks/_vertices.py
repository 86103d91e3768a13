"""Which vertices the classes of a run get: those of a stream before their experience, of plain loaders as they come."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.distributed import gather_objects
from clkit.errors import BatchError, CapacityError
from clkit.features.batch import Readings
from clkit.methods.simplex import ClassAllocator
from clkit.stream._lightning import datamodule_of
from clkit.stream.experience import Experience

__all__ = ["Vertices"]


class Vertices:
    """Gives all ids up to the highest one that came their vertices, so that these do not depend on the order.

    Args:
        allocator: Which class has which vertex.
        side: From which end classes get theirs.
        owner: Whose it is, for messages.
    """

    def __init__(self, allocator: ClassAllocator, side: Literal["low", "high"], owner: str) -> None:
        self.allocator, self._side, self._owner = allocator, side, owner
        self._waiting: Tensor | None = None  # highest label of plain loaders that is not allocated yet, on its device

    def announced(self, trainer: pl.Trainer, experience: Experience) -> None:
        """Allocate the classes that an experience brings; those of plain loaders are not known beforehand.

        Raises:
            CapacityError: If there are too few vertices; nothing is changed then.
        """
        ids = experience.classes
        original = getattr(datamodule_of(trainer), "original_ids", None)
        if ids and original is not None:
            place = {each: column for column, each in enumerate(original)}
            ids = tuple(place[each] for each in ids)
        if ids:
            self._up_to(max(ids), repr(experience.name))

    def seen(self, trainer: pl.Trainer, part: Any, batch: Any, experience: Experience | None) -> None:
        """Note the labels of a training batch of plain loaders, before its step.

        Raises:
            CapacityError: If one has no vertex; at once on a CPU, elsewhere with the next checkpoint or boundary.
        """
        if experience is None or experience.classes:
            return
        try:
            labels = Readings.of(trainer).read(part, batch, needs_targets=False)[1]
        except BatchError:  # a form that the user's step alone understands: its classes stay unknown
            return
        if labels is None or not len(labels):
            return
        highest = labels.detach().max()
        self._waiting = highest if self._waiting is None else torch.maximum(self._waiting, highest)
        if highest.device.type == "cpu":
            self._settle(int(self._waiting))

    def settle(self, experience: Experience | None) -> None:
        """Allocate what all processes have seen; a call on all of them."""
        if experience is None or experience.classes:
            return
        own = -1 if self._waiting is None else int(self._waiting)
        self._settle(max(gather_objects(own, "the classes that they trained")))

    def _settle(self, highest: int) -> None:
        self._waiting = None
        if highest >= 0 and highest not in self.allocator.classes:
            self._up_to(highest, "a training batch")

    def _up_to(self, highest: int, who: str) -> None:
        vertices = self.allocator.num_vertices
        if highest >= vertices:
            raise CapacityError(
                f"{who} has a class with id {highest}, and {self._owner} has num_vertices={vertices}, which cannot "
                "grow without losing its galleries; build it with more from the start, or set relabel=True in the data "
                "where ids are far apart"
            )
        self.allocator.allocate(range(highest + 1), self._side)
