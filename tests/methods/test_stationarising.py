"""Stationarising features against naive loops, refitted sums, scikit-learn and numbers computed by hand."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy, multivariate_normal
from sklearn.neighbors import KernelDensity, NearestNeighbors
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ConfigurationError, NotFittedError
from clkit.methods import (
    FEATURE_SIGNS,
    AnalyticHead,
    ErrorPredictor,
    ErrorRecords,
    FeatureStatistics,
    NearestMeanHead,
    Snapshot,
    gaussian_rows,
    left_out_features,
    novel_features,
    sample_loss,
    stationarising_features,
)
from clkit.methods.heads.pseudo_features import pseudo_features
from clkit.metrics.ranking import auroc

DEFAULT = ["log_maha", "gap", "log_leverage", "log_knn", "confidence", "margin"]
FROM_SUMS = ["log_maha", "gap", "log_density"]
EVERYTHING = list(FEATURE_SIGNS)


def sample(rows: int = 90, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of classes 2, 3 and 7; the first is the only one of class 7."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.tensor([2, 3])[torch.randint(2, (rows,), generator=generator)]
    targets[0] = 7
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, width)
    return features + 0.4 * targets[:, None] + 5, targets


def learned(features: Tensor, targets: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], scatter=True)
    statistics.update(features, targets)
    return statistics


def scores_of(features: Tensor, columns: int = 8, unseen: tuple[int, ...] = (0, 1, 4, 5, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(len(features), columns, generator=generator, dtype=torch.float64)
    scores[:, list(unseen)] = -torch.inf
    return scores


def from_sums_by_hand(
    x: np.ndarray, y: np.ndarray, h: np.ndarray, shrinkage: float, keep: tuple[int, float] | None = None
) -> np.ndarray:
    """The features of FROM_SUMS of one row by sums over rows (x, y); ``keep``: N and tr S of another set."""
    ids = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in ids])
    centred = x - means[np.searchsorted(ids, y)]
    scatter = centred.T @ centred
    number, trace = keep or (len(x), np.trace(scatter) / len(x))
    width = x.shape[1]
    S = (1 - shrinkage) * scatter / number + shrinkage * trace / width * np.eye(width)
    m = np.sort([(h - mean) @ np.linalg.solve(S, h - mean) for mean in means])
    shares = [np.mean(y == c) for c in ids]
    densities = [multivariate_normal(mean, S).logpdf(h) for mean in means]
    density = logsumexp(densities, b=shares)
    return np.array([np.log(m[0] / width + 1e-6), min((m[1] - m[0]) / width, 50) if len(m) > 1 else 50, density])


def test_known_values() -> None:
    rows, targets = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]]), torch.tensor([0, 0, 1, 1])
    snapshot = Snapshot.of(learned(rows, targets), shrinkage=0.5)
    torch.testing.assert_close(snapshot.factor @ snapshot.factor.T, torch.diag(torch.tensor([0.75, 0.25])).double())
    x, z = torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2)
    torch.testing.assert_close(snapshot.distances(x), torch.tensor([[4.0, 36.0]]).double())
    found = stationarising_features(FROM_SUMS, snapshot, x, z, probabilities=False)[0]
    np.testing.assert_allclose(found.numpy(), [np.log(2 + 1e-6), 16, -3.694035918], rtol=1e-9)
    out = left_out_features(["log_maha", "gap"], snapshot, rows[:1], targets[:1], z, probabilities=False)[0]
    np.testing.assert_allclose(out.numpy(), [np.log(8 / 2 + 1e-6), (66 - 8) / 2], rtol=1e-9)


@pytest.mark.parametrize("shrinkage", [0.01, 0.1, 1.0])
def test_features_of_new_rows_from_the_sums(shrinkage: float) -> None:
    features, targets = sample()
    new, _ = sample(20, seed=1)
    snapshot = Snapshot.of(learned(features, targets), shrinkage=shrinkage)
    found = stationarising_features(FROM_SUMS, snapshot, new, scores_of(new), probabilities=False)
    expected = [from_sums_by_hand(features.numpy(), targets.numpy(), h, shrinkage) for h in new.numpy()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(("width", "rows"), [(6, 90), (64, 100), (512, 700)])
def test_left_out_and_novel_rows_equal_sums_without_them(width: int, rows: int) -> None:
    features, targets = sample(rows, width)
    x, y = features.numpy(), targets.numpy()
    snapshot = Snapshot.of(learned(features, targets))
    ids = np.unique(y)
    centred = x - np.stack([x[y == c].mean(0) for c in ids])[np.searchsorted(ids, y)]
    keep = len(x), float((centred**2).sum() / len(x))
    chosen = [0, 1, 5]
    arguments = (FROM_SUMS, snapshot, features[chosen], targets[chosen], scores_of(features)[chosen])
    out = left_out_features(*arguments, probabilities=False)
    novel = novel_features(*arguments, probabilities=False)
    for place, row in enumerate(chosen):
        others = np.arange(len(x)) != row
        expected = from_sums_by_hand(x[others], y[others], x[row], 0.1, keep)
        np.testing.assert_allclose(out[place].numpy(), expected, rtol=1e-10)
        # the class dropped: its mean goes, the covariance still has its other rows
        ids = np.unique(y[others & (y != y[row])])
        means = np.stack([x[y == c].mean(0) for c in ids])
        own = x[others] - np.stack([x[others & (y == c)].mean(0) for c in y[others]])
        S = 0.9 * own.T @ own / keep[0] + 0.1 * keep[1] / width * np.eye(width)
        m = np.sort([(x[row] - mean) @ np.linalg.solve(S, x[row] - mean) for mean in means])
        gap = (m[1] - m[0]) / width if len(m) > 1 else 50
        shares = [np.mean(y[y != y[row]] == c) for c in ids]
        density = logsumexp([multivariate_normal(mean, S).logpdf(x[row]) for mean in means], b=shares)
        np.testing.assert_allclose(novel[place].numpy(), [np.log(m[0] / width + 1e-6), gap, density], rtol=1e-10)


def test_neighbours_and_kernels_are_those_of_scikit_learn() -> None:
    features, targets = sample()
    features = features.float()
    features[40] = features[41]  # the same image twice
    new, _ = sample(20, seed=1)
    memory = features, targets
    snapshot = Snapshot.of(learned(features, targets), memory=memory)
    names, x, y = ["log_knn", "kde"], features.double().numpy(), targets.numpy()
    bandwidth = np.sqrt(x.var(axis=0).mean()) * len(x) ** (-1 / 10)

    def expected(rows: np.ndarray, h: np.ndarray) -> list[float]:
        distance = NearestNeighbors(n_neighbors=5).fit(rows).kneighbors(h[None])[0][0, -1]
        return [np.log(distance + 1e-6), KernelDensity(bandwidth=bandwidth).fit(rows).score_samples(h[None])[0]]

    found = stationarising_features(names, snapshot, new, scores_of(new), probabilities=False)
    np.testing.assert_allclose(found.numpy(), [expected(x, h) for h in new.numpy()], rtol=1e-9)
    out = left_out_features(names, snapshot, features, targets, scores_of(features), probabilities=False)
    novel = novel_features(names, snapshot, features, targets, scores_of(features), probabilities=False)
    for row in (0, 1, 40, 41):
        np.testing.assert_allclose(out[row].numpy(), expected(np.delete(x, row, 0), x[row]), rtol=1e-9)
        np.testing.assert_allclose(novel[row].numpy(), expected(x[y != y[row]], x[row]), rtol=1e-9)
    strangers = torch.cat([features[:2], features[2:3] + 0.01])
    with pytest.raises(BatchError, match="row 2 is not in the memory"):
        left_out_features(["log_knn"], snapshot, strangers, targets[:3], scores_of(strangers), probabilities=False)


def test_few_rows_in_the_memory() -> None:
    features, targets = sample()
    statistics = learned(features, targets)
    for number in (0, 1, 3):
        snapshot = Snapshot.of(statistics, memory=(features[:number], targets[:number]))
        found = stationarising_features(["log_knn", "kde", "gmm"], snapshot, features, scores_of(features),
                                        probabilities=False)  # fmt: skip
        if number == 0:
            assert found[0].tolist() == [torch.inf, -torch.inf, -torch.inf]
            continue
        farthest = torch.cdist(features, features[:number]).amax(dim=1)
        torch.testing.assert_close(found[:, 0], (farthest + 1e-6).log())
        assert bool(found.isfinite().all())
        out = left_out_features(["log_knn", "kde"], snapshot, features[:number], targets[:number],
                                scores_of(features[:number]), probabilities=False)  # fmt: skip
        assert bool(out.isfinite().all()) == (number > 1)


def test_mixture() -> None:
    features, targets = sample()
    new, _ = sample(20, seed=1)
    far = new + 100
    snapshot = Snapshot.of(learned(features, targets), memory=(features, targets))
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002  # the global one is the subject
    density, far_away = (
        stationarising_features(["gmm"], snapshot, rows, scores_of(new), probabilities=False)[:, 0]
        for rows in (new, far)
    )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # noqa: NPY002  # likewise
    assert bool((far_away < density.min()).all())
    # with one class it is one Gaussian of diagonal covariance, whatever the start
    one = targets == 2
    single = Snapshot.of(learned(features[one], targets[one]), memory=(features[one], targets[one]))
    x = features[one].numpy()
    floor = 1e-3 * x.var(axis=0).mean()
    reference = multivariate_normal(x.mean(0), np.diag(x.var(axis=0) + floor)).logpdf(new.numpy())
    found = stationarising_features(["gmm"], single, new, scores_of(new), probabilities=False)[:, 0]
    np.testing.assert_allclose(found.numpy(), reference, rtol=1e-9)
    # a class dropped is a memory without it
    three = targets == 3
    kept = Snapshot.of(learned(features, targets), memory=(features[~three], targets[~three]))
    plain = stationarising_features(["gmm"], kept, features[three], scores_of(features[three]), probabilities=False)
    arguments = (["gmm"], snapshot, features[three], targets[three], scores_of(features[three]))
    torch.testing.assert_close(novel_features(*arguments, probabilities=False), plain)
    with pytest.raises(ArgumentError, match="'gmm' has no left-out form"):
        left_out_features(*arguments, probabilities=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_features_of_scores(dtype: torch.dtype) -> None:
    features, targets = sample()
    snapshot, scores = Snapshot.of(learned(features, targets)), (4 * scores_of(features)).to(dtype)
    z = scores.double().numpy()[:, [2, 3, 7]]
    p, ranked = softmax(z, axis=1), np.sort(z, axis=1)
    names = ["confidence", "margin", "entropy", "energy"]
    found = stationarising_features(names, snapshot, features, scores, probabilities=True)
    expected = [1 - p.max(1), ranked[:, -2] - ranked[:, -1], entropy(p, axis=1), -logsumexp(z, axis=1)]
    np.testing.assert_allclose(found.numpy(), np.stack(expected, 1), rtol=1e-12, atol=1e-12)
    plain = stationarising_features(["confidence"], snapshot, features, scores, probabilities=False)
    np.testing.assert_allclose(plain[:, 0].numpy(), 1 - z.max(1), rtol=1e-12)
    # the best class is dropped where it is the row's own
    best = torch.tensor([2, 3, 7])[torch.from_numpy(z.argmax(1))]
    novel = novel_features(names, snapshot, features, best, scores, probabilities=True)
    rest, ranked = np.sort(z, axis=1)[:, :2], np.sort(z, axis=1)[:, :2]
    p = softmax(rest, axis=1)
    expected = [1 - p.max(1), ranked[:, 0] - ranked[:, 1], entropy(p, axis=1), -logsumexp(rest, axis=1)]
    np.testing.assert_allclose(novel.numpy(), np.stack(expected, 1), rtol=1e-12, atol=1e-12)


def test_leverage() -> None:
    features, targets = sample()
    statistics, x = learned(features, targets), features.numpy()
    inverse = np.linalg.inv(x.T @ x + np.eye(6))
    v = np.einsum("ni,ij,nj->n", x, inverse, x)
    snapshot, scores = Snapshot.of(statistics), scores_of(features)
    arguments = (["log_leverage"], snapshot, features, targets, scores)
    plain = stationarising_features(["log_leverage"], snapshot, features, scores, probabilities=False)
    np.testing.assert_allclose(plain[:, 0].numpy(), np.log(v + 1e-12), rtol=1e-9)
    out = left_out_features(*arguments, probabilities=False)
    novel = novel_features(*arguments, probabilities=False)
    drawn = novel_features(*arguments, probabilities=False, learned=False)
    np.testing.assert_allclose(out[:, 0].numpy(), np.log(v / (1 - v)), rtol=1e-8)
    torch.testing.assert_close(novel, out)
    torch.testing.assert_close(drawn, plain)
    for v in (0.5, 0.9995):  # of a row that is nearly all that is known of its direction
        known = Snapshot.of(statistics, leverage=lambda rows, v=v: torch.full((len(rows),), v))
        found = novel_features(["log_leverage"], known, *arguments[2:], probabilities=False).exp()
        np.testing.assert_allclose(found.numpy(), v / (1 - min(v, 0.999)), rtol=1e-6)
    given = torch.full((90,), 0.25)
    for function in (left_out_features, novel_features):
        assert function(*arguments, given, probabilities=False).exp().unique().numpy() == pytest.approx(0.25)

    head = AnalyticHead(6, gamma=2.0, expansion_dim=40)
    head.update(features, targets)
    snapshot = Snapshot.of(statistics, leverage=head.leverage)
    plain = stationarising_features(["log_leverage"], snapshot, features, scores, probabilities=False)
    torch.testing.assert_close(plain[:, 0], (head.leverage(features) + 1e-12).log())
    out = left_out_features(["log_leverage"], snapshot, features, targets, scores, probabilities=False)
    torch.testing.assert_close(out[:, 0], (head.leverage(features, left_out=True) + 1e-12).log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_features_are_taken_for_what_they_are(dtype: torch.dtype) -> None:
    features, targets = (tensor.clone() for tensor in sample())
    narrow = features.to(dtype)
    scores = scores_of(features)
    memories = [(narrow, targets), (narrow.double(), targets)]
    snapshots = [Snapshot.of(learned(rows, targets), memory=(rows, targets)) for rows, _ in memories]
    tables = [
        stationarising_features(EVERYTHING, snapshot, rows, scores, probabilities=True)
        for snapshot, (rows, _) in zip(snapshots, memories, strict=True)
    ]
    assert tables[0].dtype == torch.float64
    assert torch.equal(tables[0], tables[1])
    out = left_out_features(["log_knn"], snapshots[0], narrow, targets, scores, probabilities=True)
    assert bool(out[1:].isfinite().all())


def test_one_class_and_one_row() -> None:
    row, target = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([4])
    snapshot = Snapshot.of(learned(row, target), memory=(row, target))
    scores = torch.full((2, 5), -torch.inf)
    scores[:, 4] = 0.5
    new = torch.stack([row[0], row[0] + 2])
    names = [name for name in EVERYTHING if name != "gmm"]
    found = stationarising_features(names, snapshot, new, scores, probabilities=True)
    assert bool(found.isfinite().all())
    values = dict(zip(names, found[1].tolist(), strict=True))
    assert values["log_maha"] == pytest.approx(np.log(12 / 3 + 1e-6))  # no spread yet: plain distances
    assert (values["gap"], values["margin"], values["entropy"], values["confidence"]) == (50, -50, 0, 0)
    gone = torch.full((1, 5), -torch.inf)
    out = left_out_features(DEFAULT, snapshot, row, target, gone, probabilities=True)[0]
    novel = novel_features(DEFAULT, snapshot, row, target, gone, probabilities=True)[0]
    for phi in (out, novel):
        assert phi[0] == torch.inf
        assert not bool(phi.isfinite().all())  # so no record is made of it
    one_column = stationarising_features(["margin"], snapshot, new, torch.zeros(2, 1), probabilities=False)
    assert one_column.tolist() == [[-50], [-50]]


def test_a_gap_is_capped() -> None:
    rows, targets = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 90.0], [9.0, 91.0]]), torch.tensor([0, 0, 1, 1])
    snapshot = Snapshot.of(learned(rows, targets))
    for middle, capped in ((45.4, False), (10.0, True)):
        row = torch.tensor([[4.5, middle]])
        first, second = snapshot.distances(row)[0].tolist()
        assert ((second - first) / 2 > 50) == capped
        gap = stationarising_features(["gap"], snapshot, row, torch.zeros(1, 2), probabilities=False)
        assert float(gap) == pytest.approx(min((second - first) / 2, 50))


def test_empty_batches_and_rows_that_are_not_finite() -> None:
    features, targets = sample()
    snapshot, scores = Snapshot.of(learned(features, targets), memory=(features, targets)), scores_of(features)
    none = targets[:0]
    empty = (features[:0], none, scores[:0])
    assert stationarising_features(EVERYTHING, snapshot, *empty[::2], probabilities=True).shape == (0, 11)
    assert left_out_features(DEFAULT, snapshot, *empty, probabilities=True).shape == (0, 6)
    assert novel_features(EVERYTHING, snapshot, *empty, probabilities=True).shape == (0, 11)
    assert stationarising_features([], snapshot, features, scores, probabilities=True).shape == (90, 0)
    poisoned, odd = features.clone(), scores.clone()
    poisoned[3, 1], poisoned[4, 0], odd[5, 2] = torch.nan, torch.inf, torch.nan
    found = stationarising_features(EVERYTHING, snapshot, poisoned, odd, probabilities=True)
    assert bool(found[3:6].isnan().all())
    clean = stationarising_features(EVERYTHING, snapshot, features, scores, probabilities=True)
    torch.testing.assert_close(found[6:], clean[6:])


def test_a_snapshot_holds_nothing_that_is_newer() -> None:
    features, targets = sample()
    statistics = learned(features, targets)
    memory = features.clone(), targets.clone()
    snapshot = Snapshot.of(statistics, memory=memory)
    scores = scores_of(features)
    before = stationarising_features(EVERYTHING, snapshot, features, scores, probabilities=True)
    lazy = Snapshot.of(statistics, memory=memory)  # nothing of it was read yet
    statistics.update(features * 3, targets + 1)
    memory[0].zero_()
    for each in (snapshot, lazy):
        assert torch.equal(stationarising_features(EVERYTHING, each, features, scores, probabilities=True), before)


def test_names_of_classes_do_not_matter() -> None:
    features, targets = sample()
    scores, renamed = scores_of(features), torch.full((90, 40), -torch.inf, dtype=torch.float64)
    names = {2: 31, 3: 12, 7: 20}
    for old, new in names.items():
        renamed[:, new] = scores[:, old]
    others = torch.tensor([names[int(target)] for target in targets])
    tables = []
    for ids, z in ((targets, scores), (others, renamed)):
        snapshot = Snapshot.of(learned(features, ids), memory=(features, ids))
        arguments = (DEFAULT, snapshot, features, ids, z)
        plain = stationarising_features(EVERYTHING, snapshot, features, z, probabilities=True)
        tables.append([plain] + [f(*arguments, probabilities=True) for f in (left_out_features, novel_features)])
    for first, second in zip(*tables, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def test_a_common_offset_costs_no_digits() -> None:
    features, targets = sample()
    near = Snapshot.of(learned(features, targets), memory=(features, targets))
    far = Snapshot.of(learned(features + 1e6, targets), memory=(features + 1e6, targets))
    names, scores = ["log_maha", "gap", "log_knn", "log_density", "kde"], scores_of(features)
    first = left_out_features(names, near, features, targets, scores, probabilities=False)
    second = left_out_features(names, far, features + 1e6, targets, scores, probabilities=False)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_gaussian_rows_have_the_moments_and_depend_on_nothing_else() -> None:
    features, targets = sample()
    snapshot = Snapshot.of(learned(features, targets))
    random = torch.get_rng_state()
    rows, classes = gaussian_rows(snapshot, per_class=4000)
    few, _ = gaussian_rows(snapshot, per_class=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(classes, torch.tensor([2, 3, 7]).repeat_interleave(4000))
    assert torch.equal(few.reshape(3, 3, 6), rows.reshape(3, 4000, 6)[:, :3])
    covariance = (snapshot.factor @ snapshot.factor.T).numpy()
    for place, class_id in enumerate((2, 3, 7)):
        drawn = rows[classes == class_id].numpy()
        deviations = np.sqrt(np.diag(covariance))
        error = (drawn.mean(0) - features[targets == class_id].mean(0).numpy()) / deviations
        assert np.abs(error).max() < 4 / np.sqrt(4000), place
        assert np.abs(np.cov(drawn.T) - covariance).max() < 0.1 * np.abs(covariance).max()
    assert not torch.equal(gaussian_rows(snapshot, per_class=3, seed=1)[0], few)
    noise = torch.linalg.solve_triangular(
        snapshot.factor, (few[:3] - snapshot.means[0] - snapshot.offset).T, upper=False
    ).T
    zeros = torch.zeros(6, dtype=torch.float64)
    assert not torch.allclose(noise, next(pseudo_features(zeros, zeros + 1, 3, class_id=2)))  # draws of their own
    assert float(gaussian_rows(snapshot, clamp_min=5.0)[0].min()) == 5.0
    with pytest.raises(ArgumentError, match="per_class must be an integer of at least 1, got 0"):
        gaussian_rows(snapshot, per_class=0)


def test_rows_that_were_drawn_are_in_no_sum() -> None:
    features, targets = sample()
    snapshot = Snapshot.of(learned(features, targets))
    rows, classes = gaussian_rows(snapshot, per_class=5)
    arguments = (FROM_SUMS, snapshot, rows, classes, scores_of(rows))
    found = novel_features(*arguments, probabilities=False, learned=False)
    distances = snapshot.distances(rows).numpy()
    distances[np.arange(15), np.repeat([0, 1, 2], 5)] = np.inf
    expected = np.sort(distances, axis=1)
    np.testing.assert_allclose(found[:, 0].numpy(), np.log(expected[:, 0] / 6 + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(found[:, 1].numpy(), np.minimum((expected[:, 1] - expected[:, 0]) / 6, 50), rtol=1e-12)


def test_what_is_wrong_is_named() -> None:
    features, targets = sample()
    statistics = learned(features, targets)
    snapshot, scores = Snapshot.of(statistics), scores_of(features)
    plain: Any = {"probabilities": False}
    with pytest.raises(ArgumentError, match="no stationarising feature 'log_mah', did you mean 'log_maha'"):
        stationarising_features(["log_mah"], snapshot, features, scores, **plain)
    for name in ("log_knn", "gmm", "kde"):
        with pytest.raises(ConfigurationError, match=f"'{name}' needs a memory"):
            stationarising_features([name], snapshot, features, scores, **plain)
    for name in ("entropy", "energy"):
        with pytest.raises(ConfigurationError, match=f"'{name}' needs scores whose softmax are probabilities"):
            stationarising_features([name], snapshot, features, scores, **plain)
    with pytest.raises(BatchError, match=r"scores must have shape \(90, C\)"):
        stationarising_features(DEFAULT[:1], snapshot, features, scores[:5], **plain)
    with pytest.raises(BatchError, match=r"features must have shape \(B, 6\)"):
        stationarising_features(DEFAULT[:1], snapshot, features[:, :5], scores, **plain)
    with pytest.raises(BatchError, match="scores have 3 columns and a target is 7"):
        novel_features(DEFAULT[:1], snapshot, features, targets, scores[:, :3], **plain)
    with pytest.raises(BatchError, match="target 4 in row 0 is no class that was learned"):
        novel_features(DEFAULT[:1], snapshot, features, torch.full((90,), 4), scores, **plain)
    with pytest.raises(BatchError, match=r"leverage must have shape \(90,\)"):
        novel_features(DEFAULT[:1], snapshot, features, targets, scores, torch.zeros(90, 1), **plain)
    with pytest.raises(ArgumentError, match="shrinkage"):
        Snapshot.of(statistics, shrinkage=1.5)
    with pytest.raises(ArgumentError, match=r"singular with shrinkage=0\.0"):
        Snapshot.of(learned(features[:5], targets[:5]), shrinkage=0.0)
    with pytest.raises(NotFittedError):
        Snapshot.of(FeatureStatistics(6, scatter=True))
    few = FeatureStatistics(6)
    few.update(features, targets)
    with pytest.raises(ConfigurationError, match="scatter"):
        Snapshot.of(few)
    with pytest.raises(BatchError, match="memory has the target -1"):
        Snapshot.of(statistics, memory=(features, targets * 0 - 1))
    with pytest.raises(ArgumentError, match="memory must be a pair"):
        Snapshot.of(statistics, memory=features)  # type: ignore[arg-type]  # what a user may do


def test_no_warning_of_scikit_learn_comes_through() -> None:
    rows, targets = torch.zeros(30, 3), torch.arange(30) % 3  # all rows alike: nothing converges
    snapshot = Snapshot.of(learned(rows, targets), memory=(rows, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stationarising_features(["gmm", "kde"], snapshot, rows, torch.zeros(30, 3), probabilities=True)
    assert found.shape == (30, 2)
    assert bool(found.isfinite().all())


# ---- what they are for: an error predictor on a stream of classes, from records of rows that were learned


def stream_of_digits(
    digits: Any, kind: str, memory: str = "features", novelty: float = 0.05, judged: tuple[int, ...] = (0, 3, 4)
) -> dict[int, dict[str, float]]:
    """What an error predictor is worth after some of five stages of two classes, in the order of their ids."""
    train, targets, test, test_targets = digits
    head: Any = (
        AnalyticHead(64, gamma=0.1, expansion_dim=512, num_classes=10)
        if kind == "ridge"
        else NearestMeanHead(64, metric="cosine", num_classes=10)
    )
    statistics, stages = FeatureStatistics(64, scatter=True), {}
    for stage in range(5):
        now, learned_so_far = targets // 2 == stage, targets < 2 * stage + 2
        for learner in (head, statistics):
            learner.update(train[now], targets[now])
        if stage not in judged:
            continue
        rows, labels = train[learned_so_far], targets[learned_so_far]
        leverage = head.leverage if kind == "ridge" else None
        snapshot = Snapshot.of(statistics, memory=(rows, labels), leverage=leverage)
        records, source = ErrorRecords(4096), "loo"
        if memory == "gaussian":
            source = "gaussian"
            rows, labels = gaussian_rows(snapshot)
            snapshot = Snapshot.of(statistics, memory=gaussian_rows(snapshot, seed=1), leverage=leverage)
            scores = head(rows)
            phi = stationarising_features(DEFAULT, snapshot, rows, scores, probabilities=False)
        else:
            scores = head.leave_one_out(rows, labels)
            phi = left_out_features(DEFAULT, snapshot, rows, labels, scores, probabilities=False)
        ids = torch.arange(len(rows))
        records.add(source, phi, sample_loss("error", scores, labels), ids, labels)
        arguments = (DEFAULT, snapshot, rows, labels, head(rows))
        phi = novel_features(*arguments, probabilities=False, learned=memory == "features")
        records.add("novel", phi, torch.ones(len(rows)), ids)
        predictor = ErrorPredictor(signs=[FEATURE_SIGNS[name] for name in DEFAULT])
        made = records.training_set(novelty=novelty)
        predictor.fit(made.phi, made.error, made.weight)
        scores = head(test)
        phi = stationarising_features(DEFAULT, snapshot, test, scores, probabilities=False)
        total, wrong, seen = predictor.predict(phi), scores.argmax(dim=1) != test_targets, test_targets < 2 * stage + 2
        stages[stage] = {
            "future": auroc(total, ~seen),
            "distance": auroc(phi[:, 0], ~seen),
            "mistakes": auroc(total[seen], wrong[seen]),
            "total": float(total[seen].mean()),
            "error": float(wrong[seen].double().mean()),
        }
    return stages


def test_left_out_and_novel_records_predict_errors_of_a_ridge_head(digits: Any) -> None:
    stages = stream_of_digits(digits, "ridge")
    assert min(stages[0]["future"], stages[3]["future"]) > 0.95
    assert stages[3]["future"] > stages[3]["distance"] + 0.03  # than the best single feature for what is new
    assert stages[4]["mistakes"] > 0.9
    assert 0.5 < stages[4]["total"] / stages[4]["error"] < 2
    without = stream_of_digits(digits, "ridge", novelty=0.0, judged=(0,))
    assert without[0]["future"] < 0.7  # no record shows a novelty before there are mistakes


def test_means_and_drawn_rows(digits: Any) -> None:
    kept, drawn = (stream_of_digits(digits, "means", memory) for memory in ("features", "gaussian"))
    for stage in (0, 3):
        assert kept[stage]["future"] > 0.93
        assert drawn[stage]["future"] > kept[stage]["future"] - 0.06
    for stages in (kept, drawn):
        assert stages[4]["mistakes"] > 0.9
        assert 0.8 < stages[4]["total"] / stages[4]["error"] < 1.6
