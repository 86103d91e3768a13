"""What only callbacks or only strategies must do, and what methods must do beside each other."""

from __future__ import annotations

import random
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ProgressBar

from clkit.callbacks import NMC, StreamEvaluation
from clkit.stream.resume import capture_random_state
from clkit.testing._compare import leaves, require, same
from clkit.testing._runs import Setting, batch_of, fit, loader, seed, small_module, snapshot, stream
from clkit.testing.checks_shared import CHECKS as SHARED
from clkit.testing.entries import Entry
from clkit.testing.processes import two_processes_equal_one

__all__ = ["CHECKS", "all_callbacks_in_one_run_learn_what_they_learn_alone"]


def order_of_callbacks_does_not_matter(setting: Setting) -> None:
    """First or last among others, it learns the same bits, those of a run of its own, and so do the others."""
    entry, folder, strategy = setting.entry, setting.folder, setting.strategy
    alone = setting.run().learned()
    neighbours = _neighbours(entry)
    fit(folder, neighbours, strategy=strategy)
    undisturbed = [_seen_by(one, None) for one in neighbours]
    among = []
    for first in (True, False):
        one, others = entry.make(), _neighbours(entry)
        fit(folder, [one, *others] if first else [*reversed(others), one], strategy=strategy)
        among.append(snapshot(one, entry.volatile))
        if not entry.changes_training:
            same(
                undisturbed,
                [_seen_by(other, one) for other in others],
                "others learned something else beside it",
                "change nothing that others read: the batch, the module, the random state",
            )
    same(among[0], among[1], "it depends on its place in the list", "read only in hooks")
    _require_as_alone(entry, alone, among[0], "beside others")


def _require_as_alone(entry: Entry, alone: dict[str, Any], beside: dict[str, Any], what: str) -> None:
    """Require that a callback learned alone what it learned beside others; one that watches may have seen more."""
    if not entry.learns:
        alone = leaves(alone)
        beside = {path: leaf for path, leaf in leaves(beside).items() if path in alone}
    same(alone, beside, f"{what} it learned something else than alone", "depend on the stream only, not on others")


def _neighbours(entry: Entry) -> list[Any]:
    """Make a head and an evaluation, unless that is what is checked."""
    others = [NMC(name="neighbour"), StreamEvaluation(table=False, files=False)]
    return [other for other in others if other.state_key != entry.make().state_key]


def _seen_by(neighbour: Any, checked: Any) -> dict[str, Any]:
    """Copy what a neighbour learned; of an evaluation without what it measured of the callback that is checked."""
    seen = snapshot(neighbour, ("seconds", "columns"))
    if isinstance(seen.get("rows"), dict):
        name = getattr(checked, "name", None)
        seen["rows"] = {predictor: row for predictor, row in seen["rows"].items() if predictor != name}
    return seen


def training_is_left_alone(setting: Setting) -> None:
    """Weights, optimizer, what the module logs and the global random state are those of a run without it."""
    if setting.entry.changes_training:
        raise unittest.SkipTest("the entry says that it changes training")
    plain, watched = (_everything(setting, callbacks) for callbacks in ([], [setting.entry.make()]))
    for what in plain:
        same(
            plain[what],
            watched[what],
            f"{what} of a run with it differ from those of a run without it",
            "draw random numbers from a generator of its own, forward in eval mode under no_grad, touch no weight",
        )


def _everything(setting: Setting, callbacks: Sequence[Any]) -> dict[str, Any]:
    module, run = fit(setting.folder, callbacks, strategy=setting.strategy)
    return {
        "the weights": dict(module.state_dict()),
        "optimizer states": [optimizer.state_dict() for optimizer in run.optimizers],
        "the module's metrics": run.callback_metrics.get("val_loss"),
        "global random states": capture_random_state(),
    }


def empty_and_single_row_batches_are_taken(setting: Setting) -> None:
    """Batches of one row are learned; those of none, or without a label, change nothing."""
    if not setting.entry.reads_batches:
        raise unittest.SkipTest("the entry says that it reads no batch: batches go to the user's module")
    good = [batch_of(5, 0), batch_of(1, 7), batch_of(3, 9)]
    inputs, targets = batch_of(4, 20)
    idle = [(inputs, torch.full_like(targets, -1)), (inputs[:0], targets[:0]), (inputs[:1], torch.tensor([-1]))]
    ends = [
        setting.run(batches=batches, module=setting.fixed_module()).learned(followed=False)
        for batches in (good, [idle[0], good[0], idle[1], good[1], idle[2], good[2]])
    ]
    if setting.entry.learns:
        same(
            ends[0],
            ends[1],
            "batches of no row or of unlabelled rows (-1) changed what was learned",
            "leave rows with target -1 out, and return early where none is left",
        )


def a_run_can_be_repeated(setting: Setting) -> None:
    """The same seed gives the same bits."""
    same(
        setting.run().outcome(),
        setting.run().outcome(),
        "two runs of one seed differ",
        "draw random numbers from the global generators or from seeded ones of its own",
    )


def it_fits_again_and_evaluates(setting: Setting) -> None:
    """Fit, validate, test, predict and a second fit work, and validate on a trainer that never fitted."""
    entry, module = setting.entry, small_module()
    run = setting.trainer(entry.make(), [NMC()], max_epochs=1)
    batches = [batch_of(5, 0), batch_of(3, 7)]
    seed(1)
    run.fit(module, loader(batches), loader(batches))
    run.validate(module, loader(batches), verbose=False)
    run.test(module, loader(batches), verbose=False)
    run.predict(module, loader(batches))
    before = run.fit_loop.total_batch_idx
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(batches), loader(batches))
    require(
        run.fit_loop.total_batch_idx == before + len(batches),
        f"a second fit of {len(batches)} batches made {run.fit_loop.total_batch_idx - before}",
        "give everything back in teardown(), so that setup() can begin anew",
    )
    setting.trainer(entry.make()).validate(module, datamodule=stream(), verbose=False)
    spoiled = [name for name, value in module.state_dict().items() if not bool(value.isfinite().all())]
    require(not spoiled, f"after two fits {spoiled} are not finite", "check the loss")


CHECKS: dict[str, list[Callable[[Setting], None]]] = {
    "callback": [
        *SHARED,
        order_of_callbacks_does_not_matter,
        training_is_left_alone,
        empty_and_single_row_batches_are_taken,
        two_processes_equal_one,
    ],
    "strategy": [*SHARED, a_run_can_be_repeated, it_fits_again_and_evaluates, two_processes_equal_one],
}


def all_callbacks_in_one_run_learn_what_they_learn_alone(
    entries: Sequence[Entry], strategy: Entry | None, folder: Path
) -> None:
    """In one run, in several orders of the list, each callback learns the same bits as alone."""
    make: Callable[[], Any] = (lambda: "auto") if strategy is None else strategy.make
    made = make()
    trains = getattr(made, "trains_module", True) and not getattr(made, "warmup_epochs", 0)  # all the time
    bars = [entry for entry in entries if isinstance(entry.make(), ProgressBar)]  # Lightning takes one only
    admitted = [entry for entry in entries if entry not in bars[1:] and (trains or not entry.needs_gradients)]
    quiet = [entry for entry in admitted if not entry.changes_training]
    # one that changes how the network is trained changes what all others see: it runs with them, but not with its like
    companies = [quiet, *([*quiet, entry] for entry in admitted if entry.changes_training)]
    if not any(companies):
        raise unittest.SkipTest("no callback of the table runs under this strategy")
    for company in companies:
        # as listed, the other way round, so that each stands on both sides of each, and mixed
        mixed = random.Random(0).sample(company, len(company))
        states = []
        for order in (company, company[::-1], mixed):
            callbacks = {entry: entry.make() for entry in order}
            fit(folder, list(callbacks.values()), strategy=make())
            states.append({entry.name: snapshot(callbacks[entry], entry.volatile) for entry in company})
        for other in states[1:]:
            same(states[0], other, "what is learned depends on the order of the callbacks", "read only in hooks")
        if company is quiet:
            for entry in quiet:
                alone = entry.make()
                fit(folder, [alone], strategy=make())
                learned = snapshot(alone, entry.volatile)
                _require_as_alone(entry, learned, states[0][entry.name], f"beside all others, {entry.name}:")
