"""Metrics of continual learning, as ``torchmetrics.Metric`` objects and as functions (:mod:`.functional`).

The metrics of a stream are fed in the same way: ``update(predictions, targets, experience)`` with the test samples of
an experience (``experience`` counts from 0, as :class:`clkit.Experience` does), and ``next_stage()`` each time an
experience was learned. Stage 0 is before any training (only :class:`ForwardTransfer` reads it), stage ``i`` is after
the ``i``-th experience. Constructors take the keyword arguments of ``torchmetrics.Metric``. The definitions and their
sources stand in :mod:`clkit.metrics.functional`, the values are those of ``results.json``: float64, ``NaN`` where not
defined.

The state is a list of exact integer counts, one row for every combination of stage, experience and class that really
occurred. So class ids may have gaps and be large, nothing need be known about the stream beforehand, and processes that
saw different experiences or classes are added up exactly.

Whether models of a sequence can search each other's galleries is measured from features, not from predictions: see
:class:`CompatibilityMatrix` and the metrics of its numbers, :mod:`clkit.metrics.compatibility` and
:mod:`clkit.metrics.retrieval`. :class:`NegativeFlipRate` compares the answers of two systems. What an
edit of a network did is measured from answers before and after it, :mod:`clkit.metrics.editing`.

How much an uncertainty is worth (``AUROC``, ``AURC``, ``CalibrationError``, …) is measured from a number a sample,
whatever it comes from: see :mod:`clkit.metrics.uncertainty`.

In a ``LightningModule``:

* log ``metric.compute()``, not the metric: ``log`` would reset it at the end of the epoch, and these remember a stream;
* counts add up, so evaluate each stage once, and skip batches while ``trainer.sanity_checking``;
* call ``metric.persistent(True)`` to have the counts in checkpoints.

Example:
    >>> import torch
    >>> for metric in AccuracySeen(), FinalAccuracy(), AverageAccuracy(), Forgetting(), BackwardTransfer():
    ...     metric.next_stage()
    ...     metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), experience=0)
    ...     metric.next_stage()
    ...     metric.update(torch.tensor([0, 7, 7, 7]), torch.tensor([0, 1, 7, 7]), torch.tensor([0, 0, 1, 1]))
    ...     print(type(metric).__name__, metric.compute().tolist())
    AccuracySeen [1.0, 0.75]
    FinalAccuracy 0.75
    AverageAccuracy 0.75
    Forgetting 0.5
    BackwardTransfer -0.5
"""

from __future__ import annotations

from clkit.metrics.compatibility import (
    AverageCompatibility,
    AverageMultiModelAccuracy,
    BackwardCompatibility,
    CompatibilityMatrix,
    ForwardCompatibility,
    MultiModelAccuracyCurve,
)
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
    StreamConfusionMatrix,
)
from clkit.metrics.editing import (
    Drawdown,
    EditSuccess,
    Generality,
    Locality,
    LocalityKL,
    Reliability,
    Retention,
)
from clkit.metrics.flips import NegativeFlipRate
from clkit.metrics.uncertainty import (
    AUGRC,
    AUPR,
    AURC,
    AUROC,
    FPR95,
    AdaptiveCalibrationError,
    BrierScore,
    CalibrationError,
    ExcessAURC,
    KendallCorrelation,
    MaxCalibrationError,
    NegativeLogLikelihood,
    RiskCoverageCurve,
    SpearmanCorrelation,
)

__all__ = [
    "AMCA",
    "AUGRC",
    "AUPR",
    "AURC",
    "AUROC",
    "FPR95",
    "AccuracyMatrix",
    "AccuracySeen",
    "AdaptiveCalibrationError",
    "AverageAccuracy",
    "AverageCompatibility",
    "AverageIncrementalAccuracy",
    "AverageMultiModelAccuracy",
    "BackwardCompatibility",
    "BackwardTransfer",
    "BrierScore",
    "CalibrationError",
    "CompatibilityMatrix",
    "Drawdown",
    "EditSuccess",
    "ExcessAURC",
    "FinalAccuracy",
    "Forgetting",
    "ForwardCompatibility",
    "ForwardTransfer",
    "Generality",
    "KendallCorrelation",
    "Locality",
    "LocalityKL",
    "MaxCalibrationError",
    "MultiModelAccuracyCurve",
    "NegativeFlipRate",
    "NegativeLogLikelihood",
    "PerClassAccuracy",
    "Reliability",
    "Retention",
    "RiskCoverageCurve",
    "SpearmanCorrelation",
    "StreamConfusionMatrix",
]
