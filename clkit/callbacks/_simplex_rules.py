"""What a simplex head cannot be trained under, said by name before a run begins."""

from __future__ import annotations

import lightning.pytorch as pl

from clkit.errors import ConfigurationError

__all__ = ["check_strategy"]


def check_strategy(trainer: pl.Trainer, owner: str, alignment: str | None) -> None:
    """Refuse a strategy that trains nothing, and an alignment that it does not serve."""
    strategy = trainer.strategy
    if not getattr(strategy, "trains_module", True):
        raise ConfigurationError(
            f"{owner} trains the network for its vertices, and {type(strategy).__name__} trains nothing; "
            "use another strategy, or heads that need no training (AEFOCL, NMC)"
        )
    if alignment is not None and not trainer.lightning_module.automatic_optimization:
        raise ConfigurationError(
            f"{owner} with alignment={alignment!r} adds a term to the loss, and under manual "
            "optimization it cannot know which; add clkit.methods.HOCLoss in your training_step, or leave "
            "alignment out"
        )
    if alignment == "fd" and not hasattr(strategy, "forwarded"):
        raise ConfigurationError(
            f"{owner} with alignment='fd' distils the replayed rows, and {type(strategy).__name__} "
            "replays none; use strategy='er' or another that replays, or alignment='hoc'"
        )
