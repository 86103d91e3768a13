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

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from clkit.errors import ArgumentError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
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

Array: TypeAlias = "Tensor | npt.NDArray[Any] | Sequence[Any]"

NAN = math.nan


def accuracy_matrix(correct: Array, total: Array) -> Tensor:
    """The accuracy matrix: how well each experience is known after each stage.

    Everything else that is commonly reported about a stream is read off this table.

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
    return _widen(_ratio(*_counts(correct, total)))


def per_class_accuracy(class_correct: Array, class_total: Array) -> Tensor:
    """Accuracy of each class after each stage, on everything that was evaluated then.

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
    return _ratio(*_counts(class_correct, class_total))


def accuracy_seen(correct: Array, total: Array) -> Tensor:
    """Accuracy after each stage on all experiences learned so far, every test sample counting the same.

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
    correct, total = (_widen(table) for table in _counts(correct, total))
    learned = torch.ones_like(total, dtype=torch.bool).tril()
    accuracy = _ratio((correct * learned).sum(1), (total * learned).sum(1))
    return accuracy.masked_fill((learned & (total == 0)).any(1), NAN)


def average_incremental_accuracy(seen: Array) -> float:
    """Mean over stages of the accuracy on everything seen; the headline number of class-incremental papers.

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
    return float(_vector("seen", seen).mean())


def final_accuracy(seen: Array) -> float:
    """Accuracy after the last stage on everything seen, every test sample counting the same.

    ``A_T``

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
    values = _vector("seen", seen)
    return float(values[-1]) if len(values) else NAN


def average_accuracy(matrix: Array) -> float:
    """Mean accuracy over the experiences learned, after the last stage, every experience counting the same.

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
    R = _matrix("matrix", matrix)
    T = len(R)
    return float(R[-1, :T].mean()) if T else NAN


def forgetting(matrix: Array) -> float:
    """How far each earlier experience has fallen from its best accuracy, averaged; lower is better.

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
    R = _matrix("matrix", matrix)
    T, E = R.shape
    if T < 2 or E < 2:
        return NAN
    past = R[:-1, : T - 1]
    if bool(past.isnan().tril().any()):
        return NAN
    best = past.nan_to_num(nan=-math.inf).amax(0)
    return float((best - R[-1, : T - 1]).mean())


def backward_transfer(matrix: Array) -> float:
    """How much later learning changed what was just learned; negative is forgetting, positive is improvement.

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
    R = _matrix("matrix", matrix)
    T, E = R.shape
    if T < 2 or E < 2:
        return NAN
    return float((R[-1, : T - 1] - R.diagonal()[: T - 1]).mean())


def forward_transfer(matrix: Array, baseline: Array | None) -> float:
    """How much earlier learning helps with an experience before it is learned, over an untrained model.

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
    R = _matrix("matrix", matrix)
    T, E = R.shape
    if baseline is None or T < 2 or E < 2:
        return NAN
    before = _vector("baseline", baseline)
    if len(before) < T:
        return NAN
    return float((R.diagonal(offset=1)[: T - 1] - before[1:T]).mean())


def amca(class_correct: Array, class_total: Array, num_test_classes: int | None = None) -> float:
    """Average mean class accuracy: every class of the full test set counts the same, at every stage.

    The measure of imbalanced streams, where rare classes would vanish in an accuracy over samples. Classes that a stage
    did not evaluate, because they were not learned yet, count as 0.

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
    correct, total = _counts(class_correct, class_total)
    if len(total) == 0:
        return NAN
    present = int((total[-1] > 0).sum())
    classes = present if num_test_classes is None else num_test_classes
    if classes < present:
        raise ArgumentError(
            f"num_test_classes is {classes}, but the last stage evaluated {present} classes: give the number of classes"
            " in the full test set, or leave it out"
        )
    evaluated = total > 0
    empty = ~evaluated.any(1)
    partly = evaluated & (total != total[-1])
    dropped = evaluated[:-1] & ~evaluated[1:]
    if any(bool(flaw.any()) for flaw in (empty, partly, dropped)):
        return NAN
    return float(_ratio(correct, total).nan_to_num(nan=0.0).sum(1).mean() / classes)


def summarize(
    correct: Array,
    total: Array,
    class_correct: Array | None = None,
    class_total: Array | None = None,
    baseline: Array | None = None,
    num_test_classes: int | None = None,
) -> dict[str, float | list[Any] | None]:
    """All metrics of one predictor, as they stand in ``results.json``.

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
    matrix = accuracy_matrix(correct, total)
    seen = accuracy_seen(correct, total)
    if class_correct is not None and class_total is not None:
        mean_class = amca(class_correct, class_total, num_test_classes)
    elif class_correct is None and class_total is None:
        mean_class = NAN
    else:
        missing = "class_correct" if class_correct is None else "class_total"
        raise ArgumentError(f"{missing} is missing: give class_correct and class_total together, or neither")
    return {
        "accuracy_matrix": _plain(matrix),
        "accuracy_seen": _plain(seen),
        "average_incremental_accuracy": _json(average_incremental_accuracy(seen)),
        "final_accuracy": _json(final_accuracy(seen)),
        "average_accuracy": _json(average_accuracy(matrix)),
        "forgetting": _json(forgetting(matrix)),
        "backward_transfer": _json(backward_transfer(matrix)),
        "forward_transfer": _json(forward_transfer(matrix, baseline)),
        "amca": None if bool(seen.isnan().any()) else _json(mean_class),
    }


def staged_counts(
    classes: Mapping[int, tuple[int, int]], stages: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """The tables of a stream for a network that has learned everything at once, so that it can stand beside others.

    After stage ``i`` it is measured on the classes that the stream has brought by then. That is the stream's own
    evaluation where no class comes twice.

    Args:
        classes: For each class the correct and the evaluated test samples.
        stages: The classes of each experience.

    Returns:
        ``correct`` and ``total``, (T, T) lists of integers as :func:`accuracy_matrix` takes them.

    Raises:
        ArgumentError: If a class comes in two experiences.

    Example:
        >>> correct, total = staged_counts({0: (3, 4), 1: (1, 4), 2: (4, 4)}, [(0, 2), (1,)])
        >>> summarize(correct, total)["accuracy_matrix"]
        [[0.875, None], [0.875, 0.25]]
    """
    labels = [label for stage in stages for label in stage]
    if len(labels) != len(set(labels)):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise ArgumentError(f"stages has the classes {twice} more than once: their samples belong to no one experience")
    last = [[sum(classes.get(label, (0, 0))[k] for label in stage) for stage in stages] for k in (0, 1)]
    correct, total = (
        [[count if j <= i else 0 for j, count in enumerate(row)] for i in range(len(stages))] for row in last
    )
    return correct, total


def _plain(values: Tensor) -> list[Any]:
    """Nested lists with ``None`` for ``NaN``; no loop, because the matrix of a long stream has millions of entries."""
    entries = values.numpy().astype(object)
    entries[values.isnan().numpy()] = None
    plain: list[Any] = entries.tolist()
    return plain


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value


def _ratio(correct: Tensor, total: Tensor) -> Tensor:
    # 0 / 0 is NaN in IEEE arithmetic, which is what "not evaluated" means here.
    return correct.double() / total.double()


def _widen(table: Tensor) -> Tensor:
    """Adds the columns that ``T`` stages must have, as not evaluated; a single column is one fixed test set."""
    stages, experiences = table.shape
    if experiences == 1 or experiences >= stages:
        return table
    filler = NAN if table.is_floating_point() else 0
    return torch.cat([table, table.new_full((stages, stages - experiences), filler)], dim=1)


def _counts(correct: Array, total: Array) -> tuple[Tensor, Tensor]:
    hits, samples = torch.as_tensor(correct).cpu(), torch.as_tensor(total).cpu()
    if hits.ndim != 2 or hits.shape != samples.shape:
        raise ArgumentError(
            f"correct has shape {tuple(hits.shape)} and total {tuple(samples.shape)}: both must be (stages, columns)"
        )
    if hits.numel() and (hits.is_floating_point() or samples.is_floating_point()):
        raise ArgumentError(f"correct is {hits.dtype} and total {samples.dtype}: both must count, so give integers")
    hits, samples = hits.long(), samples.long()
    if bool(((hits < 0) | (hits > samples)).any()):
        row, column = ((hits < 0) | (hits > samples)).nonzero()[0].tolist()
        raise ArgumentError(
            f"correct[{row}, {column}] is {int(hits[row, column])} of total {int(samples[row, column])}:"
            " 0 <= correct <= total must hold"
        )
    return hits, samples


def _matrix(name: str, values: Array) -> Tensor:
    table = torch.as_tensor(values, dtype=torch.float64).cpu()
    if table.ndim != 2:
        raise ArgumentError(f"{name} has shape {tuple(table.shape)}: it must be (stages, experiences)")
    return _widen(table)


def _vector(name: str, values: Array) -> Tensor:
    row = torch.as_tensor(values, dtype=torch.float64).cpu()
    if row.ndim != 1:
        raise ArgumentError(f"{name} has shape {tuple(row.shape)}: it must be one-dimensional")
    return row
