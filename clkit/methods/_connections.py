"""Which connections of one layer leave and which come: scores, ranks and draws, with ties settled by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError
from clkit.methods._checks import check_count, check_number, check_probability

__all__ = ["Growth", "Prune", "PruneSchedule", "drawn_scores", "fitting", "highest", "lowest_active", "pack", "unpack"]

PruneRule = Literal["magnitude", "set", "taylor", "mest"]
GrowthRule = Literal["gradient", "random", "momentum", "unfired"]
ScheduleRule = Literal["cosine", "rigl", "constant", "linear", "power"]
GROUP = 4  # of a 2:4 pattern, along the inputs of a unit
_PER_GROUP = 2


@dataclass(frozen=True)
class Prune:
    """Which active connections leave at an update: those with the lowest score.

    Args:
        rule: ``"magnitude"``: abs(W). ``"set"``: the smallest positive and the negative weights closest to zero, in
            proportion. ``"taylor"``: (W g)². ``"mest"``: abs(W) + ``gamma`` abs(g). Here g is the dense gradient.
        scope: ``"all"`` lets the task also drop connections that it reuses of earlier tasks, which keep them;
            ``"free"`` moves its own only.
        gamma: Weight of the gradient in ``"mest"``, at least 0.

    Raises:
        ArgumentError: If a value is not allowed.

    Source: Mocanu et al., arXiv 1707.04780 (SET); Molchanov et al., arXiv 1906.10771 (Taylor); Yuan et al.,
    arXiv 2110.14032 (MEST).
    """

    rule: PruneRule = "magnitude"
    scope: Literal["all", "free"] = "all"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        check_number("gamma", self.gamma, at_least=0)


@dataclass(frozen=True)
class Growth:
    """Which connections come at an update, as many as leave: those with the highest score.

    Args:
        rule: ``"gradient"``: abs(g), the dense gradient (RigL). ``"random"``: uniform (SET). ``"momentum"``: abs of a
            running mean of g over the task (SNFS). ``"unfired"``: uniform among those that were never active in the
            task (ITOP).
        accumulate: Optimizer steps whose gradients ``"gradient"`` averages, at least 1.
        momentum: Share of the past in the mean of ``"momentum"``, from 0 to 1.

    Raises:
        ArgumentError: If a value is not allowed.

    Source: Evci et al., arXiv 1911.11134 (RigL); Dettmers and Zettlemoyer, arXiv 1907.04840 (SNFS); Liu et al.,
    arXiv 2102.02887 (ITOP).
    """

    rule: GrowthRule = "gradient"
    accumulate: int = 1
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        check_count("accumulate", self.accumulate)
        check_probability("momentum", self.momentum)


@dataclass(frozen=True)
class PruneSchedule:
    r"""When connections move within a task, and what share of them.

    With n optimizer steps of S done, S' = ``stop`` S, and :math:`\rho_0` the ``fraction``:

    * ``"cosine"``: :math:`m + (\rho_0 - m)(1 + \cos(\pi n / S)) / 2`, where m is the ``minimum``;
    * ``"rigl"``: :math:`\rho_0 (1 + \cos(\pi n / S')) / 2`;
    * ``"constant"``: :math:`\rho_0`;
    * ``"linear"`` and ``"power"``: :math:`\rho_0 (1 - n / S')^e`, with e = 1 or the ``exponent``.

    Args:
        rule: See above.
        fraction: Share of a layer's connections that move at first, in (0, 1].
        minimum: Share at the end of ``"cosine"``, from 0 to 1.
        update_every: Optimizer steps between updates, at least 1.
        stop: Share of a task's steps after which the topology stays, from 0 to 1; 0 never moves it.
        exponent: Of ``"power"``, at least 0.

    Raises:
        ArgumentError: If a value is not allowed.

    Example:
        >>> [round(PruneSchedule().fraction_at(n, steps=1000), 4) for n in (0, 500, 1000)]
        [0.5, 0.2525, 0.005]
    """

    rule: ScheduleRule = "cosine"
    fraction: float = 0.5
    minimum: float = 0.005
    update_every: int = 100
    stop: float = 0.75
    exponent: float = 3.0

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        for name in ("fraction", "minimum", "stop"):
            check_probability(name, getattr(self, name))
        if self.fraction == 0:
            raise ArgumentError("fraction must be above 0; to keep the topology as it is use stop=0")
        check_count("update_every", self.update_every)
        check_number("exponent", self.exponent, at_least=0)

    def fraction_at(self, step: int, steps: int) -> float:
        """Return the share of the connections that move after ``step`` of ``steps`` optimizer steps."""
        end = self.stop * steps
        if self.rule == "cosine":
            return self.minimum + (self.fraction - self.minimum) * (1 + math.cos(math.pi * step / steps)) / 2
        if self.rule == "rigl":
            return self.fraction / 2 * (1 + math.cos(math.pi * step / end))
        if self.rule == "constant":
            return self.fraction
        left = max(0.0, 1 - step / end)
        return self.fraction * (left if self.rule == "linear" else left**self.exponent)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the topology is updated after ``step`` of ``steps`` optimizer steps.

        The rules that reach 0 at the stop have nothing to move there.
        """
        end = self.stop * steps
        in_time = step <= end if self.rule in ("cosine", "constant") else step < end
        return step > 0 and step % self.update_every == 0 and in_time


def lowest_active(rule: Prune, weight: Tensor, gradient: Tensor | None, active: Tensor, number: int) -> Tensor:
    """Return the flat positions of the ``number`` connections among ``active`` ones that leave.

    Args:
        rule: The scores.
        weight: (N,) weights.
        gradient: (N,) dense gradient, for the rules that need it; without one they fall back to magnitudes.
        active: (n,) int64 flat positions, ascending.
        number: How many, at most n.
    """
    values = weight[active].float()
    if rule.rule == "set":
        return _smallest_of_both_signs(values, active, number)
    scores = values.abs()
    if gradient is not None and rule.rule != "magnitude":
        slope = gradient[active].float()
        scores = (values * slope).square() if rule.rule == "taylor" else scores + rule.gamma * slope.abs()
    return active[highest(-scores, number)]


def _smallest_of_both_signs(values: Tensor, active: Tensor, number: int) -> Tensor:
    share = number / max(1, len(active))
    named = [(values == 0).nonzero().squeeze(1)]  # of no sign, and worth least
    for sign in (1.0, -1.0):
        own = (values * sign > 0).nonzero().squeeze(1)
        named.append(own[highest(-values[own].abs(), math.ceil(share * len(own)))])
    # the ceilings of both signs may be one too many; the largest of those named stay
    leaving = torch.cat(named).sort().values
    return active[leaving[highest(-values[leaving].abs(), number)]]


def highest(scores: Tensor, number: int) -> Tensor:
    """Return the ascending positions of the ``number`` highest of (n,) scores; of equal ones the first.

    As a stable sort would choose, at the cost of a selection.
    """
    number = min(number, len(scores))
    if number == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    low, high = torch.aminmax(scores)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):  # of any NaN both are NaN
        raise ArgumentError("connections cannot be ranked: a weight or gradient is not finite")
    bound = _lowest_of_the_highest(scores, number)
    best = (scores >= bound).nonzero().squeeze(1)
    if len(best) > number:  # several have the lowest of these scores: the last of them are too many
        kept = torch.ones_like(best, dtype=torch.bool)
        kept[(scores[best] == bound).nonzero().squeeze(1)[number - len(best) :]] = False
        best = best[kept]
    return best


def _lowest_of_the_highest(scores: Tensor, number: int) -> Tensor:
    if scores.device.type != "cpu":
        return torch.topk(scores, number, sorted=False).values.min()
    place = len(scores) - number  # NumPy selects among values alone, in a fraction of the time that torch takes
    return torch.tensor(np.partition(scores.numpy(), place)[place])


def drawn_scores(candidates: Tensor, seed: Sequence[int]) -> Tensor:
    """Return (N,) float64 scores, uniform in [0, 1) for candidates in an (N,) bool tensor, and -1 for others.

    A function of the seed and the candidates alone, whatever the device.
    """
    scores = torch.full(candidates.shape, -1.0, dtype=torch.float64, device=candidates.device)
    drawn = np.random.default_rng(seed).random(int(candidates.sum()))
    scores[candidates] = torch.from_numpy(drawn).to(candidates.device)
    return scores


def fitting(scores: Tensor, candidates: Tensor, active: Tensor) -> Tensor:
    """Return the candidates that a 2:4 pattern has room for, the best of each group of four, as positions among them.

    Args:
        scores: (n,) of the candidates.
        candidates: (n,) int64 flat positions, ascending.
        active: (N,) bool, N a multiple of 4.
    """
    room = _PER_GROUP - active.view(-1, GROUP).sum(1)
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(candidates[order] // GROUP, stable=True)]  # by group, the best first
    group = candidates[order] // GROUP
    first = torch.searchsorted(group, group)
    place = torch.arange(len(group), device=group.device) - first
    kept: Tensor = order[place < room[group]]
    return kept.sort().values


def pack(mask: Tensor) -> Tensor:
    """Return the bits of a bool tensor, eight a byte, as a (ceil(N / 8),) uint8 tensor on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """Return the mask that was packed, in the shape and on the device of another tensor."""
    flat = np.unpackbits(bits.numpy(), count=like.numel())
    return torch.from_numpy(flat).to(device=like.device, dtype=torch.bool).view(like.shape)
