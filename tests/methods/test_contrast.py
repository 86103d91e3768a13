"""The supervised contrast against loops written from its equation, and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clkit.errors import ArgumentError, BatchError
from clkit.methods import supervised_contrast


def unit_rows(n: int, width: int, seed: int) -> Tensor:
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(drawn, dim=1)


def naive(first: Tensor, second: Tensor, labels: list[int], temperature: float) -> float:
    z = [*first.tolist(), *second.tolist()]
    labels = [*labels, *labels]
    total = 0.0
    for i in range(len(z)):
        similar = [sum(a * b for a, b in zip(z[i], z[j], strict=True)) / temperature for j in range(len(z))]
        everybody = sum(math.exp(similar[j]) for j in range(len(z)) if j != i)
        positives = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        total += sum(-math.log(math.exp(similar[j]) / everybody) for j in positives) / len(positives)
    return total / len(z)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 4), min_size=1, max_size=9),
    temperature=st.sampled_from([0.07, 0.5, 3.0]),
    width=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_it_is_the_naive_loop(labels: list[int], temperature: float, width: int, seed: int) -> None:
    first, second = unit_rows(len(labels), width, seed), unit_rows(len(labels), width, seed + 5000)
    loss = supervised_contrast(first, second, torch.tensor(labels), temperature)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(naive(first, second, labels, temperature), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("labels", [[2, 2, 2, 2], [0, 1, 2, 3], [5, 0, 5, 9]], ids=["one class", "distinct", "mixed"])
def test_gradients_are_finite_differences(labels: list[int]) -> None:
    first, second = unit_rows(4, 3, 1).requires_grad_(), unit_rows(4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: supervised_contrast(a, b, torch.tensor(labels), 0.3), (first, second))


def test_one_row_costs_nothing_and_pulls_nowhere() -> None:
    first, second = unit_rows(1, 3, 1).requires_grad_(), unit_rows(1, 3, 2).requires_grad_()
    loss = supervised_contrast(first, second, torch.tensor([4]))
    loss.backward()
    assert loss.item() == 0.0
    for rows in (first, second):
        assert rows.grad is not None
        assert not rows.grad.any()


def test_one_class_of_equal_rows_costs_the_logarithm_of_the_others() -> None:
    rows = unit_rows(1, 3, 1).expand(5, 3)
    loss = supervised_contrast(rows, rows, torch.zeros(5, dtype=torch.int64))
    assert loss.item() == pytest.approx(math.log(9), rel=1e-12)


def test_orthogonal_classes_cost_nothing_at_a_low_temperature() -> None:
    rows = torch.eye(4, dtype=torch.float64)
    assert supervised_contrast(rows, rows, torch.arange(4), 0.01).item() == pytest.approx(0.0, abs=1e-12)
    apart = supervised_contrast(rows, -rows, torch.arange(4), 0.5).item()
    assert apart == pytest.approx(2 + math.log(6 + math.exp(-2)), rel=1e-12)


def test_no_rows_are_zero_with_a_graph() -> None:
    rows = torch.zeros(0, 3, requires_grad=True)
    loss = supervised_contrast(rows, rows, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert rows.grad is not None


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=8),
    names=st.permutations([3, 11, -5, 1000, 0]),
    seed=st.integers(0, 1000),
)
def test_order_names_and_views_do_not_matter(labels: list[int], names: list[int], seed: int) -> None:
    y = torch.tensor(labels)
    first, second = unit_rows(len(y), 3, seed), unit_rows(len(y), 3, seed + 5000)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    loss = supervised_contrast(first, second, y).item()
    for same in (
        supervised_contrast(first[order], second[order], y[order]),
        supervised_contrast(first, second, torch.tensor(names)[y]),
        supervised_contrast(second, first, y),
    ):
        assert same.item() == pytest.approx(loss, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_is_float32_or_float64_inside_autocast(dtype: torch.dtype) -> None:
    first, second = unit_rows(6, 8, 1).to(dtype), unit_rows(6, 8, 2).to(dtype)
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = supervised_contrast(first.to(wide), second.to(wide), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supervised_contrast(first, second, labels)
    assert loss.dtype == wide
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda rows: supervised_contrast(rows, rows[:2], torch.arange(3)), BatchError, r"\(3, 4\), got .* \(2, 4\)"),
        (lambda rows: supervised_contrast(rows, rows, torch.arange(6)), BatchError, r"got \(6,\)"),
        (lambda rows: supervised_contrast(rows[0], rows[0], torch.arange(4)), BatchError, r"shape \(4,\)"),
        (lambda rows: supervised_contrast(rows.long(), rows.long(), torch.arange(3)), BatchError, "torch.int64"),
        (lambda rows: supervised_contrast(rows, rows, torch.rand(3)), BatchError, "labels must be integers"),
        (lambda rows: supervised_contrast(rows, rows, torch.arange(3), 0.0), ArgumentError, "temperature"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Tensor], Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(torch.eye(3, 4))
