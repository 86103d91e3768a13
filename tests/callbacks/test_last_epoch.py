"""Heads beside a network that trains for several epochs: what is stale is said, and the last epoch can be had alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from small_runs import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, NMC, HeadCallback
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError
from clkit.testing._compare import changed

Make = Callable[..., Any]
DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)
EPOCHS = 3
# what is said of any backbone that trains on from one experience to the next
pytestmark = pytest.mark.filterwarnings("ignore:.*the backbone still trains")


class Watch(pl.Callback):
    """Features and targets of each training batch by epoch, by the network as it is before the step."""

    def __init__(self) -> None:
        self.rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            features = torch.relu(pl_module.net.hidden(batch[0])).double()
        self.rows.setdefault(trainer.current_epoch, []).append((features, batch[1]))


def stream() -> dict[str, Any]:
    options: dict[str, Any] = {"batch_size": 64, "epochs_per_experience": EPOCHS}
    return {"datamodule": StreamDataModule("digits:flat", ClassIncremental(experiences=2), **options)}


def plain() -> dict[str, Any]:
    return {"train_dataloaders": DataLoader(TensorDataset(X, Y), 64, shuffle=True)}


def heads() -> list[HeadCallback]:
    return [NMC("euclidean", epochs="last"), AEFOCL(balance="none", epochs="last")]


@pytest.mark.parametrize("data", [stream, plain])
def test_the_sums_are_those_of_one_pass_with_the_network_of_the_last_epoch(
    make_trainer: Make, lit_small: Make, data: Any
) -> None:
    watch, (nmc, ridge) = Watch(), heads()
    epochs = {"max_epochs": EPOCHS} if data is plain else {}
    make_trainer(callbacks=[ridge, nmc, watch], limit_val_batches=0, **epochs).fit(lit_small(), **data())
    last = [epoch for epoch in watch.rows if epoch % EPOCHS == EPOCHS - 1]
    assert len(last) == (1 if data is plain else 2)
    x, y = (
        torch.cat(part).numpy() for part in zip(*(pair for epoch in last for pair in watch.rows[epoch]), strict=True)
    )
    sums = np.stack([x[y == label].sum(0) for label in range(10)])
    assert nmc.head.counts.tolist() == ridge.head.counts.tolist() == np.bincount(y).tolist()
    assert np.abs(nmc.head.statistics.sums.numpy() - sums).max() <= 1e-5 * np.abs(sums).max()
    wanted = np.linalg.solve(x.T @ x + np.eye(16), x.T @ np.eye(10)[y]).T
    assert np.abs(ridge.head.linear_readout()[0].numpy() - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_resume_learns_the_same_epochs(tmp_path: Path, lit_small: Make) -> None:
    def states(path: Path | None) -> list[Any]:
        torch.manual_seed(0)
        learned = heads()
        save = ModelCheckpoint(tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(tmp_path, callbacks=[*learned, *([save] if path is None else [])], limit_val_batches=0)
        trainer.fit(lit_small(), **stream(), ckpt_path=path)
        return [dict(head.head.state_dict()) for head in learned]

    whole = states(None)
    for step in (12, 20, 28, 40):  # in the first epochs and in the last of each experience, of 8 batches an epoch
        assert changed(states(tmp_path / f"all/step={step}.ckpt"), whole) == []


def test_where_the_last_epoch_is_not_known_beforehand_the_fit_is_refused(make_trainer: Make, lit_small: Make) -> None:
    for options, named in (
        ({"max_epochs": -1, "max_steps": 9}, "max_epochs=-1 and max_steps=9 may end"),
        ({"max_epochs": 9, "extra": [EarlyStopping("train_loss")]}, "EarlyStopping may end"),
        ({"max_epochs": 9, "max_time": "00:01:00:00"}, "Timer may end"),
    ):
        trainer = make_trainer(callbacks=[NMC(epochs="last"), *options.pop("extra", [])], **options)  # type: ignore[attr-defined]  # a list
        with pytest.raises(ConfigurationError, match=named):
            trainer.fit(lit_small(), **plain())
    with pytest.raises(ArgumentError, match="epochs must be"):
        NMC(epochs="first")  # type: ignore[arg-type]  # the mistake
    make_trainer(callbacks=[NMC(epochs="last")], fast_dev_run=True, max_epochs=None).fit(lit_small(), **plain())


def test_what_a_fit_that_ends_early_did_not_learn_is_said(make_trainer: Make, lit_small: Make) -> None:
    trainer = make_trainer(callbacks=heads()[:1], max_steps=12, limit_val_batches=0)
    with pytest.warns(UserWarning, match="ended before|this fit learned no batch") as said:
        trainer.fit(lit_small(), **stream())
    wanted = "NMC(nmc): the fit ended before the last epoch of its experience, of which epochs='last' learned nothing"
    assert [str(each.message) for each in said].count(wanted) == 1


@pytest.mark.parametrize("strategy", ["auto", "gradient_free"])
def test_a_second_epoch_is_said_once_where_it_does_something(
    make_trainer: Make, lit_small: Make, strategy: str
) -> None:
    trains = strategy == "auto"
    stale, again = "trains for several epochs, so what was learned in earlier ones", "counts each sample again"
    trainer = make_trainer(callbacks=[NMC(), AEFOCL(balance="none")], strategy=strategy, limit_val_batches=0)
    with pytest.warns(UserWarning, match="epochs='last'") as said:
        trainer.fit(lit_small(), **stream())
    messages = [str(each.message) for each in said]
    owners = {part: [message.split(":")[0] for message in messages if part in message] for part in (stale, again)}
    assert owners == {
        stale: ["NMC(nmc)", "AEFOCL(aef_ocl)"] * trains,  # each once
        again: ["AEFOCL(aef_ocl)"] * (not trains),
    }
    assert all("epochs='last'" in message for message in messages if stale in message or again in message)
