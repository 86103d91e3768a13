"""What every callback and every strategy must do in a run."""

from __future__ import annotations

import contextlib
import unittest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.callbacks import NMC
from clkit.errors import ClkitError, ContractError
from clkit.schema import STRATEGY
from clkit.testing import processes
from clkit.testing._compare import changed, far, leaves, require, same, surface
from clkit.testing._runs import (
    EXACT,
    Setting,
    StoppedError,
    Trial,
    batch_of,
    loader,
    seed,
    settings,
    small_module,
    snapshot,
    stream,
    trainer,
)
from clkit.testing.entries import Entry

__all__ = [
    "a_compiled_module_gives_the_same_bits",
    "evaluating_changes_nothing",
    "hostile_batches_are_refused_whole",
    "it_learns_the_same_on_a_gpu",
    "low_precision_is_taken",
    "nothing_is_left_on_the_module",
    "two_processes_equal_one",
]


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


# ---- batches


def hostile_batches() -> dict[str, tuple[Tensor, Tensor]]:
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
    advice = "check the whole batch before the first number is changed"
    clean, expected = _after(setting, batch_of(5, 40) if entry.learns else None)
    for what, bad in hostile_batches().items():
        met, found = _after(setting, bad, what)
        same(expected, found, f"a batch with {what} changed weights or what was learned", advice)
    if entry.kind == "callback":
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
    seed(1)
    try:
        run.fit(module, loader(good if last is None else [*good, last]))
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
    for key in ("cut", "cut_in_update"):  # of a strategy of clkit's base: one run ended, the other was ended
        own.get(STRATEGY, {}).pop(key, None)
    return method, {"weights": trial.weights(), "own": own}


# ---- precision, compilation, devices, processes


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
    kinds = set(_dtypes(trial.weights()).values())
    expected = "torch.bfloat16" if precision == "bf16-true" else "torch.float32"
    require(kinds == {expected}, f"{under}weights are {kinds}", "leave dtypes to the precision plugin")
    state, before = trial.callback.state_dict(), reference.callback.state_dict()
    require(
        _dtypes(state) == _dtypes(before),
        f"{under}dtypes are {_dtypes(state)}, else {_dtypes(before)}",
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


def two_processes_equal_one(setting: Setting) -> None:
    """Two processes (gloo) on shares of the stream end with the same state, that of one process, and save it once."""
    entry = setting.entry
    reports = processes.run(entry, setting.folder, _learn_in_a_process)
    ends = [report[str(setting.strategy)] for report in reports]
    exact, one = processes.agreed(entry, ends), ends[0]
    if one["refused"] is not None:
        return
    alone = setting.run(module=setting.fixed_module(), precision=EXACT)
    if one["saved"] is not None:
        fresh = NMC() if entry.kind == "strategy" else entry.make()
        fresh.load_state_dict(one["saved"])
        held = snapshot(fresh, entry.volatile, followed=False)
        seen = "the file of two processes holds another state than they do"
        same(one["end"]["learned"], held, seen, "sum over processes in state_dict()")
    if exact:
        apart = far(_essence(_end(alone)), _essence(one["end"]), entry.tolerance)
        require(
            not apart,
            f"two processes learned something else than one, at {', '.join(apart)}",
            "sum over processes once; what differs by rounding alone goes by the entry's tolerance",
        )


def _end(trial: Trial) -> dict[str, Any]:
    return {"weights": trial.weights(), "learned": trial.learned(followed=False)}


def _essence(end: dict[str, Any]) -> dict[str, Any]:
    """Give weights, and what is predicted and counted where it predicts (the same sums can be held in many ways)."""
    learned = end["learned"]
    if "scores(features)" in learned:
        learned = {
            path: leaf
            for path, leaf in leaves(learned).items()
            if path == "/scores(features)" or not (isinstance(leaf, Tensor) and leaf.is_floating_point())
        }
    return {**end, "learned": learned}


def _learn_in_a_process(entry: Entry, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Do one process's part of :func:`two_processes_equal_one`, in all settings."""
    report: dict[str, Any] = {}
    for setting in settings(entry, folder):
        options = {"strategy": "ddp"} if setting.strategy == "auto" else {}
        try:
            trial = setting.run(module=setting.fixed_module(), devices=world, precision=EXACT, **options)
        except ClkitError as error:
            report[str(setting.strategy)] = {"refused": str(error)}
            continue
        saved = trial.saved()["callbacks"].get(trial.callback.state_key)
        report[str(setting.strategy)] = {"refused": None, "end": _end(trial), "saved": saved}
    return report
