"""What every callback and every strategy must do."""

from __future__ import annotations

import unittest
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from clkit.callbacks import StreamCallback
from clkit.errors import ClkitError, ContractError
from clkit.schema import STRATEGY, STREAM
from clkit.testing import processes
from clkit.testing._compare import changed, far, leaves, require, same
from clkit.testing._runs import BATCHES, StoppedError, batch_of, fit, loader, seed, small_module, stream
from clkit.testing._surface import surface
from clkit.testing._trials import BESIDE, EXACT, Setting, Trial, settings
from clkit.testing.entries import Entry

__all__ = [
    "a_compiled_module_gives_the_same_bits",
    "a_resumed_run_equals_an_uninterrupted_one",
    "evaluating_changes_nothing",
    "hostile_batches_are_refused_whole",
    "it_learns_the_same_on_a_gpu",
    "learn_in_a_process",
    "low_precision_is_taken",
    "nothing_is_left_on_the_module",
    "own_part",
    "two_processes_equal_one",
]

FOLLOWED = ("cut", "cut_in_update")  # where in the stream a strategy of clkit's base says it is


def a_resumed_run_equals_an_uninterrupted_one(entry: Entry, folder: Path) -> None:
    """A run resumed in mid-experience, at an experience's last batch or at a boundary ends with the same bits."""
    # one that knows nothing of streams needs someone beside it who restores the random state
    follows = entry.kind == "strategy" or isinstance(entry.make(), StreamCallback)
    for setting in settings(entry, folder):
        place = folder / str(setting.strategy)
        savers = [
            ModelCheckpoint(str(place), filename="{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(str(place), filename="end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1),
        ]

        def ended(*savers: Any, setting: Setting = setting, **options: Any) -> Trial:
            return setting.run(beside=[*savers, *([] if follows else [StreamCallback()])], **options)

        expected = ended().outcome()
        same(
            expected,
            ended(*savers, enable_checkpointing=True).outcome(),
            f"{setting.under}saving checkpoints on the way changed what was learned",
            "let state_dict() and save_checkpoint() read only",
        )
        first = setting.first_steps
        steps = first + sum(BATCHES[1:])
        for when in (f"step={first - 2}", f"step={first}", "end-epoch=0", f"step={first + 3}", f"step={steps}"):
            resumed = ended(resume=place / f"{when}.ckpt")
            made = resumed.trainer.global_step
            require(
                made == steps,
                f"{setting.under}resumed from {when} it made {made} steps of {steps}",
                "derive from StreamCallback or LearningStrategy, or call its hooks",
            )
            same(
                expected,
                resumed.outcome(),
                f"{setting.under}a run resumed from {when} of parts with {BATCHES} batches ended otherwise",
                "save everything that a later batch depends on, counters included",
            )


class _Failing(pl.Callback):
    """Fails in the second experience."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            raise StoppedError


def nothing_is_left_on_the_module(entry: Entry, folder: Path) -> None:
    """After a fit, an evaluation and a failed fit no hook, part, attribute or mode of the module is changed."""
    kinds = ("a fit", "an evaluation", "a failed fit")
    for setting in settings(entry, folder):
        for kind in kinds:
            beside = [_Failing()] if kind == "a failed fit" else []
            plain = Setting(entry, folder).trainer(setting.strategy or "auto", beside)
            own = _left(plain, kind)
            left = [path for path in _left(setting.trainer(entry.make(), beside), kind) if path not in own]
            require(
                not left,
                f"{setting.under}{kind} left something on the module: {', '.join(left)}",
                "undo in teardown() what connect() and setup() did; a callback also in on_exception(), after which no "
                "teardown() comes",
            )


def _left(run: pl.Trainer, kind: str) -> list[str]:
    """Name what of the module is not as it was before the run."""
    module = small_module()
    module.net[2].eval()
    module.net[0].bias.requires_grad_(False)
    before, data = surface(module), stream()
    try:
        if kind == "an evaluation":
            _evaluate(run, module, data)
        else:
            run.fit(module, datamodule=data)
    except StoppedError:
        pass
    return changed(before, surface(module))


def _evaluate(run: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
    run.validate(module, datamodule=data, verbose=False)
    run.test(module, datamodule=data, verbose=False)
    run.predict(module, datamodule=data)


def evaluating_changes_nothing(entry: Entry, folder: Path) -> None:
    """Validating at every opportunity, and validate, test and predict afterwards, change no bit of what is learned."""
    for setting in settings(entry, folder):
        quiet = setting.run(limit_val_batches=0)
        watched = setting.run(val_check_interval=1, num_sanity_val_steps=-1)
        end = watched.outcome()
        if entry.learns or entry.kind == "strategy":
            seen = f"{setting.under}validations on the way changed what was learned"
            same(quiet.outcome(), end, seen, "change nothing in validation hooks")
        _evaluate(watched.trainer, watched.module, stream())
        seen = f"{setting.under}validate, test or predict changed what was learned"
        same(end, watched.outcome(), seen, "learn in training hooks only")


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


def hostile_batches_are_refused_whole(entry: Entry, folder: Path) -> None:
    """A malformed batch raises a ClkitError and leaves what was learned bitwise as it was; learning can go on."""
    if entry.kind == "strategy" and not entry.learns:
        raise unittest.SkipTest("the entry says that it learns nothing of its own: batches go to the user's module")
    advice = "check the whole batch before the first number is changed"
    for setting in settings(entry, folder):
        clean, expected = _after(setting, batch_of(5, 40) if entry.learns else None)
        for what, bad in hostile_batches().items():
            met, found = _after(setting, bad, what)
            same(expected, found, f"{setting.under}a batch with {what} changed weights or what was learned", advice)
        if entry.kind == "callback":
            ends = [
                setting.run(method=one, batches=[batch_of(5, 11)], module=setting.fixed_module())
                for one in (clean, met)
            ]
            seen = f"{setting.under}one that refused a batch learned the next one otherwise"
            same(ends[0].learned(followed=False), ends[1].learned(followed=False), seen, advice)


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
            f"{setting.under}a batch with {hostile} was taken",
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
    own = own_part(trial)
    for key in FOLLOWED:  # one run ended, the other was ended
        own.get(STRATEGY, {}).pop(key, None)
    return method, {"weights": trial.weights(), "own": own}


def own_part(trial: Trial) -> dict[str, Any]:
    """Give what of a strategy's checkpoint neither Lightning writes nor whatever follows a stream."""
    checkpoint, others = trial.saved(), {*_plain_keys(), STREAM}
    return {key: value for key, value in checkpoint.items() if key not in others}


@cache
def _plain_keys() -> frozenset[str]:
    with TemporaryDirectory() as name:
        module, run = fit(Path(name), [])
        return frozenset(Trial(Setting(BESIDE, Path(name)), None, module, run).saved())


# ---- precision, compilation, devices, processes


def low_precision_is_taken(entry: Entry, folder: Path) -> None:
    """With bf16-mixed, bf16-true and 16-mixed it runs; weights and state keep dtypes and stay finite."""
    for setting in settings(entry, folder):
        reference = setting.run()
        for precision in ("bf16-mixed", "bf16-true", "16-mixed"):  # on a CPU Lightning makes bf16-mixed of the last
            _sound(reference, setting.run(precision=precision), precision)


def it_learns_the_same_on_a_gpu(entry: Entry, folder: Path) -> None:
    """On a CUDA device, also with 16-mixed, it runs; in float32 a callback's state is that of a CPU within 1e-3."""
    if not torch.cuda.is_available():
        raise unittest.SkipTest("there is no CUDA device")
    for setting in settings(entry, folder):
        reference = setting.run(module=setting.fixed_module(), precision="32-true")
        for precision in ("32-true", "16-mixed"):
            trial = setting.run(module=setting.fixed_module(), accelerator="gpu", precision=precision)
            _sound(reference, trial, precision)
            if entry.kind == "callback" and entry.learns and precision == "32-true":
                apart = far(_state(reference), _on_cpu(_state(trial)), 1e-3)
                seen = f"{setting.under}a GPU gave another state: {apart}"
                require(not apart, seen, "keep state on the features' device")


def _sound(reference: Trial, trial: Trial, precision: str) -> None:
    """Require that weights and state have the dtypes that they should and are finite where the reference's are."""
    under = f"{trial.setting.under}with precision {precision!r} "
    kinds = set(_dtypes(trial.weights()).values())
    expected = "torch.bfloat16" if precision == "bf16-true" else "torch.float32"
    require(kinds == {expected}, f"{under}weights are {kinds}", "leave dtypes to the precision plugin")
    state, before = _state(trial), _state(reference)
    require(
        _dtypes(state) == _dtypes(before),
        f"{under}dtypes are {_dtypes(state)}, else {_dtypes(before)}",
        "upcast features to float64 before adding them up, outside autocast",
    )
    spoiled = changed(_finite(before), _finite(state)) + changed(_finite(reference.weights()), _finite(trial.weights()))
    require(not spoiled, f"{under}{spoiled} are not finite", "upcast before adding up, and check the loss")


def _state(trial: Trial) -> dict[str, Any]:
    """Give what the callback saves."""
    return dict(trial.callback.state_dict())


def _dtypes(state: dict[str, Any]) -> dict[str, str]:
    return {path: str(leaf.dtype) for path, leaf in leaves(state).items() if isinstance(leaf, Tensor)}


def _finite(state: dict[str, Any]) -> dict[str, Any]:
    return {path: leaf.isfinite() for path, leaf in leaves(state).items() if isinstance(leaf, Tensor)}


def _on_cpu(state: Any) -> dict[str, Any]:
    return {path: leaf.cpu() if isinstance(leaf, Tensor) else leaf for path, leaf in leaves(state).items()}


def a_compiled_module_gives_the_same_bits(entry: Entry, folder: Path) -> None:
    """With a module of torch.compile (backend "eager", which needs no compiler) the same is learned."""
    batches = [batch_of(5, 0), batch_of(5, 7)]  # of one size: another would be compiled anew
    for setting in settings(entry, folder):
        ends = []
        for compile_it in (False, True):
            torch.compiler.reset()
            module: Any = torch.compile(small_module(), backend="eager") if compile_it else small_module()
            ends.append(setting.run(batches=batches, module=module).outcome())
        torch.compiler.reset()
        same(
            ends[0],
            ends[1],
            f"{setting.under}a compiled module gave something else",
            "call the module that Lightning hands over; set hooks in setup(), before the first call, and keep them",
        )


def two_processes_equal_one(entry: Entry, folder: Path) -> None:
    """Two processes (gloo) on shares of the stream end with the same state, that of one process, and save it once."""
    reports = processes.run(entry, folder)
    for setting in settings(entry, folder):
        ends = [report[str(setting.strategy)] for report in reports]
        exact, one = processes.agreed(entry, ends, setting.under), ends[0]
        if one["refused"] is not None:
            continue
        alone = setting.run(module=setting.fixed_module(), precision=EXACT)
        if one["saved"] is not None:
            fresh = alone.of_callback.make()
            fresh.load_state_dict(one["saved"])
            seen = f"{setting.under}the file of two processes holds another state than they do"
            held = Trial(setting, fresh, alone.module, alone.trainer).learned(followed=False)
            same(one["end"]["learned"], held, seen, "sum over processes in state_dict()")
        if exact:
            apart = far(_essence(_end(alone)), _essence(one["end"]), entry.tolerance)
            require(
                not apart,
                f"{setting.under}two processes learned something else than one, at {', '.join(apart)}",
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


def learn_in_a_process(entry: Entry, folder: Path, world: int) -> dict[str, Any]:
    """Do one process's part of :func:`two_processes_equal_one`."""
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
