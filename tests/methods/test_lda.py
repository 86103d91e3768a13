"""Linear discriminant analysis against scikit-learn and explicit distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from clkit.errors import ArgumentError
from clkit.methods import LDAHead, NearestMeanHead


def sample(per_class: list[int], width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    targets = torch.cat([torch.full((n,), 3 * c) for c, n in enumerate(per_class)])
    noise = torch.randn(len(targets), width, generator=generator, dtype=torch.float64)
    return noise @ mixing + (targets[:, None] / 3).double() * torch.linspace(-1, 1, width, dtype=torch.float64), targets


def learned(features: Tensor, targets: Tensor, **options: float) -> LDAHead:
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
