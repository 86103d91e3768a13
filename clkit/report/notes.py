"""Why a metric is null, and what a reader must know of the samples that others are of: one sentence for each reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from clkit.metrics.functional import METRICS

__all__ = ["notes_on"]

_COMPARE = ("forgetting", "backward_transfer")  # stages, of which there must be two


def notes_on(
    summaries: Mapping[str, Mapping[str, Any]], totals: Mapping[str, Tensor], without: Collection[int]
) -> dict[str, str]:
    """Return by kind what is to be said of the metrics of each predictor, as ``results.json`` has them.

    Args:
        summaries: The metrics by predictor, as :func:`~clkit.metrics.functional.summarize` gives them.
        totals: (T, E) evaluated samples by predictor.
        without: The experiences, from 0, that have no test samples, which is no reason for a null.

    Example:
        >>> from clkit.metrics.functional import summarize
        >>> correct, total = torch.tensor([[9, 0], [0, 8]]), torch.tensor([[10, 0], [0, 10]])
        >>> notes_on({"nmc": summarize(correct, total)}, {"nmc": total}, ())["missing"][:71]
        'accuracy_seen, average_incremental_accuracy, average_accuracy, forgetti'
    """
    notes: dict[str, str] = {}
    for name, total in totals.items():
        if not len(total):
            continue
        last = {
            metric: value[-1:] or [None] if isinstance(value, list) else [value]
            for metric, value in summaries[name].items()
        }
        nulls = [metric for metric in METRICS if last[metric] == [None] and metric != "forward_transfer"]
        nulls = [metric for metric in nulls if len(total) > 1 or metric not in _COMPARE]
        needed = torch.ones_like(total, dtype=torch.bool).tril()
        needed[:, [j for j in without if j < total.shape[1]]] = False
        missing = (needed & (total == 0)).nonzero()
        if len(missing):
            stage = int(missing[-1, 0])
            which = [str(j + 1) for i, j in missing.tolist() if i == stage]
            those = f"experience {which[0]} was" if len(which) == 1 else f"experiences {', '.join(which[:10])} were"
            notes.setdefault(
                "missing",
                f"{', '.join(nulls)} of {name} {'is' if len(nulls) == 1 else 'are'} null: {those} not evaluated after "
                f"experience {stage + 1}. Evaluate all experiences so far after each: with one loader over all "
                "classes, or a list of one loader for each experience, and without limit_val_batches",
            )
        elif nulls == ["amca"]:
            notes.setdefault(
                "amca",
                f"amca of {name} is null: it is defined for a full test set, and stages evaluated different samples of "
                "one class",
            )
        most, least = total.amax(0), total.masked_fill(total == 0, torch.iinfo(torch.int64).max).amin(0)
        for j in (most > least).nonzero()[:1, 0]:
            notes.setdefault(
                "uneven",
                f"experience {int(j) + 1} was evaluated on {int(least[j])} samples after one experience and on "
                f"{int(most[j])} after another, so metrics that compare stages compare different samples",
            )
    return notes
