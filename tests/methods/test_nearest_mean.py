"""Nearest means against NumPy, scikit-learn and brute force."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from clkit.errors import ArgumentError
from clkit.methods import NearestMeanHead

METRICS = ("janson", "euclidean", "icarl", "cosine")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def by_hand(metric: str, x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores (B, k) by the definition, one distance at a time."""
    learned = x if metric in ("euclidean", "cosine") else unit(x)
    means = np.stack([learned[y == c].mean(0) for c in np.unique(y)])
    if metric in ("icarl", "cosine"):
        means = unit(means)
    test = test if metric == "euclidean" else unit(test)
    if metric == "cosine":
        return np.array([[float(f @ m) for m in means] for f in test])
    return np.array([[-float(((f - m) ** 2).sum()) for m in means] for f in test])


def sample(rows: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 7, generator=generator, dtype=torch.float64) + 0.5
    return features, torch.randint(0, 5, (rows,), generator=generator) * 2


@pytest.mark.parametrize("metric", METRICS)
def test_scores_follow_the_definition(metric: str) -> None:
    features, targets = sample()
    test, _ = sample(30, 1)
    head = NearestMeanHead(7, metric=metric)
    head.update(features, targets)
    expected = by_hand(metric, features.numpy(), targets.numpy(), test.numpy())
    np.testing.assert_allclose(head.scores_seen(test).numpy(), expected, rtol=1e-11, atol=1e-13)
    assert head.predict(test).tolist() == np.unique(targets)[expected.argmax(1)].tolist()


def test_euclidean_equals_scikit_learn() -> None:
    features, targets = sample()
    test, _ = sample(300, 1)
    head = NearestMeanHead(7, metric="euclidean")
    head.update(features, targets)
    expected = NearestCentroid().fit(features.numpy(), targets.numpy()).predict(test.numpy())
    assert head.predict(test).tolist() == expected.tolist()


def test_icarl_ranks_by_distance_as_by_cosine() -> None:
    features, targets = sample()
    test, _ = sample(100, 1)
    head = NearestMeanHead(7, metric="icarl")
    head.update(features, targets)
    cosine = unit(test.numpy()) @ head.means.numpy().T
    order = head.scores_seen(test).numpy().argsort(1)
    assert (order == cosine.argsort(1)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_length_matters_to_euclidean_only(metric: str) -> None:
    features, targets = sample()
    test, _ = sample(100, 1)
    head = NearestMeanHead(7, metric=metric)
    head.update(features, targets)
    same = torch.equal(head.predict(test * 4), head.predict(test))
    assert same == (metric != "euclidean")


@pytest.mark.parametrize("metric", METRICS)
def test_a_second_pass_changes_nothing(metric: str) -> None:
    features, targets = sample()
    head = NearestMeanHead(7, metric=metric)
    head.update(features, targets)
    means = head.means
    head.update(features, targets)
    torch.testing.assert_close(head.means, means, rtol=1e-13, atol=1e-15)


def test_a_common_offset_does_not_hide_the_classes() -> None:
    features, targets = sample()
    test, _ = sample(200, 1)
    near, far = NearestMeanHead(7, metric="euclidean"), NearestMeanHead(7, metric="euclidean")
    near.update(features, targets)
    far.update(features + 1e7, targets)
    assert torch.equal(near.predict(test), far.predict(test + 1e7))
    torch.testing.assert_close(far(test + 1e7), near(test), rtol=1e-6, atol=1e-6)


def test_a_mean_of_exactly_zero_survives_saving() -> None:
    head, fresh = NearestMeanHead(2, metric="euclidean"), NearestMeanHead(2, metric="euclidean")
    head.update(torch.tensor([[1.0, 2.0], [-1.0, -2.0], [5.0, 5.0]]), torch.tensor([3, 3, 1]))
    fresh.load_state_dict(head.state_dict())
    test = torch.tensor([[0.1, 0.1], [4.0, 4.0]])
    assert fresh.predict(test).tolist() == head.predict(test).tolist() == [3, 1]


def test_a_zero_vector_counts_and_is_warned_about_once() -> None:
    head = NearestMeanHead(2)
    with pytest.warns(UserWarning, match="1 feature vectors of a batch are zero"):
        head.update(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.update(torch.zeros(1, 2), torch.tensor([1]))
        NearestMeanHead(2, metric="euclidean").update(torch.zeros(1, 2), torch.tensor([1]))
    assert head.counts.tolist() == [2, 1]
    assert torch.allclose(head.means, torch.tensor([[0.3, 0.4], [0.0, 0.0]], dtype=torch.float64))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ArgumentError, match="janson"):
        NearestMeanHead(2, metric="manhattan")


GOLDEN = {
    "janson": ([99.44, 95.29, 95.93, 95.42, 89.87], 95.19),
    "euclidean": ([99.44, 95.01, 95.74, 95.15, 89.87], 95.04),
    "icarl": ([99.44, 94.74, 95.56, 95.28, 90.09], 95.02),
    "cosine": ([99.44, 94.74, 95.56, 95.28, 89.98], 95.00),
}


@pytest.mark.parametrize("metric", METRICS)
def test_digits_two_classes_a_stage(metric: str, digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train, train_targets, test, test_targets = digits
    head = NearestMeanHead(64, metric=metric)
    accuracies = []
    for stage in range(5):
        now, seen = train_targets // 2 == stage, test_targets < 2 * stage + 2
        head.update(train[now], train_targets[now])
        accuracies.append(100 * (head.predict(test[seen]) == test_targets[seen]).double().mean().item())
    expected, average = GOLDEN[metric]
    np.testing.assert_allclose(accuracies, expected, atol=0.005)
    assert np.mean(accuracies) == pytest.approx(average, abs=0.0051)


@pytest.mark.parametrize(("metric", "accuracy"), [("euclidean", 80.2), ("janson", 81.8)])
def test_long_tailed_digits(metric: str, accuracy: float, long_tailed: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train, train_targets, test, test_targets = long_tailed
    head = NearestMeanHead(64, metric=metric)
    head.update(train, train_targets)
    right = head.predict(test) == test_targets
    assert 100 * np.mean([right[test_targets == c].double().mean() for c in range(10)]) == pytest.approx(
        accuracy, abs=0.05
    )
