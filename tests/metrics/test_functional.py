"""The metrics as functions, against loops written from the definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from clkit.errors import ArgumentError
from clkit.metrics import functional as F

NAN = float("nan")

Table = list[list[int]]


# --- the definitions as loops; `None` is "not evaluated" or "not defined" --------------------------------------------


def naive_entry(correct: Table, total: Table, i: int, j: int) -> float | None:
    if j >= len(total[i]) or total[i][j] == 0:
        return None
    return correct[i][j] / total[i][j]


def naive_columns(total: Table) -> int:
    """Experiences that must be looked at: one fixed test set, or at least as many as there are stages."""
    columns = len(total[0])
    return 1 if columns == 1 else max(columns, len(total))


def naive_seen(correct: Table, total: Table) -> list[float | None]:
    result: list[float | None] = []
    for i in range(len(total)):
        hits = samples = 0
        complete = True
        for j in range(min(i + 1, naive_columns(total))):
            if naive_entry(correct, total, i, j) is None:
                complete = False
            else:
                hits += correct[i][j]
                samples += total[i][j]
        result.append(hits / samples if complete else None)
    return result


def naive_mean(values: list[float | None]) -> float | None:
    if not values or any(value is None for value in values):
        return None
    return sum(values) / len(values)


def naive_forgetting(correct: Table, total: Table) -> float | None:
    last = len(total) - 1
    if naive_columns(total) == 1:
        return None
    falls: list[float | None] = []
    for j in range(last):
        now = naive_entry(correct, total, last, j)
        history = [naive_entry(correct, total, i, j) for i in range(last)]
        if now is None or any(value is None for value in history[j:]):
            falls.append(None)
        else:
            falls.append(max(value for value in history if value is not None) - now)
    return naive_mean(falls)


def naive_backward(correct: Table, total: Table) -> float | None:
    last = len(total) - 1
    if naive_columns(total) == 1:
        return None
    changes: list[float | None] = []
    for j in range(last):
        now, then = naive_entry(correct, total, last, j), naive_entry(correct, total, j, j)
        changes.append(None if now is None or then is None else now - then)
    return naive_mean(changes)


def naive_forward(correct: Table, total: Table, baseline: list[float | None] | None) -> float | None:
    if baseline is None or naive_columns(total) == 1:
        return None
    gains: list[float | None] = []
    for j in range(1, len(total)):
        before = baseline[j] if j < len(baseline) else None
        entry = naive_entry(correct, total, j - 1, j)
        gains.append(None if entry is None or before is None else entry - before)
    return naive_mean(gains)


def naive_amca(correct: Table, total: Table, classes: int | None) -> float | None:
    present = sum(1 for samples in total[-1] if samples)
    classes = present if classes is None else classes
    stages = []
    for t in range(len(total)):
        if not any(total[t]):
            return None
        accuracy = 0.0
        for c in range(len(total[t])):
            if total[t][c] == 0:
                if any(total[s][c] for s in range(t)):
                    return None  # was in the test set before
                continue
            if total[t][c] != total[-1][c]:
                return None
            accuracy += correct[t][c] / total[t][c]
        stages.append(accuracy / classes)
    return sum(stages) / len(stages)


# --- random tables ------------------------------------------------------------------------------------------------


@st.composite
def counts(draw: st.DrawFn, stages: int, columns: int, holes: bool) -> tuple[Table, Table]:
    """Counts of a stream; without `holes` everything on and below the diagonal is evaluated."""
    total = [[draw(st.integers(0 if holes or j > i else 1, 6)) for j in range(columns)] for i in range(stages)]
    correct = [[draw(st.integers(0, samples)) for samples in row] for row in total]
    return correct, total


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    stages = draw(st.integers(1, 5))
    columns = draw(st.just(1) | st.integers(stages, 6))
    correct, total = draw(counts(stages, columns, holes=draw(st.booleans())))
    baseline = draw(st.none() | st.lists(st.none() | st.floats(0, 1), min_size=columns, max_size=columns))
    return {"correct": correct, "total": total, "baseline": baseline}


@st.composite
def class_counts(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly counts of a full test set in which classes turn up one after the other; sometimes spoilt."""
    stages, classes = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    size = [draw(st.integers(1, 5)) for _ in range(classes)]
    since = [draw(st.integers(0, stages - 1)) for _ in range(classes)]
    total = [[size[c] if t >= since[c] else 0 for c in range(classes)] for t in range(stages)]
    if draw(st.booleans()):
        total[draw(st.integers(0, stages - 1))][draw(st.integers(0, classes - 1))] = draw(st.integers(0, 5))
    correct = [[draw(st.integers(0, samples)) for samples in row] for row in total]
    present = sum(1 for samples in total[-1] if samples)
    asked = draw(st.none() | st.integers(max(present, 1), 8))
    return {"correct": correct, "total": total, "classes": asked}


def same(value: float | None, expected: float | None) -> bool:
    if value is None or expected is None:
        return value is expected
    return value == pytest.approx(expected, rel=1e-12, abs=1e-12)


# --- tests --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(streams())
def test_every_value_equals_the_loops(stream: dict[str, Any]) -> None:
    correct, total, baseline = stream["correct"], stream["total"], stream["baseline"]
    before = None if baseline is None else [NAN if value is None else value for value in baseline]
    summary: dict[str, Any] = F.summarize(correct, total, baseline=before)
    seen = naive_seen(correct, total)
    last = len(total) - 1
    final_row = [naive_entry(correct, total, last, j) for j in range(min(last + 1, naive_columns(total)))]

    columns = naive_columns(total)
    matrix = [[naive_entry(correct, total, i, j) for j in range(columns)] for i in range(len(total))]
    assert summary["accuracy_matrix"] == matrix  # one division each: equal to the last bit
    assert summary["accuracy_seen"] == seen
    assert same(summary["average_incremental_accuracy"], naive_mean(seen))
    assert same(summary["final_accuracy"], seen[-1])
    assert same(summary["average_accuracy"], naive_mean(final_row))
    assert same(summary["forgetting"], naive_forgetting(correct, total))
    assert same(summary["backward_transfer"], naive_backward(correct, total))
    assert same(summary["forward_transfer"], naive_forward(correct, total, baseline))
    assert summary["amca"] is None


@settings(deadline=None, max_examples=200)
@given(class_counts())
def test_amca_equals_the_loops(table: dict[str, Any]) -> None:
    value = F.amca(table["correct"], table["total"], table["classes"])
    expected = naive_amca(table["correct"], table["total"], table["classes"])
    assert same(None if math.isnan(value) else value, expected)


def test_hand_computed_stream() -> None:
    # Three experiences of 10, 20 and 10 test samples, all evaluated at all times.
    total = [[10, 20, 10]] * 3
    correct = [[10, 8, 1], [6, 16, 3], [7, 10, 9]]
    summary = F.summarize(correct, total, baseline=[0.1, 0.2, 0.0])
    assert summary["accuracy_matrix"] == [[1.0, 0.4, 0.1], [0.6, 0.8, 0.3], [0.7, 0.5, 0.9]]
    assert summary["accuracy_seen"] == [10 / 10, 22 / 30, 26 / 40]
    assert summary["average_incremental_accuracy"] == pytest.approx((1 + 22 / 30 + 26 / 40) / 3)
    assert summary["final_accuracy"] == 0.65  # by samples
    assert summary["average_accuracy"] == pytest.approx(0.7)  # by experiences: (0.7 + 0.5 + 0.9) / 3
    assert summary["forgetting"] == pytest.approx((0.3 + 0.3) / 2)  # from 1.0 to 0.7, from 0.8 to 0.5
    assert summary["backward_transfer"] == pytest.approx((-0.3 - 0.3) / 2)
    assert summary["forward_transfer"] == pytest.approx(((0.4 - 0.2) + (0.3 - 0.0)) / 2)


def test_forgetting_takes_the_best_of_all_earlier_stages() -> None:
    # Experience 1 was best after stage 2, experience 2 before it was learned.
    matrix = [[0.5, 1.0, NAN], [0.75, 0.5, NAN], [0.25, 0.25, 1.0]]
    assert F.forgetting(matrix) == pytest.approx(((0.75 - 0.25) + (1.0 - 0.25)) / 2)
    assert F.backward_transfer(matrix) == pytest.approx(((0.25 - 0.5) + (0.25 - 0.5)) / 2)


def test_improvement_is_negative_forgetting() -> None:
    assert F.forgetting([[0.5, NAN], [0.75, 1.0]]) == -0.25


def test_amca_by_hand() -> None:
    # Three classes of 4, 2 and 1 test samples, turning up one a stage.
    total = [[4, 0, 0], [4, 2, 0], [4, 2, 1]]
    correct = [[4, 0, 0], [3, 1, 0], [2, 1, 1]]
    stages = [1 / 3, (3 / 4 + 1 / 2) / 3, (2 / 4 + 1 / 2 + 1) / 3]
    assert F.amca(correct, total) == pytest.approx(sum(stages) / 3)
    assert F.amca(correct, total, num_test_classes=6) == pytest.approx(sum(stages) / 6)
    assert F.amca(correct[:1], total[:1]) == 1.0  # cut after one stage, the full test set has one class


@pytest.mark.parametrize(
    "total",
    [
        [[4, 1], [4, 2]],  # a class in part
        [[4, 2], [4, 0]],  # a class left out at the end
        [[4, 2], [4, 0], [4, 2]],  # a class left out in between
        [[0, 0], [4, 2]],  # a stage not evaluated
    ],
)
def test_amca_needs_the_full_test_set(total: Table) -> None:
    correct = [[0] * 2 for _ in total]
    assert math.isnan(F.amca(correct, total))
    assert F.summarize([[1]], [[1]], correct, total)["amca"] is None


def test_amca_in_the_summary_needs_all_learned_experiences() -> None:
    # After stage 2 the second experience was left out; by classes alone that looks like "not learned yet".
    class_total = [[4, 0, 0], [4, 0, 0], [4, 4, 4]]
    class_correct = [[4, 0, 0], [4, 0, 0], [4, 4, 4]]
    total = [[4, 0, 0], [4, 0, 0], [4, 4, 4]]
    assert F.amca(class_correct, class_total) == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert F.summarize(total, total, class_correct, class_total)["amca"] is None


def test_one_fixed_test_set() -> None:
    summary = F.summarize([[5], [8], [7]], [[10], [10], [10]], [[5, 0], [5, 3], [4, 3]], [[5, 5], [5, 5], [5, 5]])
    assert summary["accuracy_matrix"] == [[0.5], [0.8], [0.7]]
    assert summary["accuracy_seen"] == [0.5, 0.8, 0.7]
    assert summary["average_incremental_accuracy"] == pytest.approx(2 / 3)
    assert summary["final_accuracy"] == summary["average_accuracy"] == 0.7
    assert summary["amca"] == pytest.approx((0.5 + 0.8 + 0.7) / 3)
    assert summary["forgetting"] is summary["backward_transfer"] is summary["forward_transfer"] is None


def test_one_experience_has_no_forgetting_and_no_transfer() -> None:
    summary = F.summarize([[3]], [[4]], baseline=[0.0])
    assert summary["average_accuracy"] == 0.75
    assert summary["forgetting"] is summary["backward_transfer"] is summary["forward_transfer"] is None


def test_missing_entries_are_none_where_they_are_needed() -> None:
    # R[2, 1] was not evaluated; the last stage is complete.
    correct, total = [[9, 0, 0], [0, 8, 0], [5, 6, 7]], [[10, 0, 0], [0, 10, 0], [10, 10, 10]]
    summary = F.summarize(correct, total)
    assert summary["accuracy_seen"] == [0.9, None, 0.6]
    assert summary["average_incremental_accuracy"] is None
    assert summary["final_accuracy"] == 0.6
    assert summary["average_accuracy"] == pytest.approx(0.6)
    assert summary["forgetting"] is None  # the best of experience 1 may have been at stage 2
    assert summary["backward_transfer"] == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)


def test_forward_transfer_needs_future_experiences_and_the_row_before_training() -> None:
    matrix = [[1.0, 0.5], [1.0, 1.0]]
    assert F.forward_transfer(matrix, [NAN, 0.25]) == 0.25
    assert math.isnan(F.forward_transfer(matrix, None))
    assert math.isnan(F.forward_transfer(matrix, [0.25, NAN]))
    assert math.isnan(F.forward_transfer(matrix, [0.25]))
    assert math.isnan(F.forward_transfer([[1.0, NAN], [1.0, 1.0]], [0.25, 0.25]))


def test_nothing_evaluated_yet() -> None:
    empty = torch.zeros(0, 3, dtype=torch.int64)
    summary = F.summarize(empty, empty, empty, empty, [0.1, 0.1, 0.1])
    assert summary.pop("accuracy_matrix") == []
    assert summary.pop("accuracy_seen") == []
    assert set(summary.values()) == {None}


def test_summary_is_plain_json_with_the_keys_of_the_results_file() -> None:
    correct, total = torch.tensor([[9, 0], [6, 8]]), torch.tensor([[10, 0], [10, 10]])
    summary = F.summarize(correct, total, correct, total)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary) == [
        "accuracy_matrix",
        "accuracy_seen",
        "average_incremental_accuracy",
        "final_accuracy",
        "average_accuracy",
        "forgetting",
        "backward_transfer",
        "forward_transfer",
        "amca",
    ]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), counts(n, n, holes=False))))
def test_a_value_at_a_stage_is_that_of_the_stream_cut_there(case: tuple[int, tuple[Table, Table]]) -> None:
    stages, (correct, total) = case
    for cut in range(1, stages + 1):
        wide = F.summarize(correct[:cut], total[:cut], baseline=[0.5] * stages)
        narrow = F.summarize(
            [row[:cut] for row in correct[:cut]], [row[:cut] for row in total[:cut]], baseline=[0.5] * cut
        )
        wide.pop("accuracy_matrix"), narrow.pop("accuracy_matrix")
        assert wide == narrow


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 5).flatmap(lambda n: counts(n, n, holes=False)))
def test_forgetting_is_at_least_the_negative_backward_transfer(case: tuple[Table, Table]) -> None:
    matrix = F.accuracy_matrix(*case)
    assert F.forgetting(matrix) >= -F.backward_transfer(matrix) - 1e-15


def test_more_stages_than_experiences_are_refused() -> None:
    matrix, counted = [[1.0, NAN], [0.5, 1.0], [0.5, 0.5]], [[1, 0], [1, 1], [1, 1]]
    for refuses in (F.average_accuracy, F.forgetting, F.backward_transfer, lambda R: F.forward_transfer(R, [0, 0])):
        with pytest.raises(ArgumentError, match="3 stages and 2 experiences"):
            refuses(matrix)
    for counts_refuse in (F.accuracy_matrix, F.accuracy_seen, F.summarize):
        with pytest.raises(ArgumentError, match="3 stages and 2 experiences"):
            counts_refuse(counted, counted)
    assert F.average_accuracy([[1.0], [0.5], [0.25]]) == 0.25  # one fixed test set


def test_forgetting_of_mammoth_is_two_lines_away() -> None:
    matrix = np.array([[0.5, NAN, NAN], [0.25, 1.0, NAN], [0.75, 0.5, 1.0]])
    best = np.nanmax(matrix, 0)
    assert (best - matrix[-1])[:-1].mean() == 0.25  # (0.75 - 0.75 + 1 - 0.5) / 2: the maximum includes the last stage
    assert F.forgetting(matrix) == 0.125  # (0.5 - 0.75 + 1 - 0.5) / 2


def test_tensors_arrays_and_lists_are_the_same() -> None:
    correct, total = [[9, 0], [6, 8]], [[10, 0], [10, 10]]
    expected = F.summarize(correct, total)
    assert F.summarize(np.array(correct), np.array(total, dtype=np.int32)) == expected
    assert F.summarize(torch.tensor(correct), torch.tensor(total, dtype=torch.int32)) == expected
    assert F.average_accuracy(np.array([[1.0, np.nan], [0.5, 1.0]], dtype=np.float32)) == 0.75


def test_arguments_are_left_alone() -> None:
    correct, total = torch.tensor([[9, 0], [6, 8]]), torch.tensor([[10, 0], [10, 10]])
    matrix = F.accuracy_matrix(correct, total)
    kept = matrix.clone(), correct.clone(), total.clone()
    F.summarize(correct, total, correct, total)
    F.forgetting(matrix)
    for now, before in zip((matrix, correct, total), kept, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


def test_float64_to_the_last_digit() -> None:
    # float32 would say 0.33333334.
    assert F.summarize([[1]], [[3]])["accuracy_seen"] == [1 / 3]
    large = 2**40 + 1
    assert F.summarize([[large - 1]], [[large]])["final_accuracy"] == (large - 1) / large


@pytest.mark.parametrize(
    ("correct", "total", "says"),
    [
        ([[1, 2]], [[1]], r"\(1, 2\).*\(1, 1\)"),
        ([1, 2], [1, 2], r"\(2,\)"),
        ([[0.5]], [[1]], "float32.*integers"),
        ([[3]], [[2]], r"correct\[0, 0\] is 3 of total 2"),
        ([[0, -1]], [[2, 2]], r"correct\[0, 1\] is -1"),
    ],
)
def test_malformed_counts_are_refused(correct: Any, total: Any, says: str) -> None:
    for function in (F.accuracy_matrix, F.per_class_accuracy, F.accuracy_seen, F.amca, F.summarize):
        with pytest.raises(ArgumentError, match=says):
            function(correct, total)


def test_other_malformed_arguments_are_refused() -> None:
    for function in (F.average_accuracy, F.forgetting, F.backward_transfer, lambda m: F.forward_transfer(m, None)):
        with pytest.raises(ArgumentError, match=r"matrix has 1 dimensions \(shape \(2,\)\)"):
            function([0.5, 0.5])
    for function in (F.average_incremental_accuracy, F.final_accuracy):
        with pytest.raises(ArgumentError, match="seen"):
            function([[0.5]])
    with pytest.raises(ArgumentError, match="baseline"):
        F.forward_transfer([[1.0, 1.0], [1.0, 1.0]], [[0.5, 0.5]])
    with pytest.raises(ArgumentError, match=r"num_test_classes is 1.*2 classes"):
        F.amca([[1, 1]], [[1, 1]], num_test_classes=1)
    with pytest.raises(ArgumentError, match="class_total is missing"):
        F.summarize([[1]], [[1]], class_correct=[[1]])
    with pytest.raises(ArgumentError, match="class_correct is missing"):
        F.summarize([[1]], [[1]], class_total=[[1]])


def test_nearest_means_on_digits() -> None:
    """A whole stream, with a nearest-mean classifier and an evaluation written here in NumPy alone."""
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    train, train_labels, test, test_labels = images[::2], labels[::2], images[1::2], labels[1::2]
    correct, total = np.zeros((5, 5), dtype=int), np.zeros((5, 5), dtype=int)
    curve = []
    for stage in range(5):
        means = np.stack([train[train_labels == c].mean(0) for c in range(2 * stage + 2)])
        hits = ((test[:, None] - means) ** 2).sum(2).argmin(1) == test_labels
        curve.append(100 * hits[test_labels < 2 * stage + 2].mean())
        for j in range(stage + 1):
            correct[stage, j], total[stage, j] = hits[test_labels // 2 == j].sum(), (test_labels // 2 == j).sum()
    summary: dict[str, Any] = F.summarize(correct, total)
    assert 100 * np.array(summary["accuracy_seen"]) == pytest.approx(curve)
    assert curve == pytest.approx([99.44, 95.29, 95.93, 95.42, 89.87], abs=0.005)
    assert 100 * summary["average_incremental_accuracy"] == pytest.approx(95.19, abs=0.005)
    assert 100 * summary["average_accuracy"] == pytest.approx(89.84, abs=0.005)
    assert 100 * summary["forgetting"] == pytest.approx(4.47, abs=0.005)


# ---- joint training beside a stream


def test_staged_counts_are_those_of_a_network_that_never_changes() -> None:
    """Every stage of a stream, counted sample by sample for fixed predictions."""
    draw = np.random.default_rng(0)
    targets, right = draw.integers(0, 7, 300), draw.random(300) < 0.6
    stages = [(3, 0), (6,), (1, 2, 4), (5,)]
    counts = {c: (int(right[targets == c].sum()), int((targets == c).sum())) for c in range(7)}
    correct, total = F.staged_counts(counts, stages)
    for i in range(4):
        for j in range(4):
            rows = np.isin(targets, stages[j]) & (j <= i)
            assert correct[i][j] == right[rows].sum()
            assert total[i][j] == rows.sum()
    seen = [right[np.isin(targets, sum(stages[: i + 1], ()))].mean() for i in range(4)]
    assert F.accuracy_seen(correct, total).tolist() == pytest.approx(seen)


def test_staged_counts_want_classes_that_come_once() -> None:
    with pytest.raises(ArgumentError, match=r"stages has the classes \[1\] more than once"):
        F.staged_counts({0: (1, 1), 1: (1, 1)}, [(0, 1), (1,)])


def test_staged_counts_of_a_class_without_test_samples() -> None:
    correct, total = F.staged_counts({0: (1, 2)}, [(0,), (1,)])
    assert F.summarize(correct, total)["accuracy_matrix"] == [[0.5, None], [0.5, None]]


@given(st.integers(2, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_experiences_without_test_samples_cost_only_themselves(stages: int, data: st.DataObject) -> None:
    """Sums over what is there, by plain NumPy; no entry on or below the diagonal is missing but theirs."""
    without = data.draw(st.sets(st.integers(0, stages - 1), max_size=stages - 1))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    n = draw.integers(1, 20, stages) * [j not in without for j in range(stages)]
    total = np.tile(n, (stages + 1, 1))  # the first row is before any training
    correct = draw.integers(0, total + 1)
    with np.errstate(invalid="ignore"):
        before, R = correct[0] / total[0], correct[1:] / total[1:]
    hits, total = correct[1:].tolist(), total[1:].tolist()
    found = F.summarize(hits, total, hits, total, before, without=without)
    last = stages - 1
    seen = [correct[i + 1, : i + 1].sum() / n[: i + 1].sum() if n[: i + 1].any() else None for i in range(stages)]
    wanted: dict[str, list[Any]] = {
        "average_incremental_accuracy": [value for value in seen if value is not None],
        "average_accuracy": [R[last, j] for j in range(stages) if n[j]],
        "forgetting": [R[:last, j].max() - R[last, j] for j in range(last) if n[j]],
        "backward_transfer": [R[last, j] - R[j, j] for j in range(last) if n[j]],
        "forward_transfer": [R[j - 1, j] - before[j] for j in range(1, stages) if n[j]],
    }
    assert found["accuracy_seen"] == [None if value is None else pytest.approx(value) for value in seen]
    for name, values in wanted.items():
        assert found[name] == (pytest.approx(np.mean(values)) if values else None), name
    begun = [i for i in range(stages) if n[: i + 1].any()]
    classes = [j for j in range(stages) if n[j]]
    assert found["amca"] == pytest.approx(np.mean([[R[i, j] for j in classes] for i in begun]))
