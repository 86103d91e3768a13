"""Thresholds, queries and prediction sets: golden values, what they promise, and naive versions of each."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, NotFittedError, StateError
from clkit.methods import PredictionSets, abstention_threshold, nonconformity, query, risk_threshold
from clkit.methods.decisions import conformal_rank, largest_error_rate
from clkit.testing._compare import changed

NAN, INF = float("nan"), float("inf")
SCORES: list[Any] = ["margin", "lac", "aps"]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- abstention


def test_golden_thresholds() -> None:
    for n, rate, k in ((9, 0.2, 8), (19, 0.05, 19), (10, 0.05, None)):
        u = torch.randperm(n, generator=draws()).double() + 1
        assert abstention_threshold(u, rate) == (INF if k is None else k)
    assert abstention_threshold(torch.empty(0), 0.5) == INF
    assert abstention_threshold(torch.rand(5), 0.0) == INF
    assert abstention_threshold(torch.rand(5), 1.0) == -INF


def test_ranks_are_those_of_decimal_numbers() -> None:
    """In floating point 1 - 0.9 is below 0.1, and 30 * (1 - 0.9) above 3, so that a rank would be one off."""
    for n, percent in itertools.product(range(0, 200, 3), range(101)):
        assert conformal_rank(n, percent / 100) == -(-(n + 1) * (100 - percent) // 100)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("n", [5, 20, 99])
def test_the_share_that_is_refused_is_at_most_the_rate(n: int, rate: float) -> None:
    """Of n + 1 exchangeable numbers each is the new one as often as the others: the share is exact, not simulated."""
    u = torch.rand(n + 1, generator=draws())
    refused = [float(u[i]) > abstention_threshold(torch.cat([u[:i], u[i + 1 :]]), rate) for i in range(n + 1)]
    assert sum(refused) / (n + 1) <= rate
    assert sum(refused) / (n + 1) > rate - 1 / (n + 1)


def test_thresholds_refuse_what_is_no_uncertainty() -> None:
    for wrong in (torch.tensor([0.1, NAN]), torch.zeros(2, 2), [0.1]):
        with pytest.raises(BatchError, match="u "):
            abstention_threshold(wrong, 0.1)  # type: ignore[arg-type]  # the wrong type is the test
    for rate in (-0.1, 1.1, NAN):
        with pytest.raises(ArgumentError, match="rate"):
            abstention_threshold(torch.rand(3), rate)


# ---- risk


def test_golden_bounds() -> None:
    assert largest_error_rate(0, 59, 0.05) == pytest.approx(0.0495076, abs=1e-7)
    assert largest_error_rate(2, 100, 0.1) == pytest.approx(0.0523453, abs=1e-7)
    for k, n, delta in itertools.product(range(4), (4, 17, 300), (0.01, 0.2)):
        expected = 1.0 if k == n else beta.ppf(1 - delta, k + 1, n - k)
        assert largest_error_rate(k, n, delta) == pytest.approx(expected, rel=1e-9)


def naive_risk_threshold(u: list[float], wrong: list[bool], risk: float, delta: float) -> float:
    """Every threshold from its definition, one count at a time."""
    found, n = -INF, len(u)
    for step in range(1, 21):
        threshold = sorted(u)[math.ceil(step * n / 20) - 1]
        accepted = [bad for each, bad in zip(u, wrong, strict=True) if each <= threshold]
        if len(accepted) < math.log(delta) / math.log(1 - risk):
            continue
        bound = 1.0 if all(accepted) else float(beta.ppf(1 - delta, sum(accepted) + 1, len(accepted) - sum(accepted)))
        if bound > risk:
            break
        found = threshold
    return found


@pytest.mark.filterwarnings("ignore:no threshold:UserWarning")
@pytest.mark.parametrize("ties", [False, True])
def test_risk_thresholds_equal_their_definition(ties: bool) -> None:
    kinds = set()
    for seed in range(16):
        n = 20 + 40 * seed
        u = torch.rand(n, generator=draws(seed), dtype=torch.float64)
        wrong = torch.rand(n, generator=draws(seed + 100), dtype=torch.float64) < u**3
        if ties:
            u = (u * 7).round() / 7
        for risk, delta in ((0.1, 0.05), (0.3, 0.1)):
            found = risk_threshold(u, wrong, risk, delta)
            assert found == naive_risk_threshold(u.tolist(), wrong.tolist(), risk, delta)
            kinds.add("all" if found == float(u.max()) else "none" if found == -INF else "some")
    assert kinds == {"all", "none", "some"}


@pytest.mark.filterwarnings("ignore:no threshold:UserWarning")
def test_the_risk_is_exceeded_as_seldom_as_promised() -> None:
    """Accepted are u up to the threshold t; with errors of probability u their rate is t/2."""
    exceeded = 0
    for seed in range(300):
        u = torch.rand(200, generator=draws(seed), dtype=torch.float64)
        wrong = torch.rand(200, generator=draws(seed + 1000), dtype=torch.float64) < u
        exceeded += max(0.0, risk_threshold(u, wrong, risk=0.2, delta=0.1)) / 2 > 0.2
    assert exceeded <= 300 * 0.1 + 2 * math.sqrt(300 * 0.1 * 0.9)


def test_no_threshold_is_said_and_wrong_arguments_are_named() -> None:
    with pytest.warns(UserWarning, match="29 accepted"):
        assert risk_threshold(torch.rand(10), torch.zeros(10), risk=0.1) == -INF
    with pytest.warns(UserWarning, match="everything is to be refused"):
        assert risk_threshold(torch.empty(0), torch.empty(0), risk=0.1) == -INF
    for options in ({"risk": 0.0}, {"risk": 1.0}, {"risk": 0.1, "delta": 0.0}, {"risk": 0.1, "delta": NAN}):
        with pytest.raises(ArgumentError, match=r"risk|delta"):
            risk_threshold(torch.rand(3), torch.zeros(3), **options)
    for wrong in (torch.zeros(4), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, NAN, 1.0])):
        with pytest.raises(BatchError, match="wrong"):
            risk_threshold(torch.rand(3), wrong, 0.1)


# ---- queries


def naive_query(k: int, u: list[float], features: np.ndarray[Any, Any], w: float) -> list[int]:
    ranks = [(sum(v < each for v in u) + (sum(v == each for v in u) + 1) / 2) / len(u) for each in u]
    chosen = [max(range(len(u)), key=lambda i: (u[i], -i))]
    while len(chosen) < k:
        left = [i for i in range(len(u)) if i not in chosen]
        distance = {i: min(float(np.linalg.norm(features[i] - features[j])) for j in chosen) for i in left}
        largest = max(distance.values()) or 1.0
        chosen.append(max(left, key=lambda i: ((1 - w) * ranks[i] + w * distance[i] / largest, -i)))
    return chosen


@pytest.mark.parametrize("w", [0.2, 0.5, 1.0])
def test_queries_equal_their_definition(w: float) -> None:
    u = (10 * torch.rand(40, generator=draws(), dtype=torch.float64)).round()  # with ties
    features = torch.randn(40, 3, generator=draws(1), dtype=torch.float64)
    features[5:9] = features[4]  # the same place
    found = query(25, u, features, diversity=w)
    assert found.tolist() == naive_query(25, u.tolist(), features.numpy(), w)
    assert len(set(query(40, u, features, diversity=w).tolist())) == 40
    assert len(set(query(40, u, torch.zeros(40, 3), diversity=w).tolist())) == 40


def test_the_most_uncertain_come_first_and_of_equal_ones_the_lower_index() -> None:
    u = torch.tensor([0.1, 0.9, 0.5, 0.9, INF])
    assert query(4, u).tolist() == [4, 1, 3, 2]
    assert query(0, u).shape == (0,)
    assert query(5, u).dtype == torch.int64
    stretched = query(5, torch.tensor([0.1, 0.9, 0.5, 0.9, 7.0]).exp())
    assert stretched.tolist() == query(5, u).tolist()  # only the order counts
    for options in ({"k": 6}, {"k": -1}, {"k": 2, "diversity": 0.5}, {"k": 2, "diversity": 1.5}):
        with pytest.raises(ArgumentError, match=r"k|diversity"):
            query(u=u, **options)  # type: ignore[arg-type]  # the wrong type is the test
    for wrong in (torch.zeros(4, 2), torch.full((5, 2), NAN), torch.zeros(5)):
        with pytest.raises(BatchError, match="features"):
            query(2, u, wrong, diversity=0.5)
    with pytest.raises(BatchError, match="NaN"):
        query(2, torch.tensor([NAN, 1.0]))


# ---- prediction sets


@pytest.mark.parametrize("score", SCORES)
def test_nonconformity_equals_its_definition(score: Any) -> None:
    scores = (3 * torch.randn(50, 6, generator=draws(), dtype=torch.float64)).round()  # with ties
    scores[torch.rand(50, 6, generator=draws(1)) < 0.3] = -INF
    found = nonconformity(scores, score)
    for row, own in zip(scores.numpy(), found.numpy(), strict=True):
        known = row > -INF
        largest = row[known].max() if known.any() else 0.0
        p = np.exp(row - largest) * known
        p = p / max(p.sum(), 1e-300)
        for c in range(6):
            expected = {
                "margin": largest - row[c],
                "lac": 1 - p[c],
                "aps": p[p >= p[c] * (1 - 1e-12)].sum(),
            }[score]
            assert own[c] == (pytest.approx(expected, abs=1e-12) if known[c] else INF)
    assert nonconformity(torch.empty(3, 0), score).shape == (3, 0)
    assert nonconformity(torch.empty(0, 3), score).shape == (0, 3)
    for wrong in (torch.tensor([[NAN, 0.0]]), torch.tensor([[INF, 0.0]]), torch.zeros(3), torch.zeros(2, 2).long()):
        with pytest.raises(BatchError, match="scores"):
            nonconformity(wrong, score)


def data(number: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores and labels; class 4 is rare and its scores are worse than those of the others."""
    labels = (torch.rand(number, generator=draws(seed)) * (classes - 0.8)).long()
    scores = torch.randn(number, classes, generator=draws(seed + 1), dtype=torch.float64)
    scores[torch.arange(number), labels] += torch.where(labels == classes - 1, 0.3, 2.0).double()
    return scores, labels


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_sets_hold_the_truth_as_often_as_they_say(coverage: float, score: Any) -> None:
    """Each of n + 1 samples is the new one once: the share is exact."""
    scores, labels = data(41)
    held = []
    for i in range(41):
        rest = torch.arange(41) != i
        sets = PredictionSets(coverage, score)
        sets.calibrate(scores[rest], labels[rest])
        members = sets.predict(scores[i : i + 1])[0]
        held.append(bool(members[labels[i]]))
        values = sorted(float(v) for v in nonconformity(scores[rest], score)[torch.arange(40), labels[rest]])
        k = math.ceil(round(41 * coverage, 9))
        expected = nonconformity(scores[i : i + 1], score)[0] <= (values[k - 1] if k <= 40 else INF)
        assert torch.equal(members, expected)
    assert sum(held) / 41 >= coverage
    if score != "margin":  # has ties, at 0, and then more than was asked for
        assert sum(held) / 41 <= coverage + 1 / 41 + 1e-9


def test_too_few_samples_give_all_known_classes_and_unknown_ones_are_in_no_set() -> None:
    sets = PredictionSets(0.9)
    sets.calibrate(*data(5))
    scores = torch.tensor([[0.0, -INF, -50.0, -INF]])
    assert sets.predict(scores).tolist() == [[True, False, True, False]]
    sets.calibrate(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert sets.predict(scores).tolist() == [[True, False, True, False]]
    # samples of classes that are not known were missed, whatever the set
    missed = PredictionSets(0.5)
    missed.calibrate(torch.tensor([[0.0, -INF]] * 4), torch.tensor([1, 7, 1, 0]))
    assert missed.predict(torch.tensor([[0.0, -9.0, -INF]])).tolist() == [[True, True, False]]
    with pytest.raises(NotFittedError):
        PredictionSets().predict(scores)
    for wrong in (torch.tensor([0, -1]), torch.tensor([0.0, 1.0]), torch.tensor([0])):
        with pytest.raises(BatchError, match="labels"):
            missed.calibrate(torch.zeros(2, 2), wrong)
    assert missed.samples == 4


def test_rare_classes_are_covered_by_thresholds_of_their_own() -> None:
    scores, labels = data(2000)
    new, truth = data(6000, seed=7)
    rates = {}
    for conditional in (False, True):
        sets = PredictionSets(0.9, class_conditional=conditional)
        sets.calibrate(scores, labels)
        hit = sets.predict(new)[torch.arange(6000), truth].double()
        rates[conditional] = [float(hit[truth == c].mean()) for c in range(5)]
    assert rates[False][4] < 0.75
    assert all(abs(rate - 0.9) < 0.07 for rate in rates[True])
    own = PredictionSets(0.9, class_conditional=True)
    own.calibrate(scores, labels)
    common = PredictionSets(0.9)
    common.calibrate(scores[labels == 4], labels[labels == 4])
    assert float(own.thresholds(5)[4]) == float(common.thresholds(5)[0])


def test_classes_with_few_samples_use_the_common_threshold_and_that_is_said() -> None:
    scores, labels = data(300)
    labels = labels.clamp(max=3)
    few = torch.cat([(labels != 2).nonzero()[:, 0], (labels == 2).nonzero()[:8, 0]])
    enough = torch.cat([(labels != 2).nonzero()[:, 0], (labels == 2).nonzero()[:9, 0]])
    sets, common = PredictionSets(0.9, class_conditional=True), PredictionSets(0.9)
    with pytest.warns(UserWarning, match=r"classes \[2\] have fewer than 9"):
        sets.calibrate(scores[few], labels[few])
    common.calibrate(scores[few], labels[few])
    assert float(sets.thresholds(5)[2]) == float(common.thresholds(5)[2])
    sets.calibrate(scores[enough], labels[enough])
    assert float(sets.thresholds(5)[2]) == float(nonconformity(scores)[labels == 2, 2][:9].max())


def test_the_online_rule_holds_its_coverage_under_any_drift() -> None:
    """The bound of Gibbs and Candès holds for every sequence; here scores get worse and worse."""
    step, steps = 0.02, 3000
    sets, still = PredictionSets(0.9, adaptive=step), PredictionSets(0.9)
    for each in (sets, still):
        each.calibrate(*data(500))
    scores, labels = data(steps, seed=3)
    scores *= torch.linspace(1, -1, steps)[:, None]
    missed = torch.cat([sets.observe(s, y) for s, y in zip(scores.split(64), labels.split(64), strict=True)])
    rate = float(missed.double().mean())
    assert abs(rate - 0.1) <= (0.9 + step) / (step * steps)
    assert float(still.observe(scores, labels).double().mean()) > 0.2
    alpha = 0.1
    for miss in missed.tolist():
        alpha += step * (0.1 - miss)
    assert sets.alpha == pytest.approx(alpha, abs=1e-12)
    assert still.alpha == 0.1


def test_unlabelled_and_unknown_samples_of_a_stream() -> None:
    sets = PredictionSets(0.5, adaptive=0.1)
    sets.calibrate(*data(100))
    scores = torch.zeros(3, 5)
    assert sets.observe(scores, torch.tensor([-1, 9, -1])).tolist() == [False, True, False]
    assert sets.alpha == pytest.approx(0.5 + 0.1 * (0.5 - 1))
    with pytest.raises(BatchError, match="labels"):
        sets.observe(scores, torch.tensor([0, 1, -7]))


@pytest.mark.parametrize("conditional", [False, True])
def test_states_of_sets_come_back(conditional: bool) -> None:
    options: dict[str, Any] = {"coverage": np.float64(0.8), "class_conditional": conditional, "adaptive": 0.05}
    sets = PredictionSets(**options)
    fresh = PredictionSets(**options)
    fresh.load_state_dict(sets.state_dict())
    with pytest.raises(NotFittedError):
        fresh.predict(torch.zeros(1, 2))
    sets.calibrate(*data(200))
    sets.observe(*data(20, seed=5))
    file = io.BytesIO()
    torch.save(sets.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh.load_state_dict(state)
    new = data(50, seed=9)[0]
    assert torch.equal(fresh.predict(new), sets.predict(new))
    assert changed(fresh.state_dict(), state) == []
    for odd in (
        {**state, "values": state["values"].flip(0)},
        {**state, "values": state["values"] * NAN},
        {**state, "labels": state["labels"][:-1]},
        {**state, "calibrated": False},
        {**state, "alpha": NAN},
    ):
        with pytest.raises(StateError):
            fresh.load_state_dict(odd)
    with pytest.raises(StateError, match="saved settings"):
        PredictionSets().load_state_dict(state)
    assert changed(fresh.state_dict(), state) == []


@pytest.mark.parametrize(
    "options", [{"coverage": 1.0}, {"coverage": 0.0}, {"score": "raps"}, {"adaptive": -0.1}, {"class_conditional": 1}]
)
def test_wrong_settings_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        PredictionSets(**options)
