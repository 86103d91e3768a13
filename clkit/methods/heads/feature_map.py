r"""What happens to features before sums are taken: nothing, or a fixed random layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from clkit.arguments import check_arguments
from clkit.methods._checks import check_count
from clkit.methods._state import PlainState, exact
from clkit.methods.heads.readout import linear_of
from clkit.schema import Numbers, Table

__all__ = ["FeatureMap"]

Activation = Literal["relu", "tanh", "sigmoid", "gelu"]
ProjectionInit = Literal["uniform", "normal"]

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], type[nn.Module]]] = {
    "relu": (torch.relu, nn.ReLU),
    "tanh": (torch.tanh, nn.Tanh),
    "sigmoid": (torch.sigmoid, nn.Sigmoid),
    "gelu": (gelu, nn.GELU),
}
_WEIGHT_LIMIT = 1e6  # far above what is ever drawn


class FeatureMap(PlainState):
    r"""The identity, or a fixed random lift :math:`\varphi(f) = \mathrm{act}(P f)` that is never trained.

    A lift lets a linear classifier draw curved boundaries: 1,000 to 16,000 random units on 512 to 2,048 features.
    ``P`` (D, d) is drawn once from ``seed`` by a generator of its own, so the global random state is left alone, and
    is part of the saved state. Like all sums it is float64 and no buffer, so that casts leave it alone.

    Args:
        in_features: d, width of the features.
        expansion_dim: D, width of the lift; ``None`` for the identity.
        activation: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"gelu"``.
        init: ``"uniform"`` on [-1/√d, 1/√d], as ``torch.nn.Linear`` starts, or ``"normal"``, standard normal.
        seed: Of ``P``.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> FeatureMap(2)(torch.tensor([[1.0, -2.0]]))
        tensor([[ 1., -2.]], dtype=torch.float64)
        >>> lift = FeatureMap(2, 5, seed=1)
        >>> lift(torch.tensor([[1.0, -2.0]])).shape, bool((lift.projection.abs() <= 2**-0.5).all())
        (torch.Size([1, 5]), True)

    Source: H. Zhuang et al., arXiv 2405.17779; M. McDonnell et al. (RanPAC), arXiv 2307.02251, for ``"normal"``.
    """

    def __init__(
        self,
        in_features: int,
        expansion_dim: int | None = None,
        *,
        activation: Activation = "relu",
        init: ProjectionInit = "uniform",
        seed: int = 0,
    ) -> None:
        check_arguments(FeatureMap, locals())
        super().__init__()
        self.in_features = self.out_features = check_count("in_features", in_features)
        self.expansion_dim = expansion_dim
        self.is_identity = expansion_dim is None
        self.activation = activation
        self.init = init
        self.seed = check_count("projection_seed", seed, at_least=0)
        self.projection: Tensor | None = None
        if expansion_dim is not None:
            self.out_features = check_count("expansion_dim", expansion_dim)
            with exact():
                self.projection = self._drawn((expansion_dim, in_features))

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, d) features of any floating dtype to (B, D) float64."""
        features = features.to(torch.float64)
        return features if self.projection is None else _ACTIVATIONS[self.activation][0](features @ self.projection.T)

    def layers(self, dtype: torch.dtype) -> list[nn.Module]:
        """Return plain layers that do the same; none for the identity."""
        if self.projection is None:
            return []
        return [linear_of(self.projection.to(dtype)), _ACTIVATIONS[self.activation][1]()]

    def _drawn(self, shape: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.init == "normal":
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        return (2 * drawn - 1) / math.sqrt(self.in_features)

    def _move(self, device: torch.device) -> None:
        self.projection = None if self.projection is None else self.projection.to(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.projection is not None:
            destination[prefix + "projection"] = self.projection.clone()

    def _saved_table(self) -> Table:
        if self.projection is None:
            return {}
        return {"projection": Numbers(tuple(self.projection.shape), torch.float64, most=_WEIGHT_LIMIT)}

    def _take(self, saved: dict[str, Any]) -> None:
        self.projection = saved["projection"].to(self._device, copy=True)
