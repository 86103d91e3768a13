"""A trainer for benchmarks, which says and writes nothing by itself."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def quiet_trainer(**options: Any) -> pl.Trainer:
    """Return a trainer of one process on the CPU, for as long as its data lasts; options come before its own."""
    own: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**own, **options})
