"""DDP whose processes say in words, not in those of the backend, that one of them is lost."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from clkit.distributed import report_lost_process

__all__ = ["SpokenDDP"]


class SpokenDDP(DDPStrategy):
    """Lightning's DDP; a :class:`~clkit.errors.ProcessLostError` where a process that others wait for has died."""

    def barrier(self, *args: Any, **options: Any) -> None:
        """Wait for all processes."""
        with self._exchanging("that they are there"):
            super().barrier(*args, **options)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give all processes what one of them has."""
        with self._exchanging("what one of them has"):
            return super().broadcast(obj, src)

    def reduce(self, *args: Any, **options: Any) -> Any:
        """Sum or average over all processes."""
        with self._exchanging("a value"):
            return super().reduce(*args, **options)

    def _exchanging(self, what: str) -> AbstractContextManager[None]:
        return report_lost_process(what) if dist.is_initialized() else nullcontext()
