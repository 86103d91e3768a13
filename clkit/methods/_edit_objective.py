"""What an edit of a classifier wants: its loss, how far other answers move, and whether an answer is the wanted one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.arguments import in_short
from clkit.errors import BatchError

__all__ = ["ClassObjective", "Objective", "OneOutputObjective", "SampleLoss", "SeveralLabelsObjective", "objective_for"]

SampleLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(logits (B, C), targets) -> (B,)`` losses."""

NEAR_TIE = 0.05  # of two probabilities: answers that are easiest to disturb


class ClassObjective:
    """One label of several classes: cross-entropy, and the KL divergence of class probabilities.

    Args:
        outputs: C, at least 2.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    @property
    def classes(self) -> int:
        """How many answers there are."""
        return self.outputs

    def targets(self, name: str, y: Any, rows: int, device: torch.device) -> Tensor:
        """Return labels as int64 on a device, or raise a BatchError."""
        integers = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if not integers or y.shape != (rows,):
            seen = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else in_short(y)
            raise BatchError(f"{name} must be integer class ids, one an image, of shape ({rows},), got {seen}")
        odd = [each for each in y.tolist() if not 0 <= each < self.classes]
        if odd:
            raise BatchError(f"{name} must be class ids from 0 to {self.classes - 1}, got {odd[0]}")
        return _usable(y, device)

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each row, (B,)."""
        return F.cross_entropy(_wide(logits), y, reduction="none")

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return KL(before ‖ after) of each row, (B,)."""
        old, new = _wide(before).log_softmax(dim=1), _wide(after).log_softmax(dim=1)
        return (old.exp() * (old - new)).sum(dim=1)

    def answers(self, logits: Tensor) -> Tensor:
        """Return the answers, (B,) int64, or (B, C) of several labels."""
        return logits.argmax(dim=1)

    def hits(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return whether each row has the wanted answer, (B,) bool."""
        same = self.answers(logits) == y
        return same if same.ndim == 1 else same.all(dim=1)

    def probabilities(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the probability of the wanted answer, (B,)."""
        return _wide(logits).softmax(dim=1).gather(1, y[:, None])[:, 0]

    def near_ties(self, logits: Tensor) -> Tensor:
        """Return whether the two most probable answers of each row are less than 0.05 apart, (B,) bool."""
        best = _wide(logits).softmax(dim=1).topk(2, dim=1).values
        return best[:, 0] - best[:, 1] < NEAR_TIE


class OneOutputObjective(ClassObjective):
    """One label of two classes and one output, whose sigmoid is the probability of class 1."""

    @property
    def classes(self) -> int:
        """How many answers there are."""
        return 2

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each row, (B,)."""
        return F.binary_cross_entropy_with_logits(_wide(logits)[:, 0], y.to(_wide(logits).dtype), reduction="none")

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the KL divergence of the two outcomes of each output, summed over outputs, (B,)."""
        return _bernoulli(_wide(before), _wide(after))

    def answers(self, logits: Tensor) -> Tensor:
        """Return the answers, (B,) int64."""
        return (logits[:, 0] > 0).long()

    def probabilities(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the probability of the wanted answer, (B,)."""
        return (_wide(logits)[:, 0] * (2 * y - 1)).sigmoid()

    def near_ties(self, logits: Tensor) -> Tensor:
        """Return whether the two answers of each row are less than 0.05 apart, (B,) bool."""
        return (2 * _wide(logits)[:, 0].sigmoid() - 1).abs() < NEAR_TIE


class SeveralLabelsObjective(OneOutputObjective):
    """Any number of labels an image, each an output of its own, and a loss of the user's."""

    def __init__(self, outputs: int, loss: SampleLoss) -> None:
        super().__init__(outputs)
        self._loss = loss

    def targets(self, name: str, y: Any, rows: int, device: torch.device) -> Tensor:
        """Return labels of 0 and 1, (B, C) int64 on a device, or raise a BatchError."""
        if not isinstance(y, Tensor) or y.shape != (rows, self.outputs) or not bool(((y == 0) | (y == 1)).all()):
            seen = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else in_short(y)
            raise BatchError(f"{name} must be 0 or 1 for each output, of shape ({rows}, {self.outputs}), got {seen}")
        return _usable(y, device)

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each row, (B,)."""
        found = self._loss(_wide(logits), y)
        if not isinstance(found, Tensor) or found.shape != (len(logits),):
            seen = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else in_short(found)
            raise BatchError(f"loss must return a tensor of shape ({len(logits)},), one value an image, got {seen}")
        return found

    def answers(self, logits: Tensor) -> Tensor:
        """Return the answers, (B, C) int64 of 0 and 1."""
        return (logits > 0).long()

    def probabilities(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the probability that all labels are as wanted, (B,)."""
        return (_wide(logits) * (2 * y - 1)).sigmoid().prod(dim=1)

    def near_ties(self, logits: Tensor) -> Tensor:
        """Return whether a label of each row is less than 0.05 from a tie, (B,) bool."""
        return ((2 * _wide(logits).sigmoid() - 1).abs() < NEAR_TIE).any(dim=1)


Objective: TypeAlias = ClassObjective


def objective_for(outputs: int, loss: SampleLoss | None) -> Objective:
    """Return the objective of a network of so many outputs."""
    if loss is not None:
        return SeveralLabelsObjective(outputs, loss)
    return ClassObjective(outputs) if outputs > 1 else OneOutputObjective(outputs)


def _usable(y: Tensor, device: torch.device) -> Tensor:
    """Return labels that a graph may keep, which those of inference mode may not be."""
    with torch.inference_mode(False):
        return y.detach().clone().to(device, torch.int64)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _bernoulli(before: Tensor, after: Tensor) -> Tensor:
    terms = [(sign * before).sigmoid() * (F.logsigmoid(sign * before) - F.logsigmoid(sign * after)) for sign in (1, -1)]
    return (terms[0] + terms[1]).sum(dim=1)
