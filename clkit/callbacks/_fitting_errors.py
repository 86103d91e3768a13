"""What a DEUP callback records of arriving batches, and how it fits its error predictors once they were learned."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch

from clkit.callbacks._deup_parts import Rows, joined_rows
from clkit.callbacks._judging import Judging
from clkit.callbacks._own_pass import own_pass
from clkit.callbacks._watching import Watching, network_trains
from clkit.distributed import gather_objects
from clkit.features.observer import forward
from clkit.stream._lightning import callbacks_of, is_logged

__all__ = ["fit_errors", "freeze", "record_arriving"]


def freeze(watching: Watching) -> None:
    """Bring up to date what heads say of arriving batches, before any of them learns the next."""
    for name, watched in watching.watched.items():
        ahead = watched.looks_ahead and watched.needs_rows
        own = ahead and watched.leverage is not None  # the leverage that it predicts with
        watched.frozen = None if watched.head is None else watched.head.frozen(leverage=own)
        if ahead:
            watching.layers.keep(watching.observer_of[name].point)


def record_arriving(
    watching: Watching,
    judging: Judging,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batch_idx: int,
    experience: int,
) -> None:
    """Record the errors on a batch that was checked, by what predictors said before it; then learn its rows."""
    layers = watching.layers
    targets = next(iter(watching.observers)).known_targets
    ids = layers.ids(trainer, batch_idx, targets)
    logged = is_logged(trainer)
    for name, rows in judging.rows(ids, arriving=True).items():
        watched, point, view = watching.watched[name], watching.observer_of[name].point, None
        if watched.looks_ahead and watched.needs_rows:
            view = layers.kept_view(name, point, watched.frozen and watched.frozen.leverage)
        watched.see(rows, view, experience, trainer.global_step, lambda: layers.classes)
        if logged and watched.arrived.samples:
            report = watched.arrived.report().items()
            module.log_dict({f"deup/{judging.prefix}{name}/{key}": value for key, value in report})
    for observer in watching.observers:
        readers = [each for name, each in watching.watched.items() if watching.observer_of[name] is observer]
        passes: set[Any] = {
            getattr(each.predictor, "forward", "auto") for each in readers if each.predictor is not None
        }
        if any(each.needs_rows for each in readers):
            # the numbers that heads learn; those of the module's own classifier where there is no head
            source: Any = sorted(passes)[0] if passes else watching.forward
            if not observer.has_rows(source):
                continue
            layers.learn(observer.point, observer.features(source), observer.known_targets, ids)
            if len({observer.source(each) for each in passes}) > 1:
                layers.mixed.add(observer.point)
    layers.see_classes(targets)


def fit_errors(
    watching: Watching,
    judging: Judging,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    experience: int,
    *,
    inside: bool = False,
) -> None:
    """Fit each error predictor to what is known now; a call on all processes.

    Within an experience (``inside``) what several processes have learned is not put together yet, so nothing is fitted.
    """
    if inside and trainer.world_size > 1:
        watching.say("with several processes error predictors are fitted at the end of experiences only")
        return
    layers, rate = watching.layers, watching.settings.false_alarm_rate
    calibrated = any("calibration" in watched.sources for watched in watching.watched.values())
    if inside and calibrated:
        watching.say("with samples kept out of training error predictors are fitted at the end of experiences only")
        return
    layers.synchronize()
    if rate is not None:
        layers.set_alarms(rate)
    calibration: dict[str, Rows] = {}
    if calibrated:
        watching.say(
            "the samples that val_fraction keeps out of training teach the error predictors, so that what a validation "
            "measures of them is too good; trainer.test() has the test part of the source"
        )
        calibration = _kept_out(watching, judging, trainer, module, experience)
    for name, watched in watching.watched.items():
        observer = watching.observer_of[name]
        known, rows = layers.known(observer.point), calibration.get(name)
        if rows is not None and watched.needs_rows and network_trains(trainer, observer):
            known, kept = layers.reread(name, rows.features, rows.targets, rows.ids, rate)
            rows = rows.where(kept)
        if trainer.world_size > 1:
            watched.records.synchronize()
        watched.refit(known, rows, experience, layers.why_stale(observer.point, watched.head))
        if trainer.world_size > 1:  # the same numbers on all, however their processors round
            watched.take_fit(gather_objects(watched.fit_state(), "their error predictors")[0])


def _kept_out(
    watching: Watching, judging: Judging, trainer: pl.Trainer, module: pl.LightningModule, experience: int
) -> dict[str, Rows]:
    """Return what each predictor says of the samples kept out of training, read by the network as it is."""
    found: dict[str, list[Rows]] = {name: [] for name in watching.watched}

    def read(loaders: Any, place: int, batch: Any, batch_idx: int) -> None:
        of, numbers = loaders[place].batches[batch_idx]
        if of > experience:  # of a class that was not learned nothing may be known
            return
        for observer, part in watching.observers.items():
            observer.open(trainer, module, batch, ("calibration", experience, place, batch_idx), part=part)
        with ExitStack() as active:
            for callback in callbacks_of(trainer):
                if hasattr(callback, "activated"):  # the network that an evaluation of this experience has
                    active.enter_context(callback.activated(of))
            for observer in {(id(each.inputs), each.tap.network): each for each in watching.observers}.values():
                if not observer.is_own:
                    forward(module, observer.tap.network, observer.inputs)
            for name, rows in judging.rows(torch.as_tensor(numbers)).items():
                found[name].append(rows)

    own_pass(trainer, module, experience + 1, read)
    for observer in watching.observers:
        observer.forget()
    return {name: rows for name, parts in found.items() if (rows := joined_rows(parts)) is not None}
