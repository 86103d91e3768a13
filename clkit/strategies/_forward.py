"""The single forward of a replay step: what may go into it, and what the network gave for each block."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError, ConfigurationError
from clkit.features.calling import call
from clkit.features.tap import FeatureTap, Tapped
from clkit.methods._checks import check_count
from clkit.methods.replay.contrast import Projector
from clkit.methods.replay.rows import check_labels
from clkit.methods.replay.segments import BatchNormSegments
from clkit.methods.replay.step import StepOutputs, StepViews
from clkit.strategies._ranks import Incoming

__all__ = ["Projection", "SingleForward", "StepWork", "check_range", "checked_batch"]

_UNLABELLED = -1


@dataclass(frozen=True)
class Projection:
    """The embedding that contrastive losses compare, beside the classifier.

    Args:
        kind: ``"linear"``, or ``"mlp"`` with one hidden layer as wide as the features.
        dim: p, width of the embedding; ``None`` for min(128, D).

    Raises:
        ArgumentError: If an argument is not allowed.
    """

    kind: Literal["linear", "mlp"] = "linear"
    dim: int | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if self.dim is not None:
            check_count("projection.dim", self.dim)

    def build(self, module: nn.Module, layer: str, seed: int) -> Projector:
        """Return a projector for the features of a module, with weights that depend on the seed alone."""
        with FeatureTap(module, layer) as tap:
            width = tap.width
        if width is None:
            raise ConfigurationError(
                f"cannot tell the width of the features of {type(module).__name__} before the first forward; pass "
                "layer=, the dotted path of the network's last linear layer"
            )
        dim = min(128, width) if self.dim is None else self.dim
        if dim > width:
            raise ArgumentError(
                f"projection.dim={dim} is larger than the {width} features of {type(module).__name__}; an embedding is "
                "at most as wide"
            )
        return Projector(width, dim, self.kind, seed=seed)


class SingleForward:
    """Runs all blocks of a step through a network in one call, with segments each group by its own statistics."""

    def __init__(self, module: pl.LightningModule, layer: str, *, segments: bool, wrapped: bool) -> None:
        self._module = module
        self._runs_itself = type(module).forward is pl.LightningModule.forward
        if self._runs_itself and wrapped:
            raise ConfigurationError(
                f"{type(module).__name__} has no forward(), through which DDP must run the network; define it to "
                "return the logits"
            )
        self._tap = FeatureTap(module, layer)
        self._segments = BatchNormSegments(module) if segments else None
        self._automatic, module.automatic_optimization = module.automatic_optimization, True

    def look_again(self) -> None:
        """Follow the network that is in the module now, which may be another than before."""
        self._tap.resolve()
        if self._segments is not None:
            self._segments.close()
            self._segments = BatchNormSegments(self._module)

    def close(self) -> None:
        if self._segments is not None:
            self._segments.close()
        self._tap.close()
        self._module.automatic_optimization = self._automatic

    @property
    def width(self) -> int | None:
        """Outputs of the classifier, where it tells."""
        classifier = self._tap.classifier
        if classifier is None:
            return None
        width = getattr(classifier, "out_features", None)
        if width is None:
            widths = [getattr(m, "out_features", getattr(m, "out_channels", None)) for m in classifier.modules()]
            width = next((each for each in reversed(widths) if each is not None), None)
        return None if width is None else int(width)

    def __call__(self, model: Any, views: StepViews, labels: Tensor, projector: nn.Module | None) -> StepOutputs:
        """Return what the module, as the strategy wraps it, gave; ``labels`` are those of the incoming images."""
        if self._runs_itself:
            model = self._tap.network
        heard: list[Tapped] = []
        listener = self._tap.listen(lambda tapped: heard.append(tapped))  # torch 2.7 compiles no builtin
        try:
            with nullcontext() if self._segments is None else self._segments.step(views.segments):
                wrapped = isinstance(model, DistributedDataParallel)  # it fails, too, where a process is lost
                output = model(views.images) if wrapped else call(model, views.images)
        finally:
            listener.remove()
        if not heard:
            raise ConfigurationError(
                f"forward() does not run the classifier at {self._tap.point!r}; pass layer=, the dotted path of the "
                "one that it does run"
            )
        features, logits = heard[0]
        logits = output if logits is None else logits
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(views.images):
            seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigurationError(f"forward() must give logits of shape (B, C) to be trained so, got {seen}")
        if self.width is None:
            check_range(labels, logits.shape[1])
        return StepOutputs(views, logits, features, None if projector is None else projector(features))

    def zero(self) -> Tensor:
        """Return a loss of no rows: 0, with a graph."""
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        return torch.stack([parameter.flatten()[:0].float().sum() for parameter in parameters]).sum()


def checked_batch(x: Any, y: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """Return images, and labels on the host, of the labelled rows of a batch; refuse what cannot be learned."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise BatchError(f"the strategy needs images as one floating-point tensor (B, …), got {seen}")
    check_labels("targets", y, len(x))
    labels = y.cpu().long()
    if check_range(labels, width, least=_UNLABELLED) == _UNLABELLED:
        known = labels != _UNLABELLED
        x, labels = x[known.to(x.device)], labels[known]
    if not (math.isfinite(x.sum()) or bool(x.isfinite().all())):  # a sum of finite values may overflow
        raise BatchError("images of the batch are not finite; it was refused, nothing was changed")
    return x, labels


def check_range(labels: Tensor, width: int | None, least: int = 0) -> int:
    """Refuse labels on the host for which the classifier has no output; return the lowest, 0 of none."""
    ids = labels.numpy()
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < least or (width is not None and high >= width and len(ids)):
        raise BatchError(
            f"a batch has the label {low if low < least else high}, and the classifier {width} outputs (0 to "
            f"{'?' if width is None else width - 1}); build it with as many outputs as there will be classes"
        )
    return low


@dataclass
class StepWork:
    """What a batch needs until it is learned."""

    step: int
    incoming: Incoming
    seen: set[int]  # classes, its own among them
    views: StepViews = None  # type: ignore[assignment]  # set before anyone reads it
    extras: dict[str, Tensor] | None = None  # for the memory, once the loss is there
    kept: bool = False  # whether the memory has the batch
