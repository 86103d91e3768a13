"""However a fit ends, the state that it reached is measured, with the weights that a validation would see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from sklearn.datasets import load_digits
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule

pytestmark = pytest.mark.filterwarnings("ignore:NMC")
DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])
        self.log("seen", 0.5)  # never better, so that early stopping ends the fit

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopError(Exception):
    pass


class Late(pl.Callback):
    """Asks for the end as Lightning's ``Timer`` does for ``max_time``, at a step that no clock decides."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step == 20


class Raise(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 20:
            raise StopError


ENDS: dict[str, Callable[[], dict[str, Any]]] = {
    "early stopping": lambda: {"max_epochs": 60, "callbacks": [EarlyStopping("seen", patience=1)]},
    "max_steps": lambda: {"max_epochs": -1, "max_steps": 20},
    "max_time": lambda: {"max_epochs": 60, "callbacks": [Late()]},
    "exception": lambda: {"max_epochs": 60, "callbacks": [Raise()]},
}


def test_a_fit_that_fails_before_its_first_row_says_why(tmp_path: Path) -> None:
    """Also where the untrained network was measured, so that there are results without a row to draw."""

    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise StopError

    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=2), evaluate="all")
    trainer = quiet_trainer(tmp_path, strategy="auto", callbacks=[StreamEvaluation(table=False)], max_epochs=-1)
    with pytest.raises(StopError):
        trainer.fit(Fails(), datamodule=stream)


@pytest.mark.parametrize(
    ("end", "streamed"),
    # a stream refuses early stopping, which would end it within an experience
    [(end, streamed) for end in ENDS for streamed in (False, True) if not (streamed and end == "early stopping")],
)
def test_the_state_reached_is_measured_and_written(tmp_path: Path, end: str, streamed: bool) -> None:
    options = ENDS[end]()
    if streamed and end != "max_steps":
        options["max_epochs"] = -1
    module, nmc, evaluation = Net(), NMC(), StreamEvaluation(table=False, figures=False)
    callbacks = [evaluation, nmc, *options.pop("callbacks", [])]  # the evaluation first: the order must not matter
    trainer = quiet_trainer(tmp_path, strategy="auto", callbacks=callbacks, **options)
    data: dict[str, Any] = {
        "train_dataloaders": DataLoader(TensorDataset(X[::2], Y[::2]), 64),
        "val_dataloaders": DataLoader(TensorDataset(X[1::2], Y[1::2]), 64),
    }
    if streamed:
        options_of_stream: dict[str, Any] = {"batch_size": 64, "epochs_per_experience": 2}
        stream = StreamDataModule("digits:flat", ClassIncremental(experiences=2), **options_of_stream)
        data = {"datamodule": stream}
    try:
        trainer.fit(module, **data)
    except StopError:
        assert end == "exception"
    document = json.loads((tmp_path / "results.json").read_text())
    stages = len(document["predictors"]["nmc"]["accuracy_seen"])
    if streamed:
        batches = [(batch[0], batch[1]) for batch in stream.evaluation_loader(stages - 1)]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    else:
        x, y = X[1::2], Y[1::2]
    with torch.no_grad():
        own = module.eval().net(x).argmax(1)
        near = nmc.scores(module.net[:2](x).double()).argmax(1)
    for name, predicted in (("module", own), ("nmc", near)):
        assert document["predictors"][name]["final_accuracy"] == pytest.approx(float((predicted == y).double().mean()))
    assert document["cut_short"] == ([] if end == "early stopping" and not streamed else [stages])


def test_averaged_weights_are_measured_whoever_runs_the_pass(tmp_path: Path) -> None:
    def measured(**options: Any) -> Any:
        evaluation = StreamEvaluation(table=False, files=False)
        callbacks = [evaluation, EMAWeightAveraging(decay=0.9)]
        trainer = quiet_trainer(tmp_path, strategy="auto", callbacks=callbacks, **options)
        trainer.fit(Net(), datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=3)))
        return evaluation.results["module"]["accuracy_matrix"]

    assert measured() == measured(check_val_every_n_epoch=1000)  # Lightning's validations, and passes of its own


def test_each_fit_with_plain_loaders_is_an_experience_also_where_steps_end_it(tmp_path: Path) -> None:
    evaluation, nmc = StreamEvaluation(table=False, files=False), NMC(reset_each_task=True)
    loaders = []
    for first in (0, 5):
        rows = (first <= Y) & (first + 5 > Y)
        loaders.append(DataLoader(TensorDataset(X[rows], Y[rows]), 64))
        trainer = quiet_trainer(tmp_path, strategy="auto", callbacks=[nmc, evaluation], max_epochs=-1, max_steps=3)
        trainer.fit(Net(), loaders[-1], loaders)
    assert len(evaluation.results["nmc"]["accuracy_seen"]) == 2
