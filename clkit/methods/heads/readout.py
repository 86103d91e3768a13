"""What a head has learned, as a linear read-out and as plain PyTorch layers for a network that shall use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from clkit.errors import ArgumentError, BatchError
from clkit.methods.heads.unit_length import unit_rows

if TYPE_CHECKING:
    from clkit.methods.heads.base import Head

__all__ = [
    "L2Normalize",
    "LinearReadout",
    "Readout",
    "difference_of",
    "first_equal",
    "is_linear",
    "layer_values",
    "linear_of",
    "readout_module",
    "readout_tensors",
    "same_for_same",
]

_UNSEEN_BIAS = -1e30  # score of a class never seen; a sum of many such losses is still finite in float32


@dataclass(frozen=True)
class Readout:
    """A solved classifier over the seen classes: ``scores = (design - offset) @ weight.T + bias``.

    Attributes:
        classes: (k,) int64 sorted ids.
        weight: (k, D) float64.
        bias: (k,) float64.
        offset: (D,) float64, taken off the design first so that a common offset of all features costs no digits;
            ``None`` for none.
        size: Largest id + 1, 0 if nothing was learned.
        duplicates: (k,) first position with the same weight and bias, or ``None`` if all differ.
    """

    classes: Tensor
    weight: Tensor
    bias: Tensor
    offset: Tensor | None
    size: int
    duplicates: Tensor | None

    @classmethod
    def of(cls, classes: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None = None) -> Readout:
        """Collect the parts and look for classes that are equal to the last bit."""
        size = int(classes[-1]) + 1 if classes.numel() else 0
        return cls(classes, weight, bias, offset, size, first_equal(torch.cat([weight, bias[:, None]], dim=1)))

    def centred(self, design: Tensor) -> Tensor:
        """Return the design without the offset."""
        return design if self.offset is None else design - self.offset

    def scores(self, centred: Tensor) -> Tensor:
        """Return (B, k) float64. Equal classes get equal scores, in whatever order a product adds: ties are ties."""
        scores = torch.addmm(self.bias, centred, self.weight.T)
        return scores if self.duplicates is None else scores[:, self.duplicates]


def first_equal(table: Tensor) -> Tensor | None:
    """Return for each row the first row that equals it to the last bit, or ``None`` if no two rows are equal.

    A product or a solve may add in another order for another column, so equal columns in do not mean equal columns
    out; indexing the result by this does.
    """
    values = table.cpu().numpy() + 0.0  # -0.0 equals 0.0
    first: dict[bytes, int] = {}
    duplicates = [first.setdefault(row.tobytes(), position) for position, row in enumerate(values)]
    return None if len(first) == len(duplicates) else torch.tensor(duplicates, device=table.device)


def same_for_same(solved: Tensor, sums: Tensor) -> Tensor:
    """Return W (D, k) with equal weights for classes with equal sums (k, D)."""
    return solved if (duplicates := first_equal(sums)) is None else solved[:, duplicates]


class L2Normalize(nn.Module):
    r"""Divides each row of (B, D) by its length, :math:`x / \max(\lVert x \rVert_2, 10^{-12})`.

    Example:
        >>> L2Normalize()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return the rows scaled to length 1."""
        return unit_rows(features)


def readout_tensors(head: Head | LinearReadout, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight (outputs, D) and bias (outputs,) of a linear layer with one row for each class id.

    Classes never seen get weight 0 and a large negative *finite* bias: they never win, and a cross-entropy stays
    finite.

    Raises:
        ArgumentError: If ``outputs`` is not above the largest id.
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
    full_bias = bias.new_full((outputs,), max(_UNSEEN_BIAS, torch.finfo(dtype).min / 4))
    full_weight[classes.to(weight.device)], full_bias[classes.to(bias.device)] = weight, bias
    return full_weight.to(dtype), full_bias.to(dtype)


def difference_of(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (1, D) and bias (1,) of one output, whose sigmoid is the second softmax of two outputs.

    Example:
        >>> difference_of(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0.5, 0.0]))
        (tensor([[-1.,  3.]]), tensor([-0.5000]))
    """
    return weight[1:] - weight[:1], bias[1:] - bias[:1]


def layer_values(head: Head | LinearReadout, own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return what a classifier's ``own`` tensors become when a head is copied into it.

    They are ``weight`` and ``bias``, or ``0.weight``, ``0.bias``, ``1.weight``, … of linear layers or 1x1 convolutions
    that read the features side by side and of which the network takes the mean. ``None`` where the head is no linear
    layer of that form, or has learned nothing.

    Example:
        >>> from clkit.methods import NearestMeanHead
        >>> head = NearestMeanHead(2, metric="euclidean")
        >>> head.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        >>> layer_values(head, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})["weight"].tolist()
        [[2.0, -2.0], [-2.0, 2.0]]
    """
    weights = [name for name, tensor in own.items() if tensor.ndim > 1]
    if not weights or len(own) != 2 * len(weights) or not is_linear(head) or not head.classes.numel():
        return None
    outputs, dtype = len(own[weights[0]]), own[weights[0]].dtype
    widths = [own[name][0].numel() for name in weights]
    if int(head.classes.max()) >= outputs or sum(widths) != head.in_features:
        return None
    weight, bias = readout_tensors(head, outputs, torch.float64)
    # a mean of n layers is the whole when each has n times its part of the weights, and all of the bias
    parts = torch.split(len(weights) * weight, widths, dim=1)
    values = {name: part.reshape(own[name].shape).to(dtype) for name, part in zip(weights, parts, strict=True)}
    return {name: values.get(name, bias.clamp(min=torch.finfo(dtype).min / 4).to(dtype)) for name in own}


def is_linear(head: Head | LinearReadout) -> bool:
    """Return whether a head is one linear layer of the features themselves, neither lifted nor of unit length."""
    return isinstance(head, LinearReadout) or (not head.normalizes and head.feature_map.is_identity)


def readout_module(head: Head, outputs: int, dtype: torch.dtype) -> nn.Sequential:
    """Return the head as a ``Sequential`` of plain layers that ends in an ``nn.Linear`` and ranks as ``predict`` does.

    Returns:
        ``Sequential(Flatten, [L2Normalize], [lift], Linear)``: (B, D) or (B, D, 1, 1) → (B, outputs).

    Raises:
        ArgumentError: If ``outputs`` is not above the largest id.
        NotFittedError: If nothing was learned.

    Example:
        >>> from clkit.methods import NearestMeanHead
        >>> head = NearestMeanHead(2)
        >>> head.update(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1]))
        >>> readout_module(head, 2, torch.float32)(torch.tensor([[0.1, 3.0]])).argmax(dim=1)
        tensor([1])
    """
    weight, bias = readout_tensors(head, outputs, dtype)
    unit = [L2Normalize()] if head.normalizes else []
    return nn.Sequential(nn.Flatten(1), *unit, *head._design_layers(dtype), linear_of(weight, bias))


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer of these values, made without a draw from the global generator, which is the user's."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, dtype=weight.dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class LinearReadout(nn.Module):
    """Predicts by one linear layer over the classes that a head had learned, and learns no more.

    :func:`clkit.load_head` returns one for an exported file. The user makes none. Takes the sorted ids of the classes
    (k,), their weights (k, D) and biases (k,).

    Shape: (B, D) → (B, largest id + 1), column c for class id c, ``-inf`` for classes never seen.

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
        """Return scores; float64 for float64 features, else float32 (computed in float64)."""
        seen = self._scores_seen(features)
        scores = seen.new_full((len(seen), int(self.classes[-1]) + 1), -torch.inf).index_copy(1, self.classes, seen)
        return scores if features.dtype == torch.float64 else scores.float()

    def predict(self, features: Tensor) -> Tensor:
        """Return (B,) int64 ids of the classes with the highest scores; ties go to the lowest id."""
        return self.classes[self._scores_seen(features).argmax(dim=1)]

    def linear_readout(self) -> tuple[Tensor, Tensor]:
        """Return weight (k, D) and bias (k,) in float64."""
        return self.weight, self.bias

    def _scores_seen(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise BatchError(f"features must have shape (B, {self.in_features}), got {tuple(features.shape)}")
        return linear(features.double(), self.weight, self.bias)
