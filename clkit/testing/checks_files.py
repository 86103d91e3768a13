"""What every callback and every strategy must keep in files: its state in checkpoints, its settings in YAML."""

from __future__ import annotations

import contextlib
import io
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from clkit.callbacks import NMC, StreamCallback
from clkit.errors import ContractError
from clkit.stream._lightning import callbacks_of
from clkit.testing._compare import changed, plain, require, same
from clkit.testing._runs import BATCHES, Setting, Trial, fit, small_module, snapshot, stream, trainer

__all__ = ["a_resumed_run_equals_an_uninterrupted_one", "state_is_in_the_checkpoint", "yaml_builds_the_same"]


def state_is_in_the_checkpoint(setting: Setting) -> None:
    """What it learned is in the file as plain values under its own key, beside the module's own keys, and is loaded."""
    entry, trial = setting.entry, setting.run()
    new, callback = entry.make(), trial.callback
    own = trial.own_part() if entry.kind == "strategy" else callback.state_dict()
    plain(own, "the checkpoint" if entry.kind == "strategy" else "state_dict()")
    saved = trial.saved()
    require(
        list(saved["state_dict"]) == list(small_module().state_dict()),
        f"the module's own keys became {list(saved['state_dict'])}",
        "keep what is learned in the method's own state, not as a part of the user's module",
    )
    if entry.kind == "callback":
        if entry.learns:
            require(
                bool(changed(snapshot(new, entry.volatile, followed=False), trial.learned(followed=False))),
                "after a fit state_dict() is that of a new one",
                "return what was learned from state_dict() (of a StreamCallback: stream_state())",
            )
        if own:
            require(
                callback.state_key in saved["callbacks"],
                f"the checkpoint has no entry {callback.state_key!r}, it has {sorted(saved['callbacks'])}",
                "let state_key depend on nothing but class and name",
            )
            new.load_state_dict(saved["callbacks"][callback.state_key])
            same(
                trial.learned(),
                snapshot(new, entry.volatile),
                "a new one that loaded the saved state holds or predicts something else",
                "restore everything in load_state_dict(), sizes included",
            )
    elif entry.learns:
        require(bool(own), "the checkpoint has nothing of the strategy's own", "save it in save_checkpoint()")
    path = str(setting.folder / "end.ckpt")  # a plain Trainer takes it, too
    trainer(setting.folder, []).validate(
        small_module(), datamodule=stream(), ckpt_path=path, weights_only=True, verbose=False
    )


def a_resumed_run_equals_an_uninterrupted_one(setting: Setting) -> None:
    """A run resumed in mid-experience, at an experience's last batch or at a boundary ends with the same bits."""
    # one that knows nothing of streams needs someone beside it who restores the random state
    follows = setting.entry.kind == "strategy" or isinstance(setting.entry.make(), StreamCallback)
    place = setting.folder / str(setting.strategy)
    savers = [
        ModelCheckpoint(str(place), filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(str(place), filename="end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1),
    ]

    def ended(*savers: Any, **options: Any) -> Trial:
        return setting.run(beside=[*savers, *([] if follows else [StreamCallback()])], **options)

    expected = ended().outcome()
    same(
        expected,
        ended(*savers, enable_checkpointing=True).outcome(),
        "saving checkpoints on the way changed what was learned",
        "let state_dict() and save_checkpoint() read only",
    )
    first = setting.first_steps
    steps = first + sum(BATCHES[1:])
    for when in (f"step={first - 2}", f"step={first}", "end-epoch=0", f"step={first + 3}", f"step={steps}"):
        resumed = ended(resume=place / f"{when}.ckpt")
        made = resumed.trainer.global_step
        require(
            made == steps,
            f"resumed from {when} it made {made} steps of {steps}",
            "derive from StreamCallback or LearningStrategy, or call its hooks",
        )
        same(
            expected,
            resumed.outcome(),
            f"a run resumed from {when} of parts with {BATCHES} batches ended otherwise",
            "save everything that a later batch depends on, counters included",
        )


def yaml_builds_the_same(setting: Setting) -> None:
    """Its class path in a YAML file, and its registered name, build what Python builds, and that does the same."""
    entry, folder = setting.entry, setting.folder
    if entry.configuration is None:
        raise unittest.SkipTest("make is no class of a module; give the entry `yaml`")
    made, expected, name = entry.make(), setting.run().outcome(), entry.registered
    parts: dict[str, Any] = {"callbacks": [entry.configuration], "strategy": setting.strategy}
    if entry.kind == "strategy":
        parts = {"callbacks": [{"class_path": "clkit.callbacks.NMC"}], "strategy": entry.configuration}
    ways: dict[str, Callable[[], pl.Trainer]] = {"its class path in a YAML file": lambda: _from_yaml(folder, parts)}
    if name is not None:
        ways["its name in a YAML file"] = lambda: _from_yaml(folder, {**parts, "strategy": name})
        ways["its name in Python"] = lambda: trainer(folder, [NMC()], strategy=name)
    for way, build in ways.items():
        run = build()
        found = [part for part in (*callbacks_of(run), run.strategy) if type(part) is type(made)]
        require(
            len(found) == 1 and getattr(found[0], "state_key", None) == getattr(made, "state_key", None),
            f"{way} gave {[type(part).__name__ for part in (*callbacks_of(run), run.strategy)]}, not one "
            f"{type(made).__name__} with the state_key of that of Python",
            "give `yaml` what `make` makes, and register the class itself, with a default for every argument",
        )
        module, run = fit(folder, [], run=run)
        callback = found[0] if entry.kind == "callback" else next(c for c in callbacks_of(run) if isinstance(c, NMC))
        outcome = Trial(setting, callback, module, run).outcome()
        same(expected, outcome, f"built by {way} it did something else", "use the same arguments")


def _from_yaml(folder: Path, options: dict[str, Any]) -> pl.Trainer:
    """Build the trainer that a command line builds from a file with these settings of it."""
    from lightning.pytorch.cli import LightningCLI  # here, since the checks in several processes do without it

    quiet = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": False, "enable_checkpointing": False}
    own = {**quiet, "default_root_dir": str(folder), **options}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": own}), encoding="utf-8")
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
