"""Kernel LDA and AnaCP against their formulas on all rows at once, in NumPy, for any way in which the rows came."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import ndtr
from sklearn.preprocessing import normalize
from small_runs import merge_and_forget
from torch import Tensor

from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.methods import KLDA, AnaCP, AnalyticHead, LDAHead
from clkit.methods.heads.pseudo_features import correlated_rows
from clkit.methods.heads.seeded_map import FourierMap, SeededMap

D, L = 6, 40
Floats = npt.NDArray[np.float64]
MAKERS: dict[str, Callable[..., Any]] = {
    "klda": lambda **more: KLDA(D, **{"expansion_dim": L, "bandwidth": 0.7, "seed": 3, **more}),
    "klda of several": lambda **more: KLDA(D, **{"expansion_dim": L, "bandwidth": [0.02, 0.7], "seed": 3, **more}),
    "anacp": lambda **more: AnaCP(D, **{"expansion_dim": L, "draws": 7, "seed": 3, **more}),
    "anacp, 100": lambda **more: AnaCP(D, **{"gamma": 100.0, "expansion_dim": L, "maps": 2, "draws": 3, **more}),
    "anacp, nearest": lambda **more: AnaCP(D, **{"expansion_dim": L, "readout": "nearest", **more}),
    "anacp, unwhitened": lambda **more: AnaCP(
        D, **{"expansion_dim": L, "readout": "nearest", "targets": "unwhitened", **more}
    ),
}


def sample(per_class: tuple[int, ...] = (50, 31, 22, 9, 1), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of classes 0, 3, 6, … whose borders bend."""
    draws = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.full((n,), 3 * c) for c, n in enumerate(per_class)])
    rows = torch.randn(len(targets), D, generator=draws, dtype=torch.float64)
    rows[:, 0] += 2 * torch.cos(targets.double())
    rows[:, 1] += 2 * torch.sin(targets.double()) + rows[:, 0] ** 2 / 2
    mixed = torch.randperm(len(targets), generator=draws)
    return rows[mixed], targets[mixed]


# ---- the formulas, of all rows at once


def gelu(values: Floats) -> Floats:
    result: Floats = values * ndtr(values)
    return result


def strength(design: Floats, y: Floats, spent: float = 0.0) -> float:
    """The strength of least generalised cross-validation, by its definition."""
    rows = len(design)
    values, vectors = np.linalg.eigh(design.T @ design)
    basis = design @ vectors
    gammas = np.square(design).sum() / design.shape[1] * 10.0 ** np.arange(-8, 2.01, 0.05)
    scores = []
    for gamma in gammas:
        fitted = basis @ ((basis.T @ y) / (np.maximum(values, 0) + gamma)[:, None])
        df = float((values / (values + gamma)).sum())
        scores.append(np.square(y - fitted).sum() / (rows - spent - df) ** 2)
    return float(gammas[int(np.argmin(scores))])


def ridge(design: Floats, y: Floats, gamma: float | str) -> Floats:
    used = strength(design, y) if gamma == "auto" else float(gamma)
    solved: npt.NDArray[Any] = np.linalg.solve(design.T @ design + used * np.eye(design.shape[1]), design.T @ y)
    return solved


def joint_klda(head: KLDA, x: Floats, y: npt.NDArray[np.int64], test: Floats) -> Floats:
    ids = np.unique(y)
    one_hot = (y[:, None] == ids).astype(float)
    chosen = None
    for bandwidth in head.bandwidth if isinstance(head.bandwidth, list) else [head.bandwidth]:
        lift = FourierMap(D, L, bandwidth=bandwidth, seed=head.seed)
        assert lift.projection is not None
        p, b = lift.projection.numpy(), lift.phase.numpy()
        z, z_test = (np.sqrt(2 / L) * np.cos(normalize(rows) @ p.T + b) for rows in (x, test))
        centred = z - z.mean(0)
        gamma = strength(centred, one_hot - one_hot.mean(0), spent=1.0)
        hat = centred @ np.linalg.solve(centred.T @ centred + gamma * np.eye(L), centred.T)
        left = one_hot - one_hot.mean(0)
        error = len(z) * np.square(left - hat @ left).sum() / (len(z) - 1 - np.trace(hat)) ** 2
        if chosen is None or error < chosen[0]:
            chosen = error, bandwidth, gamma, z, z_test
    assert chosen is not None
    error, bandwidth, gamma, z, z_test = chosen
    assert head.chosen_bandwidth == bandwidth
    assert head.chosen_gamma == pytest.approx(gamma, rel=1e-9)
    assert head.gcv_error == pytest.approx(error, rel=1e-7)
    means = np.stack([z[y == c].mean(0) for c in ids])
    scatter = sum(np.cov(z[y == c].T, bias=True) * (y == c).sum() for c in ids)
    inverse = np.linalg.inv((scatter + gamma * np.eye(L)) / len(z))
    distances: Floats = np.einsum("bci,ij,bcj->bc", z_test[:, None] - means, inverse, z_test[:, None] - means)
    return -distances


def joint_anacp(head: AnaCP, x: Floats, y: npt.NDArray[np.int64], test: Floats) -> Floats:
    ids = np.unique(y)
    x, test = normalize(x), normalize(test)
    means = np.stack([x[y == c].mean(0) for c in ids])
    centred = x - means[np.searchsorted(ids, y)]
    covariance = centred.T @ centred / len(x) + 1e-4 * np.eye(D)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors @ np.diag((values + 1e-8) ** -0.5) @ vectors.T
    back = whiten if head.targets == "published" else vectors @ np.diag((values + 1e-8) ** 0.5) @ vectors.T
    u, s, vt = np.linalg.svd((means - means.mean(0)) @ whiten, full_matrices=False)
    longer = np.where(s > 1e-10 * s[0], s + 1, 0)
    targets = normalize(u @ np.diag(longer) @ vt @ back + means.mean(0))
    maps = [SeededMap(D, L, seed=head.seed, part=number + 2) for number in range(head.maps)]
    weights = [each.projection.numpy() for each in maps if each.projection is not None]
    thetas = [ridge(gelu(x @ w.T), targets[np.searchsorted(ids, y)], head.gamma) for w in weights]

    def projected(rows: Floats) -> Floats:
        each = [normalize(gelu(rows @ w.T) @ theta) for w, theta in zip(weights, thetas, strict=True)]
        mean: Floats = np.mean(each, axis=0)
        return mean

    if head.readout == "nearest":
        near: Floats = np.square(projected(test)[:, None] - targets).sum(2)
        return -near
    factor = torch.from_numpy(np.linalg.cholesky(covariance))
    drawn = [
        correlated_rows(torch.from_numpy(mean), factor, head.draws, class_id=int(c), seed=head.seed).numpy()
        for c, mean in zip(ids, means, strict=True)
    ]
    last = SeededMap(D, L, seed=head.seed).projection
    assert last is not None
    design = gelu(projected(np.concatenate(drawn)) @ last.numpy().T)
    weight = ridge(design, np.repeat(np.eye(len(ids)), head.draws, axis=0), head.gamma)
    scores: Floats = gelu(projected(test) @ last.numpy().T) @ weight
    return scores


def joint(head: Any, features: Tensor, targets: Tensor, test: Tensor) -> Floats:
    formula: Callable[..., Floats] = joint_klda if isinstance(head, KLDA) else joint_anacp
    return formula(head, features.numpy(), targets.numpy(), test.numpy())


def close(found: Tensor, expected: Floats, relative: float = 1e-9) -> bool:
    return bool(np.abs(found.numpy() - expected).max() <= relative * np.abs(expected).max())


# ---- how the rows may come


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore:1 feature vectors of a batch are zero")
def test_any_split_order_merge_and_forget_gives_the_joint_formula(name: str) -> None:
    make = MAKERS[name]
    features, targets = sample()
    features[7] = 0  # has no direction
    test = sample(seed=1)[0]
    whole = make()
    whole.update(features, targets)
    assert close(whole.scores_seen(test), joint(whole, features, targets, test))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(4))
    stray, labels = (
        3 * features[:12] + 1,
        targets[:12].clone(),
    )  # learned, and taken out again, with one class of its own
    labels[0] = 30
    parts = [make() for _ in range(5)]
    for number, part in enumerate(parts):
        mine = order[number::5]
        for start in range(0, len(mine), 1 + 4 * number):
            rows = mine[start : start + 1 + 4 * number]
            part.update(features[rows], targets[rows])
    merge_and_forget(parts, stray, labels)
    resumed = make()
    resumed.load_state_dict(parts[0].state_dict())
    assert torch.equal(resumed(test), parts[0](test))
    assert torch.equal(resumed.counts, whole.counts)
    assert close(resumed.scores_seen(test), joint(resumed, features, targets, test))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore:2 feature vectors of a batch are zero")
def test_rows_of_zeros_stay_zero_and_count(name: str) -> None:
    head = MAKERS[name]()
    features, targets = sample()
    features[:2] = 0
    head.update(features, targets)
    assert int(head.counts.sum()) == len(targets)
    assert bool(head(torch.zeros(1, D, dtype=torch.float64))[:, head.classes].isfinite().all())
    only = MAKERS[name]()
    only.update(torch.zeros(2, D), torch.tensor([4, 8]))
    assert only.predict(torch.zeros(3, D)).tolist() == [4] * 3


@pytest.mark.parametrize("name", MAKERS)
def test_the_state_is_of_one_size_and_holds_no_map(name: str) -> None:
    head = MAKERS[name]()
    features, targets = sample()

    def size() -> int:
        tensors = [each for each in head.state_dict().values() if isinstance(each, Tensor)]
        return sum(each.numel() * each.element_size() for each in tensors)

    head.update(features, targets)
    first = size()
    for _ in range(5):
        head.update(features + 1, targets)
    assert size() == first
    maps = [entry for entry in head.state_dict() if "map" in entry]
    assert maps
    assert all(entry.endswith(".checksum") and head.state_dict()[entry].shape == (D,) for entry in maps)


@pytest.mark.parametrize("name", ["klda", "anacp"])
def test_heads_of_another_map_are_refused_by_name(name: str) -> None:
    head = MAKERS[name]()
    features, targets = sample()
    head.update(features, targets)
    before = head(features)
    others: dict[str, Any] = {"seed": 4, "expansion_dim": L + 1}
    others |= {"bandwidth": 0.8, "unit": False} if name == "klda" else {"maps": 2}
    for option, value in others.items():
        other = MAKERS[name](**{option: value})
        with pytest.raises(ArgumentError, match=f"different {option}: "):
            head.merge(other)
        with pytest.raises(StateError, match=f"{option} must be "):
            other.load_state_dict(head.state_dict())
    saved = head.state_dict()
    entry = next(entry for entry in saved if entry.endswith("checksum"))
    saved[entry] = saved[entry] + 1e-6
    with pytest.raises(StateError, match="the checksum of the map that seed=3 gives here"):
        MAKERS[name]().load_state_dict(saved)
    assert torch.equal(head(features), before)


def test_maps_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    maps: list[Any] = [SeededMap(D, L, seed=5, part=part) for part in (1, 2)] + [
        FourierMap(D, L, bandwidth=0.5, seed=5)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = [SeededMap(D, L, seed=5, part=part) for part in (1, 2)] + [FourierMap(D, L, bandwidth=0.5, seed=5)]
    for one, other in zip(maps, again, strict=True):
        assert one.projection is not None
        assert other.projection is not None
        assert torch.equal(one.projection, other.projection)
    draws = torch.Generator().manual_seed(int(np.random.SeedSequence((5, 1, 1)).generate_state(1, np.uint64)[0]) >> 1)
    expected = torch.randn(L, D, generator=draws, dtype=torch.float64)
    phases = 2 * torch.pi * torch.rand(L, generator=draws, dtype=torch.float64)
    assert torch.equal(maps[0].projection, expected)
    assert torch.equal(maps[2].projection, expected)  # the variance is 2 g, here 1
    assert torch.equal(maps[2].phase, phases)
    assert not torch.equal(maps[1].projection, expected)


# ---- the covariance of the public code


def test_the_covariance_of_anacp_is_pooled_and_not_that_of_the_public_code() -> None:
    features, targets = sample((40, 40, 40, 40))
    rows = normalize(features.numpy())
    tasks = [np.flatnonzero(targets.numpy() == c) for c in (0, 3, 6, 9)]
    mixed = list(np.array_split(np.arange(len(rows)), 16))
    for stream, off in ((tasks, 0.02), (mixed, 0.01)):
        head, published, seen = AnaCP(D, expansion_dim=L), np.zeros((D, D)), 0
        for batch in stream:
            head.update(features[batch], targets[batch])
            learned = np.concatenate(stream)[: seen + len(batch)]
            means = {c: rows[learned][targets.numpy()[learned] == c].mean(0) for c in targets.numpy()[batch]}
            centred = rows[batch] - np.stack([means[c] for c in targets.numpy()[batch]])
            seen += len(batch)  # counts the batch before it is averaged, and again when it is
            weight = 1.0 if seen == len(batch) else len(batch) / (seen + len(batch))
            published = (1 - weight) * published + weight * centred.T @ centred / len(batch)
        pooled = sum(np.cov(rows[task].T, bias=True) for task in tasks) / 4  # as many rows of each class
        np.testing.assert_allclose(head.covariance.numpy(), pooled, rtol=1e-10, atol=1e-14)
        assert np.linalg.norm(published - pooled) > off * np.linalg.norm(pooled)


def test_the_scatter_of_klda_is_pooled_and_not_that_of_the_public_code() -> None:
    features, targets = sample((40, 40, 40))
    head, published = KLDA(D, expansion_dim=L, bandwidth=0.7), np.zeros((L, L))
    z = head._design(features).numpy()
    for stop in range(8, len(z) + 1, 8):
        head.update(features[stop - 8 : stop], targets[stop - 8 : stop])
        for c in np.unique(targets[stop - 8 : stop]):
            new = z[stop - 8 : stop][targets[stop - 8 : stop] == c]
            centred = new - z[:stop][targets[:stop] == c].mean(0)  # of the rows so far; never put right later
            published += centred.T @ centred
    pooled = sum(np.cov(z[targets == c].T, bias=True) * int((targets == c).sum()) for c in (0, 3, 6))
    np.testing.assert_allclose(head.covariance.numpy() * len(z), pooled, rtol=1e-9, atol=1e-12)
    assert np.linalg.norm(published - pooled) > 0.01 * np.linalg.norm(pooled)


# ---- the rest


def test_rows_left_out_of_kernel_lda_are_as_if_never_learned() -> None:
    features, targets = sample((20, 15, 9))
    head = KLDA(D, expansion_dim=30, bandwidth=0.7, shrinkage=0.1)
    head.update(features, targets)
    found = head.leave_one_out(features, targets)
    for row in (0, 5):
        other = KLDA(D, expansion_dim=30, bandwidth=0.7, shrinkage=0.1)
        kept = torch.arange(len(targets)) != row
        other.update(features[kept], targets[kept])
        np.testing.assert_allclose(found[row, ::3], other(features[row : row + 1])[0, ::3], rtol=1e-9)
    nothing = AnaCP(D, expansion_dim=L)
    nothing.update(features, targets)
    with pytest.raises(ConfigurationError, match="AnaCP has no exact leave-one-out form"):
        nothing.leave_one_out(features, targets)


def test_the_error_that_the_sums_foresee_tells_which_map_is_better(digits: Any) -> None:
    """On pixels a bent border is far better than a straight one, and the sums know before a test row is seen."""
    heads: dict[str, Any] = {
        "lda": LDAHead(64, unit=True),
        "klda": KLDA(64, expansion_dim=300, bandwidth=1.0),
        "ridge": AnalyticHead(64, gamma="auto"),
        "lift": AnalyticHead(64, gamma="auto", expansion_dim=300),
    }
    right = {}
    for name, head in heads.items():
        head.update(digits.train, digits.train_targets)
        right[name] = float((head.predict(digits.test) == digits.test_targets).double().mean())
    assert right["klda"] > right["lda"] + 0.02
    assert right["lift"] > right["ridge"] + 0.02
    assert heads["klda"].gcv_error < 0.8 * heads["lda"].gcv_error
    assert heads["lift"].gcv_error < 0.8 * heads["ridge"].gcv_error
    assert np.isnan([KLDA(D, shrinkage=0.1).gcv_error, AnalyticHead(D).gcv_error]).all()


def test_targets_of_one_class_and_of_equal_means() -> None:
    one = AnaCP(D, expansion_dim=L)
    one.update(sample((9,))[0], torch.full((9,), 2))
    assert one.predict(torch.ones(2, D)).tolist() == [2, 2]
    twins = AnaCP(D, expansion_dim=L, readout="nearest")
    rows = sample((9, 9))[0]
    twins.update(torch.cat([rows, rows]), torch.tensor([1, 5]).repeat_interleave(18))
    assert twins.predict(rows).tolist() == [1] * 18  # ties go to the lowest id


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KLDA(3, bandwidth=0.0), "bandwidth must be a finite number above 0, got 0.0"),
        (lambda: KLDA(3, bandwidth=[]), r"bandwidth must be a number above 0 or several different ones, got \[\]"),
        (lambda: KLDA(3, bandwidth=[0.1, 0.1]), "several different ones"),
        (lambda: KLDA(3, expansion_dim=0), "expansion_dim must be an integer of at least 1, got 0"),
        (lambda: KLDA(3, seed=-1), "seed must be an integer of at least 0"),
        (lambda: AnaCP(3, gamma=0.0), "gamma must be a finite number above 0"),
        (lambda: AnaCP(3, maps=0), "maps must be an integer of at least 1"),
        (lambda: AnaCP(3, draws=0), "draws must be an integer of at least 1"),
        (
            partial(AnaCP, 3, targets="whitened"),
            "targets must be one of 'published', 'unwhitened', got 'whitened'",
        ),
        (partial(AnaCP, 3, readout="targets"), "readout must be one of 'draws', 'nearest', got 'targets'"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        make()
