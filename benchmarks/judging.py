"""The engine of ``DEUP`` on kept features, without a trainer: for benchmarks that learn from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clkit.methods import (
    FEATURE_SIGNS,
    ErrorPredictor,
    ErrorRecords,
    FeatureMemory,
    FeatureStatistics,
    Snapshot,
    left_out_features,
    novel_features,
    sample_loss,
    stationarising_features,
)

MEMORY = 1024  # rows
NAMES = ["log_maha", "gap", "log_leverage", "log_knn", "confidence", "margin"]
SCORES = {"confidence": "largest score", "margin": "margin", "log_maha": "Mahalanobis"}


def judge(head: Any, statistics: FeatureStatistics, memory: FeatureMemory) -> Callable[[Tensor], dict[str, Tensor]]:
    """Fit an error predictor to rows left out and imagined novelties; return what tells the numbers of other rows."""
    rows, labels, ids = memory.features.double(), memory.labels, memory.ids
    view = Snapshot.of(statistics, memory=(rows, labels), leverage=getattr(head, "leverage", None))
    records, plain = ErrorRecords(), head(rows)
    left_out = head.leave_one_out(rows, labels)
    phi = left_out_features(NAMES, view, rows, labels, left_out, probabilities=False)
    records.replace("loo", phi, sample_loss("error", left_out, labels), ids, labels)
    phi = novel_features(NAMES, view, rows, labels, plain, probabilities=False)
    records.replace("novel", phi, torch.ones(len(labels)), ids, labels)
    counts = dict(zip(statistics.classes.tolist(), statistics.counts.tolist(), strict=True))
    errors = ErrorPredictor(signs=[FEATURE_SIGNS[name] for name in NAMES])
    errors.fit(*records.training_set(counts))

    def of(features: Tensor) -> dict[str, Tensor]:
        phi = stationarising_features(NAMES, view, features, head(features), probabilities=False)
        said = {shown: phi[:, NAMES.index(name)] for name, shown in SCORES.items()}
        return {"DEUP": errors.predict(phi), **said}

    return of
