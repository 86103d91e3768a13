"""Regular polytopes whose vertices are class prototypes: their coordinates, and products with them without a matrix."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Polytope", "dimension", "products", "vertices"]

Polytope: TypeAlias = Literal["simplex", "orthoplex", "cube"]


def dimension(polytope: Polytope, number: int) -> int:
    """Return the smallest dimension in which the polytope has so many vertices.

    Example:
        >>> dimension("simplex", 1024), dimension("orthoplex", 1024), dimension("cube", 1024)
        (1023, 512, 10)
    """
    if polytope == "simplex":
        return number - 1
    return -(-number // 2) if polytope == "orthoplex" else (number - 1).bit_length()


def vertices(polytope: Polytope, number: int, rows: Tensor) -> Tensor:
    """Return some of the vertices, (R, d) float64 of unit length, by their numbers (R,)."""
    d = dimension(polytope, number)
    if polytope == "cube":
        bits = (rows[:, None] >> torch.arange(d)) & 1
        return (2.0 * bits - 1.0).double() / math.sqrt(d)
    found = torch.zeros(len(rows), d, dtype=torch.float64)
    axis = torch.arange(len(rows)), rows % d
    if polytope == "orthoplex":
        found[axis] = torch.where(rows < d, 1.0, -1.0).double()
        return found
    along, shift, last = _axis_simplex(d)
    found[axis] = along
    found -= shift
    found[rows == d] = -last
    return found


def products(polytope: Polytope, number: int, points: Tensor) -> Tensor:
    """Return the inner products (B, K) of points (B, d) with all vertices, from a few passes over the points."""
    d = points.shape[1]
    if polytope == "orthoplex":
        return torch.cat([points, -points], dim=1)[:, :number]
    if polytope == "cube":
        sums = points.new_zeros(len(points), 1)
        for column in points.unbind(dim=1):  # each bit of a vertex's number takes the coordinate or its opposite
            sums = torch.cat([sums - column[:, None], sums + column[:, None]], dim=1)
        return sums[:, :number] / math.sqrt(d)
    along, shift, last = _axis_simplex(d)
    total = points.sum(dim=1, keepdim=True)
    return torch.cat([torch.sub(along * points, total, alpha=shift), -last * total], dim=1)


def _axis_simplex(d: int) -> tuple[float, float, float]:
    r"""Return a, b and c of the simplex with the vertices :math:`a e_i - b 1` and :math:`-c 1`."""
    return math.sqrt(1 + 1 / d), (math.sqrt(d + 1) - 1) / (d * math.sqrt(d)), 1 / math.sqrt(d)
