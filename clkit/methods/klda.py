r"""Kernel LDA: linear discriminant analysis on random Fourier features, exact from running sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError
from clkit.methods._checks import Batch, check_count, check_number
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.seeded_map import FourierMap, lift_width
from clkit.methods.heads.unit_length import unit_rows
from clkit.methods.lda import LDAHead
from clkit.methods.statistics import FeatureStatistics
from clkit.schema import Kind, Numbers

__all__ = ["KLDA"]


class KLDA(LDAHead):
    r"""LDA on random Fourier features of an RBF kernel; exact for any order and batch size.

    Use it where :class:`LDAHead` is too straight: borders between classes may bend. With directions and phases that
    one seed gives,

    .. math::
        z(x) = \sqrt{2/L} \, \cos(P x + b), \quad P \sim N(0, 2g), \quad b \sim U[0, 2\pi), \qquad
        z(x)^\top z(x') \approx \exp(-g \lVert x - x' \rVert^2),

    it is the nearest class mean of z in the metric of the pooled within-class scatter :math:`S + \gamma I`. The map is
    made again from the seed and never stored. The scatter is that of all rows around their class means; the public code
    centres each batch at the mean so far and never comes back to it.

    The bandwidth g is a setting, because the map has to be known before the first row. Rows have unit length by
    default, so their squared distances lie between 0 and 4 for every backbone and one g fits many. Several numbers are
    maps side by side, each with sums of its own, of which each solve takes the one with the smallest
    :attr:`gcv_error`: a function of the sums, as γ is.

    Args:
        in_features: D, width of the features.
        expansion_dim: L, width of the map; the state has L² numbers for each bandwidth. ``None``: 2 D, at least 1000
            and at most 5000, which is what the paper takes for all.
        bandwidth: g, above 0, of squared distances of rows of unit length; or several.
        shrinkage: As for :class:`LDAHead`, of the scatter of z.
        unit: Whether rows are scaled to unit length first. Without it g has the scale of the features.
        seed: Of the map.
        num_classes: Fixed number of score columns; ``None`` for the largest id seen + 1.
        max_classes: Class ids must be below this.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> head = KLDA(2, expansion_dim=200, bandwidth=3.0)
        >>> angles = torch.arange(24) * 15 * torch.pi / 180
        >>> circle = torch.stack([angles.cos(), angles.sin()], dim=1)
        >>> head.update(circle, torch.arange(24) // 3 % 2)  # eight arcs of two classes in turn
        >>> head.predict(circle[:9])
        tensor([0, 0, 0, 1, 1, 1, 0, 0, 0])

    Source: S. Momeni, S. Mazumder, B. Liu, "Continual Learning Using a Kernel-Based Method Over Foundation Models",
    AAAI 2025, arXiv 2412.15571; the map: A. Rahimi, B. Recht, NeurIPS 2007.
    """

    _own_options = ("expansion_dim", "bandwidth", "shrinkage", "unit", "seed")
    _added_options: Mapping[str, Any] = {}

    def __init__(
        self,
        in_features: int,
        *,
        expansion_dim: int | None = None,
        bandwidth: float | Sequence[float] = 0.02,
        shrinkage: float | Literal["auto"] = "auto",
        unit: bool = True,
        seed: int = 0,
        num_classes: int | None = None,
        max_classes: int = 65536,
    ) -> None:
        check_arguments(KLDA, locals())
        super().__init__(in_features, shrinkage=shrinkage, unit=unit, num_classes=num_classes, max_classes=max_classes)
        several = isinstance(bandwidth, Sequence)
        given: Sequence[float] = bandwidth if isinstance(bandwidth, Sequence) else [bandwidth]
        bandwidths = [check_number("bandwidth", each, above=0) for each in given]
        if not bandwidths or len(set(bandwidths)) < len(bandwidths):
            raise ArgumentError(f"bandwidth must be a number above 0 or several different ones, got {bandwidth!r}")
        self.bandwidth = bandwidths if several else bandwidths[0]
        self.expansion_dim = check_count("expansion_dim", lift_width(in_features, expansion_dim))
        self.seed = check_count("seed", seed, at_least=0)
        self._names = [f"_{number}" if number > 1 else "" for number in range(1, len(bandwidths) + 1)]
        for name, each in zip(self._names, bandwidths, strict=True):
            setattr(self, "feature_map" + name, FourierMap(in_features, self.expansion_dim, bandwidth=each, seed=seed))
            setattr(self, "statistics" + name, self._adopt(None, self.expansion_dim, ("sums", "scatter")))
        self._choice = 0
        self._learns_layers = several  # which of the maps is in front depends on the sums
        if several:
            self._frozen_table: Mapping[str, Kind] = {"choice": Numbers((), least=0, most=len(bandwidths) - 1)}

    @property
    def chosen_bandwidth(self) -> float:
        """The bandwidth of the present solution; of several, that with the smallest :attr:`gcv_error`."""
        if not isinstance(self.bandwidth, list):
            return self.bandwidth
        return self.bandwidth[self._choice] if self._solved().size else math.nan

    @property
    def _sums(self) -> FeatureStatistics:
        return self._all_statistics()[self._choice]

    @property
    def _map(self) -> FeatureMap:
        chosen: FeatureMap = getattr(self, "feature_map" + self._names[self._choice])
        return chosen

    def _choose(self) -> None:
        self._choice = 0
        if self.shrinkage != "auto" and len(self._names) == 1:
            return
        found = [self._best_gamma(each) for each in self._all_statistics()]
        # where the sums say nothing about it, it is the first
        self._choice = min(range(len(found)), key=lambda number: (math.isnan(found[number][1]), found[number][1]))
        gamma, self._gcv_error = found[self._choice]
        self._gamma = gamma if self.shrinkage == "auto" else 0.0

    def _all_statistics(self) -> list[FeatureStatistics]:
        return [getattr(self, "statistics" + name) for name in self._names]

    def _rows(self, batch: Batch) -> list[tuple[Any, Tensor]]:
        rows = self._prepared(batch)
        maps = [getattr(self, "feature_map" + name) for name in self._names]
        return [(sums, each(rows)) for sums, each in zip(self._all_statistics(), maps, strict=True)]

    def _design(self, features: Tensor) -> Tensor:
        design: Tensor = self._map(unit_rows(features) if self.normalizes else features)
        return design

    def _design_layers(self, dtype: torch.dtype) -> list[nn.Module]:
        return self._map.layers(dtype)

    def _frozen_parts(self, leverage: bool) -> dict[str, Tensor]:
        parts = super()._frozen_parts(leverage)
        return {**parts, "choice": torch.tensor(self._choice)} if self._frozen_table else parts

    def _freeze(self, parts: dict[str, Tensor]) -> None:
        super()._freeze(parts)
        self._choice = int(parts.get("choice", 0))
