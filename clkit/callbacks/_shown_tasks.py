"""Whose network an evaluation shows where each task has its own: that of a batch's task, as far as anything says it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from clkit.callbacks._brought import BroughtClasses, experience_of_batch
from clkit.callbacks.base import StreamCallback
from clkit.errors import BatchError, ConfigurationError
from clkit.stream._lightning import datamodule_of, evaluated_loaders
from clkit.surgery.task_networks import TaskNetworks

__all__ = ["ShowsTasks"]

_INSIDE = "evaluate inside `with callback.activate(task):`"


class ShowsTasks(StreamCallback):
    """A callback that keeps a network for each task in one module, and shows each batch of an evaluation its own.

    Of a stream the rows of a batch say whose it is; of plain loaders their classes do, where each task trained its own,
    and else the place of the loader in a list. Whoever asks by :meth:`activated` decides in this callback's stead.

    Args:
        networks: The networks of the tasks.
    """

    def __init__(self, networks: TaskNetworks) -> None:
        super().__init__()
        self._networks = networks
        self._brought = BroughtClasses()
        self._chosen = 0  # how many blocks of `activate` the user has open
        self._asked = False  # whether somebody says in this evaluation whose a batch is
        self._of_batch = ExitStack()  # what is kept up for the batch of an evaluation in which nobody asks
        self._changes = 0  # of the network by somebody else
        self._said: set[str] = set()

    @contextmanager
    def activate(self, task: int, module: nn.Module | None = None) -> Iterator[None]:
        """Have the network of a task in the module inside the block, and bitwise what was there afterwards.

        Evaluations inside the block use this task, too, whatever their data say.

        Args:
            task: Index of a task that is finished or trains, from 0.
            module: The module, if no run has had it yet.

        Raises:
            ArgumentError: If the task was not trained.
        """
        with self._networks.shown(task, module):
            self._chosen += 1
            try:
                yield
            finally:
                self._chosen -= 1

    def activated(self, experience: int) -> AbstractContextManager[None]:
        """Have the network of an experience in the module, for an evaluation; the present one if it was not trained."""
        self._of_batch.close()  # who asks knows better whose the batch is
        self._asked = True
        return self._evaluating(experience)

    def network_of(self, experience: int) -> Hashable:
        """Return what stays the same as long as the network of a finished task does, else ``None``."""
        networks = self._networks
        settled = experience < networks.tasks and experience != networks.known.shown and not self._chosen
        return (self._changes, experience) if settled else None

    def on_backbone_changed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        """Note that somebody else changed the network, maybe that of every task."""
        self._changes += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note which classes the batch brings, where no stream says so."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not _is_stream(trainer):
            self._brought.see(trainer, self, batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an evaluation in which nobody has asked yet."""
        super().on_validation_start(trainer, pl_module)
        self._asked = False
        if not _is_stream(trainer):
            self._brought.begin(trainer)
        if trainer.state.fn != "fit" and not self._chosen:
            self._refuse_another_stream(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show a batch the network of its own task, where nobody says which that is; say so where it is a guess."""
        self._of_batch.close()
        if not self._chosen:
            experience = self._whose(trainer, batch, batch_idx, dataloader_idx)
            if not self._asked:
                self._of_batch.enter_context(self._evaluating(experience))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Give the module what it had before the batch."""
        self._of_batch.close()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module what it had before the batch in work, and take the marks off its layers."""
        self._of_batch.close()
        self._networks.detach(pl_module)

    def _evaluating(self, experience: int) -> AbstractContextManager[None]:
        return nullcontext() if self._chosen else self._networks.shown_if_trained(experience)

    def _refuse_another_stream(self, trainer: pl.Trainer) -> None:
        """Refuse a stream in which an experience is not the task of its index: its rows would be shown another's."""
        of_plain_loaders = dict(enumerate(self._brought.classes()))  # which may be counted otherwise, and come again
        experiences = getattr(datamodule_of(trainer), "experiences", ())
        for task, (experience, about) in enumerate(zip(experiences, self._networks.about, strict=False)):
            own, learned = set(experience.classes), set(about["class_ids"])
            if own and learned and own != learned and not of_plain_loaders.get(task):
                raise ConfigurationError(
                    f"{self.state_key}: experience {task + 1} has the classes {_listed(own)}, and task {task} was "
                    f"trained on {_listed(learned)}: what was learned is of another stream; use its scenario and seed, "
                    f"or {_INSIDE}"
                )

    def _whose(self, trainer: pl.Trainer, batch: Any, batch_idx: int, place: int) -> int:
        """Return the experience of a batch, and say so once where it is a guess."""
        loaders = evaluated_loaders(trainer)
        guess, rows = experience_of_batch(loaders, self._boundaries.current, batch_idx, place)
        if rows is not None or self._networks.tasks < 2:
            return guess
        try:
            found = self._brought.of_batch(trainer, self, batch, loaders, batch_idx, place)
        except BatchError:  # a batch of an unusual form, of which the user's own step knows more
            found = guess
        if isinstance(found, int):
            self._say_guess(trainer, found, len(loaders))
            return found
        experience = self._brought.one_of(found, [self])
        if "switched" in self._brought.notes:
            shown = f"a batch holds rows of several tasks, and all of them are shown the network of task {experience}"
            self._say("mixed", f"{shown}; give a list with a loader for each task, or {_INSIDE}", rank_zero_warn)
        return experience

    def _say_guess(self, trainer: pl.Trainer, task: int, loaders: int) -> None:
        if trainer.state.fn == "fit":  # it is the task that trains, or the list is in the order of the tasks
            return
        unknown = "nothing says to which task the rows of plain loaders belong (no classes of its own), so"
        if loaders > 1:
            order = f"{unknown} the loaders of the list are taken for those of tasks 0 to {loaders - 1}, in this order"
            self._say("list", f"{order}; where that is wrong, {_INSIDE}", rank_zero_info)
        else:
            last = f"{unknown} all are shown the network of task {task}, the last that was trained"
            self._say("one", f"{last}; {_INSIDE}, or give a list with a loader for each task", rank_zero_warn)

    def _say(self, kind: str, message: str, how: Any) -> None:
        if kind not in self._said:
            self._said.add(kind)
            how(f"{self.state_key}: {message}")


def _listed(classes: set[int]) -> str:
    return ", ".join(map(str, sorted(classes)[:10])) + ", …" * (len(classes) > 10)


def _is_stream(trainer: pl.Trainer) -> bool:
    return hasattr(datamodule_of(trainer), "evaluation_loader")
