"""Experience boundaries: noticed by whichever part sees one first, announced once to every part of the trainer.

Each clkit callback and strategy passes the hooks it gets to the trainer's one :class:`Boundaries`, which compares them
with the stream's schedule and, at a boundary, calls ``on_experience_start``, ``on_experience_phase`` and
``on_experience_end``, or ``on_experience_cut`` where a fit ends within an experience, of the strategy and of every
callback that has them, in the fixed order of :class:`BoundaryPhase`, whatever their order in the list. Where no data
module gives a schedule (plain loaders), one ``fit`` is one experience.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

from clkit.errors import StateError
from clkit.schema import saved_entry
from clkit.stream._lightning import callbacks_of, go_on, trained_batches
from clkit.stream.equal_batches import check_last_batch, check_number_of_batches
from clkit.stream.experience import Experience, experience_state, saved_experience

__all__ = ["Boundaries", "BoundaryPhase", "StreamSchedule", "backbone_changed"]

_OWNER = "the position in the stream"


class BoundaryPhase(IntEnum):
    """When a part hears of a boundary, relative to the others: small numbers first.

    A part says so by an attribute ``boundary_phase``; without it, it hears in ``LEARN``. Of an experience's start,
    parts in ``EVALUATE`` hear first: what they still have to measure belongs to the experience before.
    """

    LEARN = 10  # sum over ranks, solve
    ERROR = 20  # error predictors read solved heads
    MASK = 30  # masks and other changes of the network's weights
    EDIT = 40  # grafts and edits come on top of these
    EVALUATE = 50  # sees the result of all of them; checkpoints are written by Lightning afterwards


@runtime_checkable
class StreamSchedule(Protocol):
    """What a data module offers so that boundaries follow its stream."""

    def experience_at(self, epoch: int) -> Experience | None:
        """Return the experience trained in an epoch (counted from 0), ``None`` after the stream's end."""

    def is_last_epoch(self, epoch: int) -> bool:
        """Whether an epoch is the last of its experience."""


class Boundaries:
    """Where a trainer stands in its stream.

    Attributes:
        current: The experience that runs, or that ran last; ``None`` before the first batch.
        running: Whether ``current`` has started and not ended.
        ending: Whether the fit is over: what is announced now is followed by no further training.
        cut: Whether the fit ended before the last batch of ``current``.
    """

    _of_trainer: ClassVar[WeakKeyDictionary[pl.Trainer, Boundaries]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.current: Experience | None = None
        self.running = self.ending = self.cut = False
        self._was_over = False  # a loaded checkpoint was saved after the last batch of the experience that it says runs
        self._epoch: int | None = None  # the last in which a batch's start was looked at
        self._compares = False  # whether processes have to tell each other at each batch if it is their last
        self._compared = -1  # batches that were done when they did

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Boundaries:
        """Return the one object of a trainer, made when first asked for."""
        found = cls._of_trainer.get(trainer)
        if found is None:
            found = cls._of_trainer[trainer] = cls()
        return found

    @classmethod
    def join(cls, trainer: pl.Trainer, earlier: Boundaries) -> Boundaries:
        """Return the object of a trainer, at the position of an earlier one where each experience is its own fit."""
        own = cls.of(trainer)
        if own.current is None:
            own.current, own.running = earlier.current, earlier.running
        return own

    def upcoming(self, trainer: pl.Trainer) -> Experience:
        """Return the experience, with its phase, to which the next training batch belongs."""
        schedule = _schedule(trainer)
        scheduled = None if schedule is None else schedule.experience_at(trainer.current_epoch)
        if scheduled is not None:
            return scheduled
        index = 0 if self.current is None else self.current.index + (not self.running)
        warm = index == 0 and trainer.current_epoch < getattr(trainer.strategy, "warmup_epochs", 0)
        return Experience(index=index, name=f"fit {index + 1}", phase="warmup" if warm else "learn")

    # ---- the moments, in the order in which Lightning has them

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Announce the end of an experience whose hooks a resumed run has lost."""
        self._epoch = None
        self.ending = self.cut = False
        schedule = _schedule(trainer)
        over, self._was_over = self._was_over, False
        if not self.running or self.current is None:
            return
        if schedule is not None:  # else one fit was one experience, and this is another fit
            now = schedule.experience_at(trainer.current_epoch)
            over = now is None or now.index > self.current.index
        if over:
            self._end(trainer, module)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Announce a start, here because a resume may skip ``on_train_epoch_start``."""
        if self._epoch != trainer.current_epoch:
            self._compares = check_number_of_batches(trainer)
        if self._compares and self._compared != (batches := trained_batches(trainer)):
            self._compared = batches
            check_last_batch(trainer, batches)
        if self.running and self._epoch == trainer.current_epoch:  # nothing changes within an epoch
            return
        self._epoch = trainer.current_epoch
        go_on(trainer)
        now = self.upcoming(trainer)
        if self.running and self.current is not None:
            if now.index == self.current.index:
                if now.phase != self.current.phase:
                    self.current = now
                    _announce(trainer, module, "on_experience_phase", now)
                return
            if now.index > self.current.index:
                self._end(trainer, module)
        before, self.current, self.running = self.current, now, True
        try:
            _announce(trainer, module, "on_experience_start", now)
        except BaseException:  # a part refused: nothing has begun, and the next fit announces it again
            self.current, self.running = before, False
            raise

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Announce an end before the validation that measures the finished experience."""
        if self.running and trainer.state.fn == "fit" and not trainer.sanity_checking and self.is_over(trainer):
            self._end(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Announce an end where no validation ran."""
        if self.running and self.is_over(trainer):
            self._end(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Announce an end that nothing noticed: a strategy alone hears of no epoch's end and has no next batch."""
        first, self.ending = not self.ending, True
        if not self.running or self.current is None or not first:
            return
        schedule, whole = _schedule(trainer), trainer.is_last_batch
        self.cut = not (whole and (schedule is None or schedule.is_last_epoch(trainer.current_epoch - 1)))
        if schedule is None or not self.cut:  # with plain loaders a fit was one experience, wherever it stopped
            self._end(trainer, module)
        else:  # a resumed run goes on with it
            _announce(trainer, module, "on_experience_cut", self.current)

    def is_over(self, trainer: pl.Trainer) -> bool:
        """Whether the experience that runs has had its last batch."""
        if not trainer.is_last_batch:
            return False
        schedule = _schedule(trainer)
        if schedule is not None:
            return schedule.is_last_epoch(trainer.current_epoch)
        return trainer.max_epochs == trainer.current_epoch + 1

    # ---- state: plain types

    def state_dict(self) -> dict[str, Any]:
        """Return the experience's fields and whether it runs; one that was cut goes on in a resumed run."""
        return {"experience": experience_state(self.current), "running": self.running or self.cut}

    def load_state_dict(self, state: dict[str, Any], *, over: bool = False) -> None:
        """Take the position that :meth:`state_dict` gave, saved after the experience's last batch if it is ``over``.

        Raises:
            StateError: If it is none; nothing is changed then.
        """
        current, running = saved_experience(state, "experience", _OWNER), saved_entry(state, "running", bool, _OWNER)
        if running and current is None:
            raise StateError(f"{_OWNER}: the saved state says that an experience runs, and names none")
        self.current, self.running, self._was_over, self.cut = current, running, over, False

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self.current is not None
        self.running = False
        _announce(trainer, module, "on_experience_end", self.current)


def backbone_changed(trainer: pl.Trainer, reason: str, *, sender: Any = None) -> None:
    """Announce that the network was changed other than by the optimizer, so that what was read of it grows stale.

    The strategy and every callback that has ``on_backbone_changed(trainer, pl_module, reason)`` hear of it, in the
    order of :class:`BoundaryPhase`. Kept evaluation features are dropped, and heads say that what they learned may no
    longer fit.

    Args:
        trainer: The trainer of the run.
        reason: What was changed, in words that complete "the backbone changed: ...".
        sender: The part that changed it, which is not told.
    """
    _announce(trainer, trainer.lightning_module, "on_backbone_changed", reason, but=sender)


def _schedule(trainer: pl.Trainer) -> StreamSchedule | None:
    datamodule: Any = getattr(trainer, "datamodule", None)  # set only once something was attached
    # `isinstance` with a protocol costs as much as a small step
    follows = hasattr(datamodule, "experience_at") and hasattr(datamodule, "is_last_epoch")
    return datamodule if follows else None


def _announce(
    trainer: pl.Trainer, module: pl.LightningModule, what: str, news: Experience | str, but: Any = None
) -> None:
    def order(part: Any) -> tuple[bool, int]:
        phase = int(getattr(part, "boundary_phase", BoundaryPhase.LEARN))
        # what measures is first at a start: the experience before may not be measured yet, and others change or forget
        return what == "on_experience_start" and phase < BoundaryPhase.EVALUATE, phase

    parts = [part for part in (trainer.strategy, *callbacks_of(trainer)) if getattr(part, what, None) is not None]
    for part in sorted(parts, key=order):
        if part is not but:
            getattr(part, what)(trainer, module, news)
