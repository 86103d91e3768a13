r"""Fixed random layers that are made again from their seed wherever they are needed, and never stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clkit.methods._checks import generator
from clkit.methods._state import exact
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.readout import linear_of
from clkit.schema import Numbers, Table

__all__ = ["FourierMap", "SeededMap", "lift_width"]

_MAPS = 1  # tells the draws of maps from those of pseudo-features with the same seed
_TOLERANCE = 1e-9  # of a checksum: libraries of mathematics may round the draws differently, but not by more
_NARROWEST, _WIDEST = 1000, 5000


def lift_width(in_features: int, expansion_dim: int | None) -> int:
    """Return the width of a lift; where none is given, twice that of the features within 1000 and 5000.

    Example:
        >>> lift_width(768, None), lift_width(64, None), lift_width(64, 200)
        (1536, 1000, 200)
    """
    return min(max(2 * in_features, _NARROWEST), _WIDEST) if expansion_dim is None else expansion_dim


class SeededMap(FeatureMap):
    r"""A random lift :math:`\varphi(x) = \mathrm{gelu}(P x)`, the same on every machine for the same seed.

    Standard normal ``P`` (D, d) is drawn on the CPU by a generator of its own. A saved state holds a checksum in place
    of it, and loads where the same map comes out.

    Args:
        in_features: d, width of the features.
        expansion_dim: D.
        seed: Of the draws.
        part: Tells several maps of one seed apart; at least 1.

    Example:
        >>> lift = SeededMap(2, 5, seed=3)
        >>> lift(torch.tensor([[1.0, -2.0]])).shape, list(lift.state_dict()), lift.checksum.shape
        (torch.Size([1, 5]), ['checksum'], torch.Size([2]))
    """

    def __init__(self, in_features: int, expansion_dim: int, *, seed: int = 0, part: int = 1) -> None:
        self._part = part
        super().__init__(in_features, expansion_dim, activation="gelu", init="normal", seed=seed)

    @property
    def checksum(self) -> Tensor:
        """(d,) float64, what is saved in place of the map: sums over its units, each with a weight of its own."""
        assert self.projection is not None
        with exact():
            return self._unit_weights() @ self.projection.cpu()

    def _unit_weights(self) -> Tensor:
        return torch.cos(torch.arange(1, self.out_features + 1, dtype=torch.float64))

    def _generator(self) -> torch.Generator:
        return generator(self.seed, _MAPS, self._part)

    def _drawn(self, shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=self._generator(), dtype=torch.float64, device="cpu")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "checksum"] = self.checksum

    def _saved_table(self) -> Table:
        words = f"the checksum of the map that seed={self.seed} gives here"
        return {"checksum": Numbers((self.in_features,), torch.float64, rule=(words, self._is_own))}

    def _is_own(self, checksum: Tensor) -> bool:
        own = self.checksum
        return bool(((checksum.cpu() - own).abs() <= _TOLERANCE * own.abs().max()).all())

    def _take(self, saved: dict[str, Any]) -> None:
        """Leave the map as it is: its checksum is that of the saved one."""


class FourierMap(SeededMap):
    r"""Random Fourier features: products of two mapped rows approach :math:`\exp(-g \lVert x - x' \rVert^2)`.

    .. math:: \varphi(x) = \sqrt{2/D} \, \cos(P x + b), \qquad P \sim N(0, 2g), \quad b \sim U[0, 2\pi)

    Maps of one seed and several ``bandwidth`` g are one draw, scaled.

    Args:
        in_features: d, width of the features.
        expansion_dim: D.
        bandwidth: g, above 0.
        seed: Of the draws.

    Example:
        >>> a, b = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])  # exp(-0.8) = 0.449
        >>> fourier = FourierMap(2, 50000, bandwidth=1.0)
        >>> abs(float(fourier(a) @ fourier(b).T) - 0.449) < 0.02
        True

    Source: A. Rahimi, B. Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007.
    """

    def __init__(self, in_features: int, expansion_dim: int, *, bandwidth: float, seed: int = 0) -> None:
        self.bandwidth = bandwidth
        super().__init__(in_features, expansion_dim, seed=seed)
        self.height = math.sqrt(2 / expansion_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, d) features of any floating dtype to (B, D) float64."""
        assert self.projection is not None
        return torch.addmm(self.phase, features.to(torch.float64), self.projection.T).cos() * self.height

    def layers(self, dtype: torch.dtype) -> list[nn.Module]:
        """Return plain layers that do the same."""
        assert self.projection is not None
        return [linear_of(self.projection.to(dtype), self.phase.to(dtype)), _Cosine(self.height)]

    @property
    def checksum(self) -> Tensor:
        """(d,) float64, of directions and phases."""
        with exact():
            return super().checksum + self._unit_weights() @ self.phase.cpu()

    def _drawn(self, shape: tuple[int, int]) -> Tensor:
        draws = self._generator()
        directions = torch.randn(shape, generator=draws, dtype=torch.float64, device="cpu")
        self.phase = 2 * math.pi * torch.rand(shape[0], generator=draws, dtype=torch.float64, device="cpu")
        return directions.mul_(math.sqrt(2 * self.bandwidth))

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self.phase = self.phase.to(device)


class _Cosine(nn.Module):
    def __init__(self, height: float) -> None:
        super().__init__()
        self.height = height

    def forward(self, phases: Tensor) -> Tensor:
        return phases.cos() * self.height
