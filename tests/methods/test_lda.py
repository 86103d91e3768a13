"""Linear discriminant analysis against scikit-learn and explicit distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from small_runs import merge_and_forget
from torch import Tensor

from clkit.errors import ArgumentError, StateError
from clkit.methods import LDAHead, NearestMeanHead


def sample(per_class: list[int], width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    targets = torch.cat([torch.full((n,), 3 * c) for c, n in enumerate(per_class)])
    noise = torch.randn(len(targets), width, generator=generator, dtype=torch.float64)
    return noise @ mixing + (targets[:, None] / 3).double() * torch.linspace(-1, 1, width, dtype=torch.float64), targets


def learned(features: Tensor, targets: Tensor, **options: Any) -> LDAHead:
    head = LDAHead(features.shape[1], **options)
    for start in range(0, len(features), 11):
        head.update(features[start : start + 11], targets[start : start + 11])
    return head


def test_predictions_equal_scikit_learn() -> None:
    features, targets = sample([40, 40, 40, 40])
    test, _ = sample([200, 200, 200, 200], seed=1)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(4, 0.25)).fit(
        features.numpy(), targets.numpy()
    )
    assert learned(features, targets, shrinkage=0.0).predict(test).tolist() == reference.predict(test.numpy()).tolist()


@pytest.mark.parametrize("per_class", [[40, 40, 40], [70, 20, 9]])
def test_covariance_is_the_pooled_one(per_class: list[int]) -> None:
    features, targets = sample(per_class)
    counts = np.array(per_class)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=counts / counts.sum(), store_covariance=True)
    reference.fit(features.numpy(), targets.numpy())
    np.testing.assert_allclose(
        learned(features, targets).covariance.numpy(), reference.covariance_, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("shrinkage", [0.0, 1e-4, 0.3])
def test_scores_are_explicit_distances(shrinkage: float) -> None:
    features, targets = sample([30, 12, 5])
    test, _ = sample([10, 10, 10], seed=1)
    x, y, t = features.numpy(), targets.numpy(), test.numpy()
    means = np.stack([x[y == c].mean(0) for c in (0, 3, 6)])
    centred = x - means[y // 3]
    shrunk = (1 - shrinkage) * centred.T @ centred / len(x) + shrinkage * np.eye(6)
    expected = [[-(f - m) @ np.linalg.inv(shrunk) @ (f - m) for m in means] for f in t]
    head = learned(features, targets, shrinkage=shrinkage)
    np.testing.assert_allclose(head.scores_seen(test).numpy(), expected, rtol=1e-9)


def test_full_shrinkage_is_the_nearest_mean() -> None:
    features, targets = sample([30, 12, 5])
    nearest = NearestMeanHead(6, metric="euclidean")
    nearest.update(features, targets)
    torch.testing.assert_close(
        learned(features, targets, shrinkage=1.0)(features), nearest(features), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("rows", [1, 4, 300])
def test_a_singular_covariance_is_named(rows: int) -> None:
    features, targets = sample([rows])
    features[:, 3] = features[:, 2] + features[:, 1] if rows > 6 else 0.1
    with pytest.raises(ArgumentError, match=r"shrinkage=0\.0"):
        learned(features, targets, shrinkage=0.0).predict(features)
    assert learned(features, targets).predict(features).tolist() == [0] * rows


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_shrinkage_is_checked(shrinkage: float) -> None:
    with pytest.raises(ArgumentError, match="shrinkage"):
        LDAHead(3, shrinkage=shrinkage)


def test_digits_beat_nearest_means(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train, train_targets, test, test_targets = digits
    head = learned(train, train_targets, shrinkage=1e-4)
    x = train.numpy()
    means = np.stack([x[train_targets == c].mean(0) for c in range(10)])
    centred = x - means[train_targets.numpy()]
    inverse = np.linalg.inv((1 - 1e-4) * centred.T @ centred / len(x) + 1e-4 * np.eye(64))
    differences = test.numpy()[:, None] - means
    expected = np.einsum("bci,ij,bcj->bc", differences, inverse, differences).argmin(1)
    assert head.predict(test).tolist() == expected.tolist()
    assert float((head.predict(test) == test_targets).double().mean()) > 0.93


# ---- rows of unit length


def unit_distances(x: np.ndarray, y: np.ndarray, test: np.ndarray, gamma: float) -> np.ndarray:
    """Minus the squared distances of the batch formula, from all rows at once; a row of zeros stays zero."""
    x, test = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (x, test))
    ids = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in ids])
    centred = x - means[np.searchsorted(ids, y)]
    inverse = np.linalg.inv((centred.T @ centred + gamma * np.eye(x.shape[1])) / len(x))
    distances: np.ndarray = np.einsum("bci,ij,bcj->bc", test[:, None] - means, inverse, test[:, None] - means)
    return -distances


def test_unit_rows_equal_the_joint_formula_for_any_split_order_merge_and_forget() -> None:
    features, targets = sample([60, 31, 17, 8])
    features[5] = 0  # a row without a direction
    test = sample([9, 9, 9, 9], seed=1)[0]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(4))
    with pytest.warns(UserWarning, match="1 feature vectors of a batch are zero"):
        parts = [learned(features[order[i::5]], targets[order[i::5]], unit=True) for i in range(5)]
    stray, labels = 3 * features[10:22] + 1, targets[10:22]
    merge_and_forget(parts, stray, labels)
    head = parts[0]
    expected = unit_distances(features.numpy(), targets.numpy(), test.numpy(), head.chosen_gamma)
    np.testing.assert_allclose(head.scores_seen(test).numpy(), expected, rtol=1e-9)
    assert int(head.counts.sum()) == len(targets)  # the row of zeros is one of them
    assert bool(torch.isfinite(head(torch.zeros(1, 6, dtype=torch.float64))[:, head.classes]).all())
    scaled = LDAHead(6)
    scaled.update(features / features.norm(dim=1, keepdim=True).clamp(min=1e-12), targets)
    assert head.chosen_gamma == pytest.approx(scaled.chosen_gamma, rel=1e-9)
    with pytest.raises(ArgumentError, match="different unit: True here, False there"):
        head.merge(scaled)


def test_a_state_from_before_rows_could_have_unit_length_is_one_without() -> None:
    features, targets = sample([20, 20])
    head, fresh, unit = learned(features, targets), LDAHead(6), LDAHead(6, unit=True)
    saved = head.state_dict()
    assert saved["_extra_state"].pop("unit") is False
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(features), head(features))
    with pytest.raises(StateError, match="unit must be True, the saved state has False"):
        unit.load_state_dict(saved)
