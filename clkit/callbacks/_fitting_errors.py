"""Fitting the error predictors of a DEUP callback, once everything was learned that they predict the errors of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from clkit.callbacks._deup_parts import Rows, joined_rows
from clkit.callbacks._last_epoch import backbone_trains
from clkit.callbacks._own_pass import own_pass
from clkit.distributed import gather_objects
from clkit.features.observer import BatchObserver, forward

if TYPE_CHECKING:
    from clkit.callbacks.deup import DEUP

__all__ = ["fit_errors", "network_trains"]


def network_trains(trainer: pl.Trainer, observer: BatchObserver) -> bool:
    """Whether the network that gives features changes from one experience to the next."""
    strategy = trainer.strategy
    trained = getattr(strategy, "trains_module", True) and not getattr(strategy, "warmup_epochs", 0)
    return bool(trained and backbone_trains(observer.tap))


def fit_errors(owner: DEUP, trainer: pl.Trainer, module: pl.LightningModule, *, inside: bool = False) -> None:
    """Fit each error predictor to what is known now; a call on all processes.

    Within an experience (``inside``) what several processes have learned is not put together yet, so nothing is fitted.
    """
    if inside and trainer.world_size > 1:
        owner._say("with several processes error predictors are fitted at the end of experiences only")
        return
    layers, watching = owner._layers, owner._watched
    experience = 0 if owner._boundaries.current is None else owner._boundaries.current.index
    layers.synchronize(owner.false_alarm_rate)
    calibration: dict[str, Rows] = {}
    if any("calibration" in watched.sources for watched in watching.values()):
        owner._say(
            "the samples that val_fraction keeps out of training teach the error predictors, so that what a validation "
            "measures of them is too good; trainer.test() has the test part of the source"
        )
        calibration = _kept_out(owner, trainer, module, experience)
    for name, watched in watching.items():
        observer = owner._observer_of[name]
        known, rows = layers.known(observer.point), calibration.get(name)
        if rows is not None and watched.needs_rows and network_trains(trainer, observer):
            known, kept = layers.reread(name, rows.features, rows.targets, rows.ids)
            rows = rows.where(kept)
        if trainer.world_size > 1:
            watched.records.synchronize()
        watched.refit(known, rows, experience, layers.why_stale(observer.point, watched.head))
        if trainer.world_size > 1:  # the same numbers on all, however their processors round
            watched.errors.load_state_dict(gather_objects(watched.errors.state_dict(), "their error predictors")[0])


def _kept_out(owner: DEUP, trainer: pl.Trainer, module: pl.LightningModule, experience: int) -> dict[str, Rows]:
    """Return what each predictor says of the samples kept out of training, read by the network as it is."""
    found: dict[str, list[Rows]] = {name: [] for name in owner._watched}

    def read(loaders: Any, place: int, batch: Any, batch_idx: int) -> None:
        of, numbers = loaders[place].batches[batch_idx]
        if of > experience:  # of a class that was not learned nothing may be known
            return
        owner.open(trainer, module, batch, ("calibration", experience, place, batch_idx))
        for observer in {(id(each.inputs), each.tap.network): each for each in owner.observers}.values():
            if not observer.is_own:
                forward(module, observer.tap.network, observer.inputs)
        for name, rows in owner._judging.rows(torch.as_tensor(numbers)).items():
            found[name].append(rows)

    owner._stage = "validate"
    own_pass(trainer, module, experience + 1, read)
    for observer in owner.observers:
        observer.forget()
    return {name: rows for name, parts in found.items() if (rows := joined_rows(parts)) is not None}
