"""A head without its sums, as an exported file holds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from clkit.errors import BatchError

__all__ = ["LinearReadout"]


class LinearReadout(nn.Module):
    """One linear layer over the classes that a head had learned: it predicts and learns no more.

    What :func:`clkit.load_head` gives for an exported file. The user makes none.

    Args:
        classes: (k,) int64, sorted ids.
        weight: (k, D) float64.
        bias: (k,) float64.

    Shape:
        - input: (B, D) of any floating dtype
        - output: (B, largest id + 1), column c for class id c, ``-inf`` for classes never seen

    Example:
        >>> head = LinearReadout(torch.tensor([1]), torch.tensor([[2.0, 0.0]]), torch.tensor([0.5]))
        >>> head(torch.tensor([[3.0, 1.0]])), head.predict(torch.tensor([[3.0, 1.0]]))
        (tensor([[  -inf, 6.5000]]), tensor([1]))
    """

    classes: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, classes: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.in_features = int(weight.shape[1])
        self.register_buffer("classes", classes)
        self.register_buffer("weight", weight.double())
        self.register_buffer("bias", bias.double())

    def forward(self, features: Tensor) -> Tensor:
        """Scores; float64 for float64 features, else float32 (computed in float64)."""
        seen = self._scores_seen(features)
        scores = seen.new_full((len(seen), int(self.classes[-1]) + 1), -torch.inf).index_copy(1, self.classes, seen)
        return scores if features.dtype == torch.float64 else scores.float()

    def predict(self, features: Tensor) -> Tensor:
        """(B,) int64 ids of the classes with the highest scores; ties go to the lowest id."""
        return self.classes[self._scores_seen(features).argmax(dim=1)]

    def _scores_seen(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise BatchError(f"features must have shape (B, {self.in_features}), got {tuple(features.shape)}")
        return linear(features.double(), self.weight, self.bias)
