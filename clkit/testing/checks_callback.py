"""What every callback must do, whatever it learns or watches."""

from __future__ import annotations

import contextlib
import io
import pickle
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from clkit.callbacks import NMC, StreamCallback, StreamEvaluation
from clkit.errors import ClkitError, ContractError
from clkit.stream._lightning import callbacks_of
from clkit.testing import processes
from clkit.testing._compare import PLAIN, changed, far, leaves, require, same, snapshot
from clkit.testing._runs import (
    BATCHES,
    StoppedError,
    batch_of,
    fit,
    random_bits,
    small_module,
    stream,
    trainer,
)
from clkit.testing._surface import surface
from clkit.testing.entries import Entry

__all__ = ["CHECKS", "hostile_batches"]


EXACT = "64-true"  # in float32 the network itself rounds otherwise where batches are cut otherwise


def strategies(entry: Entry) -> list[str]:
    """What every callback is run under: a network that trains with dropout, and one that is frozen."""
    return ["auto"] if entry.needs_gradients else ["auto", "gradient_free"]


# ---- state


def state_is_in_the_checkpoint(entry: Entry, folder: Path) -> None:
    """What it learned is in the file, as tensors and plain values, under its own key, and a new one loads it."""
    for strategy in strategies(entry):
        callback = entry.make()
        _, run = fit(folder, [callback], strategy=strategy)
        path = folder / f"{strategy}.ckpt"
        run.save_checkpoint(path)
        for place, leaf in leaves(callback.state_dict()).items():
            require(
                isinstance(leaf, PLAIN),
                f"state_dict() holds a {type(leaf).__module__}.{type(leaf).__qualname__} at {place}",
                "keep tensors and plain values only: files are loaded with weights_only=True",
            )
        try:
            checkpoint = torch.load(path, weights_only=True)
        except pickle.UnpicklingError as error:
            require(False, f"the file does not load with weights_only=True: {error}", "keep plain values only")
        require(
            list(checkpoint["state_dict"]) == list(small_module().state_dict()),
            f"the module's own keys became {list(checkpoint['state_dict'])}",
            "keep what is learned in the callback's state_dict(), not as a part of the user's module",
        )
        learned, blank = snapshot(entry, callback), snapshot(entry, entry.make())
        if entry.learns:
            require(
                bool(changed(blank, learned)),
                "after a fit state_dict() is that of a new one",
                "return what was learned from state_dict() (of a StreamCallback: stream_state())",
            )
        if callback.state_dict():
            require(
                callback.state_key in checkpoint["callbacks"],
                f"the checkpoint has no entry {callback.state_key!r}, it has {sorted(checkpoint['callbacks'])}",
                "let state_key depend on nothing but class and name",
            )
            fresh = entry.make()
            fresh.load_state_dict(checkpoint["callbacks"][callback.state_key])
            same(
                snapshot(entry, callback, followed=True),
                snapshot(entry, fresh, followed=True),
                "a new one that loaded the saved state holds or predicts something else",
                "restore everything in load_state_dict(), sizes included",
            )


def a_resumed_run_equals_an_uninterrupted_one(entry: Entry, folder: Path) -> None:
    """A run resumed in mid-experience, at an experience's last batch or at a boundary ends with the same bits."""
    last = BATCHES[0]
    for strategy in strategies(entry):
        place = folder / strategy
        whole = entry.make()
        module, run = fit(place, _followed(whole), strategy=strategy)
        expected = _outcome(entry, whole, module)
        saved = entry.make()
        savers = [
            ModelCheckpoint(str(place), filename="{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(str(place), filename="end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1),
        ]
        module, run = fit(place, [*_followed(saved), *savers], strategy=strategy, enable_checkpointing=True)
        same(
            expected,
            _outcome(entry, saved, module),
            f"under {strategy!r}, saving checkpoints on the way changed what was learned",
            "let state_dict() read only",
        )
        for when in (f"step={last - 2}", f"step={last}", "end-epoch=0", f"step={last + 3}", f"step={sum(BATCHES)}"):
            resumed = entry.make()
            module, run = fit(place, _followed(resumed), strategy=strategy, resume=place / f"{when}.ckpt")
            require(
                run.global_step == sum(BATCHES),
                f"under {strategy!r}, resumed from {when} it made {run.global_step} steps of {sum(BATCHES)}",
                "derive from StreamCallback, or call its hooks",
            )
            same(
                expected,
                _outcome(entry, resumed, module),
                f"under {strategy!r}, a run resumed from {when} of parts with {BATCHES} batches ended otherwise",
                "save everything that a later batch depends on, counters included",
            )


def _followed(callback: Any) -> list[Any]:
    """A callback, and one that restores the random state of a resumed run where it does not do so itself."""
    return [callback] if isinstance(callback, StreamCallback) else [callback, StreamCallback()]


def _outcome(entry: Entry, callback: Any, module: pl.LightningModule) -> dict[str, Any]:
    return {"callback": snapshot(entry, callback, followed=True), "module": dict(module.state_dict())}


# ---- neighbours


def order_of_callbacks_does_not_matter(entry: Entry, folder: Path) -> None:
    """First or last among others, it learns the same bits, those of a run of its own, and so do the others."""
    for strategy in strategies(entry):
        alone = entry.make()
        fit(folder, [alone], strategy=strategy)
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
                    f"under {strategy!r}, others learned something else beside it",
                    "change nothing that others read: the batch, the module, the random state",
                )
        same(among[0], among[1], f"under {strategy!r}, it depends on its place in the list", "read only in hooks")
        subset_or_same(entry, snapshot(entry, alone, followed=True), among[0], f"under {strategy!r}, beside others")


def subset_or_same(entry: Entry, alone: dict[str, Any], beside: dict[str, Any], what: str) -> None:
    """Requires that a callback learned alone what it learned beside others; one that watches may have seen more."""
    if not entry.learns:
        kept = leaves(alone)
        beside = {path: leaf for path, leaf in leaves(beside).items() if path in kept}
        alone = kept
    same(alone, beside, f"{what} it learned something else than alone", "depend on the stream only, not on others")


def _neighbours(entry: Entry) -> list[Any]:
    """A head and an evaluation, unless that is what is checked."""
    others = [NMC(name="neighbour"), StreamEvaluation(table=False, files=False)]
    return [other for other in others if other.state_key != entry.make().state_key]


def _of_neighbour(callback: Any) -> dict[str, Any]:
    entry = Entry("neighbour", "callback", type(callback), volatile=("seconds",))
    return snapshot(entry, callback, followed=True)


def _without(callback: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation saw, without the rows of the method that is checked."""
    name = getattr(callback, "name", None)
    rows = seen.get("rows")
    if isinstance(rows, dict) and name in rows:
        seen = {**seen, "rows": {predictor: row for predictor, row in rows.items() if predictor != name}}
    return seen


def training_is_left_alone(entry: Entry, folder: Path) -> None:
    """Weights, optimizer, what the module logs and the global random state are those of a run without it."""
    if entry.changes_training:
        raise unittest.SkipTest("the entry says that it changes training")
    for strategy in strategies(entry):
        plain, watched = (_everything(folder, callbacks, strategy) for callbacks in ([], [entry.make()]))
        for what in plain:
            same(
                plain[what],
                watched[what],
                f"under {strategy!r}, {what} of a run with it differ from those of a run without it",
                "draw random numbers from a generator of its own, forward in eval mode under no_grad, touch no weight",
            )


def _everything(folder: Path, callbacks: Sequence[Any], strategy: str) -> dict[str, Any]:
    module, run = fit(folder, callbacks, strategy=strategy)
    return {
        "the weights": dict(module.state_dict()),
        "optimizer states": [optimizer.state_dict() for optimizer in run.optimizers],
        "the module's metrics": run.callback_metrics.get("val_loss"),
        "global random states": random_bits(),
    }


def nothing_is_left_on_the_module(entry: Entry, folder: Path) -> None:
    """After a fit, an evaluation and a failed fit no hook, attribute or mode of the module is changed."""

    def run_all(callbacks: Callable[[], list[Any]], strategy: str, kind: str) -> list[str]:
        module = small_module(fails_at=2 if kind == "a failed fit" else None)
        module.net[2].eval()
        module.net[0].bias.requires_grad_(False)
        before = surface(module)
        run = trainer(folder, callbacks(), strategy=strategy)
        data = stream()
        try:
            if kind == "an evaluation":
                run.validate(module, datamodule=data, verbose=False)
                run.test(module, datamodule=data, verbose=False)
                run.predict(module, datamodule=data)
            else:
                run.fit(module, datamodule=data)
        except StoppedError:
            pass
        return changed(before, surface(module))

    for strategy in strategies(entry):
        for kind in ("a fit", "an evaluation", "a failed fit"):
            own = run_all(list, strategy, kind)
            left = [path for path in run_all(lambda: [entry.make()], strategy, kind) if path not in own]
            require(
                not left,
                f"under {strategy!r}, {kind} left something on the module: {', '.join(left)}",
                "undo in teardown() what setup() did, and in on_exception(), after which no teardown() comes",
            )


def evaluating_changes_nothing(entry: Entry, folder: Path) -> None:
    """Validating at every opportunity, and validate, test and predict afterwards, change no bit of what is learned."""
    for strategy in strategies(entry):
        ends = []
        every: list[dict[str, Any]] = [{"limit_val_batches": 0}, {"val_check_interval": 1, "num_sanity_val_steps": -1}]
        for options in every:
            callback = entry.make()
            module, run = fit(folder, [callback], strategy=strategy, **options)
            ends.append(_outcome(entry, callback, module))
        if entry.learns:
            same(ends[0], ends[1], f"under {strategy!r}, validations on the way changed what was learned", "read only")
        for verb in (run.validate, run.test):
            verb(module, datamodule=stream(), verbose=False)
        run.predict(module, datamodule=stream())
        same(
            ends[1],
            _outcome(entry, callback, module),
            f"under {strategy!r}, validate, test or predict changed what was learned",
            "learn in training hooks only",
        )


# ---- batches


def hostile_batches() -> dict[str, tuple[Tensor, Tensor]]:
    """Batches that nothing may be learned of, by what is wrong with them; most in the last row."""
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
    good = [batch_of(5, 0), batch_of(5, 7)]
    advice = "check the whole batch before the first number is changed"

    def learn(callback: Any, batches: list[Any], strategy: str) -> None:
        fit(folder, [callback], batches=batches, module=small_module(rate=0), strategy=strategy)

    for strategy in strategies(entry):
        clean = entry.make()
        learn(clean, good, strategy)
        expected = snapshot(entry, clean)
        for what, bad in hostile_batches().items():
            met = entry.make()
            try:
                learn(met, [*good, bad], strategy)
                require(
                    not entry.learns,
                    f"under {strategy!r}, a batch with {what} was taken",
                    "raise clkit.errors.BatchError, which says what was seen and what is allowed",
                )
            except ClkitError as error:
                if isinstance(error, ContractError):
                    raise
            same(expected, snapshot(entry, met), f"under {strategy!r}, a batch with {what} changed the state", advice)
        for one in (clean, met):
            learn(one, [batch_of(5, 11)], strategy)
        same(
            snapshot(entry, clean),
            snapshot(entry, met),
            f"under {strategy!r}, one that refused a batch learned the next one otherwise",
            advice,
        )


def empty_and_single_row_batches_are_taken(entry: Entry, folder: Path) -> None:
    """Batches of one row are learned; those of none, or without a label, change nothing."""
    good = [batch_of(5, 0), batch_of(1, 7), batch_of(3, 9)]
    inputs, targets = batch_of(4, 20)
    idle = [(inputs, torch.full_like(targets, -1)), (inputs[:0], targets[:0]), (inputs[:1], torch.tensor([-1]))]
    for strategy in strategies(entry):
        ends = []
        for batches in (good, [idle[0], good[0], idle[1], good[1], idle[2], *good[2:]]):
            callback = entry.make()
            fit(folder, [callback], batches=batches, module=small_module(rate=0), strategy=strategy)
            ends.append(snapshot(entry, callback))
        if entry.learns:
            same(
                ends[0],
                ends[1],
                f"under {strategy!r}, batches of no row or of unlabelled rows (-1) changed what was learned",
                "leave rows with target -1 out, and return early where none is left",
            )


# ---- precision, compilation, devices


def low_precision_is_taken(entry: Entry, folder: Path) -> None:
    """With bf16-mixed, bf16-true and 16-mixed it runs, and its state keeps dtypes and stays finite."""
    for strategy in strategies(entry):
        reference = entry.make()
        fit(folder, [reference], strategy=strategy)
        kinds = _dtypes(snapshot(entry, reference))
        for precision in ("bf16-mixed", "bf16-true", "16-mixed"):  # on a CPU Lightning makes bf16-mixed of the last
            callback = entry.make()
            fit(folder, [callback], strategy=strategy, precision=precision)
            state = snapshot(entry, callback)
            require(
                _dtypes(state) == kinds,
                f"under {strategy!r} with precision {precision!r} dtypes are {_dtypes(state)}, else {kinds}",
                "upcast features to float64 before adding them up, outside autocast",
            )
            spoiled = changed(_finite(snapshot(entry, reference)), _finite(state))
            require(not spoiled, f"with precision {precision!r} {spoiled} are not finite", "upcast before adding up")


def _finite(state: dict[str, Any]) -> dict[str, Any]:
    return {path: leaf.isfinite() for path, leaf in leaves(state).items() if isinstance(leaf, Tensor)}


def _dtypes(state: dict[str, Any]) -> dict[str, str]:
    return {path: str(leaf.dtype) for path, leaf in leaves(state).items() if isinstance(leaf, Tensor)}


def a_compiled_module_gives_the_same_bits(entry: Entry, folder: Path) -> None:
    """With a module of torch.compile (backend "eager", which needs no compiler) the same is learned."""
    batches = [batch_of(5, 0), batch_of(5, 7)]  # of one size: another would be compiled anew
    for strategy in strategies(entry):
        ends = []
        for compile_it in (False, True):
            torch.compiler.reset()
            callback, module = entry.make(), small_module()
            compiled: Any = torch.compile(module, backend="eager") if compile_it else module
            fit(folder, [callback], batches=batches, module=compiled, strategy=strategy)
            ends.append(_outcome(entry, callback, module))
        torch.compiler.reset()
        same(
            ends[0],
            ends[1],
            f"under {strategy!r}, a compiled module gave something else",
            "set hooks in setup(), before the first call, and keep them for the run",
        )


def it_learns_the_same_on_a_gpu(entry: Entry, folder: Path) -> None:
    """On a CUDA device, also with 16-mixed, it runs; in float32 its state is that of a CPU within 1e-3."""
    if not torch.cuda.is_available():
        raise unittest.SkipTest("there is no CUDA device")
    for strategy in strategies(entry):
        ends = []
        for accelerator, precision in (("cpu", "32-true"), ("gpu", "32-true"), ("gpu", "16-mixed")):
            callback = entry.make()
            fit(
                folder,
                [callback],
                module=small_module(rate=0),
                strategy=strategy,
                accelerator=accelerator,
                precision=precision,
            )
            ends.append(_on_cpu(callback.state_dict() if entry.learns else {}))
        require(
            _dtypes(ends[1]) == _dtypes(ends[2]) == _dtypes(ends[0]),
            f"under {strategy!r} dtypes differ between devices",
            "upcast features before adding them up",
        )
        apart = [path for path in far(ends[0], ends[1], 1e-3) if "position" not in path]
        require(
            not apart, f"under {strategy!r} a GPU gave another state: {apart}", "keep state on the features' device"
        )


def _on_cpu(state: Any) -> dict[str, Any]:
    return {path: leaf.cpu() if isinstance(leaf, Tensor) else leaf for path, leaf in leaves(state).items()}


# ---- construction and processes


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
    """What stands in the YAML file.

    Raises:
        unittest.SkipTest: If there is none.
    """
    written = entry.configuration
    if written is None:
        raise unittest.SkipTest("make is no class of a module; give the entry `yaml`")
    return written


def from_yaml(folder: Path, options: dict[str, Any]) -> pl.Trainer:
    """The trainer that a command line builds from a file with these settings of it."""
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


def two_processes_equal_one(entry: Entry, folder: Path) -> None:
    """Two processes (gloo) on shares of the stream end with the same state, that of one process, and save it once."""
    reports = processes.run(entry, folder)
    for strategy in strategies(entry):
        one, two = (report[strategy] for report in reports)
        if entry.processes == "refused":
            require(
                one["refused"] is not None and two["refused"] is not None,
                f"under {strategy!r}, two processes were not refused",
                "raise a ClkitError on all of them",
            )
            continue
        require(one["refused"] is None, f"it refused: {one['refused']}", 'declare processes="refused"')
        same(
            one["state"],
            two["state"],
            f"under {strategy!r}, two processes hold different states after a fit",
            "sum over processes on all of them, in on_experience_end or on_train_end",
        )
        fresh = entry.make()
        if one["saved"] is not None:
            fresh.load_state_dict(one["saved"])
            seen = f"under {strategy!r}, the file of two processes holds another state than they do"
            same(one["state"], snapshot(entry, fresh), seen, "sum over processes in state_dict()")
        if entry.processes == "exact":
            alone = entry.make()
            fit(folder, [alone], module=small_module(rate=0), strategy=strategy, precision=EXACT)
            apart = far(_essence(snapshot(entry, alone)), _essence(one["state"]), entry.tolerance)
            require(
                not apart,
                f"under {strategy!r}, two processes learned something else than one, at {', '.join(apart)}",
                "sum over processes once; what differs by rounding alone goes by the entry's tolerance",
            )


def _essence(state: dict[str, Any]) -> dict[str, Any]:
    """What is predicted and counted, where it predicts (the same sums can be held in many ways), else all."""
    if "scores(features)" not in state:
        return state
    return {
        path: leaf
        for path, leaf in leaves(state).items()
        if path == "/scores(features)" or not (isinstance(leaf, Tensor) and leaf.is_floating_point())
    }


def learn_in_a_process(entry: Entry, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """One process's part of :func:`two_processes_equal_one`, on a network that stays as it is."""
    report: dict[str, Any] = {}
    for strategy in strategies(entry):
        callback = entry.make()
        path = folder / f"{strategy}.ckpt"
        try:
            _, run = fit(
                folder,
                [callback],
                module=small_module(rate=0),
                strategy="ddp" if strategy == "auto" else strategy,
                devices=world,
                precision=EXACT,
            )
        except ClkitError as error:
            report[strategy] = {"refused": str(error)}
            continue
        run.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)["callbacks"].get(callback.state_key)
        report[strategy] = {"refused": None, "state": snapshot(entry, callback), "saved": saved}
    return report


CHECKS: list[Callable[[Entry, Path], None]] = [
    state_is_in_the_checkpoint,
    a_resumed_run_equals_an_uninterrupted_one,
    order_of_callbacks_does_not_matter,
    training_is_left_alone,
    nothing_is_left_on_the_module,
    evaluating_changes_nothing,
    hostile_batches_are_refused_whole,
    empty_and_single_row_batches_are_taken,
    low_precision_is_taken,
    a_compiled_module_gives_the_same_bits,
    yaml_builds_the_same,
    it_learns_the_same_on_a_gpu,
    two_processes_equal_one,
]
