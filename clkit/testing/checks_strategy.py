"""What every strategy must do, however it makes an update of a batch."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from clkit.callbacks import NMC
from clkit.errors import ClkitError, ContractError
from clkit.schema import STRATEGY
from clkit.stream._lightning import callbacks_of
from clkit.testing import processes
from clkit.testing._compare import PLAIN, changed, far, leaves, require, same, snapshot
from clkit.testing._runs import (
    BATCHES,
    StoppedError,
    batch_of,
    fit,
    loader,
    seed,
    small_module,
    stream,
    trainer,
)
from clkit.testing._surface import surface
from clkit.testing.checks_callback import EXACT, configuration, from_yaml, hostile_batches
from clkit.testing.entries import Entry

__all__ = ["CHECKS"]

FOLLOWED = ("cut", "cut_in_update")  # where in the stream a strategy of clkit's base says it is
BESIDE = Entry("a head beside it", "callback", NMC)


def outcome(folder: Path, run: Any, **options: Any) -> dict[str, Any]:
    """What a run ends with: its file without the loops' progress, and a head that learned beside.

    Args:
        folder: Where files land.
        run: A strategy, or a trainer that has one and an :class:`NMC`.
        options: Of :func:`fit`; ``callbacks`` come beside the head.
    """
    if isinstance(run, pl.Trainer):
        module, run = fit(folder, [], run=run, **options)
    else:
        callbacks = [NMC(), *options.pop("callbacks", [])]
        module, run = fit(folder, callbacks, strategy=run, **options)
    head = next(callback for callback in callbacks_of(run) if isinstance(callback, NMC))
    path = folder / "end.ckpt"
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    kept = {key: value for key, value in checkpoint.items() if key not in ("loops", "callbacks")}
    return {**kept, "head beside": snapshot(BESIDE, head), "weights": dict(module.state_dict())}


def steps_of(entry: Entry) -> int:
    """Batches of the whole stream, with a warm-up's."""
    return sum(BATCHES) + getattr(entry.make(), "warmup_epochs", 0) * BATCHES[0]


def it_is_built_by_name_and_from_yaml(entry: Entry, folder: Path) -> None:
    """Its registered name, its class path in a YAML file and Python build the same strategy."""
    expected = outcome(folder, entry.make())
    beside = {"callbacks": [{"class_path": "clkit.callbacks.NMC"}]}
    ways: dict[str, Callable[[], pl.Trainer]] = {
        "its class path in a YAML file": lambda: from_yaml(folder, {**beside, "strategy": configuration(entry)})
    }
    if entry.registered is not None:
        name = entry.registered
        ways["its name in a YAML file"] = lambda: from_yaml(folder, {**beside, "strategy": name})
        ways["its name in Python"] = lambda: trainer(folder, [NMC()], strategy=name)
    for way, build in ways.items():
        run, wanted = build(), type(entry.make())
        require(
            type(run.strategy) is wanted,
            f"{way} gave a {type(run.strategy).__name__}, not a {wanted.__name__}",
            "register the class itself, with a default for every argument",
        )
        same(expected, outcome(folder, run), f"built by {way} it did something else", "use the same arguments")


def a_run_can_be_repeated(entry: Entry, folder: Path) -> None:
    """The same seed gives the same bits."""
    same(
        outcome(folder, entry.make()),
        outcome(folder, entry.make()),
        "two runs of one seed differ",
        "draw random numbers from the global generators or from seeded ones of its own",
    )


def it_fits_again_and_evaluates(entry: Entry, folder: Path) -> None:
    """Fit, validate, test, predict and a second fit work, and validate on a trainer that never fitted."""
    module = small_module()
    run = trainer(folder, [NMC()], strategy=entry.make(), max_epochs=1)
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
    trainer(folder, [], strategy=entry.make()).validate(module, datamodule=stream(), verbose=False)
    _finite(module, "after two fits")


def the_file_is_the_users(entry: Entry, folder: Path) -> None:
    """A checkpoint has the module's own keys, holds plain values, and loads under a plain Trainer."""
    fit(folder, [], strategy=entry.make())
    _, run = fit(folder, [], strategy=entry.make())
    path = folder / "run.ckpt"
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    require(
        list(checkpoint["state_dict"]) == list(small_module().state_dict()),
        f"the module's own keys became {list(checkpoint['state_dict'])}",
        "move the tensors of the strategy's own parts to a key of its own in save_checkpoint()",
    )
    own = own_part(entry, folder, checkpoint)
    for place, leaf in leaves(own).items():
        require(
            isinstance(leaf, PLAIN),
            f"the checkpoint holds a {type(leaf).__module__}.{type(leaf).__qualname__} at {place}",
            "keep tensors and plain values only",
        )
    if entry.learns:
        require(bool(own), "the checkpoint has nothing of the strategy's own", "save it in save_checkpoint()")
    trainer(folder, []).validate(
        small_module(), datamodule=stream(), ckpt_path=str(path), weights_only=True, verbose=False
    )


def own_part(entry: Entry, folder: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint Lightning's simplest strategy does not write."""
    _, run = fit(folder, [])
    run.save_checkpoint(folder / "plain.ckpt")
    plain = torch.load(folder / "plain.ckpt", weights_only=True)
    return {key: value for key, value in checkpoint.items() if key not in plain}


def a_resumed_run_equals_an_uninterrupted_one(entry: Entry, folder: Path) -> None:
    """A run resumed in mid-experience, at an experience's last batch or at a boundary ends with the same bits."""
    expected = outcome(folder, entry.make())
    first = steps_of(entry) - sum(BATCHES[1:])  # the last batch of the first experience
    saver = ModelCheckpoint(str(folder), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    end = ModelCheckpoint(str(folder), filename="end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    found = outcome(folder, entry.make(), callbacks=[saver, end], enable_checkpointing=True)
    same(expected, found, "saving checkpoints on the way changed the run", "let save_checkpoint() read only")
    for when in (f"step={first - 2}", f"step={first}", "end-epoch=0", f"step={first + 3}", f"step={steps_of(entry)}"):
        same(
            expected,
            outcome(folder, entry.make(), resume=folder / f"{when}.ckpt"),
            f"a run resumed from {when} ended otherwise",
            "save the strategy's own state, and derive what phase it is in from the restored epoch",
        )


def nothing_is_left_on_the_module(entry: Entry, folder: Path) -> None:
    """After a fit, an evaluation and a failed fit no hook, part, attribute or mode of the module is changed."""

    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                raise StoppedError

    def run_all(strategy: Any, kind: str) -> list[str]:
        module = small_module()
        module.net[2].eval()
        module.net[0].bias.requires_grad_(False)
        before = surface(module)
        run = trainer(folder, [Failing()] if kind == "a failed fit" else [], strategy=strategy)
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

    for kind in ("a fit", "an evaluation", "a failed fit"):
        own = run_all("auto", kind)
        left = [path for path in run_all(entry.make(), kind) if path not in own]
        require(
            not left,
            f"{kind} left something on the module: {', '.join(left)}",
            "undo in teardown() what connect() and setup() did",
        )


def evaluating_changes_nothing(entry: Entry, folder: Path) -> None:
    """Validating at every opportunity changes no bit of what is trained or learned."""
    quiet = outcome(folder, entry.make(), limit_val_batches=0)
    watched = outcome(folder, entry.make(), val_check_interval=1, num_sanity_val_steps=-1)
    same(quiet, watched, "validations on the way changed the run", "change nothing in validation hooks")


def low_precision_is_taken(entry: Entry, folder: Path) -> None:
    """With bf16-mixed, bf16-true and 16-mixed it runs, and weights keep their dtype and stay finite."""
    for precision in ("bf16-mixed", "bf16-true", "16-mixed"):  # on a CPU Lightning makes bf16-mixed of the last
        head = NMC()
        module, _ = fit(folder, [head], strategy=entry.make(), precision=precision)
        expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
        kinds = {parameter.dtype for parameter in module.parameters()}
        require(kinds == {expected}, f"with {precision} weights are {kinds}", "leave dtypes to the precision plugin")
        _finite(module, f"with {precision}")


def a_compiled_module_gives_the_same_bits(entry: Entry, folder: Path) -> None:
    """With a module of torch.compile (backend "eager", which needs no compiler) the same is learned."""
    ends = []
    for compile_it in (False, True):
        torch.compiler.reset()
        module = small_module()
        given: Any = torch.compile(module, backend="eager") if compile_it else module
        end = outcome(folder, entry.make(), module=given, batches=[batch_of(5, 0), batch_of(5, 7)])
        ends.append({**end, "weights": dict(module.state_dict())})
    torch.compiler.reset()
    same(ends[0], ends[1], "a compiled module gave something else", "call the module that Lightning hands over")


def hostile_batches_are_refused_whole(entry: Entry, folder: Path) -> None:
    """A malformed batch raises a ClkitError, and leaves the weights and what was learned as they were."""
    if not entry.learns:
        raise unittest.SkipTest("the entry says that it learns nothing of its own: batches go to the user's module")
    good = [batch_of(5, 0), batch_of(5, 7)]
    expected = _after(entry, folder, [*good, batch_of(5, 40)])
    for what, bad in hostile_batches().items():
        same(
            expected,
            _after(entry, folder, [*good, bad], what),
            f"a batch with {what} changed weights or what was learned",
            "check the whole batch before the first number is changed",
        )


def _after(entry: Entry, folder: Path, batches: list[Any], hostile: str | None = None) -> dict[str, Any]:
    """Weights and the strategy's own part when the last batch, if not refused, was about to be learned."""

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if hostile is None and batch_idx == len(batches) - 1:
                raise StoppedError

    module, strategy = small_module(), entry.make()
    run = trainer(folder, [Stop()], strategy=strategy, max_epochs=1)
    seed(1)
    try:
        run.fit(module, loader(batches))
        require(hostile is None, f"a batch with {hostile} was taken", "raise clkit.errors.BatchError")
    except StoppedError:
        pass
    except ClkitError as error:
        if isinstance(error, ContractError):
            raise
    path = folder / "after.ckpt"
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    own = own_part(entry, folder, checkpoint)
    for key in FOLLOWED:  # one run ended, the other was ended
        own.get(STRATEGY, {}).pop(key, None)
    return {"weights": dict(module.state_dict()), "own": own}


def it_runs_on_a_gpu(entry: Entry, folder: Path) -> None:
    """On a CUDA device, also with 16-mixed, it runs and weights stay finite."""
    if not torch.cuda.is_available():
        raise unittest.SkipTest("there is no CUDA device")
    for precision in ("32-true", "16-mixed"):
        module, _ = fit(folder, [NMC()], strategy=entry.make(), accelerator="gpu", precision=precision)
        _finite(module, f"on a GPU with {precision}")


def two_processes_agree(entry: Entry, folder: Path) -> None:
    """Two processes (gloo) end with the same weights and state; exact ones with those of one process."""
    reports = processes.run(entry, folder)
    if entry.processes == "refused":
        require(
            all(report["refused"] is not None for report in reports),
            "two processes were not refused",
            "raise a ClkitError on all of them",
        )
        return
    for report in reports:
        require(report["refused"] is None, f"it refused: {report['refused']}", 'declare processes="refused"')
    same(
        reports[0]["end"],
        reports[1]["end"],
        "two processes hold different weights or states after a fit",
        "reduce gradients over processes (super().training_step() or self.model(x) does), broadcast what is drawn",
    )
    if entry.processes == "exact":
        head = NMC()
        module, _ = fit(folder, [head], strategy=entry.make(), precision=EXACT)
        alone = {"weights": dict(module.state_dict()), "head beside": snapshot(BESIDE, head)}
        apart = far(alone, reports[0]["end"], entry.tolerance)
        require(not apart, f"two processes gave something else than one, at {', '.join(apart)}", "sum over processes")


def learn_in_a_process(entry: Entry, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """One process's part of :func:`two_processes_agree`."""
    head = NMC()
    try:
        module, run = fit(folder, [head], strategy=entry.make(), devices=world, precision=EXACT)
    except ClkitError as error:
        return {"refused": str(error)}
    run.save_checkpoint(folder / "two.ckpt")
    return {"refused": None, "end": {"weights": dict(module.state_dict()), "head beside": snapshot(BESIDE, head)}}


def _finite(module: pl.LightningModule, when: str) -> None:
    spoiled = [name for name, value in module.state_dict().items() if not bool(_all_finite(value))]
    require(not spoiled, f"{when} {spoiled} are not finite", "check the loss")


def _all_finite(value: Tensor) -> Tensor:
    return value.isfinite().all()


CHECKS: list[Callable[[Entry, Path], None]] = [
    it_is_built_by_name_and_from_yaml,
    a_run_can_be_repeated,
    it_fits_again_and_evaluates,
    the_file_is_the_users,
    a_resumed_run_equals_an_uninterrupted_one,
    nothing_is_left_on_the_module,
    evaluating_changes_nothing,
    low_precision_is_taken,
    a_compiled_module_gives_the_same_bits,
    hostile_batches_are_refused_whole,
    it_runs_on_a_gpu,
    two_processes_agree,
]
