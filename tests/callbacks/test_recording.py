"""Rows of the accuracy matrix: however they are filled, their tables are those of a plain loop over all stages."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clkit.callbacks._recording import Row, Rows, packed, tables, unpacked

Samples = list[tuple[int, int, int]]
SAMPLES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(-1, 4)), min_size=1, max_size=8)
STEPS = st.lists(st.tuples(st.integers(0, 5), SAMPLES, st.booleans()), max_size=8)


def row_of(samples: Samples) -> Row:
    return Row.of(*np.array(samples, dtype=np.int64).T)


def counted(samples: Samples, column: int) -> list[list[int]]:
    """Key, hits and samples of an experience (column 0) or a class (column 1), counted one by one."""
    total = Counter(sample[column] for sample in samples)
    hits = Counter(sample[column] for sample in samples if sample[1] == sample[2])
    return [[key, hits[key], total[key]] for key in sorted(total)]


@given(steps=STEPS)
def test_tables_equal_a_count_one_by_one(steps: Any) -> None:
    rows, plain = Rows(), {}
    for stage, samples, forget in steps:
        if forget and rows:  # what the evaluation does with a row when the next one comes
            rows[max(rows)] = rows[max(rows)].without_confusions()
        rows[stage], plain[stage] = row_of(samples), samples
        for column, name in enumerate(("experiences", "classes")):
            expected = [[s, *line] for s in sorted(plain) for line in counted(plain[s], column)]
            assert rows.stacked(name).tolist() == expected
    counts = tables(rows)
    right = sum(target == predicted for s, samples in plain.items() if s for _, target, predicted in samples)
    assert int(counts.correct.sum()) == int(counts.class_correct.sum()) == right


@given(steps=STEPS)
def test_a_saved_record_comes_back(steps: Any) -> None:
    rows = Rows({stage: row_of(samples) for stage, samples, _ in steps})
    back = unpacked(packed(rows), "test")
    assert sorted(back) == sorted(rows)
    for stage, row in rows.items():
        assert back[stage].experiences.tolist() == row.experiences.tolist()
        assert back[stage].pairs.tolist() == row.pairs.tolist()
