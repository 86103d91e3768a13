"""What Lightning itself loses when a fit goes on from a checkpoint, and what clkit gets back, under any strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import LitSmall
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from clkit.callbacks import NMC, StreamCallback
from clkit.data import ClassIncremental, StreamDataModule
from clkit.strategies import LearningStrategy

Make = Callable[..., Any]
LENGTH = 5  # batches of an epoch
STRATEGIES = {"lightning's": lambda: "auto", "clkit's": LearningStrategy}


class Plateau(LitSmall):
    """A schedule that waits for a plateau, and finds one at once."""

    interval = "epoch"
    monitor = "train_loss"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        config = {"scheduler": schedule, "monitor": self.monitor, "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config}


class OfValidation(Plateau):
    """The same, for a value of the validation."""

    monitor = "val_acc"


class OfSteps(Plateau):
    """The same, at every step."""

    interval = "step"


class Double(LitSmall):
    """A network of float64, built in ``setup``."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(1)
        self.late = torch.nn.Linear(10, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.late(super().forward(inputs))


def run(
    make_trainer: Make, kind: Any, strategy: str, *callbacks: Any, resume: str | None = None, **options: Any
) -> Any:
    torch.manual_seed(0)
    module = kind()
    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=2), epochs_per_experience=2, batch_size=64)
    trainer = make_trainer(
        strategy=STRATEGIES[strategy](), callbacks=[StreamCallback(), *callbacks], limit_train_batches=LENGTH, **options
    )
    trainer.fit(module, datamodule=stream, ckpt_path=resume)
    return module, trainer


def checkpoints(
    make_trainer: Make, kind: Any, strategy: str, folder: Path, **options: Any
) -> tuple[Any, dict[int, str]]:
    saving = ModelCheckpoint(str(folder), every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module, _ = run(make_trainer, kind, strategy, saving, enable_checkpointing=True, **options)
    return module, {int(file.stem.partition("=")[2]): str(file) for file in folder.glob("step=*.ckpt")}


def same(one: pl.LightningModule, two: pl.LightningModule) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [Plateau, OfValidation])
def test_a_plateau_is_seen_after_a_resume_within_an_epoch(
    make_trainer: Make, tmp_path: Path, strategy: str, kind: Any
) -> None:
    module, files = checkpoints(make_trainer, kind, strategy, tmp_path)
    for step in (2, LENGTH + 1, 2 * LENGTH + 3):
        resumed, trainer = run(make_trainer, kind, strategy, resume=files[step])
        assert same(module, resumed), step
        assert trainer.optimizers[0].param_groups[0]["lr"] < 0.05


@pytest.mark.parametrize(("kind", "step"), [(Plateau, 0), (OfSteps, 3)])
def test_a_step_of_a_plateau_that_is_lost_is_said(make_trainer: Make, tmp_path: Path, kind: Any, step: int) -> None:
    _, files = checkpoints(make_trainer, kind, "lightning's", tmp_path)
    with pytest.warns(
        UserWarning,
        match=rf"before ReduceLROnPlateau looked at 'train_loss' of its last {'epoch' if not step else 'batch'}",
    ):
        run(make_trainer, kind, "lightning's", resume=files[step or LENGTH])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [LitSmall, Double])
def test_double_weights_are_not_rounded_on_their_way(
    make_trainer: Make, tmp_path: Path, strategy: str, kind: Any
) -> None:
    module, files = checkpoints(make_trainer, kind, strategy, tmp_path, precision="64-true")
    assert next(module.parameters()).dtype == torch.float64
    resumed, trainer = run(make_trainer, kind, strategy, resume=files[3], precision="64-true")
    assert same(module, resumed)
    last = str(max(files.items())[1])
    trainer = make_trainer(strategy=STRATEGIES[strategy](), callbacks=[StreamCallback()], precision="64-true")
    fresh = kind()
    trainer.validate(fresh, datamodule=StreamDataModule("digits:flat"), ckpt_path=last, verbose=False)
    saved = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("stateful", [False, True])
def test_a_plain_loader_that_begins_anew_within_an_epoch_is_said(
    make_trainer: Make, tmp_path: Path, stateful: bool
) -> None:
    class Stateful(DataLoader[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Nothing is counted here: whether there is a position is all that is asked."""

    def loader() -> DataLoader[Any]:
        rows = TensorDataset(torch.rand(40, 64), torch.arange(40) % 10)
        return (Stateful if stateful else DataLoader)(rows, batch_size=10)

    saving = ModelCheckpoint(str(tmp_path), every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[NMC(), saving]).fit(LitSmall(), loader())
    for step, within in ((2, True), (4, False)):
        trainer = make_trainer(max_epochs=2, callbacks=[head := NMC()])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(LitSmall(), loader(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        lost = [str(each.message) for each in said if "has no position" in str(each.message)]
        assert len(lost) == int(within and not stateful)
        assert all("after batch 2 of an epoch" in message for message in lost)
        assert int(head.head.counts.sum()) == 80


class Counting(IterableDataset[Any]):
    """Rows in order, which knows where it is; ``length`` is how many it says there are, if anything."""

    def __init__(self, length: int | None) -> None:
        self.at = 0
        if length is not None:
            self.__class__ = type("Sized", (type(self),), {"__len__": lambda self: length})

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        while self.at < 50:
            self.at += 1
            yield torch.full((64,), float(self.at)), self.at % 10
        self.at = 0


class Placed(DataLoader[Any]):
    """A loader with a position, as torchdata's stateful one has it."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.dataset.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.at = state["at"]


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("length", [None, 50])
def test_iterable_data_with_a_position_goes_on_there_and_says_where_a_batch_was_fetched_ahead(
    make_trainer: Make, tmp_path: Path, length: int | None
) -> None:
    class Seen(pl.Callback):
        def __init__(self) -> None:
            self.first: list[int] = []

        def on_train_batch_end(
            self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.first.append(int(batch[0][0, 0]))

    saving = ModelCheckpoint(str(tmp_path), every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[StreamCallback(), saving]).fit(
        LitSmall(), Placed(Counting(length), batch_size=10)
    )
    trainer = make_trainer(max_epochs=1, callbacks=[StreamCallback(), seen := Seen()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(LitSmall(), Placed(Counting(length), batch_size=10), ckpt_path=str(tmp_path / "step=2.ckpt"))
    ahead = [str(each.message) for each in said if "fetched a batch ahead" in str(each.message)]
    assert (seen.first, len(ahead)) == (([31, 41], 1) if length is None else ([21, 31, 41], 0))
