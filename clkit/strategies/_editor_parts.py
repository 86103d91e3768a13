"""What the training of an editor is made of beside the strategy: settings, its optimizer, rows of all processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam

from clkit.arguments import check_arguments
from clkit.distributed import exchange_device, gather_rows
from clkit.methods._checks import check_count, check_number

__all__ = ["ClippedAdam", "EditorSettings", "rows_of_all"]


@dataclass(frozen=True)
class EditorSettings:
    """What kind of editor is trained; see :class:`~clkit.methods.GradientEditor` for each.

    Args:
        rank: Of the networks' blocks, at least 1.
        n_hidden: Blocks after the first, at least 0.
        norm_scope: Statistics that normalise rows: of all layers of a ``"shape"``, of each ``"layer"``, or ``"none"``.
        share: Whether layers of a ``"shape"`` share a network, or ``"none"`` do.
        transforms: What goes through networks: ``"joint"``, ``"separate"``, ``"inputs"``, ``"gradients"`` or
            ``"smaller"``.
        alpha: First step size of each layer, above 0, or ``"auto"``.
        c_edit: Weight of the edit in the loss, above 0.
        c_loc: Weight of locality, at least 0.
        classifier: Dotted path of the classifier, or ``"auto"``.

    Raises:
        ArgumentError: If a value is not allowed.

    Example:
        >>> EditorSettings(rank=16, c_edit=0.3).rank
        16
    """

    rank: int = 64
    n_hidden: int = 1
    norm_scope: Literal["shape", "layer", "none"] = "shape"
    share: Literal["shape", "none"] = "shape"
    transforms: Literal["joint", "separate", "inputs", "gradients", "smaller"] = "joint"
    alpha: float | Literal["auto"] = "auto"
    c_edit: float = 0.1
    c_loc: float = 1.0
    classifier: str = "auto"

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        check_count("rank", self.rank)
        check_count("n_hidden", self.n_hidden, at_least=0)
        if self.alpha != "auto":
            check_number("alpha", self.alpha, above=0)
        check_number("c_edit", self.c_edit, above=0)
        check_number("c_loc", self.c_loc, at_least=0)


class ClippedAdam(Adam):
    """Adam on clipped gradients; where these are 0 or not finite, as if there had been no step.

    Gradients of 0 are those of batches of which nothing is learned, and the moments would move the weights.
    """

    def __init__(self, clip: float) -> None:
        super().__init__([{"params": [nn.Parameter(torch.zeros(0))]} for _ in range(2)])  # until there is an editor
        self._clip = clip
        self.is_done = False  # set by a step whose gradients were finite, which mixed precision may leave out

    def take(self, groups: list[dict[str, Any]]) -> None:
        """Train these two groups from now on, as if nothing had been trained before."""
        self.state.clear()
        for own, group in zip(self.param_groups, groups, strict=True):
            own.update(group)

    def step(self, closure: Any = None) -> Any:
        output = None if closure is None else closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self._clip))
        self.is_done = math.isfinite(norm)
        if norm == 0 or not self.is_done:
            self.zero_grad()
        super().step()
        return output


def rows_of_all(rows: Tensor, sizes: list[int]) -> Tensor:
    """Return the rows of all processes in the order of their ranks."""
    if len(sizes) == 1:
        return rows
    sent = rows.to(exchange_device(rows.device))
    return torch.cat(gather_rows(sent, sizes, "the images of a batch")).to(rows.device)
