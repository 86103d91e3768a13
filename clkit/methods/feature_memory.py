"""A bounded, class-balanced memory of features that is the same in whatever order they came."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.methods._checks import check_device
from clkit.methods._keyed_table import KeyedTable, integers, matrix
from clkit.methods._state import exact
from clkit.schema import Kind, Numbers

__all__ = ["FeatureMemory"]


class FeatureMemory(KeyedTable):
    """A bounded memory of features, with equally many rows of each class, that depends on the set of samples only.

    Of each class it keeps the ``capacity // classes`` rows with the smallest :func:`sample_keys`: whatever the order in
    which samples come, in batches of any size, to one process or several, with or without an interruption. With more
    classes than rows, each of some classes has one.

    Args:
        capacity: Most rows; D · 4 bytes each, and 24.
        seed: Of the keys, at least 0.
        device: Where the features lie.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> memory = FeatureMemory(4)
        >>> memory.add(torch.arange(10.0)[:, None], torch.tensor([0] * 8 + [5] * 2), ids=torch.arange(10))
        >>> memory.ids.tolist(), memory.labels.tolist(), memory.counts
        ([1, 4, 9, 8], [0, 0, 5, 5], {0: 2, 5: 2})
    """

    _columns: Mapping[str, torch.dtype] = {"features": torch.float32}

    def __init__(self, capacity: int = 1024, seed: int = 0, device: torch.device | str = "cpu") -> None:
        check_arguments(FeatureMemory, locals())
        super().__init__(capacity, seed, device)

    @property
    def ids(self) -> Tensor:
        """(n,) int64 ids of the samples, in the order of their keys, as the two below."""
        return torch.from_numpy(self._rows.read()[0])

    @property
    def labels(self) -> Tensor:
        """(n,) int64, on the device of the features."""
        return torch.from_numpy(self._rows.read()[1]).to(self.device)

    @property
    def features(self) -> Tensor:
        """(n, D) float32."""
        return self._rows.read()[3]["features"]

    @property
    def counts(self) -> dict[int, int]:
        """Rows of each class that has some, by class id in order."""
        classes, counts = np.unique(self._rows.read()[1], return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist(), strict=True))

    @property
    def device(self) -> torch.device:
        """Where the features lie."""
        return self._rows.device

    def to(self, device: torch.device | str) -> FeatureMemory:
        """Move the features, and return the memory."""
        with exact():
            self._rows.to(check_device(device))
        return self

    def add(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Offer a batch. Rows with label -1, or with features that are not finite in float32, are counted as rejected.

        Args:
            features: (B, D) of any floating dtype and device; copied.
            labels: (B,) class ids.
            ids: (B,) ids of the samples, at least 0; a sample that comes again replaces its row.

        Raises:
            BatchError: If shapes or dtypes do not fit; nothing is changed then.
        """
        with exact():
            rows = matrix("features", features).to(torch.float32)
            of, names = integers("labels", labels, len(rows), least=-1), integers("ids", ids, len(rows))
            finite = (rows - rows).sum(dim=1) == 0  # NaN otherwise; isfinite takes ten times as long
            good = (of >= 0) & finite.cpu().numpy()
            at = np.flatnonzero(good)
            kept = rows if good.all() else rows[torch.from_numpy(at).to(rows.device)]
            self._rows.add(names[at], of[at], {"features": kept})
            self._refused_here += int(good.size - at.size)

    def _column_kinds(self) -> dict[str, Kind]:
        return {"features": Numbers(("N", "D"), torch.float32)}
