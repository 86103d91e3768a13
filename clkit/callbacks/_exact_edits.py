"""An edit without an editor: the images are counted in the sums of a head, and taken out of them again."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.callbacks._run_edits import LoggedEdit, RunEdit
from clkit.callbacks.head import HeadCallback
from clkit.distributed import world_size
from clkit.errors import BatchError
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap
from clkit.methods import EditReference, Guard, LocalityReport
from clkit.methods._edit_objective import objective_for
from clkit.methods._edited_network import ran

__all__ = ["count_in", "features_of", "propose_counting", "take_out"]

_FACTORS = (1, 3, 10)  # of the weight, of which the first that does is taken
_VIEWS = 8  # of a function of equivalents
_NEVER = -1e9  # in the place of the -inf of a class that a head does not know


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
        weight: How often each image is counted, or up to ten times that where it is needed.
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
    before = _logits(head, rows, width)
    for count in (factor * weight for factor in _FACTORS):
        trial = copy.deepcopy(head)
        trial.update(rows.repeat(count, 1), ids.repeat(count))
        after = _logits(trial, rows, width)
        if bool((after.argmax(dim=1) == ids).all()):
            break
    objective = objective_for(width, None)
    own: dict[str, Any] = {"prediction_before": before.argmax(dim=1).tolist(), "label": ids.tolist()}
    own["probability_before"] = objective.probabilities(before, ids).tolist()
    others = _views(x, equivalents)
    views = None if others is None else features_of(module, callback.layer, others).cpu()
    report: LocalityReport | None = None
    status: Any = "applied"
    reason, earlier = "", list(earlier)
    if bool((before.argmax(dim=1) == ids).all()):
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
        generality=None
        if views is None
        else _right(trial, views, ids.repeat_interleave(len(views) // len(ids)), width),
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


def _views(x: Tensor, given: Any) -> Tensor | None:
    """Return equivalents (B·k, …), those of one image in a row."""
    if given is not None and not isinstance(given, Tensor):
        if not callable(given):
            raise BatchError(f"equivalents must be images or a function (images, generator), got {in_short(given)}")
        draws = torch.Generator().manual_seed(0)
        given = torch.stack([given(x.clone(), draws) for _ in range(_VIEWS)], dim=1)
    if given is None:
        return None
    several: Tensor = given[None] if given.ndim == x.ndim and len(x) == 1 else given
    if several.shape[:1] + several.shape[2:] != x.shape:
        raise BatchError(f"equivalents must be of shape (B, k, …) to images {tuple(x.shape)}, got {tuple(given.shape)}")
    return several.flatten(0, 1) if several.shape[1] else None


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
    return reference.report(objective_for(classes, None), *logits)
