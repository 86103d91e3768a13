"""The metrics of continual learning as plain functions of counts and of the accuracy matrix.

Notation, shared by all functions: a stream has experiences ``j = 1 … E``, of which ``T`` were learned so far, and is
evaluated after each of these ``T`` stages. ``R[i, j]`` is the accuracy on the test samples of experience ``j`` after
learning experience ``i``, ``NaN`` where it was not evaluated, and ``n_j`` is the number of these test samples. Every
value at stage ``T`` is that of the stream cut after ``T`` experiences, so a series over stages is read off prefixes.

An entry that a definition needs and that was not evaluated makes the value ``NaN``; entries that it does not need (the
future, above the diagonal) are skipped. A single column (``E = 1``) stands for one fixed test set: every stage is
judged on it, and the metrics that compare experiences are undefined.

All arguments may be tensors, NumPy arrays or nested lists; the arithmetic is float64 on the CPU.
"""

from __future__ import annotations

from math import inf, isnan, nan
from typing import Any

import torch
from torch import Tensor

from clkit.errors import ArgumentError
from clkit.metrics._arrays import Array, as_counts, as_matrix, as_vector, plain, ratio, widen
from clkit.metrics.counts import staged_counts

__all__ = [
    "METRICS",
    "accuracy_matrix",
    "accuracy_seen",
    "amca",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "final_accuracy",
    "forgetting",
    "forward_transfer",
    "per_class_accuracy",
    "staged_counts",
    "summarize",
]

METRICS = (
    "accuracy_seen",
    "average_incremental_accuracy",
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "amca",
)
"""The entries of :func:`summarize` that are logged, of a list the last value."""


def accuracy_matrix(correct: Array, total: Array) -> Tensor:
    """Return the accuracy matrix: how well each experience is known after each stage.

    ``R[i, j] = correct[i, j] / total[i, j]``

    Args:
        correct: (T, E) integers, correctly classified test samples of experience ``j`` after stage ``i``.
        total: (T, E) integers, evaluated test samples; 0 = not evaluated.

    Returns:
        (T, max(E, T)) float64 in [0, 1], ``NaN`` where nothing was evaluated; columns that are missing up to ``T`` are
        added as not evaluated, except to a single column (one fixed test set).

    Raises:
        ArgumentError: If the tables differ in shape, are not integers or violate ``0 <= correct <= total``.

    Example:
        >>> accuracy_matrix([[9, 0], [6, 8]], [[10, 0], [10, 10]])
        tensor([[0.9000,    nan],
                [0.6000, 0.8000]], dtype=torch.float64)

    Source:
        Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, section 2.
    """
    return widen(ratio(*as_counts(correct, total)))


def per_class_accuracy(class_correct: Array, class_total: Array) -> Tensor:
    """Return the accuracy of each class after each stage, on everything that was evaluated then.

    ``a[t, c] = class_correct[t, c] / class_total[t, c]``

    Args:
        class_correct: (T, K) integers, correctly classified test samples of class ``c`` after stage ``t``.
        class_total: (T, K) integers, evaluated test samples; 0 = not evaluated.

    Returns:
        (T, K) float64 in [0, 1], ``NaN`` where nothing was evaluated.

    Raises:
        ArgumentError: If the tables differ in shape, are not integers or violate ``0 <= correct <= total``.

    Example:
        >>> per_class_accuracy([[3, 0]], [[4, 0]])
        tensor([[0.7500,    nan]], dtype=torch.float64)
    """
    return ratio(*as_counts(class_correct, class_total))


def accuracy_seen(correct: Array, total: Array) -> Tensor:
    """Return the accuracy after each stage on all experiences learned so far, every test sample counting the same.

    The usual curve over time. With experiences of equal size it is the mean of a row's first ``i`` entries.

    ``A_i = Σ_{j ≤ i} n_j R[i, j] / Σ_{j ≤ i} n_j``

    Args:
        correct: (T, E) integers, see :func:`accuracy_matrix`.
        total: (T, E) integers, see :func:`accuracy_matrix`.

    Returns:
        (T,) float64 in [0, 1]; ``NaN`` at a stage that did not evaluate all experiences learned by then.

    Raises:
        ArgumentError: If the tables differ in shape, are not integers or violate ``0 <= correct <= total``.

    Example:
        >>> accuracy_seen([[9, 0], [6, 24]], [[10, 0], [10, 30]])  # (6 + 24) / (10 + 30)
        tensor([0.9000, 0.7500], dtype=torch.float64)

    Source:
        ``A_t`` of the class-incremental protocol: Rebuffi et al., "iCaRL", arXiv 1611.07725, section 4.
    """
    hits, samples = as_counts(correct, total)
    hits, samples = widen(hits), widen(samples)
    learned = torch.ones_like(samples, dtype=torch.bool).tril()
    accuracy = ratio((hits * learned).sum(1), (samples * learned).sum(1))
    return accuracy.masked_fill((learned & (samples == 0)).any(1), nan)


def average_incremental_accuracy(seen: Array) -> float:
    """Return the mean over stages of the accuracy on everything seen, the headline of class-incremental papers.

    It rewards being good at all times and depends on the order of the classes. Compare it with other papers'
    "average incremental accuracy" only, never with a final accuracy.

    ``(1/T) Σ_i A_i``

    Args:
        seen: (T,) accuracies from :func:`accuracy_seen`.

    Returns:
        A float in [0, 1], ``NaN`` if a stage is ``NaN`` or there is none.

    Raises:
        ArgumentError: If ``seen`` is not one-dimensional.

    Example:
        >>> average_incremental_accuracy([1.0, 0.5])
        0.75

    Source:
        Rebuffi et al., "iCaRL", arXiv 1611.07725, section 4.
    """
    return float(as_vector("seen", seen).mean())


def final_accuracy(seen: Array) -> float:
    """Return the accuracy ``A_T`` after the last stage on everything seen, every test sample counting the same.

    Args:
        seen: (T,) accuracies from :func:`accuracy_seen`.

    Returns:
        A float in [0, 1], ``NaN`` if the last stage is ``NaN`` or there is none.

    Raises:
        ArgumentError: If ``seen`` is not one-dimensional.

    Example:
        >>> final_accuracy([1.0, 0.5])
        0.5
    """
    return float(values[-1]) if len(values := as_vector("seen", seen)) else nan


def average_accuracy(matrix: Array) -> float:
    """Return the mean accuracy over the experiences learned, after the last stage, each counting the same.

    ``(1/T) Σ_{j ≤ T} R[T, j]``

    Args:
        matrix: (T, E) accuracy matrix, ``NaN`` where not evaluated.

    Returns:
        A float in [0, 1], ``NaN`` if one of the entries is missing or there is no stage.

    Raises:
        ArgumentError: If ``matrix`` is not two-dimensional.

    Example:
        >>> average_accuracy([[1.0, float("nan")], [0.5, 1.0]])
        0.75

    Source:
        Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.
    """
    R = as_matrix("matrix", matrix)
    T = len(R)
    return float(R[-1, :T].mean()) if T else nan


def forgetting(matrix: Array) -> float:
    """Return how far each earlier experience has fallen from its best accuracy, averaged; lower is better.

    Of the definitions in use this is the one with the maximum over *all* earlier stages (also stages before the
    experience was learned, where they were evaluated), without clipping at 0 and without the last experience.

    ``(1/(T−1)) Σ_{j < T} ( max_{i < T} R[i, j] − R[T, j] )``

    Args:
        matrix: (T, E) accuracy matrix, ``NaN`` where not evaluated. Entries above the diagonal are optional.

    Returns:
        A float in [-1, 1]; ``NaN`` with fewer than two stages or if an entry on or below the diagonal is missing.

    Raises:
        ArgumentError: If ``matrix`` is not two-dimensional.

    Example:
        >>> nan = float("nan")
        >>> forgetting([[1.0, nan, nan], [0.5, 1.0, nan], [0.75, 0.5, 1.0]])  # (1 - 0.75 + 1 - 0.5) / 2
        0.375

    Source:
        Chaudhry et al., "Riemannian Walk for Incremental Learning", arXiv 1801.10112, section 3.
    """
    R = as_matrix("matrix", matrix)
    T, E = R.shape
    if T < 2 or E < 2:
        return nan
    past = R[:-1, : T - 1]
    if bool(past.isnan().tril().any()):
        return nan
    best = past.nan_to_num(nan=-inf).amax(0)
    return float((best - R[-1, : T - 1]).mean())


def backward_transfer(matrix: Array) -> float:
    """Return how much later learning changed what was just learned; negative is forgetting.

    ``(1/(T−1)) Σ_{j < T} ( R[T, j] − R[j, j] )``

    Args:
        matrix: (T, E) accuracy matrix, ``NaN`` where not evaluated.

    Returns:
        A float in [-1, 1]; ``NaN`` with fewer than two stages or if an entry is missing.

    Raises:
        ArgumentError: If ``matrix`` is not two-dimensional.

    Example:
        >>> backward_transfer([[1.0, float("nan")], [0.75, 1.0]])
        -0.25

    Source:
        Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.
    """
    R = as_matrix("matrix", matrix)
    T, E = R.shape
    if T < 2 or E < 2:
        return nan
    return float((R[-1, : T - 1] - R.diagonal()[: T - 1]).mean())


def forward_transfer(matrix: Array, baseline: Array | None) -> float:
    """Return how much earlier learning helps with an experience before it is learned, over an untrained model.

    Needs every experience to be evaluated before it is learned, and once before any training.

    ``(1/(T−1)) Σ_{1 < j ≤ T} ( R[j−1, j] − R[0, j] )``

    Args:
        matrix: (T, E) accuracy matrix, ``NaN`` where not evaluated.
        baseline: (E,) accuracies ``R[0, ·]`` before any training, or ``None`` if they were not measured.

    Returns:
        A float in [-1, 1]; ``NaN`` with fewer than two stages or if an entry is missing.

    Raises:
        ArgumentError: If ``matrix`` is not two-dimensional or ``baseline`` not one-dimensional.

    Example:
        >>> forward_transfer([[1.0, 0.5], [0.75, 1.0]], baseline=[0.5, 0.25])  # R[1, 2] - R[0, 2]
        0.25

    Source:
        Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.
    """
    R = as_matrix("matrix", matrix)
    T, E = R.shape
    if baseline is None or T < 2 or E < 2:
        return nan
    before = as_vector("baseline", baseline)
    if len(before) < T:
        return nan
    return float((R.diagonal(offset=1)[: T - 1] - before[1:T]).mean())


def amca(class_correct: Array, class_total: Array, num_test_classes: int | None = None) -> float:
    """Return the average mean class accuracy: every class of the full test set counts the same, at every stage.

    The measure of imbalanced streams. Classes that a stage did not evaluate, as they were not learned yet, count as 0.

    ``(1/T) Σ_t (1/K) Σ_c a[t, c]``

    Args:
        class_correct: (T, K') integers, see :func:`per_class_accuracy`.
        class_total: (T, K') integers, see :func:`per_class_accuracy`.
        num_test_classes: Number ``K`` of classes in the full test set; default: those evaluated at the last stage.

    Returns:
        A float in [0, 1]. ``NaN`` when the counts are not those of a full test set: a stage without any sample, a class
        of which a stage evaluated only a part, or one that a later stage left out.

    Raises:
        ArgumentError: If the tables are malformed, or ``num_test_classes`` is smaller than the number of classes
            evaluated at the last stage.

    Example:
        >>> amca([[4, 0], [2, 1]], [[4, 0], [4, 1]])  # ((1 + 0) / 2 + (0.5 + 1) / 2) / 2
        0.625

    Source:
        Verwimp et al., "CLAD: A realistic Continual Learning benchmark for Autonomous Driving", arXiv 2210.03482.
    """
    correct, total = as_counts(class_correct, class_total)
    if len(total) == 0:
        return nan
    present = int((total[-1] > 0).sum())
    classes = present if num_test_classes is None else num_test_classes
    if classes < present:
        raise ArgumentError(
            f"num_test_classes is {classes}, but the last stage evaluated {present} classes: give the number of classes"
            " in the full test set, or leave it out"
        )
    evaluated = total > 0
    flaws = ~evaluated.any(1), evaluated & (total != total[-1]), evaluated[:-1] & ~evaluated[1:]
    if any(bool(flaw.any()) for flaw in flaws):
        return nan
    return float(ratio(correct, total).nan_to_num(nan=0.0).sum(1).mean() / classes)


def summarize(
    correct: Array,
    total: Array,
    class_correct: Array | None = None,
    class_total: Array | None = None,
    baseline: Array | None = None,
    num_test_classes: int | None = None,
) -> dict[str, float | list[Any] | None]:
    """Return all metrics of one predictor, as they stand in ``results.json``.

    Args:
        correct: (T, E) integers: ``T`` stages so far, ``E`` experiences, see :func:`accuracy_matrix`.
        total: (T, E) integers; 0 = not evaluated.
        class_correct: (T, K) integers per class, on everything evaluated at a stage; needed for ``amca`` only.
        class_total: (T, K) integers; 0 = not evaluated.
        baseline: (E,) accuracies before any training, ``NaN`` where not evaluated; for ``forward_transfer`` only.
        num_test_classes: Classes in the full test set, for ``amca``; default: those evaluated at the last stage.

    Returns:
        ``accuracy_matrix`` (T lists), ``accuracy_seen`` (a list), ``average_incremental_accuracy``, ``final_accuracy``,
        ``average_accuracy``, ``forgetting``, ``backward_transfer``, ``forward_transfer`` and ``amca``: plain floats,
        ``None`` where not evaluated or not defined, so that ``json.dumps`` writes ``null``. ``amca`` is also ``None``
        when a stage did not evaluate all experiences learned by then.

    Raises:
        ArgumentError: If a table is malformed or only one of the two class tables is given.

    Example:
        >>> summary = summarize([[9, 0], [6, 8]], [[10, 0], [10, 10]])
        >>> summary["accuracy_matrix"], summary["accuracy_seen"]
        ([[0.9, None], [0.6, 0.8]], [0.9, 0.7])
        >>> round(summary["forgetting"], 12), summary["forward_transfer"]
        (0.3, None)
    """
    matrix, seen, mean_class = accuracy_matrix(correct, total), accuracy_seen(correct, total), nan
    if class_correct is not None and class_total is not None:
        mean_class = amca(class_correct, class_total, num_test_classes)
    elif class_correct is not class_total:
        missing = "class_correct" if class_correct is None else "class_total"
        raise ArgumentError(f"{missing} is missing: give class_correct and class_total together, or neither")
    values = {
        "average_incremental_accuracy": average_incremental_accuracy(seen),
        "final_accuracy": final_accuracy(seen),
        "average_accuracy": average_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix, baseline),
        "amca": nan if bool(seen.isnan().any()) else mean_class,
    }
    defined = {name: None if isnan(value) else value for name, value in values.items()}
    return {"accuracy_matrix": plain(matrix), "accuracy_seen": plain(seen), **defined}
