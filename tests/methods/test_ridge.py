"""The analytic head against joint ridge solutions of NumPy and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ConfigurationError, NotFittedError
from clkit.methods import AnalyticHead, FeatureMap
from clkit.methods.ridge import pseudo_features, woodbury_update

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def sample(rows: int = 70, width: int = 8, ids: tuple[int, ...] = (0, 2, 5), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(ids), (rows,), generator=generator)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64) + 0.3 * which[:, None]
    return features, torch.tensor(ids)[which]


def one_hot(targets: Tensor | np.ndarray) -> np.ndarray:
    y = np.asarray(targets)
    return np.eye(int(y.max()) + 1)[y]


def joint(design: np.ndarray, targets: np.ndarray | Tensor, gamma: float) -> np.ndarray:
    """W of all data at once."""
    return np.linalg.solve(design.T @ design + gamma * np.eye(design.shape[1]), design.T @ one_hot(targets))


def stacked_qr(design: np.ndarray, targets: Tensor, gamma: float) -> np.ndarray:
    """The same from the least-squares problem itself, whose condition is the square root."""
    width = design.shape[1]
    q, r = np.linalg.qr(np.vstack([design, np.sqrt(gamma) * np.eye(width)]))
    right = np.vstack([one_hot(targets), np.zeros((width, int(targets.max()) + 1))])
    return scipy.linalg.solve_triangular(r, q.T @ right)


def error(weight: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(weight.numpy() - expected).max() / np.abs(expected).max())


def learn(head: AnalyticHead, features: Tensor, targets: Tensor, batch: int = 10_000) -> AnalyticHead:
    for start in range(0, len(features), batch):
        head.update(features[start : start + batch], targets[start : start + batch])
    return head


# The plain solution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 10, 70])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 100.0])
@pytest.mark.parametrize(("solver", "tolerance"), [("gram", 1e-12), ("recursive", 1e-10)])
def test_equals_joint_ridge(batch: int, gamma: float, solver: Any, tolerance: float) -> None:
    features, targets = sample()
    head = learn(AnalyticHead(8, gamma=gamma, solver=solver), features, targets, batch)
    assert error(head.weight, joint(features.numpy(), targets, gamma)) <= tolerance
    reference = Ridge(alpha=gamma, fit_intercept=False).fit(features.numpy(), one_hot(targets))
    assert error(head.weight, reference.coef_.T) <= 1e-9


def test_fewer_samples_than_features() -> None:
    features, targets = sample(20, 50)
    for solver in ("gram", "recursive"):
        head = learn(AnalyticHead(50, gamma=0.1, solver=solver), features, targets, 6)
        assert error(head.weight, stacked_qr(features.numpy(), targets, 0.1)) <= 1e-10


def test_classes_not_seen_have_zero_weight_and_minus_infinity() -> None:
    features, targets = sample()
    head = learn(AnalyticHead(8, num_classes=7), features, targets)
    unseen = [1, 3, 4, 6]
    assert head.weight.shape == (8, 7)
    assert not head.weight[:, unseen].any()
    assert bool(torch.isneginf(head(features)[:, unseen]).all())


def test_a_class_more_leaves_the_other_columns_alone() -> None:
    features, targets = sample()
    head = learn(AnalyticHead(8), features, targets)
    before = head.weight
    head.update(torch.zeros(1, 8), torch.tensor([3]))  # opens column 3 and changes no sum
    assert error(head.weight, before.numpy()) <= 1e-14
    assert not head.weight[:, 3].any()


def test_constant_column_is_regularised_like_the_others() -> None:
    features, targets = sample()
    design = np.hstack([features.numpy(), np.ones((70, 1))])
    for solver in ("gram", "recursive"):
        head = learn(AnalyticHead(8, bias=True, solver=solver), features, targets, 9)
        expected = joint(design, targets, 1.0)
        assert error(head.weight, expected) <= 1e-10
        np.testing.assert_allclose(head.scores_seen(features), (design @ expected)[:, [0, 2, 5]], atol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "gelu"])
@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_lift(activation: Any, init: Any) -> None:
    features, targets = sample()
    head = AnalyticHead(8, expansion_dim=33, activation=activation, projection_init=init, projection_seed=5)
    learn(head, features.float(), targets, 9)
    projection = head.feature_map.projection
    assert projection is not None
    acts = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh, "sigmoid": lambda z: 1 / (1 + np.exp(-z))}
    act = {**acts, "gelu": lambda z: z * scipy.special.ndtr(z)}[activation]
    design = act(features.float().double().numpy() @ projection.numpy().T)
    assert error(head.weight, joint(design, targets, 1.0)) <= 1e-9


def test_projection_is_drawn_from_its_seed_alone() -> None:
    random = torch.get_rng_state()
    first, same, other = (FeatureMap(9, 200, seed=seed).projection for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random)
    assert first is not None
    assert same is not None
    assert other is not None
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert float(first.abs().max()) <= 1 / 3
    assert float(first.std()) == pytest.approx(1 / 3 / 3**0.5, rel=0.05)
    normal = FeatureMap(9, 2000, init="normal").projection
    assert normal is not None
    assert float(normal.std()) == pytest.approx(1, rel=0.05)


# Digits that a poor method would lose ---------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "tolerance"), [("gram", 1e-8), ("recursive", 1e-5)])
def test_a_large_first_batch_with_little_regularisation(solver: Any, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 64, generator=generator, dtype=torch.float64)
    projection = torch.randn(64, 256, generator=generator, dtype=torch.float64)
    features = 30 * torch.relu(base @ projection / 8)
    targets = torch.randint(0, 10, (4000,), generator=generator)
    head = AnalyticHead(256, gamma=1e-3, solver=solver)
    head.update(features, targets)
    assert error(head.weight, stacked_qr(features.numpy(), targets, 1e-3)) <= tolerance


def test_a_recursion_without_digits_is_an_error() -> None:
    features, targets = sample(200, 16)
    head = AnalyticHead(16, gamma=1e-12, solver="recursive")
    with pytest.raises((BatchError, ArgumentError), match="gamma=1e-12"):
        head.update(features * 1e8, targets)
    assert head.classes.tolist() == []
    assert torch.equal(head.state_dict()["recursion.inverse"], AnalyticHead(16, gamma=1e-12, solver="recursive").state_dict()["recursion.inverse"])  # fmt: skip  # noqa: E501


def test_a_system_that_cannot_be_solved_names_gamma() -> None:
    features = torch.ones(50, 6, dtype=torch.float64) * 1e8
    head = learn(AnalyticHead(6, gamma=1e-12), features, torch.zeros(50, dtype=torch.long))
    with pytest.raises(ArgumentError, match=r"gamma=1e-12.*smallest diagonal is 5e\+17.*raise gamma"):
        head.predict(features)


def test_gain_form_keeps_the_inverse_symmetric_and_right() -> None:
    features, targets = sample(100, 12)
    inverse, _ = woodbury_update(
        torch.eye(12, dtype=torch.float64), torch.zeros(12, 6, dtype=torch.float64), features,
        torch.from_numpy(one_hot(targets)), 1.0,
    )  # fmt: skip
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(12) + features.numpy().T @ features.numpy()), atol=1e-13)
    torch.testing.assert_close(inverse, inverse.T, rtol=0, atol=1e-16)


# Balancing ------------------------------------------------------------------------------------------------------


def unbalanced(width: int = 8) -> tuple[Tensor, Tensor]:
    features, _ = sample(60, width)
    targets = torch.tensor([1] * 40 + [4] * 13 + [6] * 6 + [9])
    return features + targets[:, None] * 0.2, targets


def pseudo_rows(features: Tensor, targets: Tensor, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The rows that balance the classes, with NumPy's mean and deviation."""
    x, y = features.numpy(), targets.numpy()
    most = np.unique(y, return_counts=True)[1].max()
    rows, labels = [np.zeros((0, x.shape[1]))], []
    for c in np.unique(y):
        own = x[y == c]
        deviation = own.std(0, ddof=1) if len(own) > 1 else np.zeros(x.shape[1])
        mean = torch.from_numpy(own.mean(0))
        missing = int(most - len(own))
        rows += list(
            pseudo_features(mean, torch.from_numpy(deviation), missing, class_id=int(c), seed=seed, noise=noise)
        )
        labels += [int(c)] * missing
    return np.vstack(rows), np.array(labels, dtype=int)


@pytest.mark.parametrize("solver", ["gram", "recursive"])
@pytest.mark.parametrize("batch", [1, 13, 60])
@pytest.mark.parametrize(("lift", "bias"), [(None, False), (None, True), (30, False), (30, True)])
def test_pfg_equals_ridge_on_real_and_pseudo_rows(solver: Any, batch: int, lift: int | None, bias: bool) -> None:
    features, targets = unbalanced()
    head = AnalyticHead(8, balance="pfg", pfg_seed=3, noise=0.7, expansion_dim=lift, bias=bias, solver=solver)
    learn(head, features, targets, batch)
    rows, labels = pseudo_rows(features, targets, 3, 0.7)
    assert len(rows) == 40 * 4 - 60
    design = head.feature_map(torch.from_numpy(np.vstack([features.numpy(), rows]))).numpy()
    design = np.hstack([design, np.ones((len(design), 1))]) if bias else design
    assert error(head.weight, joint(design, np.concatenate([targets.numpy(), labels]), 1.0)) <= 1e-9


def test_a_balanced_stream_needs_no_pseudo_features() -> None:
    features, _ = sample(60)
    targets = torch.arange(60) % 3
    plain, *balanced = (AnalyticHead(8, balance=balance) for balance in ("none", "pfg", "expected", "reweight"))
    learn(plain, features, targets)
    for head in balanced:
        learn(head, features, targets)
        torch.testing.assert_close(head.weight, plain.weight, rtol=1e-12, atol=1e-14)


def test_without_noise_pseudo_features_are_weights() -> None:
    features = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([0] * 10 + [1, 2])
    repeated = torch.cat([torch.arange(10), torch.full((10,), 10), torch.full((10,), 11)])
    head = learn(AnalyticHead(8, balance="pfg", noise=0.0), features, targets)
    assert error(head.weight, joint(features[repeated].numpy(), targets[repeated], 1.0)) <= 1e-12


@pytest.mark.parametrize("solver", ["gram", "recursive"])
@pytest.mark.parametrize("bias", [False, True])
def test_expected_is_the_mean_of_the_samples(solver: Any, bias: bool) -> None:
    features, targets = unbalanced()
    x, y = features.numpy(), targets.numpy()
    design = np.hstack([x, np.ones((60, 1))]) if bias else x
    gram, right = design.T @ design + np.eye(design.shape[1]), design.T @ one_hot(y)
    for c in np.unique(y):
        own = design[y == c]
        missing = 40 - len(own)
        variance = own.var(0, ddof=1) if len(own) > 1 else np.zeros(design.shape[1])
        gram += missing * (np.outer(own.mean(0), own.mean(0)) + 0.25 * np.diag(variance))
        right[:, c] += missing * own.mean(0)
    head = learn(AnalyticHead(8, balance="expected", noise=0.5, bias=bias, solver=solver), features, targets, 7)
    assert error(head.weight, np.linalg.solve(gram, right)) <= 1e-10


def test_sampled_balancing_converges_to_the_expected() -> None:
    features, targets = unbalanced()
    expected = learn(AnalyticHead(8, balance="expected"), features, targets).weight
    sampled = [learn(AnalyticHead(8, balance="pfg", pfg_seed=s), features, targets).weight for s in range(40)]
    spread = torch.stack(sampled).std(0) / 40**0.5
    assert float(((torch.stack(sampled).mean(0) - expected) / spread.clamp(min=1e-6)).abs().median()) < 3


def test_reweighting_counts_each_class_the_same() -> None:
    features, targets = unbalanced()
    x, y = features.numpy(), targets.numpy()
    ids, counts = np.unique(y, return_counts=True)
    weights = 1 / counts * len(ids) / (1 / counts).sum()
    assert weights.sum() == pytest.approx(4)
    row_weights = weights[np.searchsorted(ids, y)]
    reference = Ridge(alpha=1.0, fit_intercept=False).fit(x, one_hot(y), sample_weight=row_weights)
    head = learn(AnalyticHead(8, balance="reweight", num_classes=20), features, targets, 7)
    assert error(head.weight[:, :10], reference.coef_.T) <= 1e-10


def test_fewer_drawn_rows_weigh_more() -> None:
    features, targets = unbalanced()
    head = learn(AnalyticHead(8, balance="pfg", pfg_max_per_class=5), features, targets)
    x, y = features.numpy(), targets.numpy()
    gram, right = x.T @ x + np.eye(8), x.T @ one_hot(y)
    rows, labels = pseudo_rows(features, targets)
    for c in np.unique(labels):
        missing = int((labels == c).sum())
        drawn = rows[labels == c][:5]
        gram += missing / 5 * drawn.T @ drawn
        right[:, c] += missing / 5 * drawn.sum(0)
    assert error(head.weight, np.linalg.solve(gram, right)) <= 1e-11
    many = learn(AnalyticHead(8, balance="pfg", pfg_max_per_class=1000), features, targets)
    assert torch.equal(many.weight, learn(AnalyticHead(8, balance="pfg"), features, targets).weight)


def test_clamped_pseudo_features_stay_above() -> None:
    features, targets = unbalanced()
    features = features.abs()
    x, y = features.numpy(), targets.numpy()
    rows, labels = pseudo_rows(features, targets)
    design = np.vstack([x, np.maximum(rows, 0)])
    head = learn(AnalyticHead(8, balance="pfg", clamp_min=0.0), features, targets)
    assert error(head.weight, joint(design, np.concatenate([y, labels]), 1.0)) <= 1e-10


# Uncertainty, merging -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"expansion_dim": 12}, {"solver": "recursive"}, {"balance": "pfg"}, {"balance": "reweight"}])  # fmt: skip  # noqa: E501
def test_leverage(options: dict[str, Any]) -> None:
    features, targets = unbalanced()
    test, _ = sample(9, seed=4)
    head = learn(AnalyticHead(8, gamma=0.5, **options), features, targets, 9)

    def design(x: Tensor) -> np.ndarray:
        mapped = head.feature_map(x).numpy()
        return np.hstack([mapped, np.ones((len(mapped), 1))]) if options.get("bias") else mapped

    h, t = design(features), design(test)
    inverse = np.linalg.inv(h.T @ h + 0.5 * np.eye(h.shape[1]))
    np.testing.assert_allclose(head.leverage(test), np.einsum("bi,ij,bj->b", t, inverse, t), rtol=1e-10)
    assert head.leverage(test.float()).dtype == torch.float32
    with pytest.raises(NotFittedError):
        AnalyticHead(8, **options).leverage(test)


def test_gamma_counts_once_when_heads_merge() -> None:
    features, targets = sample()
    parts = [learn(AnalyticHead(8, gamma=10.0), features[k::3], targets[k::3]) for k in range(3)]
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert error(parts[0].weight, joint(features.numpy(), targets, 10.0)) <= 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.integers(1, 50))
def test_unlearning_equals_never_having_learned(seed: int, count: int) -> None:
    features, targets = sample(60, 5, seed=seed)
    head = learn(AnalyticHead(5, gamma=0.5), features, targets, 11)
    head.subtract(features[:count], targets[:count])
    kept = joint(features[count:].numpy(), targets[count:], 0.5)
    assert error(head.weight, kept) <= 1e-10


def test_recursion_refuses_what_needs_sums() -> None:
    features, targets = sample()
    head = learn(AnalyticHead(8, solver="recursive"), features, targets)
    with pytest.raises(ConfigurationError, match="recursive"):
        head.merge(AnalyticHead(8, solver="recursive"))
    with pytest.raises(ConfigurationError, match="recursive"):
        head.subtract(features, targets)
    head.synchronize()  # one process: nothing to do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": float("inf")}, "gamma"),
        ({"expansion_dim": 0}, "expansion_dim"),
        ({"activation": "swish"}, "activation"),
        ({"projection_init": "zeros"}, "projection_init"),
        ({"balance": "smote"}, "balance"),
        ({"solver": "qr"}, "solver"),
        ({"noise": -0.1}, "noise"),
        ({"pfg_max_per_class": 0}, "pfg_max_per_class"),
        ({"pfg_seed": -1}, "pfg_seed"),
        ({"balance": "expected", "expansion_dim": 9}, "expansion_dim"),
        ({"balance": "reweight", "solver": "recursive"}, "gram"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AnalyticHead(8, **options)


# Figures that can be computed again -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "expected", "average", "forgetting"),
    [(1.0, [100, 99.45, 97.59, 96.67, 92.32], 97.21, 3.59), (0.1, [100, 99.17, 97.22, 96.26, 92.54], 97.04, 3.45)],
)
@pytest.mark.parametrize("solver", ["gram", "recursive"])
def test_digits_two_classes_a_stage(
    gamma: float, expected: list[float], average: float, forgetting: float, solver: Any, digits: Digits
) -> None:
    train, train_targets, test, test_targets = digits
    head = AnalyticHead(64, gamma=gamma, solver=solver)
    accuracies, matrix = [], np.zeros((5, 5))
    for stage in range(5):
        now, seen = train_targets // 2 == stage, test_targets < 2 * stage + 2
        learn(head, train[now], train_targets[now], 10)
        right = head.predict(test) == test_targets
        accuracies.append(100 * float(right[seen].double().mean()))
        matrix[stage] = [100 * float(right[test_targets // 2 == j].double().mean()) for j in range(5)]
    np.testing.assert_allclose(accuracies, expected, atol=0.005)
    assert np.mean(accuracies) == pytest.approx(average, abs=0.0051)
    lost = [max(matrix[j:4, j]) - matrix[4, j] for j in range(4)]
    assert np.mean(lost) == pytest.approx(forgetting, abs=0.0051)


def test_digits_with_a_lift(digits: Digits) -> None:
    train, train_targets, test, test_targets = digits
    head = learn(AnalyticHead(64, gamma=0.1, expansion_dim=1000), train, train_targets)
    assert 98 < 100 * float((head.predict(test) == test_targets).double().mean()) < 99.4


def mean_class_accuracy(data: Digits, **options: Any) -> float:
    train, train_targets, test, test_targets = data
    right = learn(AnalyticHead(64, **options), train, train_targets, 17).predict(test) == test_targets
    return float(100 * np.mean([right[test_targets == c].double().mean() for c in range(10)]))


@pytest.mark.parametrize(
    ("balance", "solver", "accuracy"),
    [("none", "gram", 61.1), ("expected", "gram", 79.4), ("expected", "recursive", 79.4), ("reweight", "gram", 81.5)],
)
def test_long_tailed_digits(balance: str, solver: str, accuracy: float, long_tailed: Digits) -> None:
    assert mean_class_accuracy(long_tailed, balance=balance, solver=solver) == pytest.approx(accuracy, abs=0.05)


def test_long_tailed_digits_with_pseudo_features(long_tailed: Digits) -> None:
    accuracies = [mean_class_accuracy(long_tailed, balance="pfg", pfg_seed=seed) for seed in range(20)]
    assert 78.6 <= np.mean(accuracies) <= 79.7
