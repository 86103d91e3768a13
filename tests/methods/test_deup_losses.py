"""Losses of one sample and their noise floors: golden values, expectations taken over all outcomes, masked classes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods import neighbour_noise, replicate_noise, sample_loss

NAN, INF = float("nan"), float("inf")
CLASSIFICATION: list[Any] = ["error", "nll", "brier"]


def test_golden_losses() -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1]] * 2, dtype=torch.float64).log() + 3
    targets = torch.tensor([1, 0])
    expected = {"nll": [1.609437912, 0.356674944], "brier": [1.14, 0.14], "error": [1.0, 0.0]}
    for loss in CLASSIFICATION:
        assert sample_loss(loss, scores, targets).tolist() == pytest.approx(expected[loss], abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "total", "noise", "rest"),
    [("nll", 0.551372135, 0.325082973, 0.226289161), ("brier", 0.36, 0.18, 0.18), ("error", 0.1, 0.1, 0.0)],
)
def test_the_expected_loss_is_noise_and_a_rest(loss: Any, total: float, noise: float, rest: float) -> None:
    mu, p = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64)

    def expected(q: Tensor) -> float:
        return float(mu @ sample_loss(loss, q.log().expand(2, 2), torch.tensor([0, 1])))

    assert expected(p) == pytest.approx(total, abs=1e-9)
    assert expected(mu) == pytest.approx(noise, abs=1e-9)
    assert expected(p) - expected(mu) == pytest.approx(rest, abs=1e-9)


def naive(loss: str, row: list[float], target: int) -> float:
    """One sample by the equations; a class that is not known has no probability."""
    if any(math.isnan(each) or each == INF for each in row) or target < 0:
        return NAN
    known = [c for c, each in enumerate(row) if each > -INF]
    top = max((row[c] for c in known), default=0.0)
    weights = {c: math.exp(row[c] - top) for c in known}
    p = {c: weights[c] / sum(weights.values()) for c in known}
    if loss == "error":
        return float(not known or max(known, key=lambda c: row[c]) != target)
    if loss == "nll":
        return min(-math.log(p[target]), 10.0) if p.get(target, 0) > 0 else 10.0
    return sum((p[c] - (c == target)) ** 2 for c in known) + (target not in p)


@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_losses_equal_the_equations_row_by_row(loss: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    scores = 8 * torch.randn(200, 5, generator=draws, dtype=torch.float64)
    scores[torch.rand(200, 5, generator=draws) < 0.3] = -INF
    scores[0], scores[1, 2], scores[2, 1] = -INF, NAN, INF
    scores[3] = torch.tensor([1.0, 1.0, 0.0, 1.0, -INF])  # a tie is decided by the lowest column
    targets = torch.randint(-1, 7, (200,), generator=draws)  # 5 and 6 have no column
    targets[3] = 1
    found = sample_loss(loss, scores, targets)
    expected = [naive(loss, row, int(target)) for row, target in zip(scores.tolist(), targets, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert torch.equal(sample_loss(loss, scores.float(), targets.int()).isnan(), found.isnan())


def test_what_is_not_known_is_wrong_and_columns_without_a_class_change_nothing() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    wider = torch.tensor([[2.0, -INF, 0.0, -INF], [0.0, -INF, 1.0, -INF]], dtype=torch.float64)
    for loss in CLASSIFICATION:
        narrow = sample_loss(loss, scores, torch.tensor([0, 0]))
        assert torch.equal(narrow, sample_loss(loss, wider, torch.tensor([0, 0])))
        # a class with a masked column, or none at all
        assert torch.equal(
            sample_loss(loss, wider, torch.tensor([1, 3])), sample_loss(loss, scores, torch.tensor([7, 9]))
        )
        nothing = sample_loss(loss, torch.empty(2, 0), torch.tensor([0, 5]))
        assert nothing.tolist() == [{"nll": 10.0}.get(loss, 1.0)] * 2
        assert sample_loss(loss, scores[:0], torch.arange(0)).shape == (0,)
    p = scores.softmax(dim=1)
    dropped = sample_loss("brier", scores, torch.tensor([4, 4]))
    torch.testing.assert_close(dropped, 1 + (p**2).sum(dim=1))
    assert sample_loss("nll", scores, torch.tensor([4, 0]), nll_cap=0.5).tolist() == [0.5, 0.5]


def test_squared_errors_never_broadcast() -> None:
    y = torch.tensor([1.0, 2.0, 4.0])
    for predictions, targets in ((y, y + 2), (y[:, None], y + 2), (y, y[:, None] + 2), (y.bfloat16(), y.int() + 2)):
        assert sample_loss("squared", predictions, targets).tolist() == [4.0, 4.0, 4.0]
    both = torch.tensor([[1.0, 2.0], [NAN, 2.0], [1e200, 0.0]], dtype=torch.float64)
    found = sample_loss("squared", both, torch.tensor([[0.0, 0.0]] * 3))
    np.testing.assert_equal(found.numpy(), [5.0, NAN, NAN])
    for wrong in ((y, y[:2]), (y, y[None]), (y[:, None].repeat(1, 3), y)):
        with pytest.raises(BatchError, match="as many numbers"):
            sample_loss("squared", *wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.tensor([0, 1, -100])),
    ],
)
@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_batches_of_another_form_are_refused(loss: Any, arguments: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(BatchError):
        sample_loss(loss, *arguments)
    with pytest.raises(ArgumentError, match="loss must be one of"):
        sample_loss("accuracy", *arguments)  # type: ignore[arg-type]  # the wrong name is the test


# ---- noise


def test_golden_noise() -> None:
    assert replicate_noise("squared", torch.tensor([[1.0, 2.0, 4.0]])).tolist() == pytest.approx([7 / 3])
    labels = torch.tensor([[0, 1, -1, -1], [0, 0, 1, -1], [0, 0, 0, 1], [5, -1, -1, -1], [-1] * 4])
    np.testing.assert_allclose(replicate_noise("brier", labels).numpy(), [1.0, 2 / 3, 0.5, NAN, NAN])
    h = math.log(2)
    assert replicate_noise("nll", labels[:1]).tolist() == pytest.approx([h + 1 / 4])
    assert replicate_noise("error", labels[1:3]).tolist() == pytest.approx([1 / 3, 1 / 4])
    for loss in (*CLASSIFICATION, "squared"):
        assert replicate_noise(loss, torch.zeros(2, 1, dtype=torch.int64)).isnan().all()
        assert replicate_noise(loss, torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_noise_is_right_on_average_over_all_labels_that_can_come(k: int) -> None:
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    outcomes = torch.tensor(list(itertools.product(range(3), repeat=k)))
    chance = mu[outcomes].prod(dim=1)
    values = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    average = {loss: float(chance @ replicate_noise(loss, outcomes)) for loss in CLASSIFICATION}
    assert average["brier"] == pytest.approx(1 - float((mu**2).sum()), abs=1e-12)
    spread = float(chance @ replicate_noise("squared", values[outcomes]))
    assert spread == pytest.approx(float(mu @ values**2 - (mu @ values) ** 2), abs=1e-12)
    assert average["error"] < 1 - 0.5  # too small, as is said
    entropy = -float((mu * mu.log()).sum())
    shares = torch.stack([(outcomes == c).double().mean(dim=1) for c in range(3)], dim=1)
    plain = float(chance @ -torch.xlogy(shares, shares).sum(dim=1))
    assert abs(average["nll"] - entropy) < abs(plain - entropy)  # corrected to first order


def test_names_of_classes_and_order_of_labels_change_nothing() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (50, 6), generator=draws)
    renamed = torch.where(labels < 0, -1, (labels + 1) * 977)
    for loss in CLASSIFICATION:
        found = replicate_noise(loss, labels)
        np.testing.assert_array_equal(found.numpy(), replicate_noise(loss, renamed).numpy())
        np.testing.assert_allclose(found.numpy(), replicate_noise(loss, labels.flip(1)).numpy(), atol=1e-15)
    for wrong in (labels.float(), labels > 0):
        with pytest.raises(BatchError, match="integer"):
            replicate_noise("brier", wrong)
    with pytest.raises(BatchError, match="shape"):
        replicate_noise("squared", labels[0])


@pytest.mark.parametrize("loss", [*CLASSIFICATION, "squared"])
def test_neighbours_are_those_of_scikit_learn(loss: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    memory, features = torch.randn(80, 4, generator=draws), torch.randn(30, 4, generator=draws)
    labels = torch.randint(0, 4, (80,), generator=draws)
    near = NearestNeighbors(n_neighbors=7).fit(memory.numpy())
    at = torch.from_numpy(near.kneighbors(features.numpy(), return_distance=False))
    expected = replicate_noise(loss, labels[at])
    torch.testing.assert_close(neighbour_noise(loss, features, memory, labels, k=7), expected)
    own = torch.from_numpy(near.kneighbors(return_distance=False))  # of the rows themselves, without them
    found = neighbour_noise(loss, memory, memory, labels, k=7, skip_same=True)
    torch.testing.assert_close(found, replicate_noise(loss, labels[own]))
    assert neighbour_noise(loss, features, memory[:1], labels[:1]).isnan().all()
    assert neighbour_noise(loss, features[:0], memory, labels).shape == (0,)
    for wrong in ((features[:, :3], memory, labels), (features, memory, labels[:-1]), (features[0], memory, labels)):
        with pytest.raises(BatchError):
            neighbour_noise(loss, *wrong)
    with pytest.raises(ArgumentError, match="k must be"):
        neighbour_noise(loss, features, memory, labels, k=1)
