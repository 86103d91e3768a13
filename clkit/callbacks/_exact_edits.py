"""An edit without an editor: the images are counted in the sums of a head, and taken out of them again."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.callbacks._run_edits import LoggedEdit, RunEdit
from clkit.callbacks.head import HeadCallback
from clkit.distributed import world_size
from clkit.errors import BatchError, NotFittedError
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap
from clkit.methods import EditReference, Guard, LocalityReport
from clkit.methods._edit_objective import objective_for
from clkit.methods._edited_network import ran
from clkit.methods._equivalents import FLIP_SHARE, equivalents_of

__all__ = ["Beginnings", "count_in", "features_of", "propose_counting", "take_out"]

_FACTORS = (1, 3, 10)  # of the weight, of which the first that does is taken
_NEVER = -1e9  # in the place of the -inf of a class that a head does not know


class Beginnings:
    """Since when heads hold images of edits: one that began anew holds them no more, and they are not taken out of it.

    What is noted is of this process alone. A checkpoint has edits and sums of one moment, so that what it gives is
    noted when it is there.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[weakref.ref[Any], int]] = {}

    def note(self, callback: HeadCallback) -> None:
        """Note the head as the one that holds what is counted in it now."""
        self._known[callback.name] = (weakref.ref(callback.head), callback.head.resets)

    def holds(self, callback: HeadCallback) -> bool:
        """Whether it is the head that was noted, and was not reset since; one of which nothing is known is noted."""
        try:
            now = weakref.ref(callback.head), callback.head.resets
        except NotFittedError:  # there is none yet, so none that began anew
            return True
        return self._known.setdefault(callback.name, now) == now


def features_of(module: pl.LightningModule, layer: str, x: Tensor) -> Tensor:
    """Return the features (B, D) of images, float64, as a head reads them at a layer in evaluation mode."""
    some = next((each for each in module.parameters() if each.is_floating_point()), x)
    own = x.to(some.device, some.dtype if x.is_floating_point() else x.dtype)
    with torch.autocast(some.device.type, enabled=False), FeatureTap(module, layer) as tap:
        run = partial(forward, module, tap.network)
        features: Tensor = ran(lambda images: tap.extract(images, run), own)
    return features if features.device.type == "mps" else features.double()


def propose_counting(
    module: pl.LightningModule,
    callback: HeadCallback,
    x: Tensor,
    y: Tensor,
    equivalents: Any,
    *,
    weight: int,
    guard: Guard | None,
    reference: EditReference | None,
    earlier: Iterable[LoggedEdit],
) -> tuple[RunEdit, Tensor]:
    """Return what would become of an edit, and the features (B, D) of its images; nothing is changed.

    Args:
        module: The user's module.
        callback: Whose head it is.
        x: (B, …) images.
        y: (B,) class ids.
        equivalents: Other views of the images, see :meth:`clkit.methods.GradientEditor.edit`.
        weight: How often each image is counted, or three or ten times that where it needs more to get its label, or
            for three quarters of its views to get it too.
        guard: Bounds.
        reference: Of which the guard speaks.
        earlier: Edits of this head that are open.
    """
    began = time.perf_counter()
    odd = y.is_floating_point() or y.is_complex() or y.dtype == torch.bool
    if y.ndim != 1 or odd or len(y) != len(x) or bool((y < 0).any()):
        raise BatchError(
            f"y must be (B,) class ids to {len(x)} images, got {tuple(y.shape)} {y.dtype}; nothing was changed"
        )
    head, ids = callback.head, y.detach().cpu().long()
    rows = features_of(module, callback.layer, x).cpu()
    copy.deepcopy(head).update(rows, ids)  # refuses what it could not learn, before anything is as wide as ids say
    width = max(2, int(torch.cat([head.classes.cpu(), ids]).max()) + 1)
    others = equivalents_of(x, equivalents, (0,)).flatten(0, 1)
    views = features_of(module, callback.layer, others).cpu() if len(others) else None
    theirs = ids.repeat_interleave(len(others) // len(ids))
    before = _logits(head, rows, width)
    found: tuple[int, Any, Tensor] | None = None
    for count in (factor * weight for factor in _FACTORS):
        trial = copy.deepcopy(head)
        trial.update(rows.repeat(count, 1), ids.repeat(count))
        after = _logits(trial, rows, width)
        if bool((after.argmax(dim=1) == ids).all()):
            found = found or (count, trial, after)
            if views is None or _right(trial, views, theirs, width) >= FLIP_SHARE:
                found = count, trial, after
                break
    count, trial, after = found or (count, trial, after)
    objective = objective_for(width, None)
    own: dict[str, Any] = {"prediction_before": before.argmax(dim=1).tolist(), "label": ids.tolist()}
    own["probability_before"] = objective.probabilities(before, ids).tolist()
    report: LocalityReport | None = None
    status: Any = "applied"
    reason, earlier = "", list(earlier)
    right = bool((before.argmax(dim=1) == ids).all())
    if right and (views is None or _right(head, views, theirs, width) >= FLIP_SHARE):
        status, reason, trial, after = "satisfied", "the images have these answers already", head, before
    elif not bool((after.argmax(dim=1) == ids).all()):
        reason = f"counting the images {count} times does not give the wanted answers; raise weight"
        status = "refused"
    elif reference is not None:
        report = _report(module, callback, trial, reference.without(x), earlier, width)
        broken = "" if guard is None or report is None else guard.broken_by(report)
        if broken and guard is not None:
            status, reason = ("applied" if guard.policy == "warn" else "refused"), broken
    if status == "refused":
        trial, after = head, before
    result = RunEdit(
        id=None,
        status=status,
        reason=reason,
        scale=float(count) if status == "applied" else 0.0,
        repeats=1,
        prediction_after=after.argmax(dim=1).tolist(),
        probability_after=objective.probabilities(after, ids).tolist(),
        reliability=float((after.argmax(dim=1) == ids).double().mean()),
        generality=None if views is None else _right(trial, views, theirs, width),
        sizes={},
        realised=None,
        locality=report,
        retention=_retention(trial, earlier, width) if status == "applied" else None,
        seconds=time.perf_counter() - began,
        route="exact",
        head=callback.name,
        **own,
    )
    return result, rows


def count_in(callback: HeadCallback, rows: Tensor, targets: Tensor, *, here: bool) -> None:
    """Add rows to the sums of a head, once over all processes; a call on all of them, one of which says ``here``."""
    if world_size() > 1:
        callback.head.synchronize()
    if here:
        callback.head.update(rows, targets)
    if world_size() > 1:
        callback.head.synchronize()


def take_out(callback: HeadCallback, rows: Tensor, targets: Tensor) -> None:
    """Take rows out of the sums of a head; a call on all processes."""
    if world_size() > 1:
        callback.head.synchronize()
    callback.head.subtract(rows, targets)


def _logits(head: Any, rows: Tensor, width: int) -> Tensor:
    scores: Tensor = head(rows.double()).cpu().clamp(min=_NEVER)
    return torch.cat([scores, scores.new_full((len(rows), width - scores.shape[1]), _NEVER)], dim=1)


def _right(head: Any, rows: Tensor, ids: Tensor, width: int) -> float:
    return float((_logits(head, rows, width).argmax(dim=1) == ids).double().mean())


def _retention(head: Any, earlier: list[LoggedEdit], width: int) -> float | None:
    known = [each for each in earlier if each.features is not None]
    right = [
        _right(head, each.features, torch.tensor(each.label), width) == 1.0
        for each in known
        if each.features is not None
    ]
    return sum(right) / len(right) if right else None


def _report(
    module: pl.LightningModule,
    callback: HeadCallback,
    trial: Any,
    reference: EditReference,
    earlier: list[LoggedEdit],
    width: int,
) -> LocalityReport | None:
    """Compare the answers of a head to the reference without edits, before this one and after it."""
    rows = torch.cat([features_of(module, callback.layer, part).cpu() for part in reference.parts()])
    original = copy.deepcopy(callback.head)
    for each in earlier:
        original.subtract(*each.rows())
    classes = max(width, int(reference.labels.max()) + 1 if reference.labels is not None else 0)
    logits = [_logits(head, rows, classes) for head in (original, callback.head, trial)]
    report = reference.report(objective_for(classes, None), *logits)
    return replace(report, near_ties=0, near_tie_agreement=None)  # the scores of a head are no probabilities
