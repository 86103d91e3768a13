"""The ridge strength that the sums choose, and what is said where float64 ends, against NumPy and scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from clkit.callbacks import AEFOCL, LDA
from clkit.errors import ArgumentError
from clkit.methods import AnalyticHead, LDAHead
from clkit.methods.ridge import pseudo_features

D = 7


def sample(counts: tuple[int, ...] = (40, 25, 9), seed: int = 0, width: int = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.full((n,), 2 * c) for c, n in enumerate(counts)])
    noise = torch.randn(len(targets), width, generator=generator, dtype=torch.float64)
    features = noise + 0.4 * targets[:, None] * torch.linspace(-1, 1, width, dtype=torch.float64)
    mixed = torch.randperm(len(targets), generator=generator)
    return features[mixed], targets[mixed]


def learned(head: Any, features: Tensor, targets: Tensor) -> Any:
    for start in range(0, len(features), 13):
        head.update(features[start : start + 13], targets[start : start + 13])
    return head


def strengths(design: np.ndarray) -> np.ndarray:
    return np.square(design).sum() / design.shape[1] * 10.0 ** np.arange(-8, 2.01, 0.05)


def best_by_the_hat_matrix(design: np.ndarray, y: np.ndarray, rows: float | None = None, spent: float = 0.0) -> float:
    """Generalised cross-validation as it is defined: from the residuals of all rows and the trace of the hat matrix."""
    rows, scores = rows or len(design), []
    for gamma in strengths(design):
        hat = design @ np.linalg.solve(design.T @ design + gamma * np.eye(design.shape[1]), design.T)
        scores.append(rows * np.square(y - hat @ y).sum() / (rows - spent - np.trace(hat)) ** 2)
    return float(strengths(design)[int(np.argmin(scores))])


def one_hot(targets: Tensor) -> np.ndarray:
    return (targets.numpy()[:, None] == np.unique(targets.numpy())).astype(float)


@pytest.mark.parametrize(
    ("balance", "options"),
    [
        (balance, options)
        for balance in ("none", "pfg", "expected", "reweight")
        for options in ({}, {"bias": True}, {"expansion_dim": 20})
        if balance != "expected" or "expansion_dim" not in options  # there is no such balance behind a lift
    ],
)
def test_the_choice_is_made_on_what_is_solved(balance: Any, options: dict[str, Any]) -> None:
    features, targets = sample()
    head = learned(AnalyticHead(D, gamma="auto", balance=balance, **options), features, targets)
    counts, weights, rows = torch.bincount(targets)[::2], np.ones(len(targets)), None
    design, y = head._mapped(features).numpy(), one_hot(targets)
    if balance == "pfg":
        for c in range(3):
            mine = features[targets == 2 * c]
            missing = int(counts.max() - counts[c])
            for drawn in pseudo_features(mine.mean(0), mine.std(0), missing, class_id=2 * c):
                design = np.vstack([design, head._mapped(drawn).numpy()])
                y = np.vstack([y, np.eye(3)[[c] * len(drawn)]])
        weights = np.ones(len(y))
    elif balance == "expected":
        spread = np.zeros(D)
        for c in range(3):
            mine, missing = features[targets == 2 * c], int(counts.max() - counts[c])
            mean = np.sqrt(missing) * head._mapped(mine.mean(0)[None]).numpy()
            design, y = np.vstack([design, mean]), np.vstack([y, np.sqrt(missing) * np.eye(3)[[c]]])
            spread += missing * mine.var(0).numpy()
        design = np.vstack([design, np.pad(np.diag(np.sqrt(spread)), ((0, 0), (0, design.shape[1] - D)))])
        y, rows = np.vstack([y, np.zeros((D, 3))]), float(3 * counts.max())
        weights = np.ones(len(y))
    elif balance == "reweight":
        weights = (1 / counts.double() * 3 / (1 / counts.double()).sum()).numpy()[targets.numpy() // 2]
    scaled, y = design * np.sqrt(weights)[:, None], y * np.sqrt(weights)[:, None]
    gamma = best_by_the_hat_matrix(scaled, y, rows)
    assert head.chosen_gamma == pytest.approx(gamma, rel=1e-9)
    assert gamma not in (strengths(scaled)[0], strengths(scaled)[-1])
    expected = np.linalg.solve(scaled.T @ scaled + gamma * np.eye(scaled.shape[1]), scaled.T @ y)
    np.testing.assert_allclose(head.weight[:, ::2].numpy(), expected, rtol=1e-8, atol=1e-11)
    real = head._mapped(features).numpy()  # pseudo-features and weights of classes do not enter the leverage
    inverse = np.linalg.inv(real.T @ real + gamma * np.eye(real.shape[1]))
    np.testing.assert_allclose(head.leverage(features), ((real @ inverse) * real).sum(1), rtol=1e-8)


@pytest.mark.parametrize("kind", [AnalyticHead, LDAHead])
def test_merged_unlearned_reordered_and_loaded_heads_choose_alike(kind: Any) -> None:
    options = {"gamma": "auto"} if kind is AnalyticHead else {"shrinkage": "auto"}
    features, targets = sample((60, 40, 30))
    joint = kind(D, **options)
    joint.update(features, targets)
    parts = [learned(kind(D, **options), features[i::3], targets[i::3]) for i in range(3)]
    parts[2].update(2 * features[:9], targets[:9])
    parts[0].merge(parts[2])
    parts[0].merge(parts[1])
    parts[0].subtract(2 * features[:9], targets[:9])
    loaded = kind(D, **options)
    loaded.load_state_dict(parts[0].state_dict())
    for head in (parts[0], loaded, learned(kind(D, **options), features.flip(0), targets.flip(0))):
        assert head.chosen_gamma == pytest.approx(joint.chosen_gamma, rel=1e-9)
        torch.testing.assert_close(head(features), joint(features), rtol=1e-9, atol=1e-10)


def test_one_eigendecomposition_a_solve_and_none_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (calls.append(1), plain(matrix))[1])
    features, targets = sample()
    for head in (AnalyticHead(D, gamma="auto", balance="pfg"), LDAHead(D)):
        calls.clear()
        learned(head, features, targets)
        assert not calls
        head.predict(features), head(features), head.chosen_gamma, head.linear_readout()
        assert len(calls) == 1


def test_strengths_that_the_sums_say_nothing_about() -> None:
    head = AnalyticHead(3, gamma="auto")
    assert np.isnan([head.chosen_gamma, LDAHead(3).chosen_gamma]).all()
    head.update(torch.zeros(4, 3), torch.tensor([0, 1, 1, 2]))
    assert head.predict(torch.ones(1, 3)).tolist() == [0]
    one = LDAHead(3)
    one.update(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.full((5,), 4))
    assert one.predict(torch.ones(1, 3)).tolist() == [4]


def test_fewer_rows_than_features() -> None:
    features, targets = sample((6, 6, 6), width=40)
    features = features + 3 * torch.linspace(-1, 1, 40, dtype=torch.float64) * (targets[:, None] - 2)
    head = learned(AnalyticHead(40, gamma="auto"), features, targets)
    assert head.chosen_gamma == pytest.approx(best_by_the_hat_matrix(features.numpy(), one_hot(targets)), rel=1e-9)


@pytest.mark.parametrize("wrong", ["Auto", "best", 0, -1.0, float("nan"), None, True])
def test_other_strengths_are_refused(wrong: Any) -> None:
    for make in (lambda: AnalyticHead(3, gamma=wrong), lambda: AEFOCL(gamma=wrong)):
        with pytest.raises(ArgumentError, match="gamma"):
            make()
    if wrong != 0:
        for make_lda in (lambda: LDAHead(3, shrinkage=wrong), lambda: LDA(shrinkage=wrong)):
            with pytest.raises(ArgumentError, match="shrinkage"):
                make_lda()


def test_recursion_needs_a_number() -> None:
    with pytest.raises(ArgumentError, match='gamma="auto" needs solver="gram"'):
        AEFOCL(gamma="auto", solver="recursive")


# The edges of float64 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", ["auto", 0.0, 1e-4])
@pytest.mark.parametrize("offset", [3e7, -1e9])
def test_a_common_offset_costs_lda_nothing(shrinkage: Any, offset: float) -> None:
    features, targets = sample((60, 40, 30))
    features = (features * 64).round() / 64  # so that the offset rounds no row
    near = learned(LDAHead(D, shrinkage=shrinkage), features, targets)
    one, two = (learned(LDAHead(D, shrinkage=shrinkage), features[i::2] + offset, targets[i::2]) for i in (0, 1))
    one.merge(two)
    one.update(features[:5] * 3 + offset, targets[:5])
    one.subtract(features[:5] * 3 + offset, targets[:5])
    torch.testing.assert_close(one.covariance, near.covariance, rtol=1e-7, atol=1e-8)
    assert one.chosen_gamma == pytest.approx(near.chosen_gamma, rel=1e-6)
    torch.testing.assert_close(one.scores_seen(features + offset), near.scores_seen(features), rtol=1e-5, atol=1e-5)
    if shrinkage == 0.0:
        reference = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(3, 1 / 3))
        x, y = features.numpy(), targets.numpy()
        weights = np.bincount(y)[::2] / len(y)  # scikit-learn pools the covariances by the priors
        reference.fit(x, y)
        pooled = sum(w * np.cov(x[y == 2 * c].T, bias=True) for c, w in enumerate(weights))
        np.testing.assert_allclose(one.covariance.numpy(), pooled, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "scale", "offset"),
    [
        (lambda: AnalyticHead(20), 1.0, 1e6),
        (lambda: AnalyticHead(20, gamma=1e-300), torch.logspace(-8, 8, 20, dtype=torch.float64), 0.0),
        (lambda: LDAHead(20, shrinkage=0.0), torch.logspace(-3.4, 3.4, 20, dtype=torch.float64), 0.0),
    ],
    ids=["offset", "scales", "lda"],
)
def test_a_system_without_digits_is_said_once_with_its_number(make: Any, scale: Any, offset: float) -> None:
    features, targets = sample((60, 40, 30), width=20)
    features = features * scale + offset
    head = learned(make(), features, targets)
    with pytest.warns(UserWarning, match="condition number of ") as caught:
        head.predict(features)
    assert len(caught) == 1
    head.update(features[:5], targets[:5])
    head.predict(features)  # said once: a second warning would be an error here
    said = float(str(caught[0].message).split("is about ")[1].split(",")[0])
    x = features.numpy()
    system = head.covariance.numpy() if isinstance(head, LDAHead) else x.T @ x
    condition = np.linalg.cond(system)
    assert said / condition > 0.02
    assert said / condition < 50 or condition > 1e17  # where NumPy's own number has no digits


def test_ordinary_systems_are_solved_in_silence() -> None:
    features, targets = sample((6, 6, 6), width=40)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for head in (AnalyticHead(40, gamma=1e-3), AnalyticHead(40, gamma="auto"), LDAHead(40)):
            learned(head, 30 * features, targets).predict(features)
    assert said == []
