"""DDP whose processes say in words, not in those of the backend, that one of them is lost."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from clkit.distributed import report_lost_process

__all__ = ["SpokenDDP"]


class SpokenDDP(DDPStrategy):
    """Lightning's DDP; a :class:`~clkit.errors.ProcessLostError` where a process that others wait for has died."""

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
