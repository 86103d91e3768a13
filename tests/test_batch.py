"""What a batch may look like."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clkit.errors import BatchError
from clkit.features.batch import INPUT_KEYS, TARGET_KEYS, read_batch, read_inputs

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([4, 0, 7])
Pair = namedtuple("Pair", "features labels")


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, torch.zeros(3), "more"),
        Pair(X, Y),
        {"image": X, "label": Y},
        OrderedDict(x=X, y=Y),
        UserDict(inputs=X, target=Y, index=torch.arange(3)),
    ],
)
def test_usual_forms_are_read_as_they_are(batch: Any) -> None:
    for reading in (read_batch, read_inputs):
        inputs, targets = reading(batch)
        assert inputs is X
        assert targets is Y


@given(st.sampled_from(INPUT_KEYS), st.sampled_from(TARGET_KEYS), st.permutations(["first", "second", "third"]))
def test_every_documented_pair_of_keys_in_any_order(inputs: str, targets: str, others: list[str]) -> None:
    batch: dict[str, Any] = {others[0]: 1, targets: Y, others[1]: 2, inputs: X, others[2]: 3}
    found = read_batch(batch)
    assert found[0] is X
    assert found[1] is Y


@pytest.mark.parametrize(("inputs", "targets"), [("pixel_values", "labels"), ("img", "label"), ("image", "targets")])
def test_keys_of_other_libraries_are_known(inputs: str, targets: str) -> None:
    found = read_batch({"file": ["a.png"], targets: Y, inputs: X})
    assert found[0] is X
    assert found[1] is Y


def test_the_exact_name_wins_over_one_that_may_mean_something_else() -> None:
    place = torch.zeros(3)  # of an aerial image
    found = read_batch({"x": place, "y": place, "image": X, "label": Y})
    assert found[0] is X
    assert found[1] is Y


def test_inputs_may_be_any_structure() -> None:
    inputs = {"pixels": X, "mask": None}
    assert read_batch((inputs, Y))[0] is inputs


def test_a_reader_of_the_users_own_is_asked_first() -> None:
    def reader(batch: Any) -> tuple[Any, Tensor]:
        return batch["x"] * 2, batch["fine"]

    batch = {"x": X, "y": torch.zeros(3), "fine": Y}
    inputs, targets = read_batch(batch, reader)
    assert torch.equal(inputs, 2 * X)
    assert targets is Y
    assert read_inputs(batch, reader)[1] is Y


@pytest.mark.parametrize("batch", [X, (X,), [X], {"image": X}])
def test_a_batch_to_predict_needs_no_targets(batch: Any) -> None:
    inputs, targets = read_inputs(batch)
    assert inputs is X
    assert targets is None
    with pytest.raises(BatchError):
        read_batch(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"got Tensor; pass `batch_reader=`"),
        ("text", r"got str; pass `batch_reader=`"),
        ((X,), r"got tuple; pass `batch_reader=`"),
        (None, r"got NoneType; pass `batch_reader=`"),
        (
            {"pixels": X, "y": Y},
            r"no inputs in a batch with keys \['pixels', 'y'\]; expected one of \['pixel_values'",
        ),
        ({"x": X, "category": Y}, r"no targets in a batch with keys \['category', 'x'\]; expected one of \['label'"),
        ((X, [4, 0, 7]), r"targets of a batch must be a tensor, got list"),
        ((X, None), r"targets of a batch must be a tensor, got NoneType"),
    ],
)
def test_anything_else_is_named(batch: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        read_batch(batch)


def test_a_reader_that_gives_no_tensor_is_named() -> None:
    with pytest.raises(BatchError, match=r"targets of a batch must be a tensor, got int"):
        read_batch((X, Y), lambda batch: (batch[0], 3))
