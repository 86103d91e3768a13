"""Callbacks that read features get those of the incoming batch, whatever else a step runs through the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from clkit.callbacks import NMC
from clkit.data import ClassIncremental, StreamDataModule
from clkit.methods import OnProLosses
from clkit.strategies import DERPPStrategy, ERStrategy, OnProStrategy, SCRStrategy

Make = Callable[..., Any]

METHODS: dict[str, Callable[..., Any]] = {
    "onpro": partial(OnProStrategy, losses=OnProLosses(rotation="none")),
    "er": ERStrategy,
    "der_pp": DERPPStrategy,
    "memory only": partial(
        OnProStrategy, losses=OnProLosses(instance_new=0, instance_mem=0, ope_new=0, ope_seen=0), mixing=None
    ),
    "scr": SCRStrategy,
}
SHOWN = {"onpro": {True, False}, "er": {True}, "der_pp": {True}, "memory only": set(), "scr": {True, False}}


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
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.warns("the backbone still trains")
def test_rows_of_the_stream_are_the_batch_as_it_came(
    make_trainer: Make, lit_small: Make, method: str, identity: bool
) -> None:
    transform = nn.Identity() if identity else lambda image: image + 0.5
    strategy = METHODS[method](capacity=20, transform=transform)
    rows, nmc = Rows(), NMC()
    trainer = make_trainer(strategy=strategy, callbacks=[rows, nmc], limit_train_batches=3)
    trainer.fit(lit_small(), datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)))
    assert all(rows.right)
    assert len(rows.right) >= 6 * (identity in SHOWN[method])
    # where the batch does not go through the network as it is, a head that wants its features pays for them
    assert strategy.augments_stream == (identity not in SHOWN[method])
