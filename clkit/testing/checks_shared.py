"""What every callback and every strategy must do, alone and in one process."""

from __future__ import annotations

import contextlib
import io
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from clkit.callbacks import NMC, StreamCallback
from clkit.errors import ClkitError, ContractError
from clkit.schema import STRATEGY
from clkit.stream._lightning import callbacks_of
from clkit.testing._compare import changed, far, leaves, plain, require, same, surface
from clkit.testing._runs import (
    BATCHES,
    CLASSIFIER,
    Setting,
    StoppedError,
    Trial,
    batch_of,
    fit,
    quiet,
    small_module,
    snapshot,
    stream,
    trainer,
)

__all__ = ["CHECKS"]


def state_is_in_the_checkpoint(setting: Setting) -> None:
    """What it learned is in the file as plain values under its own key, beside the module's own keys, and is loaded."""
    entry, trial = setting.entry, setting.run()
    new, callback = entry.make(), trial.callback
    own = trial.own_part() if entry.kind == "strategy" else callback.state_dict()
    plain(own, "the checkpoint" if entry.kind == "strategy" else "state_dict()")
    saved = trial.saved()
    replaced = CLASSIFIER if entry.replaces_classifier else "nothing"
    keys, wanted = (
        [key for key in each if not key.startswith(replaced)]
        for each in (saved["state_dict"], small_module().state_dict())
    )
    require(
        keys == wanted,
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
    plain_run, path = trainer(setting.folder, []), str(setting.folder / "end.ckpt")
    if not entry.replaces_classifier:  # which the module gets from the callback alone
        plain_run.validate(small_module(), datamodule=stream(), ckpt_path=path, weights_only=True, verbose=False)


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
    first = BATCHES[0] * (1 + getattr(setting.entry.make(), "warmup_epochs", 0))  # steps of the first experience
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
    parts |= quiet(folder, [made])
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

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": options}), encoding="utf-8")
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


class _Failing(pl.Callback):
    """Fails in the second experience."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            raise StoppedError


def nothing_is_left_on_the_module(setting: Setting) -> None:
    """After a fit, an evaluation and a failed fit no hook, part, attribute or mode of the module is changed."""
    for kind in ("a fit", "an evaluation", "a failed fit"):
        beside = [_Failing()] if kind == "a failed fit" else []
        own = _left(trainer(setting.folder, beside, strategy=setting.strategy or "auto"), kind)
        left = [path for path in _left(setting.trainer(setting.entry.make(), beside), kind) if path not in own]
        if setting.entry.replaces_classifier:
            left = [path for path in left if CLASSIFIER not in path and path != "/keys of state_dict()"]
        require(
            not left,
            f"{kind} left something on the module: {', '.join(left)}",
            "undo in teardown() what connect() and setup() did; a callback also in on_exception(), after which no "
            "teardown() comes",
        )


def _left(run: pl.Trainer, kind: str) -> list[str]:
    """Name what of the module is not as it was before the run."""
    module = small_module()
    module.net[2].eval()
    module.net[0].bias.requires_grad_(False)
    before = surface(module)
    with contextlib.suppress(StoppedError):
        if kind == "an evaluation":
            _evaluate(run, module)
        else:
            run.fit(module, datamodule=stream())
    return changed(before, surface(module))


def _evaluate(run: pl.Trainer, module: pl.LightningModule) -> None:
    data = stream()
    run.validate(module, datamodule=data, verbose=False)
    run.test(module, datamodule=data, verbose=False)
    run.predict(module, datamodule=data)


def evaluating_changes_nothing(setting: Setting) -> None:
    """Validating at every opportunity, and validate, test and predict afterwards, change no bit of what is learned."""
    quiet = setting.run(limit_val_batches=0)
    watched = setting.run(val_check_interval=1, num_sanity_val_steps=-1)
    end = watched.outcome()
    if setting.entry.learns or setting.entry.kind == "strategy":
        seen = "validations on the way changed what was learned"
        same(quiet.outcome(), end, seen, "change nothing in validation hooks")
    _evaluate(watched.trainer, watched.module)
    same(end, watched.outcome(), "validate, test or predict changed what was learned", "learn in training hooks only")


def _hostile_batches() -> dict[str, tuple[Tensor, Tensor]]:
    """Make batches that nothing may be learned of, by what is wrong with them; most in the last row."""
    inputs, targets = batch_of(5, 40)
    spoiled, endless = inputs.clone(), inputs.clone()
    spoiled[4, 0, 2] = torch.nan
    endless[4] = torch.inf
    return {
        "NaN in the last row": (spoiled, targets),
        "an infinite last row": (endless, targets),
        "a negative id": (inputs, torch.tensor([0, 1, 2, 3, -2])),
        "an id of 2**40": (inputs, torch.tensor([0, 1, 2, 3, 2**40])),
        "fractional ids": (inputs, targets + 0.5),
        "too few ids": (inputs, targets[:3]),
        "one-hot ids": (inputs, torch.nn.functional.one_hot(targets, 4)),
    }


def hostile_batches_are_refused_whole(setting: Setting) -> None:
    """A malformed batch raises a ClkitError and leaves what was learned bitwise as it was; learning can go on."""
    entry = setting.entry
    if entry.kind == "strategy" and not entry.learns:
        raise unittest.SkipTest("the entry says that it learns nothing of its own: batches go to the user's module")
    if not entry.reads_batches:
        raise unittest.SkipTest("the entry says that it reads no batch: batches go to the user's module")
    advice = "check the whole batch before the first number is changed"
    clean, expected = _after(setting, batch_of(5, 40) if entry.learns else None)
    for what, bad in _hostile_batches().items():
        met, found = _after(setting, bad, what)
        same(expected, found, f"a batch with {what} changed weights or what was learned", advice)
    if entry.kind == "callback" and entry.learns:  # the runs of others end in different ways
        ends = [
            setting.run(method=one, batches=[batch_of(5, 11)], module=setting.fixed_module()).learned(followed=False)
            for one in (clean, met)
        ]
        same(ends[0], ends[1], "one that refused a batch learned the next one otherwise", advice)


def _after(setting: Setting, last: Any, hostile: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Give a method two good batches and a last one that is refused, or comes when the run is stopped before it.

    Returns:
        The method, and what it learned.
    """
    good = [batch_of(5, 0), batch_of(5, 7)]

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if hostile is None and batch_idx == len(good):
                raise StoppedError

    entry, module = setting.entry, setting.fixed_module()
    method = entry.make()
    run = setting.trainer(method, [Stop()], max_epochs=1)
    try:
        fit(setting.folder, [], module=module, batches=good if last is None else [*good, last], run=run)
        require(
            hostile is None or not entry.learns,
            f"a batch with {hostile} was taken",
            "raise clkit.errors.BatchError, which says what was seen and what is allowed",
        )
    except StoppedError:
        pass
    except ClkitError as error:
        if hostile is None or isinstance(error, ContractError):
            raise
    trial = Trial(setting, method, module, run)
    if entry.kind == "callback":
        return method, trial.learned(followed=False)
    own = trial.own_part()
    own.get(STRATEGY, {}).pop("cut", None)  # of a strategy of clkit's base: one run ended, the other was ended
    return method, {"weights": trial.weights(), "own": own}


def low_precision_is_taken(setting: Setting) -> None:
    """With bf16-mixed, bf16-true and 16-mixed it runs; weights and state keep dtypes and stay finite."""
    reference = setting.run()
    for precision in ("bf16-mixed", "bf16-true", "16-mixed"):  # on a CPU Lightning makes bf16-mixed of the last
        _require_sound(reference, setting.run(precision=precision), precision)


def it_learns_the_same_on_a_gpu(setting: Setting) -> None:
    """On a CUDA device, also with 16-mixed, it runs; in float32 a callback's state is that of a CPU within 1e-3."""
    if not torch.cuda.is_available():
        raise unittest.SkipTest("there is no CUDA device")
    reference = setting.run(module=setting.fixed_module(), precision="32-true")
    for precision in ("32-true", "16-mixed"):
        trial = setting.run(module=setting.fixed_module(), accelerator="gpu", precision=precision)
        _require_sound(reference, trial, precision)
        if setting.entry.kind == "callback" and setting.entry.learns and precision == "32-true":
            apart = far(reference.callback.state_dict(), trial.callback.state_dict(), 1e-3)
            require(not apart, f"a GPU gave another state: {apart}", "keep state on the features' device")


def _require_sound(reference: Trial, trial: Trial, precision: str) -> None:
    """Require that weights and state have the dtypes that they should and are finite where the reference's are."""
    under = f"with precision {precision!r} "
    kinds = {kind for kind in _dtypes(trial.weights()).values() if "float" in kind}
    expected = "torch.bfloat16" if precision == "bf16-true" else "torch.float32"
    require(kinds == {expected}, f"{under}weights are {kinds}", "leave dtypes to the precision plugin")
    state, before = trial.callback.state_dict(), reference.callback.state_dict()
    wanted = _dtypes(before)
    if not trial.setting.entry.reads_batches:  # what it keeps is of the weights' own kind
        wanted = {path: kind.replace("torch.float32", expected) for path, kind in wanted.items()}
    require(
        _dtypes(state) == wanted,
        f"{under}dtypes are {_dtypes(state)}, else {wanted}",
        "upcast features to float64 before adding them up, outside autocast",
    )
    spoiled = changed(_finite(before), _finite(state)) + changed(_finite(reference.weights()), _finite(trial.weights()))
    require(not spoiled, f"{under}{spoiled} are not finite", "upcast before adding up, and check the loss")


def _dtypes(state: Any) -> dict[str, str]:
    return {path: str(leaf.dtype) for path, leaf in leaves(state).items() if isinstance(leaf, Tensor)}


def _finite(state: Any) -> dict[str, Any]:
    return {path: leaf.isfinite() for path, leaf in leaves(state).items() if isinstance(leaf, Tensor)}


def a_compiled_module_gives_the_same_bits(setting: Setting) -> None:
    """With a module of torch.compile (backend "eager", which needs no compiler) the same is learned."""
    batches = [batch_of(5, 0), batch_of(5, 7)]  # of one size: another would be compiled anew
    expected = setting.run(batches=batches).outcome()
    torch.compiler.reset()
    module: Any = torch.compile(small_module(), backend="eager")
    compiled = setting.run(batches=batches, module=module).outcome()
    torch.compiler.reset()
    same(
        expected,
        compiled,
        "a compiled module gave something else",
        "call the module that Lightning hands over; set hooks in setup(), before the first call, and keep them",
    )


CHECKS = [
    state_is_in_the_checkpoint,
    a_resumed_run_equals_an_uninterrupted_one,
    yaml_builds_the_same,
    nothing_is_left_on_the_module,
    evaluating_changes_nothing,
    hostile_batches_are_refused_whole,
    low_precision_is_taken,
    a_compiled_module_gives_the_same_bits,
    it_learns_the_same_on_a_gpu,
]
