"""What every callback must do, whatever it learns or watches."""

from __future__ import annotations

import contextlib
import io
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from clkit.callbacks import NMC, StreamEvaluation
from clkit.errors import ContractError
from clkit.stream._lightning import callbacks_of
from clkit.testing import checks_shared as shared
from clkit.testing._compare import changed, leaves, require, same, snapshot
from clkit.testing._runs import batch_of, fit, random_bits
from clkit.testing._trials import Setting, checked_file, settings
from clkit.testing.entries import Entry

__all__ = ["CHECKS", "configuration", "from_yaml", "subset_or_same"]


def state_is_in_the_checkpoint(entry: Entry, folder: Path) -> None:
    """What it learned is in the file, as tensors and plain values, under its own key, and a new one loads it."""
    for setting in settings(entry, folder):
        trial = setting.run()
        callback = trial.callback
        checked_file(trial, callback.state_dict(), "state_dict()")
        saved = trial.saved()["callbacks"]
        if entry.learns:
            require(
                bool(changed(snapshot(entry, entry.make()), trial.learned(followed=False))),
                "after a fit state_dict() is that of a new one",
                "return what was learned from state_dict() (of a StreamCallback: stream_state())",
            )
        if callback.state_dict():
            require(
                callback.state_key in saved,
                f"the checkpoint has no entry {callback.state_key!r}, it has {sorted(saved)}",
                "let state_key depend on nothing but class and name",
            )
            fresh = entry.make()
            fresh.load_state_dict(saved[callback.state_key])
            same(
                trial.learned(),
                snapshot(entry, fresh, followed=True),
                "a new one that loaded the saved state holds or predicts something else",
                "restore everything in load_state_dict(), sizes included",
            )


# ---- neighbours


def order_of_callbacks_does_not_matter(entry: Entry, folder: Path) -> None:
    """First or last among others, it learns the same bits, those of a run of its own, and so do the others."""
    for setting in settings(entry, folder):
        strategy, under = setting.strategy, setting.under
        alone = setting.run().learned()
        neighbours = _neighbours(entry)
        fit(folder, neighbours, strategy=strategy)
        undisturbed = [_of_neighbour(one) for one in neighbours]
        among = []
        for first in (True, False):
            one, others = entry.make(), _neighbours(entry)
            order = [one, *others] if first else [*reversed(others), one]
            fit(folder, order, strategy=strategy)
            among.append(snapshot(entry, one, followed=True))
            if not entry.changes_training:
                same(
                    undisturbed,
                    [_without(one, _of_neighbour(other)) for other in others],
                    f"{under}others learned something else beside it",
                    "change nothing that others read: the batch, the module, the random state",
                )
        same(among[0], among[1], f"{under}it depends on its place in the list", "read only in hooks")
        subset_or_same(entry, alone, among[0], f"{under}beside others")


def subset_or_same(entry: Entry, alone: dict[str, Any], beside: dict[str, Any], what: str) -> None:
    """Require that a callback learned alone what it learned beside others; one that watches may have seen more."""
    if not entry.learns:
        kept = leaves(alone)
        beside = {path: leaf for path, leaf in leaves(beside).items() if path in kept}
        alone = kept
    same(alone, beside, f"{what} it learned something else than alone", "depend on the stream only, not on others")


def _neighbours(entry: Entry) -> list[Any]:
    """Make a head and an evaluation, unless that is what is checked."""
    others = [NMC(name="neighbour"), StreamEvaluation(table=False, files=False)]
    return [other for other in others if other.state_key != entry.make().state_key]


def _of_neighbour(callback: Any) -> dict[str, Any]:
    entry = Entry("neighbour", "callback", type(callback), volatile=("seconds",))
    return snapshot(entry, callback, followed=True)


def _without(callback: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """Give what an evaluation saw, without the rows of the method that is checked."""
    name = getattr(callback, "name", None)
    rows = seen.get("rows")
    if isinstance(rows, dict) and name in rows:
        seen = {**seen, "rows": {predictor: row for predictor, row in rows.items() if predictor != name}}
    return seen


def training_is_left_alone(entry: Entry, folder: Path) -> None:
    """Weights, optimizer, what the module logs and the global random state are those of a run without it."""
    if entry.changes_training:
        raise unittest.SkipTest("the entry says that it changes training")
    for setting in settings(entry, folder):
        plain, watched = (_everything(setting, callbacks) for callbacks in ([], [entry.make()]))
        for what in plain:
            same(
                plain[what],
                watched[what],
                f"{setting.under}{what} of a run with it differ from those of a run without it",
                "draw random numbers from a generator of its own, forward in eval mode under no_grad, touch no weight",
            )


def _everything(setting: Setting, callbacks: Sequence[Any]) -> dict[str, Any]:
    module, run = fit(setting.folder, callbacks, strategy=setting.strategy)
    return {
        "the weights": dict(module.state_dict()),
        "optimizer states": [optimizer.state_dict() for optimizer in run.optimizers],
        "the module's metrics": run.callback_metrics.get("val_loss"),
        "global random states": random_bits(),
    }


def empty_and_single_row_batches_are_taken(entry: Entry, folder: Path) -> None:
    """Batches of one row are learned; those of none, or without a label, change nothing."""
    good = [batch_of(5, 0), batch_of(1, 7), batch_of(3, 9)]
    inputs, targets = batch_of(4, 20)
    idle = [(inputs, torch.full_like(targets, -1)), (inputs[:0], targets[:0]), (inputs[:1], torch.tensor([-1]))]
    for setting in settings(entry, folder):
        ends = [
            setting.run(batches=batches, module=setting.fixed_module()).learned(followed=False)
            for batches in (good, [idle[0], good[0], idle[1], good[1], idle[2], *good[2:]])
        ]
        if entry.learns:
            same(
                ends[0],
                ends[1],
                f"{setting.under}batches of no row or of unlabelled rows (-1) changed what was learned",
                "leave rows with target -1 out, and return early where none is left",
            )


# ---- construction


def yaml_builds_the_same(entry: Entry, folder: Path) -> None:
    """Written in a YAML file for LightningCLI it is built, and learns what the one made in Python learns."""
    built = callbacks_of(from_yaml(folder, {"callbacks": [configuration(entry)]}))
    made = entry.make()
    found = [callback for callback in built if type(callback) is type(made)]
    require(
        len(found) == 1,
        f"the YAML file gave {[type(callback).__name__ for callback in built]}, not one {type(made).__name__}",
        "give `yaml` the class path and init_args of what `make` makes",
    )
    ends = []
    for callback in (made, found[0]):
        fit(folder, [callback])
        ends.append(snapshot(entry, callback, followed=True))
    require(
        getattr(found[0], "state_key", None) == made.state_key,
        f"its state_key is {found[0].state_key!r}, in Python {made.state_key!r}",
        "give both the same name",
    )
    same(ends[0], ends[1], "built from YAML it learned something else", "let `yaml` and `make` have the same arguments")


def configuration(entry: Entry) -> dict[str, Any]:
    """Return what stands in the YAML file.

    Raises:
        unittest.SkipTest: If there is none.
    """
    written = entry.configuration
    if written is None:
        raise unittest.SkipTest("make is no class of a module; give the entry `yaml`")
    return written


def from_yaml(folder: Path, options: dict[str, Any]) -> pl.Trainer:
    """Build the trainer that a command line builds from a file with these settings of it."""
    from lightning.pytorch.cli import LightningCLI  # here, since the checks in several processes do without it

    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": False, "enable_checkpointing": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {**settings, **options}}), encoding="utf-8")
    reasons = io.StringIO()
    try:
        with contextlib.redirect_stderr(reasons):
            built: pl.Trainer = LightningCLI(
                pl.LightningModule,
                subclass_mode_model=True,
                args=["--config", str(path), "--model", "clkit.testing._runs.SmallModule"],
                save_config_callback=None,
                seed_everything_default=False,
                run=False,
            ).trainer
    except SystemExit as error:  # what jsonargparse makes of a mistake, after it printed its reasons
        raise ContractError(
            f"LightningCLI refuses\n{path.read_text(encoding='utf-8')}{reasons.getvalue()[-1500:]}; annotate the "
            "constructor's arguments with plain types, and give all of them defaults or `init_args`"
        ) from error
    return built


CHECKS: list[Callable[[Entry, Path], None]] = [
    state_is_in_the_checkpoint,
    shared.a_resumed_run_equals_an_uninterrupted_one,
    order_of_callbacks_does_not_matter,
    training_is_left_alone,
    shared.nothing_is_left_on_the_module,
    shared.evaluating_changes_nothing,
    shared.hostile_batches_are_refused_whole,
    empty_and_single_row_batches_are_taken,
    shared.low_precision_is_taken,
    shared.a_compiled_module_gives_the_same_bits,
    yaml_builds_the_same,
    shared.it_learns_the_same_on_a_gpu,
    shared.two_processes_equal_one,
]
