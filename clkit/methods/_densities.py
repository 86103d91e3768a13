"""How many connections of each layer are active: layer densities and exact counts, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError
from clkit.methods._checks import check_count, check_number

__all__ = ["Initial", "layer_counts", "layer_densities"]

InitialRule = Literal["auto", "erk", "uniform"]


@dataclass(frozen=True)
class Initial:
    """How the density is shared out among the layers when a task begins.

    Args:
        rule: ``"erk"`` gives narrow layers more (Erdős–Rényi with kernel sizes), ``"uniform"`` all the same;
            ``"auto"`` is ERK from a density of 0.2 on and uniform below, as the study found best.
        max_layer_density: Most that a layer gets, in (0, 1]. A layer of density 1 is in every mask: the first task
            learns it and no later one can.
        dense_first_layer: Whether the first layer keeps all its connections, as RigL does with uniform densities. The
            others then share what is left, so that the whole has the density asked for.
        power: Exponent of ERK's ratios, above 0.
        min_per_layer: Fewest active connections of a layer, at least 1; without any the network is dead.

    Raises:
        ArgumentError: If a value is not allowed.

    Source: Evci et al., arXiv 1911.11134, section 3 (ERK); Mocanu et al., arXiv 1707.04780 (ER).
    """

    rule: InitialRule = "auto"
    max_layer_density: float = 1.0
    dense_first_layer: bool = False
    power: float = 1.0
    min_per_layer: int = 1

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        _check_share("max_layer_density", self.max_layer_density)
        check_number("power", self.power, above=0)
        check_count("min_per_layer", self.min_per_layer)


def layer_densities(shapes: Sequence[Sequence[int]], density: float, initial: Initial) -> list[float]:
    r"""Return the density of each layer, so that all layers together have ``density`` of their connections.

    ERK gives layer l a density in proportion to :math:`(\sum s_l / \prod s_l)^p`; layers that would exceed the cap
    are pinned to it, and the rest is shared out again.

    Args:
        shapes: Sizes of each weight tensor.
        density: Share of all connections, in (0, ``initial.max_layer_density``].
        initial: The rule.

    Raises:
        ArgumentError: If the density cannot be reached.

    Example:
        >>> [round(each, 4) for each in layer_densities([(128, 64), (64, 128), (20, 64)], 0.2, Initial("erk"))]
        [0.1769, 0.1769, 0.4954]
    """
    cap = initial.max_layer_density
    _check_share("density", density)
    if density > cap:
        raise ArgumentError(
            f"density={density} is above max_layer_density={cap}, the most that any layer may have, so the layers "
            f"together cannot reach it; use a density of at most {cap}, or a higher cap"
        )
    sizes = [math.prod(shape) for shape in shapes]
    rule = initial.rule if initial.rule != "auto" else "erk" if density >= 0.2 else "uniform"
    ratios = [
        1.0 if rule == "uniform" else (sum(shape) / size) ** initial.power
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    pinned = {0: 1.0} if initial.dense_first_layer else {}
    budget = density * sum(sizes)
    while len(pinned) < len(sizes):
        free = [layer for layer in range(len(sizes)) if layer not in pinned]
        left = budget - sum(share * sizes[layer] for layer, share in pinned.items())
        if left <= 0:
            raise ArgumentError(
                f"density={density} gives {budget:,.0f} of {sum(sizes):,} connections, and the first layer, which "
                f"dense_first_layer=True makes dense, has {sizes[0]:,}: nothing is left to the others; use a density "
                f"above {sizes[0] / sum(sizes):.3g}, or dense_first_layer=False"
            )
        scale = left / sum(ratios[layer] * sizes[layer] for layer in free)
        full = [layer for layer in free if scale * ratios[layer] > cap * (1 + 1e-12)]
        if not full:
            break
        # all at once: pinning one gives budget back to the others, so the scale can only rise
        pinned.update(dict.fromkeys(full, cap))
    else:
        return [pinned[layer] for layer in range(len(sizes))]
    return [pinned.get(layer, scale * ratios[layer]) for layer in range(len(sizes))]


def layer_counts(sizes: Sequence[int], densities: Sequence[float], density: float, least: int = 1) -> list[int]:
    """Return the number of active connections of each layer; their total is exact (largest remainders).

    Args:
        sizes: Connections of each layer.
        densities: What :func:`layer_densities` returns.
        density: Of the whole; the total is ``density * sum(sizes)`` to the nearest integer.
        least: What a small layer gets at least, at the cost of the one that has most.

    Raises:
        ArgumentError: If there are fewer connections than layers need.

    Example:
        >>> layer_counts([8192, 8192, 1280], [0.176923076923, 0.176923076923, 0.495384615385], 0.2)
        [1450, 1449, 634]
    """
    wanted = [share * size for share, size in zip(densities, sizes, strict=True)]
    counts = [math.floor(each + 1e-9) for each in wanted]
    missing = math.floor(density * sum(sizes) + 0.5) - sum(counts)
    for layer in sorted(range(len(sizes)), key=lambda layer: (counts[layer] - wanted[layer], layer)):
        if missing > 0 and counts[layer] < sizes[layer]:
            counts[layer] += 1
            missing -= 1
    for layer, size in enumerate(sizes):
        while counts[layer] < min(least, size):
            giver = max(range(len(sizes)), key=lambda other: counts[other])
            if counts[giver] <= least:
                needed = sum(min(least, each) for each in sizes)
                raise ArgumentError(
                    f"density={density} gives {sum(counts)} of {sum(sizes):,} connections, and {len(sizes)} layers "
                    f"need {needed}, {least} each (min_per_layer of Initial); use a density of at least "
                    f"{needed / sum(sizes):.3g}, or exclude layers"
                )
            counts[giver] -= 1
            counts[layer] += 1
    return counts


def _check_share(name: str, value: float) -> None:
    if check_number(name, value, above=0) > 1:
        raise ArgumentError(f"{name} must be a share above 0 and up to 1 (20 % is 0.2), got {value!r}")
