"""What Lightning would get wrong by itself, one small test each, where no other file is about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from clkit import Experience
from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.data.loader import EvaluationLoader, TrainLoader, Workers
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy

Make = Callable[..., Any]

# a head stands on a network that trains, and learns nothing in a run that is resumed at its end
pytestmark = pytest.mark.filterwarnings("ignore:.*(the backbone still trains|this fit learned no batch):UserWarning")
LAST = (6, 18, 30)  # steps at which the three experiences end: a longer one follows, since that is what loses batches


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=2, classes_per_experience=4)
    return StreamDataModule("digits:flat", scenario, **options)


class Net(pl.LightningModule):
    """Keeps the rows that it was given, and fails in one of them if told so."""

    def __init__(self, fail_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
        self.fail_at = fail_at
        self.rows: list[list[float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == self.fail_at:
            raise ZeroDivisionError
        self.rows.append(batch[0].sum(1).tolist())
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Listener(pl.Callback):
    """A user's own callback."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        self.events.append(("start", experience.index))

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        self.events.append(("end", experience.index))


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(str(folder), filename="{step}", every_n_train_steps=1, save_top_k=-1)


# ---- resume


@pytest.mark.filterwarnings("ignore:.*the backbone trains for several epochs")  # which is not what it is about
@pytest.mark.parametrize("epochs", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_val_batches": 0},
        pytest.param({"val_check_interval": 0.5}, marks=pytest.mark.slow),
        pytest.param({"max_steps": 99}, marks=pytest.mark.slow),
        {"accumulate_grad_batches": 4},
    ],
    ids=["validated", "not validated", "twice validated", "max_steps", "accumulation"],
)
def test_a_resume_learns_and_announces_what_is_left_and_nothing_else(
    make_trainer: Make, tmp_path: Path, options: dict[str, Any], epochs: int
) -> None:
    """A checkpoint on an experience's last batch comes before its end: the resumed run has to announce it."""
    whole, straight, all_events = Net(), NMC(), Listener()
    callbacks = [straight, all_events, every_step(tmp_path)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, **options)
    trainer.fit(whole, datamodule=stream(epochs_per_experience=epochs))
    assert all_events.events == [(what, index) for index in range(3) for what in ("start", "end")]
    a, b, c = (epochs * step for step in LAST)
    learned = {1: 1, a - 1: 1, a: 1, a + 1: 3, b: 3, b + 1: 5, c: 5}  # batches learned: boundaries announced
    if epochs == 2:
        learned |= {a // 2: 1, a + 12: 3}
    for batches, done in learned.items():
        files = [path for path in tmp_path.glob("*.ckpt") if processed(path) == batches]
        if not files:  # between two steps of an optimizer that accumulates
            continue
        resumed, head, listener = Net(), NMC(), Listener()
        again = make_trainer(callbacks=[listener, head], **options)
        again.fit(resumed, datamodule=stream(epochs_per_experience=epochs), ckpt_path=str(files[0]))
        assert resumed.rows == whole.rows[batches:], batches
        assert listener.events == all_events.events[done:], batches
        assert torch.equal(head.head.statistics.sums, straight.head.statistics.sums), batches
        assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values())), batches
        assert again.global_step == trainer.global_step, batches
        if not options and batches < c:  # the step that Lightning gives to loggers
            assert again.fit_loop.epoch_loop._batches_that_stepped == c, batches


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"max_steps": 99}, marks=pytest.mark.slow), {"max_steps": 18}],
    ids=["open", "beyond", "exact"],
)
@pytest.mark.parametrize("moment", ["on_validation_end", "on_train_epoch_end", "on_train_epoch_start"])
def test_a_checkpoint_between_two_experiences_loses_nothing(
    make_trainer: Make, tmp_path: Path, moment: str, options: dict[str, Any]
) -> None:
    def save(self: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, straight = Net(), NMC()
    make_trainer(callbacks=[straight]).fit(whole, datamodule=stream())
    first = Net()
    make_trainer(callbacks=[NMC(), type("Save", (pl.Callback,), {moment: save})()], **options).fit(
        first, datamodule=stream()
    )
    for path in tmp_path.glob("*.ckpt"):
        resumed, head = Net(), NMC()
        make_trainer(callbacks=[head]).fit(resumed, datamodule=stream(), ckpt_path=str(path))
        assert resumed.rows == whole.rows[processed(path) :], path
        assert torch.equal(head.head.statistics.sums, straight.head.statistics.sums), path


def processed(path: Path) -> int:
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return int(loops["epoch_loop.batch_progress"]["total"]["processed"])


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=:UserWarning")  # Lightning, of the checkpoint of the exception
@pytest.mark.parametrize("fail_at", [(0, 0), (0, 5), (1, 0), (2, 3)])
def test_a_batch_that_was_handed_out_and_not_learned_comes_again(
    make_trainer: Make, tmp_path: Path, fail_at: tuple[int, int]
) -> None:
    """The checkpoint of an exception is written while a batch is in work."""
    whole, straight = Net(), NMC()
    make_trainer(callbacks=[straight]).fit(whole, datamodule=stream())
    first, second, head = Net(fail_at), Net(), NMC()
    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks=[NMC(), OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True).fit(
            first, datamodule=stream()
        )
    make_trainer(callbacks=[head]).fit(second, datamodule=stream(), ckpt_path=str(tmp_path / "on_exception.ckpt"))
    assert first.rows + second.rows == whole.rows
    assert head.head.counts.tolist() == straight.head.counts.tolist()
    assert torch.equal(head.head.statistics.sums, straight.head.statistics.sums)


def test_a_row_that_was_due_when_the_checkpoint_was_written_is_measured(make_trainer: Make, tmp_path: Path) -> None:
    """Without a validation at the boundary the row is measured before the next batch, perhaps by another run."""
    options: dict[str, Any] = {"strategy": "gradient_free", "check_val_every_n_epoch": 1000}

    def evaluation() -> StreamEvaluation:
        return StreamEvaluation(table=False, files=False)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, resumed = evaluation(), evaluation()
    make_trainer(callbacks=[NMC(), whole, Save()], **options).fit(TimmClassifier("identity"), datamodule=stream())
    make_trainer(callbacks=[NMC(), resumed], **options).fit(
        TimmClassifier("identity"), datamodule=stream(), ckpt_path=str(tmp_path / "0.ckpt")
    )
    assert whole.results["nmc"]["accuracy_matrix"][0][0] is not None
    assert resumed.results == whole.results


def test_a_row_of_a_validation_that_was_not_whole_is_null(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation may go on in its middle after a resume: shares of a row would be taken for the whole."""
    whole = EvaluationLoader.__iter__

    def shortened(loader: EvaluationLoader) -> Iterator[Any]:
        batches = list(whole(loader))
        yield from batches[1:] if len(loader.expected_samples()) == 2 else batches

    monkeypatch.setattr(EvaluationLoader, "__iter__", shortened)
    evaluation = StreamEvaluation(table=False, files=False)
    make_trainer(strategy="gradient_free", callbacks=[NMC(), evaluation]).fit(
        TimmClassifier("identity"), datamodule=stream()
    )
    assert [[value is not None for value in row] for row in evaluation.results["nmc"]["accuracy_matrix"]] == [
        [True, False, False],
        [False, False, False],
        [True, True, True],
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}],
    ids=["each epoch", "never", "each second"],
)
@pytest.mark.parametrize("strategy", ["auto", "gradient_free"])
def test_an_end_is_announced_before_whatever_comes_after_it(
    make_trainer: Make, strategy: str, options: dict[str, Any]
) -> None:
    """Before the validation that measures the experience, and before the next epoch where there is none."""

    class Look(Listener):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                self.events.append(("validation", trainer.current_epoch))

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.events.append(("epoch", trainer.current_epoch))

    look = Look()
    make_trainer(strategy=strategy, callbacks=[NMC(), look], **options).fit(Net(), datamodule=stream())
    every = options.get("check_val_every_n_epoch", 1)
    wanted: list[tuple[str, int]] = []
    for index in range(3):
        wanted += [("epoch", index), ("start", index), ("end", index)]
        if "limit_val_batches" not in options and (index + 1) % every == 0:
            wanted.append(("validation", index))
    assert look.events == wanted


# ---- loaders


def with_process(images: Any) -> Tensor:
    """Which process prepared the batch, in its first column."""
    inputs = torch.as_tensor(images).float()
    inputs[:, 0] = os.getpid()
    return inputs


def test_worker_processes_start_once_for_the_whole_stream(make_trainer: Make) -> None:
    """Lightning asks for an iterator twice an epoch, and for a loader in every epoch."""

    class Processes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[int] = set()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen |= {int(process) for process in batch[0][:, 0]}
            return super().training_step(batch, batch_idx)

    module = Processes()
    make_trainer(limit_val_batches=0).fit(module, datamodule=stream(preprocessing=with_process, num_workers=2))
    assert len(module.seen) == 2
    assert os.getpid() not in module.seen


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_asking_for_an_iterator_fetches_nothing(kind: str) -> None:
    """Of the two that Lightning asks for in an epoch it uses one."""
    asked: list[int] = []

    class Counting(Workers):
        def __init__(self) -> None: ...

        def batches(self, keys: list[Any]) -> Iterator[Any]:
            asked.append(len(keys))
            return iter([(key,) for key in keys])

    rows = [np.arange(3), np.arange(3, 5)]
    loader = TrainLoader(Counting(), rows, 0, lambda epoch: 0) if kind == "train" else None
    loader = EvaluationLoader(Counting(), {0: rows}) if loader is None else loader
    iterators = [iter(loader), iter(loader)]
    assert asked == []
    assert len(list(iterators[1])) == 2
    assert asked == [2]


def test_features_are_not_kept_over_batch_statistics_that_moved(make_trainer: Make) -> None:
    """Every weight before the classifier stands still, and yet the features change."""

    class Head(nn.Sequential):
        def get_classifier(self) -> nn.Module:
            return self[2]

    class Moving(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = Head(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))
            self.net[:2].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.05)

    results = []
    for keep in (0, 64):
        evaluation = StreamEvaluation(table=False, files=False, keep_features=keep)
        make_trainer(callbacks=[NMC(), evaluation]).fit(Moving(), datamodule=stream())
        results.append(evaluation.results)
    assert results[0] == results[1]


# ---- strategies


def test_schedules_stand_still_after_a_warm_up(make_trainer: Make) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            self.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": self.schedule}

    module = Scheduled()
    make_trainer(strategy=GradientFreeStrategy(warmup_epochs=2), callbacks=[NMC()]).fit(module, datamodule=stream())
    assert module.schedule.get_last_lr() == [pytest.approx(0.05 / 2**2)]


def test_a_module_in_mid_training_keeps_its_keys_and_children(make_trainer: Make) -> None:
    """What is learned is no part of the user's module, not even while it runs."""
    seen: list[tuple[list[str], list[str]]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            seen.append((list(pl_module.state_dict()), [name for name, _ in pl_module.named_modules()]))

    for strategy in ("auto", "gradient_free"):
        parts = [NMC(), StreamEvaluation(table=False, files=False), Look()]
        make_trainer(strategy=strategy, callbacks=parts).fit(Net(), datamodule=stream())
    bare = Net()
    assert len(seen) == 2 * LAST[-1]
    assert all(look == (list(bare.state_dict()), [name for name, _ in bare.named_modules()]) for look in seen)
