"""What is kept of the features at one layer: their sums, and a bounded sample of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from clkit.errors import StateError
from clkit.methods.feature_memory import FeatureMemory
from clkit.methods.novelty import Novelty
from clkit.methods.stationarising import Snapshot, gaussian_rows
from clkit.methods.statistics import FeatureStatistics
from clkit.schema import Real, Whole, saved_entry

__all__ = ["KnownRows"]

_WIDEST = 2**20  # features, where a damaged file names more than anybody has


class KnownRows:
    """The sums over all rows that were learned at a layer, and a sample of the rows themselves.

    Args:
        width: D, of the features.
        kind: ``"features"`` keeps rows, ``"gaussian"`` draws them from the sums when they are asked for, ``"none"``
            has none.
        size: Most rows that are kept.
        seed: Of the sample.
        shrinkage: λ of the covariance.
        novelty: Whether sums of the features at unit length are kept too, for the distance from everything learned.

    Attributes:
        reread: Whether these are samples that were kept out of training, read by the network as it is.
    """

    reread = False

    def __init__(
        self,
        width: int,
        *,
        kind: Literal["features", "gaussian", "none"],
        size: int,
        seed: int,
        shrinkage: float,
        novelty: bool,
    ) -> None:
        self.width, self.kind, self.seed, self.shrinkage = width, kind, seed, shrinkage
        self.statistics = FeatureStatistics(width, sums=True, scatter=True)
        self.novelty = Novelty(width) if novelty else None
        self.memory = FeatureMemory(size, seed=seed) if kind == "features" else None
        self.alarm = math.inf  # distance above which a sample is called new

    def learn(self, features: Tensor, targets: Tensor, ids: Tensor) -> None:
        """Learn checked rows: features (n, D) float64, targets and sample ids (n,) int64."""
        self.to(features.device)
        self.statistics.update(features, targets)
        if self.novelty is not None:
            self.novelty.update(features, targets)
        if self.memory is not None:
            self.memory.add(features, targets, ids)

    @property
    def rows_seen(self) -> int:
        """Rows that were learned."""
        return self.statistics.samples

    def to(self, device: torch.device) -> None:
        """Move the sums to a device; the rows stay on the host."""
        if self.statistics.device != device:
            self.statistics.to(device)
            if self.novelty is not None:
                self.novelty.to(device)

    def synchronize(self) -> None:
        """Put together what all processes have; a call on all of them."""
        self.statistics.synchronize()
        if self.novelty is not None:
            self.novelty.synchronize()
        if self.memory is not None:
            self.memory.synchronize()

    def rows(self, view: Snapshot) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return ids (n,), features (n, D) float64 and targets (n,) of the sample; ``None`` where there is none."""
        if self.memory is not None:
            memory = self.memory
            return memory.ids, memory.features.to(self.statistics.device, torch.float64), memory.labels
        if self.kind == "none":
            return None
        features, targets = gaussian_rows(view, seed=self.seed)
        return torch.arange(len(targets)), features, targets

    def snapshot(self, leverage: Callable[[Tensor], Tensor] | None = None) -> Snapshot:
        """Return what is known now, to compare samples with."""
        memory = None if self.memory is None else (self.memory.features, self.memory.labels)
        return Snapshot.of(self.statistics, shrinkage=self.shrinkage, memory=memory, leverage=leverage)

    def set_alarm(self, rate: float) -> None:
        """Call so many samples of known classes new; nothing is called new where no rows are kept to know how many."""
        if self.novelty is not None and self.memory is not None and len(self.memory):
            rows = self.memory.features.to(self.statistics.device)
            self.alarm = self.novelty.threshold(rows, self.memory.labels, rate)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything: tensors and plain types."""
        return {
            "width": self.width,
            "statistics": dict(self.statistics.state_dict()),
            "novelty": None if self.novelty is None else dict(self.novelty.state_dict()),
            "memory": None if self.memory is None else self.memory.state_dict(),
            "alarm": None if math.isinf(self.alarm) else self.alarm,
        }

    @classmethod
    def load(cls, state: Any, owner: str, **options: Any) -> KnownRows:
        """Return those of a saved state.

        Raises:
            StateError: If it does not fit, or was kept with other settings.
        """
        width = saved_entry(state, "width", Whole(1, _WIDEST), owner)
        known = cls(width, **options)
        for name, part in (("statistics", known.statistics), ("novelty", known.novelty), ("memory", known.memory)):
            saved = saved_entry(state, name, dict | None, owner)
            if (saved is None) != (part is None):
                raise StateError(f"{owner}: {name} was saved with other settings; give DEUP those of the saved run")
            if part is not None:
                part.load_state_dict(saved)
        alarm = saved_entry(state, "alarm", Real(least=0, optional=True), owner)
        known.alarm = math.inf if alarm is None else alarm
        return known
