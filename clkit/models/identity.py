"""A backbone that passes features through, for streams of cached embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from clkit.errors import ArgumentError

__all__ = ["IdentityBackbone"]


class IdentityBackbone(nn.Module):
    """Hands its input on, flattened; with ``in_features`` and ``num_classes`` it ends in a linear classifier.

    It has the surface of a timm network that callers use: ``get_classifier``, ``reset_classifier``, ``num_classes``
    and ``num_features``.

    Args:
        num_classes: Outputs of the classifier; 0 for none.
        in_features: Width D of the features; needed for a classifier only.

    Raises:
        ArgumentError: If a classifier is asked for without ``in_features``.

    Shape:
        - input: (B, …) of any shape with D numbers a row, float
        - output: (B, D), or (B, num_classes)

    Example:
        >>> import torch
        >>> IdentityBackbone()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(self, num_classes: int = 0, in_features: int | None = None) -> None:
        super().__init__()
        self.num_features = in_features
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, or an identity."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new classifier."""
        if num_classes and self.num_features is None:
            raise ArgumentError(
                f"an identity backbone with num_classes={num_classes} needs the width of the features: "
                "model_kwargs={'in_features': D}"
            )
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features or 0, num_classes) if num_classes else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Features, or logits."""
        logits: Tensor = self.fc(inputs.flatten(1))
        return logits
