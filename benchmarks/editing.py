"""What the studies of edits share: baselines of an edit, what is measured of one, and runs that are kept."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.files import atomic_write
from clkit.metrics.editing import drawdown, generality, locality, reliability

MOST_STEPS = 100  # of fine-tuning
NEAR_TIE = 0.05
Edit = Callable[[nn.Module, Tensor, Tensor], nn.Module]
"""A network, an image (1, ...) and its label to the network with the edit; the first stays as it is."""


def fine_tuned(layers: Sequence[str], lr: float, penalty: float | None, others: Tensor) -> Edit:
    """Return fine-tuning of some layers on an image until the label wins; with a penalty also on other answers."""

    def edit(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
        changed = copy.deepcopy(model).requires_grad_(False)
        weights = [changed.get_parameter(f"{name}.weight").requires_grad_() for name in layers]
        optimizer = torch.optim.RMSprop(weights, lr=lr)
        generator = torch.Generator().manual_seed(0)
        for _ in range(MOST_STEPS):
            logits = changed(x)
            if bool((logits.argmax(1) == y).all()):
                break
            loss = F.cross_entropy(logits, y)
            if penalty is not None:
                kept = others[torch.randint(len(others), (1,), generator=generator)]
                with torch.no_grad():
                    before = model(kept).log_softmax(1)
                loss = penalty * loss + (before.exp() * (before - changed(kept).log_softmax(1))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return changed

    return edit


def one_step(layers: Sequence[str], lr: float) -> Edit:
    """Return a plain gradient step."""

    def edit(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
        changed = copy.deepcopy(model)
        weights = [changed.get_parameter(f"{name}.weight") for name in layers]
        for weight, gradient in zip(weights, torch.autograd.grad(F.cross_entropy(changed(x), y), weights), strict=True):
            weight.data -= lr * gradient
        return changed

    return edit


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor, chunk: int = 250) -> Tensor:
    """Return logits, of many images in parts."""
    return torch.cat([model(part) for part in x.split(chunk)])


def answers(model: nn.Module, x: Tensor) -> Tensor:
    """Return predictions."""
    return logits_of(model, x).argmax(1)


def near_ties(model: nn.Module, x: Tensor) -> Tensor:
    """Return which images have two answers that are less than 0.05 apart."""
    best = logits_of(model, x).softmax(1).topk(2, dim=1).values
    return best[:, 0] - best[:, 1] < NEAR_TIE


class Row(NamedTuple):
    """What is measured of an edit, and means of it; of near-ties NaN where there are none."""

    reliability: float
    generality: float
    locality: float
    near_ties: float
    drawdown: float
    seconds: float


def row_of(own: Tensor, views: Tensor, label: Tensor, others: Others, after: Tensor, seconds: float) -> Row:
    """Measure an edit by the answers of the edited network.

    Args:
        own: (1,) its answer to the edited image.
        views: (V,) those to other views of it.
        label: (1,) the wanted one.
        others: What it answered to other images before.
        after: What it answers to them now.
        seconds: What the edit took.
    """
    return Row(
        reliability(own, label),
        generality(views, label.repeat(len(views))),
        locality(others.before, after),
        locality(others.before[others.ties], after[others.ties]),
        drawdown(others.before, after, others.y),
        seconds,
    )


class Others(NamedTuple):
    """Images that an edit is not about.

    Attributes:
        before: (N,) answers before the edit.
        ties: (N,) bool, which were near-ties then.
        y: (N,) true labels.
    """

    before: Tensor
    ties: Tensor
    y: Tensor

    def without(self, row: int) -> Others:
        """Return the same but for a row."""
        kept = torch.arange(len(self.y)) != row
        return Others(*(each[kept] for each in self))


def mean_of(rows: Sequence[Row]) -> dict[str, float]:
    """Return means over edits, by name; NaN where there are none."""
    if not rows:
        return Row(*[math.nan] * len(Row._fields))._asdict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")  # where there are no near-ties
        return Row(*np.nanmean(np.array(rows), axis=0).tolist())._asdict()


def share(value: float) -> str:
    """Return a share as it is printed."""
    return "-" if math.isnan(value) else f"{value:.2f}"


class Kept:
    """Results that are written down when they are there, so that a run that was broken off goes on.

    Args:
        folder: Where; ``None`` keeps them in memory alone.
        name: Of the file.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._file = None if folder is None else folder / f"{name}.json"
        self.values: dict[str, Any] = {}
        if self._file is not None and self._file.is_file():
            self.values = json.loads(self._file.read_text(encoding="utf-8"))

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a result, made now if it is not there."""
        if name not in self.values:
            self.values[name] = make()
            if self._file is not None:
                with atomic_write(self._file) as draft:
                    draft.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        return self.values[name]
