"""Errors on a fixed training set, each made by a predictor that did not learn the sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_choice, check_count, generator

__all__ = ["OutOfSample", "cross_fit"]


class OutOfSample(NamedTuple):
    """Records of samples that the predictor of their fold did not learn, in the order of the samples.

    Attributes:
        phi: (N, K) features, each from what its fold's predictor had learned.
        error: (N,) float64 losses.
        fold: (N,) int64, the fold that held the sample out.
    """

    phi: Tensor
    error: Tensor
    fold: Tensor


def cross_fit(
    make: Callable[[Tensor, Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]],
    X: Tensor,
    y: Tensor,
    folds: int = 5,
    by: Literal["sample", "class"] = "sample",
    seed: int = 0,
) -> OutOfSample:
    """Record errors on a fixed training set without a held-out part: each fold is measured by a model of the others.

    Folds of samples show ordinary mistakes. Folds of whole classes show what an unknown class looks like, and nothing
    else: use them beside the others, with a small weight (:meth:`ErrorRecords.training_set`). The deployed predictor
    is then trained on everything, and its features come from everything.

    Args:
        make: Called with the rows and targets of all folds but one; trains a predictor and whatever the features need,
            and returns a function that gives features (n, K) and errors (n,) of other rows and targets.
        X: (N, ...) inputs.
        y: (N,) targets, class ids for ``by="class"``.
        folds: At least 2, and at most as many as there are samples (classes).
        by: Whether samples or whole classes are dealt to the folds.
        seed: Of the dealing, at least 0.

    Returns:
        The records.

    Raises:
        ArgumentError: If an argument is not allowed.
        BatchError: If ``make`` gives features or errors of another number of rows.

    Example:
        >>> X, y = torch.arange(6.0)[:, None], torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        >>> def make(X, y):
        ...     mean = y.mean()  # a poor predictor
        ...     return lambda X, y: (X, (y - mean) ** 2)
        >>> records = cross_fit(make, X, y, folds=6)
        >>> [round(each, 2) for each in records.error.tolist()]
        [9.0, 3.24, 0.36, 0.36, 3.24, 9.0]

    Source: Lahlou et al., arXiv 2102.08501, Algorithm 2; folds of classes are those of its image experiment.
    """
    check_choice("by", by, ("sample", "class"))
    check_count("folds", folds, at_least=2)
    check_count("seed", seed, at_least=0)
    if not isinstance(X, Tensor) or not isinstance(y, Tensor) or not X.ndim or not y.ndim or len(X) != len(y):
        raise ArgumentError("X and y must be tensors with as many rows")
    dealt = torch.arange(len(y)) if by == "sample" else torch.unique(y.detach().cpu(), return_inverse=True)[1]
    number = int(dealt.max()) + 1 if len(dealt) else 0
    if folds > number:
        what = "samples" if by == "sample" else "classes"
        raise ArgumentError(f"folds must be at most {number}, the number of {what}, got {folds}")
    fold = (torch.randperm(number, generator=generator(seed)) % folds)[dealt]
    phi: dict[int, Tensor] = {}
    error: dict[int, Tensor] = {}
    for out in range(folds):
        inside, rows = (torch.nonzero(mask).flatten() for mask in (fold != out, fold == out))
        record = make(X[inside.to(X.device)], y[inside.to(y.device)])
        given = record(X[rows.to(X.device)], y[rows.to(y.device)])
        shapes = [tuple(each.shape) for each in given]
        if len(shapes[0]) != 2 or shapes[0][0] != len(rows) or shapes[1] != (len(rows),):
            raise BatchError(f"features and errors of {len(rows)} samples must be (n, K) and (n,), make gave {shapes}")
        phi[out], error[out] = (each.detach().cpu().double() for each in given)
    order = torch.cat([torch.nonzero(fold == out).flatten() for out in range(folds)]).argsort()
    joined = [torch.cat([part[out] for out in range(folds)])[order] for part in (phi, error)]
    return OutOfSample(joined[0], joined[1], fold)
