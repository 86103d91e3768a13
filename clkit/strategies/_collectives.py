"""DDP whose processes say in words, not in those of the backend, that one of them is lost."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from clkit.distributed import report_lost_process, world_size
from clkit.errors import ConfigurationError

__all__ = ["SpokenDDP"]


class SpokenDDP(DDPStrategy):
    """Lightning's DDP; a :class:`~clkit.errors.ProcessLostError` where a process that others wait for has died."""

    frozen_remedy = 'use the strategy "gradient_free" for a frozen network'  # what messages advise

    def setup_environment(self) -> None:
        """Refuse a fit that knows of this process alone where torch.distributed has others in its group.

        Raises:
            ConfigurationError: Saying how many there are, and what to do.
        """
        module = self.lightning_module
        fits = module is not None and module.trainer.state.fn == "fit"
        if fits and self.world_size == 1 and (processes := world_size()) > 1:
            raise ConfigurationError(
                f"the Trainer knows of one process, and torch.distributed of {processes}: each would learn everything "
                "and write the same files. In the workers of Ray Train give strategy=ray_strategy(…) and plugins="
                "[RayLightningEnvironment()]; elsewhere give devices= and num_nodes= of the Trainer, or end the group "
                "with torch.distributed.destroy_process_group()"
            )
        super().setup_environment()

    def _setup_model(self, model: nn.Module) -> Any:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigurationError(
                f"{type(self).__name__} trains by gradient, and no parameter of {type(model).__name__} requires one; "
                f"{self.frozen_remedy}"
            )
        return super()._setup_model(model)

    def barrier(self, *args: Any, **options: Any) -> None:
        """Wait for all processes."""
        with report_lost_process("that they are there") if dist.is_initialized() else nullcontext():
            super().barrier(*args, **options)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give all processes what one of them has."""
        with report_lost_process("what one of them has") if dist.is_initialized() else nullcontext():
            return super().broadcast(obj, src)

    def reduce(self, *args: Any, **options: Any) -> Any:
        """Sum or average over all processes."""
        with report_lost_process("a value") if dist.is_initialized() else nullcontext():
            return super().reduce(*args, **options)
