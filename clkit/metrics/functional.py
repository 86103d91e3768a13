"""The metrics of continual learning as plain functions of counts and of the accuracy matrix.

Notation, shared by all functions: a stream has experiences ``j = 1 … E``, of which ``T`` were learned so far, and is
evaluated after each of these ``T`` stages. ``R[i, j]`` is the accuracy on the test samples of experience ``j`` after
learning experience ``i``, ``NaN`` where it was not evaluated, and ``n_j`` is the number of these test samples. Every
value at stage ``T`` is that of the stream cut after ``T`` experiences, so a series over stages is read off prefixes.

An entry that a definition needs and that was not evaluated makes the value ``NaN``; entries that it does not need (the
future, above the diagonal) are skipped. A single column (``E = 1``) stands for one fixed test set: every stage is
judged on it, and the metrics that compare experiences are undefined.

Arguments are tensors, NumPy arrays or nested lists; the arithmetic is float64 on the CPU.

* ``correct`` and ``total`` are (T, E) integers, the correctly classified and the evaluated test samples of each
  experience after each stage (0 = not evaluated); ``class_correct`` and ``class_total``, (T, K), are those by class;
* ``matrix`` is what :func:`accuracy_matrix` returns, (T, E) with ``NaN`` where not evaluated;
* ``seen`` is what :func:`accuracy_seen` returns, (T,);
* ``without`` are the experiences, counted from 0, that have no test samples (``n_j = 0``). They are no missing entries:
  sums and means are over the rest.

All functions raise an :class:`~clkit.errors.ArgumentError` for tables of another or of different shape, for several
experiences but fewer than stages, and for counts that are no integers or violate ``0 <= correct <= total``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf, isnan, nan
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clkit.errors import ArgumentError
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

Array: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]


def accuracy_matrix(correct: Array, total: Array) -> Tensor:
    """Return the accuracy matrix, how well each experience is known after each stage: ``R[i, j]``.

    From Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, section 2.

    Returns:
        (T, E) float64 in [0, 1], ``NaN`` where nothing was evaluated.

    Example:
        >>> accuracy_matrix([[9, 0], [6, 8]], [[10, 0], [10, 10]])
        tensor([[0.9000,    nan],
                [0.6000, 0.8000]], dtype=torch.float64)
    """
    return _ratio(*_as_counts(correct, total, by_experience=True))


def per_class_accuracy(class_correct: Array, class_total: Array) -> Tensor:
    """Return the accuracy ``a[t, c]`` of each class after each stage, on everything that was evaluated then.

    Returns:
        (T, K) float64 in [0, 1], ``NaN`` where nothing was evaluated.

    Example:
        >>> per_class_accuracy([[3, 0]], [[4, 0]])
        tensor([[0.7500,    nan]], dtype=torch.float64)
    """
    return _ratio(*_as_counts(class_correct, class_total))


def accuracy_seen(correct: Array, total: Array, without: Collection[int] = ()) -> Tensor:
    """Return the accuracy after each stage on all experiences learned so far, every test sample counting the same.

    ``A_i = Σ_{j ≤ i} n_j R[i, j] / Σ_{j ≤ i} n_j``, the usual curve over time: Rebuffi et al., "iCaRL: Incremental
    Classifier and Representation Learning", arXiv 1611.07725, section 4. With experiences of equal size it is the mean
    of a row's first ``i`` entries.

    Returns:
        (T,) float64 in [0, 1]; ``NaN`` at a stage that did not evaluate all experiences learned by then, or had none to
        evaluate.

    Example:
        >>> accuracy_seen([[9, 0], [6, 24]], [[10, 0], [10, 30]])  # (6 + 24) / (10 + 30)
        tensor([0.9000, 0.7500], dtype=torch.float64)
    """
    hits, samples = _as_counts(correct, total, by_experience=True)
    learned = torch.ones_like(samples, dtype=torch.bool).tril()
    learned[:, [j for j in without if j < learned.shape[1]]] = False
    accuracy = _ratio((hits * learned).sum(1), (samples * learned).sum(1))
    return accuracy.masked_fill((learned & (samples == 0)).any(1), nan)


def average_incremental_accuracy(seen: Array) -> float:
    """Return the mean over stages of the accuracy on everything seen: ``(1/T) Σ_i A_i``.

    The headline of class-incremental papers (Rebuffi et al., arXiv 1611.07725, section 4). It rewards being good at all
    times and depends on the order of the classes: compare it with the same number of other papers only, never with a
    final accuracy.

    A float in [0, 1], ``NaN`` if a stage is ``NaN`` or there is none.

    Example:
        >>> average_incremental_accuracy([1.0, 0.5])
        0.75
    """
    return float(as_floats("seen", seen, 1).mean())


def final_accuracy(seen: Array) -> float:
    """Return the accuracy ``A_T`` after the last stage on everything seen, every test sample counting the same.

    A float in [0, 1], ``NaN`` if the last stage is ``NaN`` or there is none.

    Example:
        >>> final_accuracy([1.0, 0.5])
        0.5
    """
    return float(values[-1]) if len(values := as_floats("seen", seen, 1)) else nan


def average_accuracy(matrix: Array, without: Collection[int] = ()) -> float:
    """Return the mean accuracy over the experiences learned, after the last stage, each counting the same.

    ``(1/T) Σ_{j ≤ T} R[T, j]``: Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.

    A float in [0, 1], ``NaN`` if one of the entries is missing or there is no stage.

    Example:
        >>> average_accuracy([[1.0, float("nan")], [0.5, 1.0]])
        0.75
    """
    R = as_floats("matrix", matrix, 2, by_experience=True)
    T = len(R)
    return float(R[-1, :T][_but(without, T, R)].mean()) if T else nan


def forgetting(matrix: Array, without: Collection[int] = ()) -> float:
    """Return how far each earlier experience has fallen from its best accuracy, averaged; lower is better.

    ``(1/(T−1)) Σ_{j < T} ( max_{i < T} R[i, j] − R[T, j] )``: Chaudhry et al., "Riemannian Walk for Incremental
    Learning", arXiv 1801.10112, section 3. Of the definitions in use this is the one with the maximum over *all*
    earlier stages (also stages before the experience was learned, where they were evaluated), without clipping at 0 and
    without the last experience. Entries above the diagonal are optional. Mammoth's "forgetting" is another quantity,
    because its maximum includes the last stage: ``best = numpy.nanmax(matrix, 0); (best - matrix[-1])[:-1].mean()``.

    A float in [-1, 1]; ``NaN`` with fewer than two stages or if an entry on or below the diagonal is missing.

    Example:
        >>> nan = float("nan")
        >>> forgetting([[1.0, nan, nan], [0.5, 1.0, nan], [0.75, 0.5, 1.0]])  # (1 - 0.75 + 1 - 0.5) / 2
        0.375
    """
    R = as_floats("matrix", matrix, 2, by_experience=True)
    T, E = R.shape
    if T < 2 or E < 2:
        return nan
    past, kept = R[:-1, : T - 1], _but(without, T - 1, R)
    if bool(past.isnan().tril()[:, kept].any()):
        return nan
    best = past.nan_to_num(nan=-inf).amax(0)
    return float((best - R[-1, : T - 1])[kept].mean())


def backward_transfer(matrix: Array, without: Collection[int] = ()) -> float:
    """Return how much later learning changed what was just learned; negative is forgetting.

    ``(1/(T−1)) Σ_{j < T} ( R[T, j] − R[j, j] )``: Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.

    A float in [-1, 1]; ``NaN`` with fewer than two stages or if an entry is missing.

    Example:
        >>> backward_transfer([[1.0, float("nan")], [0.75, 1.0]])
        -0.25
    """
    R = as_floats("matrix", matrix, 2, by_experience=True)
    T, E = R.shape
    if T < 2 or E < 2:
        return nan
    return float((R[-1, : T - 1] - R.diagonal()[: T - 1])[_but(without, T - 1, R)].mean())


def forward_transfer(matrix: Array, baseline: Array | None, without: Collection[int] = ()) -> float:
    """Return how much earlier learning helps with an experience before it is learned, over an untrained model.

    ``(1/(T−1)) Σ_{1 < j ≤ T} ( R[j−1, j] − R[0, j] )``: Lopez-Paz and Ranzato, arXiv 1706.08840, section 2. Needs every
    experience to be evaluated before it is learned, and once before any training: ``baseline`` is (E,) accuracies
    ``R[0, ·]``, or ``None`` if they were not measured.

    A float in [-1, 1]; ``NaN`` with fewer than two stages or if an entry is missing.

    Example:
        >>> forward_transfer([[1.0, 0.5], [0.75, 1.0]], baseline=[0.5, 0.25])  # R[1, 2] - R[0, 2]
        0.25
    """
    R = as_floats("matrix", matrix, 2, by_experience=True)
    T, E = R.shape
    if baseline is None or T < 2 or E < 2:
        return nan
    before = as_floats("baseline", baseline, 1)
    if len(before) < T:
        return nan
    gains = R.diagonal(offset=1)[: T - 1] - before[1:T]
    return float(gains[_but([j - 1 for j in without], T - 1, R)].mean())


def amca(class_correct: Array, class_total: Array, num_test_classes: int | None = None) -> float:
    """Return the average mean class accuracy: every class of the full test set counts the same, at every stage.

    ``(1/T) Σ_t (1/K) Σ_c a[t, c]``, the measure of imbalanced streams: Verwimp et al., "CLAD: A realistic Continual
    Learning benchmark for Autonomous Driving", arXiv 2210.03482. Classes that a stage did not evaluate, as they were
    not learned yet, count as 0. ``num_test_classes`` is ``K``; default: as many as the last stage evaluated.

    Returns:
        A float in [0, 1]. ``NaN`` when the counts are not those of a full test set: a stage without any sample, a class
        of which a stage evaluated only a part, or one that a later stage left out.

    Raises:
        ArgumentError: If ``num_test_classes`` is smaller than the number of classes evaluated at the last stage.

    Example:
        >>> amca([[4, 0], [2, 1]], [[4, 0], [4, 1]])  # ((1 + 0) / 2 + (0.5 + 1) / 2) / 2
        0.625
    """
    correct, total = _as_counts(class_correct, class_total)
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
    return float(_ratio(correct, total).nan_to_num(nan=0.0).sum(1).mean() / classes)


def summarize(
    correct: Array,
    total: Array,
    class_correct: Array | None = None,
    class_total: Array | None = None,
    baseline: Array | None = None,
    num_test_classes: int | None = None,
    without: Collection[int] = (),
) -> dict[str, float | list[Any] | None]:
    """Return all metrics of one predictor, as they stand in ``results.json``.

    ``class_correct`` and ``class_total``, both or neither, and ``num_test_classes`` are those of :func:`amca`,
    ``baseline`` that of :func:`forward_transfer`.

    Returns:
        ``accuracy_matrix`` (T lists), ``accuracy_seen`` (a list), ``average_incremental_accuracy``, ``final_accuracy``,
        ``average_accuracy``, ``forgetting``, ``backward_transfer``, ``forward_transfer`` and ``amca``: plain floats,
        ``None`` where not evaluated or not defined, so that ``json.dumps`` writes ``null``. ``amca`` is also ``None``
        when a stage did not evaluate all experiences learned by then. Means over stages leave out the first ones where
        none of the experiences learned by then has test samples.

    Example:
        >>> summary = summarize([[9, 0], [6, 8]], [[10, 0], [10, 10]])
        >>> summary["accuracy_matrix"], summary["accuracy_seen"]
        ([[0.9, None], [0.6, 0.8]], [0.9, 0.7])
        >>> round(summary["forgetting"], 12), summary["forward_transfer"]
        (0.3, None)
    """
    matrix, seen, mean_class = accuracy_matrix(correct, total), accuracy_seen(correct, total, without), nan
    first = next(j for j in range(len(without) + 1) if j not in without)  # the stage that has something to evaluate
    if class_correct is not None and class_total is not None:
        mean_class = amca(class_correct[first:], class_total[first:], num_test_classes)
    elif class_correct is not class_total:
        missing = "class_correct" if class_correct is None else "class_total"
        raise ArgumentError(f"{missing} is missing: give class_correct and class_total together, or neither")
    values = {
        "average_incremental_accuracy": average_incremental_accuracy(seen[first:]),
        "final_accuracy": final_accuracy(seen),
        "average_accuracy": average_accuracy(matrix, without),
        "forgetting": forgetting(matrix, without),
        "backward_transfer": backward_transfer(matrix, without),
        "forward_transfer": forward_transfer(matrix, baseline, without),
        "amca": nan if bool(seen[first:].isnan().any()) else mean_class,
    }
    defined = {name: None if isnan(value) else value for name, value in values.items()}
    return {"accuracy_matrix": plain(matrix), "accuracy_seen": plain(seen), **defined}


def as_floats(name: str, values: Array, ndim: int, *, by_experience: bool = False) -> Tensor:
    """Return numbers as float64 on the CPU, ``None`` as ``NaN``; ``by_experience`` wants a column for each of these."""
    if not isinstance(values, Tensor):
        values = torch.from_numpy(np.array(values, dtype=np.float64))
    table = values.detach().cpu().double()
    if table.ndim != ndim:
        raise ArgumentError(f"{name} has {table.ndim} dimensions (shape {tuple(table.shape)}): it must have {ndim}")
    if by_experience and 1 < table.shape[1] < len(table):
        _refuse_stages(*table.shape)
    return table


def plain(values: Tensor) -> list[Any]:
    """Return nested lists with ``None`` for ``NaN``; no loop, for the matrix of a long stream has millions of cells."""
    entries = values.numpy().astype(object)
    entries[values.isnan().numpy()] = None
    nested: list[Any] = entries.tolist()
    return nested


def _as_counts(correct: Array, total: Array, *, by_experience: bool = False) -> tuple[Tensor, Tensor]:
    hits, samples = torch.as_tensor(correct).cpu(), torch.as_tensor(total).cpu()
    if hits.ndim != 2 or hits.shape != samples.shape:
        raise ArgumentError(
            f"correct has shape {tuple(hits.shape)} and total {tuple(samples.shape)}: both must be (stages, columns)"
        )
    if hits.numel() and (hits.is_floating_point() or samples.is_floating_point()):
        raise ArgumentError(f"correct is {hits.dtype} and total {samples.dtype}: both must count, so give integers")
    hits, samples = hits.long(), samples.long()
    wrong = (hits < 0) | (hits > samples)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ArgumentError(
            f"correct[{row}, {column}] is {int(hits[row, column])} of total {int(samples[row, column])}:"
            " 0 <= correct <= total must hold"
        )
    if by_experience and 1 < hits.shape[1] < len(hits):
        _refuse_stages(*hits.shape)
    return hits, samples


def _but(without: Collection[int], count: int, matrix: Tensor) -> list[int]:
    """Return the first ``count`` columns of a matrix except those that have no test samples."""
    return [j for j in range(min(count, matrix.shape[1])) if j not in without]


def _ratio(correct: Tensor, total: Tensor) -> Tensor:
    return correct.double() / total.double()  # 0 / 0 is NaN in IEEE arithmetic, which means "not evaluated" here


def _refuse_stages(stages: int, experiences: int) -> NoReturn:
    """Say that a table has no column for each experience, and is not of one fixed test set either."""
    raise ArgumentError(
        f"{stages} stages and {experiences} experiences: each stage learns one experience, so give a column for "
        "each, NaN (or 0 of 0) where it was not evaluated, or a single column for one fixed test set"
    )
