"""Callbacks that read features get those of the incoming batch, whatever else a step runs through the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from clkit.callbacks import NMC
from clkit.data import ClassIncremental, StreamDataModule
from clkit.strategies import OnProStrategy

Make = Callable[..., Any]

NO_CONTRAST = {"instance_new": 0, "instance_mem": 0, "ope_new": 0, "ope_seen": 0, "apf": False}
REPLAY = {**NO_CONTRAST, "first_experience": "replay", "replay_per_class": None}
RULES: dict[str, dict[str, Any]] = {
    "onpro": {"rotation": "none"},
    "er": {**REPLAY, "ce_new_weight": 1, "ce_mean": "joint"},
    "memory only": REPLAY,
    "scr": {**REPLAY, "ce_mem_weight": 0, "contrast": 1},
    "scr and er": {**REPLAY, "ce_new_weight": 1, "contrast": 1},  # the contrast comes after the cross-entropy
}
SHOWN = {"onpro": {True, False}, "er": {True}, "memory only": set(), "scr": {True, False}, "scr and er": {True, False}}


class Rows(pl.Callback):
    """Compares the rows that the strategy calls the stream's with the batch."""

    def __init__(self) -> None:
        self.right: list[bool] = []
        self.forwards: list[Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.net.hidden.register_forward_pre_hook(lambda _, args: self.forwards.append(args[0]))

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.forwards.clear()

    def on_train_batch_end(self, trainer: Any, module: pl.LightningModule, out: Any, batch: Any, index: int) -> None:
        rows = trainer.strategy.stream_rows
        if rows is not None:
            self.right.append(torch.equal(self.forwards[-1][rows], batch[0]))


@pytest.mark.parametrize("identity", [True, False], ids=["identity", "augmented"])
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_the_stream_are_the_batch_as_it_came(
    make_trainer: Make, lit_small: Make, rule: str, identity: bool
) -> None:
    transform = nn.Identity() if identity else lambda image: image + 0.5
    strategy = OnProStrategy(capacity=20, transform=transform, **RULES[rule])
    rows, nmc = Rows(), NMC()
    trainer = make_trainer(strategy=strategy, callbacks=[rows, nmc], limit_train_batches=3)
    trainer.fit(lit_small(), datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)))
    assert all(rows.right)
    assert len(rows.right) >= 6 * (identity in SHOWN[rule])
    # where the batch does not go through the network as it is, a head that wants its features pays for them
    assert strategy.augments_stream == (identity not in SHOWN[rule])
