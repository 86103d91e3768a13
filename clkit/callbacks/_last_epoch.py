"""What several epochs of an experience do to a head, and which is the last, for heads that learn in that one alone."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer

from clkit.errors import ConfigurationError
from clkit.features.tap import FeatureTap
from clkit.stream._lightning import callbacks_of, datamodule_of, is_fast_dev_run

__all__ = ["backbone_trains", "check_last_epoch_is_known", "is_last_epoch", "leaves_behind", "on_second_epoch"]


def is_last_epoch(trainer: pl.Trainer) -> bool:
    """Whether the epoch in work is the last of its experience; with plain loaders a fit is an experience."""
    data = datamodule_of(trainer)
    if hasattr(data, "is_last_epoch"):
        return bool(data.is_last_epoch(trainer.current_epoch))
    return trainer.max_epochs == trainer.current_epoch + 1


def backbone_trains(tap: FeatureTap) -> bool:
    """Whether a parameter of the tapped network still trains that is not its classifier's."""
    own = set() if tap.classifier is None else {id(parameter) for parameter in tap.classifier.parameters()}
    return any(parameter.requires_grad and id(parameter) not in own for parameter in tap.network.parameters())


def leaves_behind(trainer: pl.Trainer, tap: FeatureTap) -> bool:
    """Whether the network goes on from that of earlier experiences, which no callback keeps for evaluations."""
    kept = any(hasattr(callback, "network_of") for callback in callbacks_of(trainer))
    return not kept and backbone_trains(tap)


def on_second_epoch(tap: FeatureTap, counts_epochs: bool) -> str:
    """Return what learning a second epoch over an experience does, nothing if it changes nothing."""
    if backbone_trains(tap):
        return (
            "the backbone trains for several epochs, so what was learned in earlier ones does not fit its features any "
            "more; pass epochs='last' to learn in the last epoch of each experience alone"
        )
    if counts_epochs:
        return (
            "a second epoch over an experience counts each sample again, as if the ridge strength were smaller; one "
            "epoch an experience is enough, or pass epochs='last'"
        )
    return ""


def check_last_epoch_is_known(trainer: pl.Trainer, owner: str) -> None:
    """Refuse a fit with plain loaders of which it is not known beforehand which epoch is the last.

    Raises:
        ConfigurationError: If it has no ``max_epochs``, or something may end it before.
    """
    if hasattr(datamodule_of(trainer), "is_last_epoch") or is_fast_dev_run(trainer):
        return
    ends = [type(each).__name__ for each in callbacks_of(trainer) if isinstance(each, EarlyStopping | Timer)]
    if trainer.max_steps != -1:
        ends.append(f"max_steps={trainer.max_steps}")
    if trainer.max_epochs in (None, -1):
        ends.insert(0, f"max_epochs={trainer.max_epochs}")
    if ends:
        raise ConfigurationError(
            f"{owner} with epochs='last' must know which epoch is the last, and {' and '.join(ends)} may end the fit "
            "at any; give max_epochs alone, or pass epochs='all'"
        )
