"""DST beside what it was not trained as: other streams, other settings, and fits that go on from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import quiet_trainer
from sparse_runs import DIGITS, LABELS, Net, outputs, quick, run, stream
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import DST
from clkit.data import Blurry, ClassIncremental, StreamDataModule, TaskIncremental
from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.methods import PruneSchedule

LOADER = DataLoader(TensorDataset(DIGITS[:64], torch.from_numpy(LABELS[:64])), batch_size=8)


def trained(folder: Path, dst: DST, **options: Any) -> str:
    """Path of the checkpoint of a finished run."""
    _, _, trainer = run(folder, dst, data=stream(epochs_per_experience=1, **options))
    trainer.save_checkpoint(folder / "end.ckpt")
    return str(folder / "end.ckpt")


def evaluate(folder: Path, dst: DST, data: Any, ckpt: str, how: str = "validate", module: Any = None) -> None:
    trainer = quiet_trainer(folder, callbacks=[dst])
    getattr(trainer, how)(module or Net(), datamodule=data, ckpt_path=ckpt, weights_only=True)


# ---- other streams


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two tasks")
    return folder, trained(folder, quick(), stop_after=2)


def other(scenario: Any, **options: Any) -> StreamDataModule:
    return StreamDataModule("digits", scenario, batch_size=14, **options)


BACKWARDS = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (TaskIncremental(experiences=5, class_order=BACKWARDS), "classes 8, 9, and task 0 was trained on 0, 1"),
        (ClassIncremental(experiences=2), "classes 0, 1, 2, 3, 4, and task 0 was trained on 0, 1"),
    ],
)
def test_another_stream_is_refused(checkpoint: tuple[Path, str], scenario: Any, said: str, how: str) -> None:
    folder, path = checkpoint
    advice = r"what was learned is of another stream; use its scenario and seed, or evaluate inside `with callback\.act"
    with pytest.raises(ConfigurationError, match=f"DST: experience 1 has the {said}: {advice}"):
        evaluate(folder, quick(), other(scenario), path, how)


def test_the_same_classes_in_the_same_experiences_are_taken(checkpoint: tuple[Path, str]) -> None:
    folder, path = checkpoint
    for data in (stream(), stream(stop_after=1), other(ClassIncremental(experiences=5)), stream(relabel=True)):
        evaluate(folder, quick(), data, path)


def test_inside_of_a_block_any_stream_is_evaluated(checkpoint: tuple[Path, str]) -> None:
    folder, path = checkpoint
    dst, module = quick(), Net()
    dst.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["DST"])
    trainer, data = quiet_trainer(folder, callbacks=[dst]), other(TaskIncremental(experiences=5, class_order=BACKWARDS))
    with dst.activate(1, module):
        trainer.validate(module, datamodule=data)
    with pytest.raises(ConfigurationError, match="of another stream"):
        trainer.validate(module, datamodule=data)


def test_a_stream_whose_classes_come_again_is_evaluated(tmp_path: Path) -> None:
    def data() -> StreamDataModule:
        return other(Blurry(3, disjoint=0.2, blur=0.3), epochs_per_experience=1)

    _, _, trainer = run(tmp_path, quick(schedule=PruneSchedule(update_every=1)), data=data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    evaluate(tmp_path, quick(schedule=PruneSchedule(update_every=1)), data(), str(tmp_path / "end.ckpt"))


def test_what_plain_loaders_trained_is_not_compared_with_a_stream(tmp_path: Path) -> None:
    """Their targets may be counted otherwise, and a later loader may hold earlier classes, too."""
    dst, module = quick(schedule=PruneSchedule(update_every=1)), Net()
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, callbacks=[dst], max_epochs=1)
        trainer.fit(module, LOADER)
    data, before = stream(), outputs(dst, module, 0)
    trainer.validate(module, datamodule=data)
    assert {*data.experiences[0].classes} != {*dst._networks.about[0]["class_ids"]}  # what is refused of a stream
    assert torch.equal(outputs(dst, module, 0), before)


# ---- other settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": []}, r"head must be \[\], the saved state has \['head'\]"),
        ({"head": "body.4"}, r"head must be \['body.4'\], the saved state has \['head'\]"),
        ({"exclude": ["body.0"]}, r"exclude must be 'body.0', the saved state has ''"),
        ({"side_state": "freeze_after_first"}, "side_state must be 'freeze_after_first', the saved.*'per_task'"),
        (
            {"schedule": PruneSchedule(update_every=5)},
            r"schedule must be 'PruneSchedule\(update_every=5\)', the saved.*'PruneSchedule\(update_every=2\)'",
        ),
    ],
)
def test_settings_that_a_checkpoint_would_overrule_are_refused(
    checkpoint: tuple[Path, str], options: dict[str, Any], said: str
) -> None:
    folder, path = checkpoint
    for how in ("validate", "fit"):
        with pytest.raises(StateError, match=f"{said}; use the settings of the saved run"):
            evaluate(folder, quick(**options), stream(epochs_per_experience=1, stop_after=2), path, how)


def test_the_same_head_by_another_name_and_older_files_are_taken(checkpoint: tuple[Path, str]) -> None:
    folder, path = checkpoint
    evaluate(folder, quick(head="head"), stream(), path)
    saved = torch.load(path, weights_only=True)
    del saved["callbacks"]["DST"]["settings"]  # as of a release that had none
    torch.save(saved, folder / "older.ckpt")
    evaluate(folder, quick(), stream(), str(folder / "older.ckpt"))


def test_a_loaded_callback_asks_for_the_module_of_its_networks(checkpoint: tuple[Path, str]) -> None:
    _, path = checkpoint
    saved, dst, module = torch.load(path, weights_only=True), quick(), Net()
    dst.load_state_dict(saved["callbacks"]["DST"])
    assert dst.tasks == 2
    with pytest.raises(ArgumentError, match=r"give the module whose networks they are: activate\(1, module\)"):
        outputs(dst, module, 1)
    module.load_state_dict(saved["state_dict"])
    with dst.activate(0, module):
        assert not torch.equal(module.head.weight, saved["state_dict"]["head.weight"])


# ---- fits with plain loaders that go on


def test_a_fit_from_the_checkpoint_of_a_finished_task_says_that_it_is_another(tmp_path: Path) -> None:
    def fit(epochs: int, ckpt: Path | None = None) -> tuple[DST, Any]:
        dst = quick(schedule=PruneSchedule(update_every=1))
        trainer = quiet_trainer(tmp_path, callbacks=[dst], max_epochs=epochs)
        trainer.fit(Net(), LOADER, ckpt_path=ckpt and str(ckpt), weights_only=True)
        return dst, trainer

    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match="task 0 was over, so this fit is another, task 1. To train one for"):
        dst, _ = fit(2, tmp_path / "end.ckpt")
    assert dst.tasks == 2
    fit(1, tmp_path / "end.ckpt")  # in which nothing is left to train: it says nothing


def test_a_fit_after_one_that_failed_in_a_task_says_that_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Net):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.fails and batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    dst, module = quick(schedule=PruneSchedule(update_every=1)), Fails()

    def fit() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            quiet_trainer(tmp_path, callbacks=[dst], max_epochs=1).fit(module, LOADER)
        return [each.message for each in caplog.records if "goes on" in each.message]

    with pytest.raises(ZeroDivisionError):
        fit()
    module.fails = False
    assert fit() == ["clkit: DST goes on with task 0, interrupted at step 3 of 8"]
    assert dst.tasks == 1
    assert fit() == []  # it is the next task
