"""A learned head as plain PyTorch layers, for a network that shall use it and for export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clkit.errors import ArgumentError
from clkit.methods.feature_map import FeatureMap
from clkit.methods.head import Head

__all__ = ["L2Normalize", "readout_module", "readout_tensors"]

_NEVER = -1e30  # score of a class never seen; a sum of many such losses is still finite in float32
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class L2Normalize(nn.Module):
    r"""Divides each row by its length, :math:`x / \max(\lVert x \rVert_2, 10^{-12})`.

    Shape: (B, D) → (B, D), any floating dtype.

    Example:
        >>> L2Normalize()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def forward(self, features: Tensor) -> Tensor:
        """Unit rows."""
        return normalize(features, dim=-1, eps=1e-12)


def readout_tensors(head: Head, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (outputs, D) and bias (outputs,) of a linear layer with one row for each class id.

    Classes never seen get weight 0 and a large negative *finite* bias: they never win, and a cross-entropy stays
    finite.

    Args:
        head: A head that has learned something.
        outputs: Rows of the layer; at least the largest id + 1.
        dtype: Of the layer.

    Raises:
        ArgumentError: If there are too few rows.
        NotFittedError: If nothing was learned.

    Example:
        >>> from clkit.methods import NearestMeanHead
        >>> head = NearestMeanHead(2, metric="euclidean")
        >>> head.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 2]))
        >>> weight, bias = readout_tensors(head, 3, torch.float32)
        >>> weight[1:].tolist(), bool(bias[0] < -1e29)  # 2 (mean of the class - mean of the means)
        ([[2.0, -2.0], [-2.0, 2.0]], True)
    """
    classes = head.classes
    if not classes.numel():
        head.predict(torch.zeros(1, head.in_features))  # raises NotFittedError
    if int(classes[-1]) >= outputs:
        raise ArgumentError(f"outputs={outputs} is too small for class id {int(classes[-1])}")
    weight, bias = head.linear_readout()
    full_weight = weight.new_zeros((outputs, weight.shape[1]))
    full_bias = bias.new_full((outputs,), max(_NEVER, torch.finfo(dtype).min / 4))
    full_weight[classes.to(weight.device)], full_bias[classes.to(bias.device)] = weight, bias
    return full_weight.to(dtype), full_bias.to(dtype)


def readout_module(head: Head, outputs: int, dtype: torch.dtype) -> nn.Sequential:
    """The head as a ``Sequential`` of plain layers that ends in an ``nn.Linear``: argmax as the head's ``predict``.

    Args:
        head: A head that has learned something.
        outputs: Columns; at least the largest id + 1.
        dtype: Of the layers.

    Returns:
        ``Sequential(Flatten, [L2Normalize | lift], Linear)``: (B, D) or (B, D, 1, 1) → (B, outputs).

    Raises:
        ArgumentError: If there are too few columns.
        NotFittedError: If nothing was learned.

    Example:
        >>> from clkit.methods import NearestMeanHead
        >>> head = NearestMeanHead(2)
        >>> head.update(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1]))
        >>> readout_module(head, 2, torch.float32)(torch.tensor([[0.1, 3.0]])).argmax(dim=1)
        tensor([1])
    """
    weight, bias = readout_tensors(head, outputs, dtype)
    linear = nn.Linear(weight.shape[1], outputs, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    layers: list[nn.Module] = [nn.Flatten(1)]
    if head.normalizes:
        layers.append(L2Normalize())
    elif not head.feature_map.is_identity:
        layers += _lift_layers(head.feature_map, dtype)
    return nn.Sequential(*layers, linear)


def _lift_layers(feature_map: FeatureMap, dtype: torch.dtype) -> list[nn.Module]:
    projection = feature_map.projection
    assert projection is not None
    linear = nn.Linear(feature_map.in_features, feature_map.out_features, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(projection)
    return [linear, _ACTIVATIONS[feature_map.activation]()]
