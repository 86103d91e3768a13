"""Strategies under which no head can learn from a network, said by name before a run begins."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from clkit.errors import ConfigurationError

__all__ = ["check_reading"]


def check_reading(owner: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse strategies that split the network, and those that train where there is nothing to train.

    Raises:
        ConfigurationError: Naming the strategy and what to do.
    """
    strategy = trainer.strategy
    kind = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigurationError(
            f"{owner} cannot read features under {kind}, which splits the network over processes; use "
            'strategy="ddp", "gradient_free" or a single device'
        )
    if trainer.state.fn != "fit" or trainer.world_size == 1 or not isinstance(strategy, DDPStrategy):
        return
    # clkit's own say it themselves; what a user's `setup` and `configure_model` make is not there yet
    if hasattr(strategy, "trains_module") or is_overridden("configure_model", module):
        return
    if is_overridden("setup", module) and not type(module).setup.__module__.startswith("clkit."):
        return
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigurationError(
            f"{kind} trains by gradient, and no parameter of {type(module).__name__} requires one. For {owner} on a "
            'frozen network use strategy="gradient_free", in a worker of Ray Train '
            'strategy=ray_strategy("gradient_free")'
        )
