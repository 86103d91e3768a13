"""Lightning's rich progress bar with the experience shown."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from clkit.stream._lightning import datamodule_of
from clkit.stream.boundaries import Boundaries

__all__ = ["StreamProgressBar"]


class StreamProgressBar(RichProgressBar):
    """The rich progress bar, which also says which experience of how many is learned.

    Takes the arguments of :class:`lightning.pytorch.callbacks.RichProgressBar`.

    Example:
        >>> from clkit.callbacks import StreamProgressBar
        >>> StreamProgressBar(refresh_rate=5).refresh_rate
        5
    """

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Lightning's metrics, and the experience in front."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        current = Boundaries.of(trainer).current
        if current is None:
            return dict(metrics)
        count = len(getattr(datamodule_of(trainer), "experiences", None) or [])
        place = f"{current.index + 1}/{count}" if count else f"{current.index + 1}"
        phase = " (warm-up)" if current.phase == "warmup" else ""
        return {"experience": f"{place} {current.name}{phase}", **metrics}
