"""Metrics of continual learning, as ``torchmetrics.Metric`` objects and as functions (:mod:`.functional`)."""

from __future__ import annotations

from clkit.metrics.confusion import StreamConfusionMatrix
from clkit.metrics.continual import (
    AMCA,
    AccuracyMatrix,
    AccuracySeen,
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    FinalAccuracy,
    Forgetting,
    ForwardTransfer,
    PerClassAccuracy,
)

__all__ = [
    "AMCA",
    "AccuracyMatrix",
    "AccuracySeen",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "FinalAccuracy",
    "Forgetting",
    "ForwardTransfer",
    "PerClassAccuracy",
    "StreamConfusionMatrix",
]
