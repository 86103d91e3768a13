"""A learned head as plain PyTorch layers, for a network that shall use it and for export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from clkit.errors import ArgumentError, BatchError
from clkit.methods.heads.base import Head
from clkit.methods.heads.feature_map import FeatureMap

__all__ = [
    "NEVER",
    "L2Normalize",
    "LinearReadout",
    "is_linear",
    "layer_values",
    "linear_of",
    "readout_module",
    "readout_tensors",
]

NEVER = -1e30  # score of a class never seen; a sum of many such losses is still finite in float32
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
    full_bias = bias.new_full((outputs,), max(NEVER, torch.finfo(dtype).min / 4))
    full_weight[classes.to(weight.device)], full_bias[classes.to(bias.device)] = weight, bias
    return full_weight.to(dtype), full_bias.to(dtype)


def layer_values(head: Head, own: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What the tensors of a classifier become when a head is copied into it.

    Args:
        head: A learned head.
        own: The classifier's tensors by name: ``weight`` and ``bias``, or ``0.weight``, ``0.bias``, ``1.weight``, …
            of linear layers that read the features side by side, the mean of which is the output.

    Returns:
        Tensors of the same names and shapes, or ``None`` where the head is no linear layer of that form.

    Example:
        >>> from clkit.methods import NearestMeanHead
        >>> head = NearestMeanHead(2, metric="euclidean")
        >>> head.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        >>> layer_values(head, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})["weight"].tolist()
        [[2.0, -2.0], [-2.0, 2.0]]
    """
    weights = [name for name in own if name.rpartition(".")[2] == "weight"]
    if len(own) != 2 * len(weights) or not is_linear(head) or not head.classes.numel():
        return None
    outputs, dtype = len(own[weights[0]]), own[weights[0]].dtype
    if int(head.classes.max()) >= outputs or any(own[name].ndim != 2 for name in weights):
        return None
    weight, bias = readout_tensors(head, outputs, torch.float64)
    # a mean of n layers is the whole when each has n times its part of the weights, and all of the bias
    parts = torch.split(len(weights) * weight, [own[name].shape[1] for name in weights], dim=1)
    values = {name: part.to(dtype) for name, part in zip(weights, parts, strict=True)}
    return {name: values.get(name, bias.clamp(min=torch.finfo(dtype).min / 4).to(dtype)) for name in own}


def is_linear(head: Head) -> bool:
    """Whether a head is one linear layer of the features themselves, neither lifted nor of unit length."""
    return not head.normalizes and head.feature_map.is_identity


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
    layers: list[nn.Module] = [nn.Flatten(1)]
    if head.normalizes:
        layers.append(L2Normalize())
    elif not head.feature_map.is_identity:
        layers += _lift_layers(head.feature_map, dtype)
    return nn.Sequential(*layers, linear_of(weight, bias))


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer that holds these values, made without a draw from the global generator, which is the user's.

    Example:
        >>> linear_of(torch.eye(2), torch.ones(2))(torch.tensor([[1.0, 2.0]])).tolist()
        [[2.0, 3.0]]
    """
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, dtype=weight.dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _lift_layers(feature_map: FeatureMap, dtype: torch.dtype) -> list[nn.Module]:
    projection = feature_map.projection
    assert projection is not None
    return [linear_of(projection.to(dtype)), _ACTIVATIONS[feature_map.activation]()]


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
