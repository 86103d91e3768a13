"""What every strategy must do, however it makes an update of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl

from clkit.callbacks import NMC
from clkit.stream._lightning import callbacks_of
from clkit.testing import checks_shared as shared
from clkit.testing._compare import require, same
from clkit.testing._runs import batch_of, fit, loader, seed, small_module, stream, trainer
from clkit.testing._trials import Setting, Trial, checked_file
from clkit.testing.checks_callback import configuration, from_yaml
from clkit.testing.entries import Entry

__all__ = ["CHECKS"]


def it_is_built_by_name_and_from_yaml(entry: Entry, folder: Path) -> None:
    """Its registered name, its class path in a YAML file and Python build the same strategy."""
    setting = Setting(entry, folder)
    expected = setting.run().outcome()
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
        module, run = fit(folder, [], run=run)
        head = next(callback for callback in callbacks_of(run) if isinstance(callback, NMC))
        found = Trial(setting, head, module, run).outcome()
        same(expected, found, f"built by {way} it did something else", "use the same arguments")


def a_run_can_be_repeated(entry: Entry, folder: Path) -> None:
    """The same seed gives the same bits."""
    setting = Setting(entry, folder)
    same(
        setting.run().outcome(),
        setting.run().outcome(),
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
    spoiled = [name for name, value in module.state_dict().items() if not bool(value.isfinite().all())]
    require(not spoiled, f"after two fits {spoiled} are not finite", "check the loss")


def the_file_is_the_users(entry: Entry, folder: Path) -> None:
    """A checkpoint has the module's own keys, holds plain values, and loads under a plain Trainer."""
    trial = Setting(entry, folder).run()
    own = shared.own_part(trial)
    checked_file(trial, own, "the checkpoint")
    if entry.learns:
        require(bool(own), "the checkpoint has nothing of the strategy's own", "save it in save_checkpoint()")
    path = str(folder / "run.ckpt")
    trial.trainer.save_checkpoint(path)
    trainer(folder, []).validate(small_module(), datamodule=stream(), ckpt_path=path, weights_only=True, verbose=False)


CHECKS: list[Callable[[Entry, Path], None]] = [
    it_is_built_by_name_and_from_yaml,
    a_run_can_be_repeated,
    it_fits_again_and_evaluates,
    the_file_is_the_users,
    shared.a_resumed_run_equals_an_uninterrupted_one,
    shared.nothing_is_left_on_the_module,
    shared.evaluating_changes_nothing,
    shared.low_precision_is_taken,
    shared.a_compiled_module_gives_the_same_bits,
    shared.hostile_batches_are_refused_whole,
    shared.it_learns_the_same_on_a_gpu,
    shared.two_processes_equal_one,
]
