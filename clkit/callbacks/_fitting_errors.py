"""What a DEUP callback records of arriving batches, and how it fits its error predictors once they were learned."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from clkit.callbacks._deup_parts import Rows, joined_rows
from clkit.callbacks._last_epoch import backbone_trains
from clkit.callbacks._own_pass import own_pass
from clkit.distributed import gather_objects
from clkit.features.observer import BatchObserver, forward
from clkit.stream._lightning import callbacks_of, datamodule_of, is_logged

if TYPE_CHECKING:
    from clkit.callbacks.deup import DEUP

__all__ = ["fit_errors", "network_trains", "record_arriving", "rows_come_once"]


def network_trains(trainer: pl.Trainer, observer: BatchObserver) -> bool:
    """Whether the network that gives features changes from one experience to the next."""
    strategy = trainer.strategy
    trained = getattr(strategy, "trains_module", True) and not getattr(strategy, "warmup_epochs", 0)
    return bool(trained and backbone_trains(observer.tap))


def rows_come_once(trainer: pl.Trainer) -> bool:
    """Whether each sample is trained on in one epoch of its experience alone; a plain fit tells how many it has."""
    data = datamodule_of(trainer)
    if hasattr(data, "epochs_per_experience"):
        return bool(data.epochs_per_experience == 1)
    return trainer.max_epochs in (None, -1, trainer.current_epoch + 1)


def record_arriving(owner: DEUP, trainer: pl.Trainer, module: pl.LightningModule, batch_idx: int) -> None:
    """Record the errors on a batch by what predictors said before it was learned, then learn its rows.

    Raises:
        BatchError: If the batch is malformed; nothing is recorded then.
    """
    for observer, part in owner.observers.items():
        owner._checked(observer.features(getattr(part, "forward", owner.forward)), observer.known_targets)
    targets = owner.observer.known_targets
    ids = owner._layers.ids(trainer, batch_idx, targets)
    experience = 0 if owner._boundaries.current is None else owner._boundaries.current.index
    logged = is_logged(trainer)
    for name, rows in owner._judging.rows(ids, arriving=True).items():
        watched, point, view = owner._watched[name], owner._observer_of[name].point, None
        if watched.looks_ahead and watched.needs_rows:
            view = owner._layers.kept_view(name, point, watched.frozen and watched.frozen.leverage)
        watched.see(rows, view, experience, trainer.global_step)
        if logged and watched.arrived.samples:
            report = watched.arrived.report().items()
            module.log_dict({f"deup/{owner.prefix}{name}/{key}": value for key, value in report})
    for observer in owner.observers:
        readers = [each for name, each in owner._watched.items() if owner._observer_of[name] is observer]
        passes: set[Any] = {
            getattr(each.predictor, "forward", "auto") for each in readers if each.predictor is not None
        }
        if any(each.needs_rows for each in readers):
            # the numbers that heads learn; those of the module's own classifier where there is no head
            source: Any = sorted(passes)[0] if passes else owner.forward
            owner._layers.learn(observer.point, observer.features(source), observer.known_targets, ids)
            if len({observer.source(each) for each in passes}) > 1:
                owner._layers.mixed.add(observer.point)
    owner._layers.see_classes(targets)


def fit_errors(owner: DEUP, trainer: pl.Trainer, module: pl.LightningModule, *, inside: bool = False) -> None:
    """Fit each error predictor to what is known now; a call on all processes.

    Within an experience (``inside``) what several processes have learned is not put together yet, so nothing is fitted.
    """
    if inside and trainer.world_size > 1:
        owner._say("with several processes error predictors are fitted at the end of experiences only")
        return
    layers, watching = owner._layers, owner._watched
    if inside and any("calibration" in watched.sources for watched in watching.values()):
        owner._say("with samples kept out of training error predictors are fitted at the end of experiences only")
        return
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
            known, kept = layers.reread(name, rows.features, rows.targets, rows.ids, owner.false_alarm_rate)
            rows = rows.where(kept)
        if trainer.world_size > 1:
            watched.records.synchronize()
        watched.refit(known, rows, experience, layers.why_stale(observer.point, watched.head))
        if trainer.world_size > 1:  # the same numbers on all, however their processors round
            watched.take_fit(gather_objects(watched.fit_state(), "their error predictors")[0])


def _kept_out(owner: DEUP, trainer: pl.Trainer, module: pl.LightningModule, experience: int) -> dict[str, Rows]:
    """Return what each predictor says of the samples kept out of training, read by the network as it is."""
    found: dict[str, list[Rows]] = {name: [] for name in owner._watched}

    def read(loaders: Any, place: int, batch: Any, batch_idx: int) -> None:
        of, numbers = loaders[place].batches[batch_idx]
        if of > experience:  # of a class that was not learned nothing may be known
            return
        owner.open(trainer, module, batch, ("calibration", experience, place, batch_idx))
        with ExitStack() as active:
            for callback in callbacks_of(trainer):
                if hasattr(callback, "activated"):  # the network that an evaluation of this experience has
                    active.enter_context(callback.activated(of))
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
