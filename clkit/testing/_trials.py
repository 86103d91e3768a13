"""Settings that a callback or a strategy is run in, and what a run ends with, by which runs are compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from clkit.callbacks import NMC
from clkit.testing._compare import plain, require, snapshot
from clkit.testing._runs import BATCHES, SmallModule, fit, small_module, trainer
from clkit.testing.entries import Entry

__all__ = ["BESIDE", "EXACT", "Setting", "Trial", "checked_file", "settings"]

EXACT = "64-true"  # in float32 the network itself rounds otherwise where batches are cut otherwise
BESIDE = Entry("a head beside it", "callback", NMC)


@dataclass(frozen=True)
class Setting:
    """What a method runs with: a callback under a strategy, or a strategy with a head that learns beside it.

    Args:
        entry: The method.
        folder: For the files of its runs.
        strategy: The strategy that a callback runs under; ``None`` where the method is a strategy.
    """

    entry: Entry
    folder: Path
    strategy: str | None = None

    @property
    def under(self) -> str:
        """The beginning of a message about a run in this setting."""
        return "" if self.strategy is None else f"under {self.strategy!r}, "

    @property
    def first_steps(self) -> int:
        """Steps of the first experience, a warm-up included."""
        return BATCHES[0] * (1 + getattr(self.entry.make(), "warmup_epochs", 0))

    def trainer(self, method: Any, callbacks: Sequence[Any] = (), **options: Any) -> pl.Trainer:
        """Make a trainer with the method and these callbacks."""
        if self.strategy is None:
            return trainer(self.folder, callbacks, strategy=method, **options)
        return trainer(self.folder, [method, *callbacks], **{"strategy": self.strategy, **options})

    def run(self, *, method: Any = None, beside: Sequence[Any] = (), **options: Any) -> Trial:
        """Fit once.

        Args:
            method: The callback or strategy; a new one by default.
            beside: Further callbacks.
            options: Of :func:`~clkit.testing._runs.fit` and of the trainer.
        """
        method = self.entry.make() if method is None else method
        callback = NMC() if self.strategy is None else method
        strategy = method if self.strategy is None else self.strategy
        module, run = fit(self.folder, [callback, *beside], **{"strategy": strategy, **options})
        return Trial(self, callback, module, run)

    def fixed_module(self) -> SmallModule:
        """Make a network that stays as it is under a callback and takes any batch; a strategy trains its network."""
        return small_module() if self.strategy is None else small_module(rate=0)


@dataclass(frozen=True)
class Trial:
    """A run that ended.

    Args:
        setting: What the method ran with.
        callback: The method, or the head beside it.
        module: The network.
        trainer: The trainer.
    """

    setting: Setting
    callback: Any
    module: pl.LightningModule
    trainer: pl.Trainer

    @property
    def of_callback(self) -> Entry:
        """What the contract knows of the callback."""
        return BESIDE if self.setting.strategy is None else self.setting.entry

    def learned(self, *, followed: bool = True) -> dict[str, Any]:
        """Copy what the callback learned, and its place in the stream where ``followed``."""
        return snapshot(self.of_callback, self.callback, followed=followed)

    def weights(self) -> dict[str, Any]:
        """Copy the network's state, under its own keys where it was compiled."""
        return dict(copy.deepcopy(getattr(self.module, "_orig_mod", self.module).state_dict()))

    def saved(self) -> dict[str, Any]:
        """Save a checkpoint and load it as Lightning does."""
        path = self.setting.folder / "end.ckpt"
        self.trainer.save_checkpoint(path)
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
        return checkpoint

    def outcome(self) -> dict[str, Any]:
        """Give all that two equal runs must share; of a strategy also its file but for the progress of loops."""
        found = {"weights": self.weights(), "learned": self.learned()}
        if self.setting.strategy is None:
            found |= {f"file/{key}": value for key, value in self.saved().items() if key not in ("loops", "callbacks")}
        return found


def settings(entry: Entry, folder: Path) -> list[Setting]:
    """List what a method is run with: a callback with a network that trains with dropout, and with a frozen one."""
    if entry.kind == "strategy":
        return [Setting(entry, folder)]
    names = ["auto"] if entry.needs_gradients else ["auto", "gradient_free"]
    return [Setting(entry, folder, name) for name in names]


def checked_file(trial: Trial, own: Any, of: str) -> None:
    """Require that a saved state is of plain values and that the module's keys in the file are its own.

    Args:
        trial: A run that ended.
        own: What the method saved.
        of: What the message calls it.

    Raises:
        ContractError: If it is not so.
    """
    plain(own, of)
    keys = list(trial.saved()["state_dict"])
    require(
        keys == list(small_module().state_dict()),
        f"the module's own keys became {keys}",
        "keep what is learned in the method's own state, not as a part of the user's module",
    )
