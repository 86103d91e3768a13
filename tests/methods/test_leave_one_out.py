"""Scores of left-out rows against heads that are really learned again without the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clkit.errors import BatchError, ConfigurationError, NotFittedError
from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead, Novelty
from clkit.methods._leave_one_out import left_out_ridge_scores
from clkit.methods.heads.base import Head
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.pseudo_features import pseudo_features

SIZES = [(64, 100), (512, 700)]  # D, N < 2 D
METRICS = ("janson", "euclidean", "icarl", "cosine")
TOLERANCE = 1e-10


def sample(width: int, rows: int) -> tuple[Tensor, Tensor]:
    """Rows of classes 1, 4 and 6, of which the last has one row: row 0."""
    generator = torch.Generator().manual_seed(width)
    targets = torch.tensor([1, 4])[torch.randint(2, (rows,), generator=generator)]
    targets[0] = 6
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return features + 0.2 * targets[:, None] + 3, targets


def without(make: Callable[[], Head], features: Tensor, targets: Tensor, row: int) -> Tensor:
    """Scores of a row by a head that learned all others."""
    kept = torch.arange(len(targets)) != row
    head = make()
    head.update(features[kept], targets[kept])
    return head(features[row : row + 1])[0]


def check(make: Callable[[], Head], features: Tensor, targets: Tensor, rows: tuple[int, ...] = (0, 1, 2, 9)) -> None:
    head = make()
    for start in range(0, len(features), 64):
        head.update(features[start : start + 64], targets[start : start + 64])
    found = head.leave_one_out(features, targets)
    assert found.shape == (len(features), 7)
    for row in rows:
        expected = without(make, features, targets, row)
        expected = torch.nn.functional.pad(expected, (0, 7 - len(expected)), value=-torch.inf)
        assert torch.equal(found[row].isneginf(), expected.isneginf())
        finite = expected.isfinite()
        scale = max(1.0, float(expected[finite].abs().max()))
        assert float((found[row] - expected)[finite].abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize(("width", "rows"), SIZES)
@pytest.mark.parametrize(
    "options",
    [{"gamma": 1.0}, {"gamma": 1.0, "bias": True}, {"gamma": 3.0, "expansion_dim": 300}, {"solver": "recursive"}],
)
def test_ridge(width: int, rows: int, options: dict[str, Any]) -> None:
    check(lambda: AnalyticHead(width, **options), *sample(width, rows))


@pytest.mark.parametrize(("width", "rows"), SIZES)
@pytest.mark.parametrize("metric", METRICS)
def test_nearest_means(width: int, rows: int, metric: Any) -> None:
    check(lambda: NearestMeanHead(width, metric=metric), *sample(width, rows))


@pytest.mark.parametrize(("width", "rows"), SIZES)
@pytest.mark.parametrize("shrinkage", [0.01, 0.5, 1.0])
def test_lda(width: int, rows: int, shrinkage: float) -> None:
    check(lambda: LDAHead(width, shrinkage=shrinkage), *sample(width, rows), rows=(0, 3))


@pytest.mark.parametrize(("width", "rows"), SIZES)
def test_novelty(width: int, rows: int) -> None:
    features, targets = sample(width, rows)
    check(lambda: Novelty(width), features, targets, rows=(0, 3))
    novelty = Novelty(width)
    novelty.update(features, targets)
    expected = [-float(without(lambda: Novelty(width), features, targets, row).max()) for row in (0, 3)]
    found = novelty.left_out_distance(features, targets)[[0, 3]]
    np.testing.assert_allclose(found.numpy(), expected, rtol=TOLERANCE)


def test_the_chosen_strength_is_kept() -> None:
    features, targets = sample(64, 100)
    ridge = AnalyticHead(64, gamma="auto")
    ridge.update(features, targets)
    chosen = ridge.chosen_gamma
    found = ridge.leave_one_out(features, targets)
    expected = without(lambda: AnalyticHead(64, gamma=chosen), features, targets, 5)
    np.testing.assert_allclose(found[5, [1, 4, 6]].numpy(), expected[[1, 4, 6]].numpy(), rtol=0, atol=TOLERANCE)

    lda = LDAHead(64)
    lda.update(features, targets)
    x, y = np.delete(features.numpy(), 5, 0), np.delete(targets.numpy(), 5)
    means = np.stack([x[y == c].mean(0) for c in (1, 4, 6)])
    centred = x - means[np.searchsorted([1, 4, 6], y)]
    inverse = np.linalg.inv((centred.T @ centred + lda.chosen_gamma * np.eye(64)) / len(x))
    by_hand = [-(features[5].numpy() - m) @ inverse @ (features[5].numpy() - m) for m in means]
    np.testing.assert_allclose(lda.leave_one_out(features, targets)[5, [1, 4, 6]].numpy(), by_hand, rtol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"expansion_dim": 90}, {"solver": "recursive"}])
def test_leverage_of_left_out_rows(options: dict[str, Any]) -> None:
    features, targets = sample(64, 100)
    head, smaller = AnalyticHead(64, **options), AnalyticHead(64, **options)
    head.update(features, targets)
    smaller.update(features[1:], targets[1:])
    found = head.leverage(features, left_out=True)[0]
    assert float(found) == pytest.approx(float(smaller.leverage(features[:1])), rel=TOLERANCE)


def test_known_values() -> None:
    rows, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double(), torch.tensor([0, 1, 1])
    head = AnalyticHead(2, gamma=1.0)
    head.update(rows, targets)
    torch.testing.assert_close(head.weight, torch.tensor([[0.375, 0.125], [-0.125, 0.625]]).double())
    leverage = head.leverage(rows)
    torch.testing.assert_close(leverage, torch.tensor([0.375, 0.375, 0.5]).double())
    torch.testing.assert_close(head.leverage(rows, left_out=True), torch.tensor([0.6, 0.6, 1.0]).double())
    expected = torch.tensor([[0.0, 0.2], [-0.2, 0.4], [0.5, 0.5]]).double()
    torch.testing.assert_close(left_out_ridge_scores(head(rows), leverage, targets), expected)
    expected[0, 0] = -torch.inf  # without row 0 class 0 was never seen
    torch.testing.assert_close(head.leave_one_out(rows, targets), expected)

    means = NearestMeanHead(2, metric="cosine")
    rows, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1])
    means.update(rows, targets)
    scores = means.leave_one_out(rows, targets)
    assert scores[0].tolist() == [0.0, -1.0]
    assert bool(scores[2, 1].isneginf())


@pytest.mark.parametrize("make", [AnalyticHead, NearestMeanHead, LDAHead, Novelty])
def test_a_single_row_leaves_nothing(make: Any) -> None:
    head, row = make(3), torch.tensor([[1.0, 2.0, 3.0]])
    with pytest.raises(NotFittedError):
        head.leave_one_out(row, torch.tensor([0]))
    head.update(row, torch.tensor([2]))
    scores = head.leave_one_out(row, torch.tensor([2]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[-torch.inf] * 3]
    assert head.leave_one_out(row[:0], torch.tensor([], dtype=torch.int64)).shape == (0, 3)


@pytest.mark.parametrize("make", [AnalyticHead, lambda width: LDAHead(width, shrinkage=0.01)])
def test_a_row_that_was_never_learned_is_refused(make: Any) -> None:
    features, targets = sample(64, 100)
    head = make(64)
    head.update(features, targets)
    with pytest.raises(BatchError, match="row 1 cannot be left out"):
        head.leave_one_out(torch.cat([features[:1], 50 * features[1:2]]), targets[:2])
    with pytest.raises(BatchError, match="target 3 in row 1 is no class that was learned"):
        head.leave_one_out(features[:2], torch.tensor([1, 3]))
    with pytest.raises(BatchError, match="one per row"):
        head.leave_one_out(features[:2], targets[:1])


@pytest.mark.parametrize("gamma", [1.0, "auto"])
@pytest.mark.parametrize("balance", ["pfg", "expected", "reweight"])
def test_what_balances_the_classes_stays_while_a_row_is_left_out(balance: Any, gamma: Any) -> None:
    """Beside a solution in NumPy of all rows but one, with the pseudo-features or weights of all rows."""
    features, targets = sample(16, 60)
    targets[:20] = 1
    head = AnalyticHead(16, gamma=gamma, balance=balance)
    head.update(features, targets)
    classes, counts = np.unique(targets.numpy(), return_counts=True)
    x, y = features.numpy(), np.eye(len(classes))[np.searchsorted(classes, targets.numpy())]
    weight = np.ones(len(x))
    extra, extra_y = [np.zeros((0, 16))], [np.zeros((0, len(classes)))]
    for place, (label, count) in enumerate(zip(classes, counts, strict=True)):
        own, missing = x[targets.numpy() == label], counts.max() - count
        if balance == "reweight":
            weight[targets.numpy() == label] = 1 / count * len(classes) / (1 / counts).sum()
        elif balance == "pfg" and missing:
            moments = (torch.from_numpy(own.mean(0)), torch.from_numpy(own.std(0, ddof=1)))
            drawn = torch.cat(list(pseudo_features(*moments, int(missing), class_id=int(label)))).numpy()
            extra.append(drawn)
            extra_y.append(np.tile(np.eye(len(classes))[place], (missing, 1)))
        elif balance == "expected":
            extra += [np.sqrt(missing) * own.mean(0)[None], np.diag(np.sqrt(missing) * own.std(0, ddof=1))]
            extra_y += [np.sqrt(missing) * np.eye(len(classes))[place][None], np.zeros((16, len(classes)))]
    found = head.leave_one_out(features, targets)[:, torch.from_numpy(classes)].numpy()
    for row in (1, 21, 40, 59):
        scale = np.sqrt(np.where(np.arange(len(x)) == row, 0, weight))[:, None]
        h, t = np.concatenate([scale * x, *extra]), np.concatenate([scale * y, *extra_y])
        w = np.linalg.solve(h.T @ h + head.chosen_gamma * np.eye(16), h.T @ t)
        seen = np.isfinite(found[row])
        np.testing.assert_allclose(found[row][seen], (x[row] @ w)[seen], atol=1e-9)


def test_recursion_with_pseudo_features_is_refused_by_name() -> None:
    features, targets = sample(16, 60)
    head = AnalyticHead(16, balance="pfg", solver="recursive")
    head.update(features, targets)
    with pytest.raises(ConfigurationError, match="balance='pfg' has a leave-one-out form with solver"):
        head.leave_one_out(features, targets)


def test_a_head_of_ones_own_has_no_exact_form_by_itself() -> None:
    class Own(NearestMeanHead):
        _left_out = Head._left_out

    head = Own(2)
    head.update(torch.ones(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ConfigurationError, match="Own has no exact leave-one-out form"):
        head.leave_one_out(torch.ones(2, 2), torch.tensor([0, 1]))
    assert isinstance(head.feature_map, FeatureMap)


def test_leaving_out_changes_nothing_and_wants_no_graph() -> None:
    features, targets = sample(64, 100)
    for head in (AnalyticHead(64), NearestMeanHead(64), LDAHead(64)):
        head.update(features, targets)
        before, random = head(features[:5]), torch.get_rng_state()
        with torch.inference_mode():
            inside = head.leave_one_out(features, targets)
        outside = head.leave_one_out(features.clone().requires_grad_(), targets)
        assert torch.equal(inside, outside)
        assert not outside.requires_grad
        assert torch.equal(head(features[:5]), before)
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("shrinkage", [0.01, "auto"])
def test_relative_distances(shrinkage: Any) -> None:
    features, targets = sample(64, 100)
    units, y, row = torch.nn.functional.normalize(features), targets.numpy(), 5
    relative, classes = Novelty(64, shrinkage=shrinkage, relative=True), LDAHead(64, shrinkage=shrinkage)
    relative.update(features, targets)
    classes.update(units, targets)
    own = units.numpy() - np.stack([units.numpy()[y == c].mean(0) for c in (1, 4, 6)])[np.searchsorted([1, 4, 6], y)]
    ratio = ((units.numpy() - units.numpy().mean(axis=0)) ** 2).sum() / (own**2).sum()
    epsilon, gamma = (0.0, classes.chosen_gamma) if shrinkage == "auto" else (shrinkage, 0.0)

    def from_everything(x: np.ndarray) -> float:
        """Squared distance of the row to one Gaussian of rows x, shrunk in proportion to the variance of all rows."""
        centred, offset = x - x.mean(axis=0), units[row].numpy() - x.mean(axis=0)
        S = (1 - epsilon) * centred.T @ centred / len(x) + ratio * (epsilon + gamma / len(x)) * np.eye(64)
        return float(offset @ np.linalg.solve(S, offset))

    expected = float(classes.distance(units)[row]) - from_everything(units.numpy())
    assert float(relative.distance(features)[row]) == pytest.approx(expected, rel=1e-9)
    expected = float(classes.left_out_distance(units, targets)[row]) - from_everything(np.delete(units.numpy(), row, 0))
    found = float(relative.left_out_distance(features, targets)[row])
    assert found == pytest.approx(expected, rel=1e-9)
    if shrinkage != "auto":  # without the row the proportion is another, by one part in N
        kept, smaller = np.arange(100) != row, Novelty(64, shrinkage=shrinkage, relative=True)
        smaller.update(features[kept], targets[kept])
        assert found == pytest.approx(float(smaller.distance(features)[row]), rel=0.02)
    assert relative.distance(features.float()).dtype == torch.float32
    again = Novelty(64, shrinkage=shrinkage, relative=True)
    again.load_state_dict(relative.state_dict())
    assert torch.equal(again.distance(features), relative.distance(features))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_rate_of_false_alarms_is_the_one_asked_for(rate: float, relative: bool) -> None:
    alarms, generator = [], torch.Generator().manual_seed(0)
    for _ in range(20):
        centres = torch.randn(4, 16, generator=generator)
        targets = torch.randint(4, (240,), generator=generator)
        features = centres[targets] + 0.5 * torch.randn(240, 16, generator=generator)
        novelty = Novelty(16, relative=relative)
        novelty.update(features[:120], targets[:120])
        threshold = novelty.threshold(features[:120], targets[:120], rate)
        alarms.append(float((novelty.distance(features[120:]) > threshold).double().mean()))
    assert float(np.mean(alarms)) == pytest.approx(rate, abs=0.02)  # 2400 rows: about three standard errors
    assert novelty.threshold(features[:18], targets[:18], 0.05) == float("inf")
    with pytest.raises(ValueError, match="false_alarms must be a number from 0 to 1"):
        novelty.threshold(features[:120], targets[:120], 1.5)


def test_novelty_is_the_distance_of_unit_features() -> None:
    features, targets = sample(64, 100)
    novelty, lda = Novelty(64, shrinkage=0.1), LDAHead(64, shrinkage=0.1)
    novelty.update(features, targets)
    units = features / features.norm(dim=1, keepdim=True)
    lda.update(units, targets)
    torch.testing.assert_close(novelty.distance(7 * features), lda.distance(units), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lda.distance(units), -lda(units).amax(dim=1))
    again = Novelty(64, shrinkage=0.1)
    again.load_state_dict(novelty.state_dict())
    assert torch.equal(again.distance(features), novelty.distance(features))
    with pytest.raises(NotFittedError):
        Novelty(64).distance(features)
