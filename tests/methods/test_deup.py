"""The error predictor: its forest against scikit-learn's, its states, what it refuses, and cross-fitting."""

from __future__ import annotations

import copy
import io
import random
import warnings
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.linear_model import Ridge
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ConfigurationError, StateError
from clkit.methods import ErrorPredictor, _error_models, cross_fit
from clkit.methods import deup as module
from clkit.testing._compare import changed

MODELS: tuple[Any, ...] = get_args(module.ErrorModelName)
NAN, INF = float("nan"), float("inf")


def records(number: int = 400, width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, errors 0 and 1 that are more frequent where the first is large and the second is small, and weights."""
    draws = torch.Generator().manual_seed(seed)
    phi = torch.randn(number, width, generator=draws, dtype=torch.float64)
    chance = torch.sigmoid(2 * phi[:, 0] - phi[:, min(1, width - 1)])
    error = (torch.rand(number, generator=draws, dtype=torch.float64) < chance).double()
    return phi, error, torch.rand(number, generator=draws, dtype=torch.float64) + 0.1


def fitted(model: Any = "forest", number: int = 400, **options: Any) -> ErrorPredictor:
    predictor = ErrorPredictor(model, **options)
    phi, error, weight = records(number)
    predictor.fit(phi, error, None if model == "gbt" else weight)  # scikit-learn bins weighted records slowly
    return predictor


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- what is fitted


@pytest.mark.parametrize(
    "options", [{}, {"signs": [1, -1, 0]}, {"trees": 7, "max_depth": 3, "min_leaf": 25, "seed": 9}]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_forest_is_that_of_scikit_learn(options: dict[str, Any], weighted: bool) -> None:
    phi, error, weight = records()
    if not weighted:
        weight = torch.ones_like(weight)
    predictor = ErrorPredictor(**options)
    predictor.fit(phi, error, weight if weighted else None)
    theirs = RandomForestRegressor(
        n_estimators=options.get("trees", 50),
        max_depth=options.get("max_depth", 8),
        min_samples_leaf=options.get("min_leaf", 10),
        max_features=0.5,
        monotonic_cst=options.get("signs"),
        random_state=options.get("seed", 0),
    ).fit(phi.numpy(), error.numpy(), sample_weight=weight.numpy())
    new = 3 * records(1000, seed=1)[0]
    np.testing.assert_allclose(predictor.predict(new).numpy(), theirs.predict(new.numpy()), rtol=0, atol=1e-12)


def test_a_value_on_a_threshold_goes_where_scikit_learn_sends_it() -> None:
    """Trees compare in float32: a float64 value may lie on the other side of a threshold than its rounding."""
    phi = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5] * 40, dtype=torch.float64)[:, None]
    predictor = ErrorPredictor(min_leaf=1)
    predictor.fit(phi, phi[:, 0])
    grown = RandomForestRegressor(50, max_depth=8, max_features=0.5, random_state=0).fit(phi.numpy(), phi[:, 0].numpy())
    edges = np.unique(np.concatenate([tree.tree_.threshold[tree.tree_.feature >= 0] for tree in grown.estimators_]))
    near = np.concatenate([edges, np.nextafter(edges, 1), np.nextafter(edges, 0), edges.astype(np.float32)])[:, None]
    found = predictor.predict(torch.from_numpy(near.astype(np.float64)))
    np.testing.assert_allclose(found.numpy(), grown.predict(near), rtol=0, atol=1e-12)


def test_ridge_is_that_of_scikit_learn() -> None:
    phi, error, weight = records()
    phi[:, 2] = 7.0  # a constant feature says nothing
    predictor = ErrorPredictor("ridge")
    predictor.fit(phi, error, weight)
    share = (weight / weight.mean()).numpy()
    centre = np.average(phi.numpy(), axis=0, weights=share)
    scale = np.sqrt(np.average((phi.numpy() - centre) ** 2, axis=0, weights=share))
    scale[2] = 1
    theirs = Ridge(alpha=1.0).fit((phi.numpy() - centre) / scale, error.numpy(), sample_weight=share)
    new = records(100, seed=1)[0]
    expected = theirs.predict((new.numpy() - centre) / scale).clip(0, 1)
    np.testing.assert_allclose(predictor.predict(new).numpy(), expected, atol=1e-12)


def test_boosting_is_that_of_scikit_learn_within_the_recorded_errors() -> None:
    phi, error, weight = records()
    predictor = ErrorPredictor("gbt", signs=[1, -1, 0], trees=20)
    predictor.fit(phi, error, weight)
    theirs = HistGradientBoostingRegressor(
        max_iter=20, max_depth=8, min_samples_leaf=10, monotonic_cst=[1, -1, 0], early_stopping=False, random_state=0
    ).fit(phi.numpy(), error.numpy(), sample_weight=(weight / weight.mean()).numpy())
    new = 3 * records(100, seed=1)[0]
    expected = theirs.predict(new.numpy())
    assert expected.min() < 0 or expected.max() > 1  # which is why predictions are held in the range
    np.testing.assert_allclose(predictor.predict(new).numpy(), expected.clip(0, 1), atol=1e-12)


def test_the_gaussian_process_is_that_of_scikit_learn_for_its_length_and_noise() -> None:
    phi, error, _ = records(120)
    predictor = ErrorPredictor("gp")
    predictor.fit(phi, error)
    process: Any = predictor._fitted
    rows = (phi - phi.mean(0)) / phi.std(0, correction=0)
    best = -INF
    for unit in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        for noise in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
            kernel = RBF(unit * 3**0.5, "fixed") + WhiteKernel(noise, "fixed")
            misses = error.numpy() - error.mean().item()
            matrix = kernel(rows.numpy())
            variance = misses @ np.linalg.solve(matrix, misses) / len(misses)
            likelihood = -len(misses) / 2 * np.log(variance) - np.linalg.slogdet(matrix)[1] / 2
            if likelihood > best:
                best, chosen = likelihood, kernel
    assert process.length == pytest.approx(chosen.k1.length_scale)
    theirs = GaussianProcessRegressor(chosen, alpha=0, optimizer=None).fit(
        rows.numpy(), error.numpy() - error.mean().item()
    )
    new = records(50, seed=1)[0]
    at = ((new - phi.mean(0)) / phi.std(0, correction=0)).numpy()
    expected = (theirs.predict(at) + error.mean().item()).clip(0, 1)
    np.testing.assert_allclose(predictor.predict(new).numpy(), expected, atol=1e-9)


def test_a_gaussian_process_does_not_fit_noise_record_by_record(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    phi = torch.rand(200, 1, generator=draws, dtype=torch.float64)
    error = torch.randn(200, generator=draws, dtype=torch.float64).exp()  # has nothing to do with the features
    predictor = ErrorPredictor("gp")
    predictor.fit(phi, error)
    found = predictor.predict(phi)
    assert float(((found - error) ** 2).mean()) > 0.5 * float(error.var())
    monkeypatch.setattr(_error_models, "_PROCESS_RECORDS", 150)
    predictor.fit(phi, error)
    model = predictor.state_dict()["model"]
    points = model["points"] * model["scale"] + model["centre"]
    drawn = torch.cdist(points, phi).argmin(dim=1)
    assert len(drawn) == 150
    assert bool((drawn.diff() > 0).all())  # each once, in the order in which they came


@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns_where_errors_are(model: Any) -> None:
    phi, error, _ = records(500)
    predictor = ErrorPredictor(model, trees=20)
    predictor.fit(phi, error)
    new = records(1000, seed=1)[0]
    chance = torch.sigmoid(2 * new[:, 0] - new[:, 1])
    found = predictor.predict(new)
    # of the variance of the true chance at least two thirds
    assert float(((found - chance) ** 2).mean()) < 0.33 * float(chance.var())
    assert abs(float(found.mean() - chance.mean())) < 0.04


@pytest.mark.parametrize("model", ["forest", "gbt"])
def test_a_feature_with_a_sign_moves_the_error_in_one_direction(model: Any) -> None:
    phi, error, weight = records(600, width=6)
    signs = [1, -1, 1, -1, 1, 0]
    predictor = ErrorPredictor(model, signs=signs, trees=20)
    predictor.fit(phi, error, weight if model == "forest" else None)
    base = 4 * records(2000, width=6, seed=1)[0]
    draws = torch.Generator().manual_seed(2)
    for column, sign in enumerate(signs[:5]):
        raised = base.clone()
        raised[:, column] += 3 * torch.rand(len(base), generator=draws, dtype=torch.float64)
        assert bool(((predictor.predict(raised) - predictor.predict(base)) * sign >= 0).all())


@pytest.mark.parametrize("transform", [None, "log"])
@pytest.mark.parametrize("model", MODELS)
def test_predictions_stay_within_the_errors_wherever_one_asks(model: Any, transform: Any) -> None:
    phi, error, weight = records(150)
    error = 0.1 + 0.2 * error  # 0.30000000000000004
    predictor = ErrorPredictor(model, transform=transform, trees=10)
    predictor.fit(phi, error, weight if model == "forest" else None)
    far = torch.cat([phi, 100 * phi, 1e99 * phi.sign(), INF * phi.sign()])
    found = predictor.predict(far)
    assert float(found.min()) >= float(error.min())
    assert float(found.max()) <= float(error.max())
    assert found.dtype == torch.float64


@pytest.mark.parametrize("model", MODELS)
def test_equal_errors_give_that_error(model: Any) -> None:
    phi, _, weight = records(100)
    predictor = ErrorPredictor(model, trees=5)
    predictor.fit(phi, torch.full((100,), 0.7), weight if model == "forest" else None)
    assert predictor.is_fitted
    assert predictor.predict(phi).unique().tolist() == [pytest.approx(0.7)]


def test_few_records_give_their_weighted_mean_and_none_gives_one() -> None:
    predictor = ErrorPredictor()
    phi, error, weight = records(49)
    assert predictor.predict(phi).tolist() == [1.0] * 49
    for number in (0, 1, 49):
        predictor.fit(phi[:number], error[:number], weight[:number])
        mean = float((weight * error)[:number].sum() / weight[:number].sum()) if number else 1.0
        assert predictor.predict(phi).tolist() == [pytest.approx(mean, abs=1e-15)] * 49
        assert not predictor.is_fitted
        assert predictor.records == number
    assert predictor.predict(phi[:0]).shape == (0,)
    predictor.fit(*records(50))
    assert predictor.is_fitted
    assert predictor.predict(phi[:0]).shape == (0,)


@pytest.mark.parametrize("model", MODELS)
def test_two_records_of_one_constant_feature_are_enough_if_one_says_so(model: Any) -> None:
    predictor = ErrorPredictor(model, min_records=2, trees=2)
    predictor.fit(torch.ones(2, 1), torch.tensor([0.0, 1.0]), torch.tensor([1e-20, 1e25]))
    assert predictor.is_fitted
    assert 0 <= float(predictor.predict(torch.zeros(1, 1))) <= 1


def test_records_without_a_weight_do_not_count() -> None:
    phi, error, weight = records(100)
    weight[50:] = 0
    one, other = ErrorPredictor(), ErrorPredictor()
    one.fit(phi, error, weight)
    other.fit(phi[:50], error[:50], weight[:50])
    assert changed(one.state_dict(), other.state_dict()) == []
    assert one.records == 50


def test_logarithms_give_geometric_means() -> None:
    predictor = ErrorPredictor(transform="log", min_leaf=1000)  # so that each tree is one leaf
    draws = torch.Generator().manual_seed(0)
    error = torch.randn(5000, generator=draws, dtype=torch.float64) ** 2
    predictor.fit(torch.zeros(5000, 1), error)
    geometric = float(predictor.predict(torch.zeros(1, 1)))
    assert geometric == pytest.approx(float(error.clamp(min=1e-5).log().mean().exp()), rel=0.02)
    assert geometric == pytest.approx(0.2807, rel=0.05)  # exp(E log r²) of a standard normal r, less than a third of 1


# ---- the three numbers


def test_the_rest_is_what_remains_of_the_error_and_never_negative() -> None:
    predictor = fitted()
    phi = records(100, seed=1)[0]
    noise = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total, aleatoric, epistemic = predictor.uncertainty(phi, noise)
    assert torch.equal(total, predictor.predict(phi))
    assert torch.equal(aleatoric, noise)
    assert epistemic.tolist() == [max(0.0, t - a) for t, a in zip(total.tolist(), noise.tolist(), strict=True)]
    assert torch.equal(predictor.uncertainty(phi).epistemic, total)
    for wrong in (noise[:3], -noise, torch.full((100,), NAN), -0.1):
        with pytest.raises(BatchError, match="aleatoric"):
            predictor.uncertainty(phi, wrong)
    geometric = fitted(transform="log")
    geometric.uncertainty(phi, 0.0)
    with pytest.raises(ConfigurationError, match="log"):
        geometric.uncertainty(phi, 0.1)


# ---- states


@pytest.mark.parametrize("number", [0, 10, 200])
@pytest.mark.parametrize("model", MODELS)
def test_a_loaded_predictor_gives_the_same_bits(model: Any, number: int) -> None:
    live = fitted(model, number, min_leaf=5, trees=5)
    state = through_a_file(live.state_dict())
    loaded = ErrorPredictor(model, min_leaf=5, trees=5)
    loaded.load_state_dict(state)
    phi = records(200, seed=1)[0]
    assert torch.equal(loaded.predict(phi), live.predict(phi))
    assert changed(loaded.state_dict(), state) == []
    assert loaded.is_fitted == live.is_fitted == (number == 200)
    before = copy.deepcopy(state)
    loaded.fit(*records(100, seed=4))  # what was loaded is not written to
    assert changed(before, state) == []
    for entry in live.state_dict().get("model", {}).values():  # nor is what it gives its own
        if isinstance(entry, Tensor):
            entry.zero_()
    assert changed(live.state_dict(), state) == []


def test_a_forest_takes_less_than_a_megabyte() -> None:
    phi, error, weight = records(4096, width=6)
    predictor = ErrorPredictor()
    predictor.fit(phi, error, weight)
    tensors = predictor.state_dict()["model"].values()
    assert sum(each.numel() * each.element_size() for each in tensors) <= 0.8 * 2**20


def test_boosting_that_comes_out_otherwise_is_said() -> None:
    state = fitted("gbt", trees=5).state_dict()
    state["model"]["shown"] = state["model"]["shown"] + 1e-3
    with pytest.warns(UserWarning, match=r"moved by up to 0\.001"):
        ErrorPredictor("gbt", trees=5).load_state_dict(state)


def _there(state: dict[str, Any], name: str, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    odd = copy.deepcopy(state)
    odd["model"][name] = change(odd["model"][name])
    return odd


def _set(at: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return change


def test_a_forest_that_does_not_lead_to_leaves_is_refused() -> None:
    predictor = fitted(signs=[1, -1, 0])
    state = predictor.state_dict()
    inner = (
        int((state["model"]["children"][1:, 0] != torch.arange(1, len(state["model"]["children"]))).nonzero()[0]) + 1
    )
    odd = [
        _there(state, "children", _set((inner, 0), 0)),  # a loop
        _there(state, "children", _set((inner, 0), inner)),  # half a leaf
        _there(state, "children", _set((inner, 1), 10**6)),
        _there(state, "feature", _set((inner,), 3)),
        _there(state, "roots", _set((0,), 10**6)),
        _there(state, "roots", lambda roots: roots[:-1]),
        _there(state, "threshold", _set((inner,), NAN)),
        _there(state, "value", _set((inner,), INF)),
        _there(state, "value", lambda value: value[:-1]),
        {**state, "low": 0.9},
        {**state, "records": 3},
        {**state, "features": 4},
        {**state, "features": None},
        {**state, "is_fitted": False},
        {**state, "format": 2},
    ]
    deep = _there(state, "children", lambda children: children)
    number = len(deep["model"]["children"])
    chain = torch.arange(number)[:, None].repeat(1, 2)
    chain[:-1] += 1
    deep["model"]["children"] = chain.int()  # no loop, but one step for each node
    before = copy.deepcopy(predictor.state_dict())
    for each in [*odd, deep]:
        with pytest.raises(StateError):
            predictor.load_state_dict(each)
    assert changed(before, predictor.state_dict()) == []
    for other in (ErrorPredictor(), ErrorPredictor(signs=[1, 0, 0]), ErrorPredictor("ridge")):
        with pytest.raises(StateError, match="saved settings"):
            other.load_state_dict(state)


# ---- what is refused, and what is left alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "tree"}, "model must be one of"),
        ({"signs": [1, 2, 0]}, "signs must be -1, 0 or 1"),
        ({"signs": [1], "model": "ridge"}, "'forest' or 'gbt'"),
        ({"trees": 0}, "trees must be"),
        ({"max_depth": 0}, "max_depth must be"),
        ({"min_leaf": 0}, "min_leaf must be"),
        ({"min_records": 1}, "min_records must be"),
        ({"transform": "sqrt"}, "transform must be"),
        ({"seed": 2**32}, "below"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message.replace("*", r"\*")):
        ErrorPredictor(**options)


def test_records_that_cannot_be_used_are_refused_and_change_nothing() -> None:
    predictor = fitted(signs=[1, -1, 0])
    before = copy.deepcopy(predictor.state_dict())
    phi, error, weight = records()
    bad = phi.clone()
    bad[7, 1] = NAN
    wrong: list[tuple[Any, ...]] = [
        (phi[0], error, weight),
        (phi.long(), error, weight),
        (phi[:, :0], error, weight),
        (phi[:, :2], error, weight),  # there are signs for three
        (bad, error, weight),
        (phi, error[:, None], weight),  # would broadcast to (N, N)
        (phi, error[:-1], weight),
        (phi, -error, weight),
        (phi, torch.where(error > 0, INF, error), weight),
        (phi, torch.where(error > 0, NAN, error), weight),
        (phi, error, -weight),
        (phi, error, 0 * weight),
        (phi, error.tolist(), weight),
    ]
    for arguments in wrong:
        with pytest.raises(BatchError):
            predictor.fit(*arguments)
    for each in (phi[:, :2], bad, phi[0]):
        with pytest.raises(BatchError):
            predictor.predict(each)
    assert changed(before, predictor.state_dict()) == []


@pytest.mark.parametrize("model", MODELS)
def test_the_global_random_state_is_left_alone(model: Any) -> None:
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002  the global one
    predictor = fitted(model, 100, trees=5)
    predictor.predict(records(10)[0])
    ErrorPredictor(model, trees=5).load_state_dict(predictor.state_dict())
    cross_fit(lambda X, y: lambda X, y: (X, y), *records()[:2])
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002  the global one is asked about
    assert states[2] == random.getstate()
    again = fitted(model, 100, trees=5)
    assert changed(again.state_dict(), predictor.state_dict()) == []
    other = fitted(model, 100, trees=5, seed=1)
    stays = model in ("ridge", "gbt", "gp")  # draw nothing from so few records
    assert (changed(other.state_dict()["model"], predictor.state_dict()["model"]) == []) == stays


@pytest.mark.parametrize("model", MODELS)
def test_precision_autocast_and_inference_mode_change_nothing(model: Any) -> None:
    phi, error, weight = records(100)
    phi = phi.bfloat16().double()
    plain = ErrorPredictor(model, trees=5)
    plain.fit(phi, error, weight)
    expected = plain.predict(phi)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        predictor = ErrorPredictor(model, trees=5)
        predictor.fit(phi.bfloat16().clone(), error.clone(), weight.clone())
        found = predictor.predict(phi.bfloat16())
    assert torch.equal(found, expected)
    assert not any(each.is_inference() for each in predictor.state_dict()["model"].values() if isinstance(each, Tensor))
    assert not predictor.predict(phi.requires_grad_()).requires_grad


def test_with_and_without_scikit_learn_in_parallel_jobs_the_bits_are_the_same() -> None:
    """Live predictions come from the tensors, too: scikit-learn's own depend on the number of jobs in the last bit."""
    phi = records(500, seed=1)[0]
    threads = torch.get_num_threads()
    one = fitted().predict(phi)
    torch.set_num_threads(2)
    try:
        two = fitted().predict(phi)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


# ---- fixed data


@pytest.mark.parametrize("by", ["sample", "class"])
def test_each_record_comes_from_a_model_that_did_not_learn_it(by: Any) -> None:
    X = torch.arange(60.0)[:, None]
    y = torch.arange(60) % 7 * 3
    taught: list[set[int]] = []

    def make(rows: Tensor, targets: Tensor) -> Any:
        taught.append({int(each) for each in rows[:, 0]})
        classes = set(targets.tolist())
        fold = len(taught) - 1

        def record(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            known = torch.tensor([each in classes for each in targets.tolist()])
            return torch.cat([rows, torch.full_like(rows, fold)], dim=1), (~known).double()

        return record

    phi, error, fold = cross_fit(make, X, y, folds=4, by=by)
    assert phi[:, 0].tolist() == list(range(60))  # in the order of the samples
    assert torch.equal(phi[:, 1].long(), fold)
    assert len(taught) == 4
    for out, rows in enumerate(taught):
        assert rows == set((fold != out).nonzero()[:, 0].tolist())
    if by == "class":
        assert error.tolist() == [1.0] * 60  # a class is held out as a whole
        assert all(len(fold[y == each].unique()) == 1 for each in range(0, 21, 3))
    else:
        assert error.tolist() == [0.0] * 60
        assert fold.bincount().tolist() == [15] * 4
    assert torch.equal(cross_fit(lambda X, y: lambda X, y: (X, y), X, y, 4, by).fold, fold)
    assert not torch.equal(cross_fit(lambda X, y: lambda X, y: (X, y), X, y, 4, by, seed=1).fold, fold)


def test_cross_fitting_refuses_what_cannot_be_dealt() -> None:
    X, y = torch.randn(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    nothing: Any = lambda X, y: lambda X, y: (X, y)  # noqa: E731  as short as what it stands for
    for wrong in ({"folds": 1}, {"folds": 7}, {"folds": 4, "by": "class"}, {"by": "group"}, {"seed": -1}):
        with pytest.raises(ArgumentError, match=r"folds|by|seed"):
            cross_fit(nothing, X, y, **wrong)
    with pytest.raises(ArgumentError, match="as many rows"):
        cross_fit(nothing, X, y[:-1])
    with pytest.raises(ArgumentError, match="folds must be at most 2, the number of classes, got 3"):
        cross_fit(nothing, X, torch.arange(len(X)) % 2, folds=3, by="class")
    for given in (lambda X, y: (X, y[:, None]), lambda X, y: (X[:0], y), lambda X, y: (X[:, 0], y)):
        with pytest.raises(BatchError, match="make gave"):
            cross_fit(lambda X, y: given, X, y, folds=2)  # noqa: B023  called at once


def test_records_of_learned_samples_would_say_that_nothing_is_ever_wrong() -> None:
    """Why the two must not be mixed up: a nearest neighbour is never wrong on what it has learned."""
    draws = torch.Generator().manual_seed(0)
    X = torch.randn(300, 2, generator=draws, dtype=torch.float64)
    y = (X[:, 0] + torch.randn(300, generator=draws, dtype=torch.float64) > 0).long()

    def make(rows: Tensor, targets: Tensor) -> Any:
        def record(new: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            near, at = torch.cdist(new, rows).min(dim=1)
            return torch.stack([near, new[:, 0].abs()], dim=1), (targets[at] != wanted).double()

        return record

    held_out = cross_fit(make, X, y)
    learned = make(X, y)(X, y)
    honest, fooled = ErrorPredictor(signs=[1, 0]), ErrorPredictor(signs=[1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        honest.fit(held_out.phi, held_out.error)
        fooled.fit(*learned)
    new = torch.randn(1000, 2, generator=draws, dtype=torch.float64)
    truth = (new[:, 0] + torch.randn(1000, generator=draws, dtype=torch.float64) > 0).long()
    phi, error = make(X, y)(new, truth)
    assert abs(float(honest.predict(phi).mean() - error.mean())) < 0.05
    assert float(fooled.predict(phi).max()) == 0.0
