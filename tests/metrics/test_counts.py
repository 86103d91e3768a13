"""The table of counts: however it is filled, what it gives is what a plain loop over all samples counts."""

from __future__ import annotations

import io
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.errors import StateError
from clkit.metrics.counts import StreamCounts, add_up

Samples = list[tuple[int, int, int]]  # experience, class (-1 = unlabelled), predicted class (-1 = none)
SAMPLES = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=8)
STEPS = st.lists(st.tuples(st.integers(0, 5), SAMPLES), max_size=8)


def columns(samples: Samples) -> list[torch.Tensor]:
    return list(torch.tensor(samples, dtype=torch.int64).reshape(-1, 3).unbind(1))


def counted(samples: Samples, column: int) -> dict[int, tuple[int, int]]:
    """Hits and samples of each experience (column 0) or class (column 1), counted one by one."""
    total = Counter(sample[column] for sample in samples if sample[1] >= 0)
    hits = Counter(sample[column] for sample in samples if sample[1] == sample[2] >= 0)
    return {key: (hits[key], total[key]) for key in sorted(total)}


def cells(correct: torch.Tensor, total: torch.Tensor, ids: Any) -> list[dict[int, tuple[int, int]]]:
    return [
        {j: (h, n) for j, h, n in zip(ids, *row, strict=True) if n}
        for row in zip(correct.tolist(), total.tolist(), strict=True)
    ]


@given(steps=STEPS)
@settings(deadline=None)
def test_measured_stages_equal_a_count_one_by_one(steps: Any) -> None:
    counts, plain = StreamCounts(), {}
    for stage, samples in steps:
        counts.measure(stage, *columns(samples))
        earlier = plain.get(stage, [])
        again = {s[0] for s in earlier if s[1] >= 0} & {s[0] for s in samples if s[1] >= 0}
        plain[stage] = samples if again else earlier + samples
    tables, stages = counts.tables(), range(1, max(plain, default=0) + 1)
    by_experience, by_class = ([counted(plain.get(stage, []), column) for stage in stages] for column in (0, 1))
    assert cells(tables.correct, tables.total, range(tables.total.shape[1])) == by_experience
    assert cells(tables.class_correct, tables.class_total, tables.classes) == by_class
    before = {j: hits / n for j, (hits, n) in counted(plain.get(0, []), 0).items()}
    assert {j: value for j, value in enumerate(tables.baseline.tolist()) if not math.isnan(value)} == before
    assert (counts.last, tables.until(1).total.tolist()) == (max(plain, default=-1), tables.total[:1].tolist())
    if not plain:
        return
    last = plain[max(plain)]
    classes, _ = counts.class_tables()
    assert {label: (hits, n) for label, hits, n in classes.tolist()} == counted(last, 1)
    accuracies, overall = counts.accuracies()
    assert accuracies == {j: hits / n for j, (hits, n) in counted(last, 0).items()}
    labelled = [sample for sample in last if sample[1] >= 0]
    assert overall == (sum(s[1] == s[2] for s in labelled) / len(labelled) if labelled else None)


def test_confusions_are_kept_of_the_last_stage_only() -> None:
    counts = StreamCounts()
    counts.measure(1, *columns([(0, 3, 4), (0, 3, 5), (1, 3, 5), (0, 3, 3)]))
    assert counts.class_tables()[1].tolist() == [[3, 3, 1], [3, 4, 1], [3, 5, 2]]
    counts.measure(2, *columns([(0, 3, 4)]))
    assert counts.rows.tolist() == [[1, 0, 3, -1, 2], [1, 0, 3, 3, 1], [1, 1, 3, -1, 1], [2, 0, 3, 4, 1]]


@given(steps=STEPS, cut=st.integers(0, 8))
def test_adding_and_merging_are_counting_everything_at_once(steps: Any, cut: int) -> None:
    whole, parts = StreamCounts(), (StreamCounts(), StreamCounts())
    for number, (stage, samples) in enumerate(steps):
        whole.add(stage, *columns(samples))
        parts[number >= cut].add(stage, *columns(samples))
    parts[0].merge(parts[1])
    assert (parts[0].rows.tolist(), parts[0].last) == (whole.rows.tolist(), whole.last)
    every = [(stage, *sample) for stage, samples in steps for sample in samples if sample[1] >= 0]
    assert whole.rows.tolist() == [[*key, n] for key, n in sorted(Counter(every).items())]


@given(steps=STEPS)
@settings(deadline=None)
def test_a_saved_table_comes_back(steps: Any) -> None:
    counts, back, file = StreamCounts(), StreamCounts(), io.BytesIO()
    for stage, samples in steps:
        counts.measure(stage, *columns(samples))
    torch.save(counts.state_dict(), file)
    file.seek(0)
    back.load_state_dict(torch.load(file, weights_only=True), "test")
    assert (back.rows.tolist(), back.last) == (counts.rows.tolist(), counts.last)


ROW = torch.tensor([[1, 0, 3, 3, 2]])
DAMAGED: list[Any] = [
    None,
    {},
    {"counts": ROW},
    {"counts": ROW, "last": True},
    {"counts": ROW, "last": 0},
    {"counts": ROW, "last": -2},
    {"counts": ROW, "last": 2**70},
    {"counts": ROW[0], "last": 1},
    {"counts": torch.tensor(3), "last": 1},
    {"counts": ROW[:, :4], "last": 1},
    {"counts": ROW.double(), "last": 1},
    {"counts": ROW.to_sparse(), "last": 1},
    {"counts": torch.cat([ROW, ROW]), "last": 1},
    {"counts": torch.cat([ROW + 1, ROW]), "last": 2},
    *({"counts": ROW - value, "last": 1} for value in torch.diag(torch.tensor([2, 1, 4, 5, 2]))),
]


@pytest.mark.parametrize("state", DAMAGED)
def test_a_damaged_table_is_refused_and_changes_nothing(state: Any) -> None:
    counts = StreamCounts(ROW.clone())
    with pytest.raises(StateError, match="test"):
        counts.load_state_dict(state, "test")
    assert (counts.rows.tolist(), counts.last) == (ROW.tolist(), 1)


def test_rows_are_added_up_by_their_values() -> None:
    keys = torch.tensor([[5, 1], [2, 2**40], [5, 1], [-1, 0]])
    assert add_up(keys).tolist() == [[-1, 0, 1], [2, 2**40, 1], [5, 1, 2]]
    assert add_up(keys, torch.arange(4)).tolist() == [[-1, 0, 3], [2, 2**40, 1], [5, 1, 2]]
    assert add_up(keys, torch.eye(4, dtype=torch.int64)).tolist()[-1] == [5, 1, 1, 0, 1, 0]
    assert add_up(keys[:0]).shape == (0, 3)
