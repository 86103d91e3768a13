"""The embedding that contrastive losses compare, beside the classifier."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.errors import ArgumentError
from clkit.methods._checks import check_choice, check_count

__all__ = ["Projector"]


class Projector(nn.Module):
    r"""Maps features to rows of length 1: :math:`z = g(f) / \lVert g(f) \rVert`.

    Args:
        in_features: D.
        out_features: p, at most D.
        kind: ``"linear"``: g is one linear layer; ``"mlp"``: two, with D hidden units and a ReLU between.
        seed: Of the first weights; the global random states are left alone.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> lengths = Projector(8, 4)(torch.randn(3, 8)).norm(dim=1)
        >>> torch.allclose(lengths, torch.ones(3))
        True
    """

    def __init__(
        self, in_features: int, out_features: int, kind: Literal["linear", "mlp"] = "linear", *, seed: int = 0
    ) -> None:
        super().__init__()
        check_choice("kind", kind, ("linear", "mlp"))
        if check_count("out_features", out_features) > check_count("in_features", in_features):
            raise ArgumentError(
                f"out_features={out_features} is above in_features={in_features}; an embedding is at most as wide"
            )
        generator = torch.Generator().manual_seed(check_count("seed", seed, at_least=0))
        last = _linear(in_features, out_features, generator)
        hidden = [_linear(in_features, in_features, generator), nn.ReLU()] if kind == "mlp" else []
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, features: Tensor) -> Tensor:
        """Return unit rows (B, p), float32 (float64 for float64 features), for features (B, D)."""
        embeddings: Tensor = self.layers(features)
        wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        return F.normalize(wide, dim=1)


def _linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer with torch's own first weights, drawn from the generator and not from the global random states."""
    layer = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(in_features)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer
