"""Metrics of uncertainty against scikit-learn, SciPy, naive loops, laws, and numbers computed by hand."""

from __future__ import annotations

import pickle
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score, roc_curve
from torch import Tensor
from two_ranks import drive, driven, enter_group

from clkit import metrics as M
from clkit.errors import ArgumentError, BatchError
from clkit.metrics import calibration, ranking, uncertainty_figures

U = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.8, 0.05, 0.6, 0.4], dtype=torch.float64)
L = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
P = torch.tensor(
    [
        [0.7, 0.2, 0.1],
        [0.4, 0.35, 0.25],
        [0.1, 0.8, 0.1],
        [0.3, 0.3, 0.4],
        [0.05, 0.05, 0.9],
        [0.5, 0.25, 0.25],
        [0.2, 0.6, 0.2],
        [0.34, 0.33, 0.33],
    ],
    dtype=torch.float64,
)
Y = torch.tensor([0, 1, 1, 2, 2, 0, 2, 1])

KNOWN: list[tuple[Any, float]] = [
    (M.SpearmanCorrelation, 0.3312945782),
    (M.KendallCorrelation, 6 / 416**0.5),
    (M.AUROC, 0.6875),
    (M.AUPR, 0.6083333333),
    (M.FPR95, 0.5),
    (M.AURC, 0.3260416667),
    (M.ExcessAURC, 0.1433035714),
    (M.AUGRC, 0.234375),
]
RANKING = [kind for kind, _ in KNOWN] + [M.RiskCoverageCurve]
CALIBRATION = [M.CalibrationError, M.MaxCalibrationError, M.AdaptiveCalibrationError]
SCORES = [M.BrierScore, M.NegativeLogLikelihood]


def fed(kind: Any, *arguments: Tensor) -> Any:
    """The metric after batches of three samples."""
    metric = kind()
    for start in range(0, len(arguments[0]), 3):
        metric.update(*[argument[start : start + 3] for argument in arguments])
    return metric


def arguments_of(kind: Any) -> tuple[Tensor, Tensor]:
    if kind in SCORES:
        return P, Y
    return calibration.top_label(P, Y) if kind in CALIBRATION else (U, L)


@pytest.mark.parametrize(("kind", "expected"), KNOWN)
def test_known_values(kind: Any, expected: float) -> None:
    value = fed(kind, U, L).compute()
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(expected, abs=1e-10)


def test_known_curve_and_calibration() -> None:
    expected = [0, 0, 1 / 3, 0.375, 0.4, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(fed(M.RiskCoverageCurve, U, L).compute().numpy(), expected, rtol=1e-12, atol=1e-15)
    assert ranking.aurc(L, L) == pytest.approx(0.1827380952, abs=1e-10)
    sure, right = calibration.top_label(P, Y)
    for kind, value in ((M.CalibrationError, 0.08), (M.AdaptiveCalibrationError, 0.305)):
        metric = kind(bins=4)
        metric.update(sure, right)
        assert float(metric.compute()) == pytest.approx(value, abs=1e-12)
    metric = M.MaxCalibrationError(bins=4)
    metric.update(sure, right)
    assert float(metric.compute()) == pytest.approx(0.15, abs=1e-12)
    assert float(fed(M.BrierScore, P, Y).compute()) == pytest.approx(0.43605, abs=1e-10)
    assert float(fed(M.NegativeLogLikelihood, P, Y).compute()) == pytest.approx(0.7578174481, abs=1e-10)


def test_a_constant_uncertainty_says_nothing() -> None:
    constant = torch.full((8,), 0.3)
    assert float(fed(M.AURC, constant, L).compute()) == 0.5  # the error rate, however the samples are stored
    assert float(fed(M.AUROC, constant, L).compute()) == 0.5
    assert np.isnan(float(fed(M.SpearmanCorrelation, constant, L).compute()))
    assert np.isnan(float(fed(M.KendallCorrelation, constant, L).compute()))
    assert np.isnan(ranking.spearman(U, torch.ones(8)))
    assert np.isnan(ranking.kendall(U, torch.ones(8)))


@pytest.mark.parametrize("scores", [(-1000.0, -900.0, -800.0, -200.0), (20.0, 25.0, 30.0, 40.0)])
def test_no_sigmoid_squeezes_scores(scores: tuple[float, ...]) -> None:
    u, new = torch.tensor(scores), torch.tensor([0, 0, 1, 1])
    assert float(fed(M.AUROC, u, new).compute()) == 1.0
    assert float(fed(M.AUPR, u, new).compute()) == 1.0
    assert float(fed(M.FPR95, u, new).compute()) == 0.0


@pytest.mark.parametrize("kind", [M.AUROC, M.AUPR, M.FPR95])
@pytest.mark.parametrize("label", [0, 1])
def test_one_kind_of_samples_is_no_ranking(kind: Any, label: int) -> None:
    assert np.isnan(float(fed(kind, U, torch.full((8,), label)).compute()))


def sample(rows: int, levels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    u = rng.integers(levels, size=rows) / 7.0
    return u, (rng.random(rows) < 0.2 + 0.6 * u / u.max()).astype(int)


@pytest.mark.parametrize("levels", [6, 10_000])
@pytest.mark.parametrize("rows", [40, 600])
def test_against_scikit_learn_and_scipy(rows: int, levels: int) -> None:
    u, wrong = sample(rows, levels, rows + levels)
    assert ranking.auroc(u, wrong) == pytest.approx(roc_auc_score(wrong, u), abs=1e-12)
    assert ranking.average_precision(u, wrong) == pytest.approx(average_precision_score(wrong, u), abs=1e-12)
    false, true, _ = roc_curve(wrong, u, drop_intermediate=False)
    for tpr in (0.5, 0.95, 1.0):
        assert ranking.fpr_at_tpr(u, wrong, tpr) == pytest.approx(false[true >= tpr].min(), abs=1e-12)
    loss = np.round(u**2 + np.random.default_rng(1).normal(size=rows), 1)
    assert ranking.spearman(u, loss) == pytest.approx(spearmanr(u, loss).statistic, abs=1e-12)


def test_kendall_by_counting_pairs() -> None:
    u, loss = sample(60, 6, 0)
    pairs = [(np.sign(u[i] - u[j]), np.sign(loss[i] - loss[j])) for i in range(60) for j in range(i)]
    a, b = np.array(pairs).T
    assert ranking.kendall(u, loss) == pytest.approx((a @ b) / np.sqrt((a @ a) * (b @ b)), abs=1e-12)


def test_risk_of_ties_is_the_mean_over_all_orders() -> None:
    u, loss = np.array([0.2, 0.5, 0.5, 0.5, 0.9]), np.array([0.1, 1.0, 0.0, 0.4, 0.3])
    curves = []
    for order in permutations((1, 2, 3)):
        row = loss[[0, *order, 4]]
        curves.append(np.cumsum(row) / np.arange(1, 6))
    np.testing.assert_allclose(ranking.risk_coverage(u, loss).numpy(), np.mean(curves, axis=0), rtol=1e-12)
    augrc = np.mean([np.mean(curve * np.arange(1, 6) / 5) for curve in curves])
    assert ranking.augrc(u, loss) == pytest.approx(augrc, abs=1e-12)


def test_nothing_beats_the_oracle() -> None:
    u, wrong = sample(300, 9, 4)
    assert ranking.excess_aurc(wrong, wrong) == 0
    assert 0 < ranking.excess_aurc(u, wrong) < ranking.excess_aurc(-u, wrong)


def test_calibration_by_loops() -> None:
    rng = np.random.default_rng(0)
    sure = np.round(rng.random(200), 2)  # with ties, and values on the edges
    sure[:3] = 0.0, 1.0, 0.6
    right = (rng.random(200) < sure**2).astype(float)
    for number in (1, 5, 10, 15):
        wide, most = 0.0, 0.0
        for i in range(number):
            top = np.inf if i == number - 1 else (i + 1) / number
            inside = (sure >= i / number) & (sure < top)
            if inside.any():
                error = abs(right[inside].mean() - sure[inside].mean())
                wide, most = wide + inside.mean() * error, max(most, error)
        bins = calibration.equal_width_bins(sure, right, number)
        assert calibration.calibration_error(bins) == pytest.approx(wide, abs=1e-12)
        assert calibration.max_calibration_error(bins) == pytest.approx(most, abs=1e-12)
        order = sorted(range(200), key=lambda i: (sure[i], right[i]))
        parts = np.array_split(np.array(order), number)
        adaptive = sum(len(part) / 200 * abs(right[part].mean() - sure[part].mean()) for part in parts)
        found = calibration.calibration_error(calibration.adaptive_bins(sure, right, number))
        assert found == pytest.approx(adaptive, abs=1e-12)


def test_predicted_errors_are_calibrated_alike() -> None:
    metric = M.CalibrationError(bins=2)
    metric.update(torch.tensor([0.25, 0.75, 0.75]), torch.tensor([False, True, True]))
    assert float(metric.compute()) == 0.25


def test_proper_scores_are_those_of_scikit_learn() -> None:
    p = torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=1)
    y = torch.arange(50) % 4
    assert float(fed(M.NegativeLogLikelihood, p, y).compute()) == pytest.approx(log_loss(y, p.numpy()), abs=1e-12)
    two = p[:, :2] / p[:, :2].sum(dim=1, keepdim=True)
    expected = 2 * brier_score_loss(y % 2, two[:, 1].numpy())  # scikit-learn counts one of the two classes
    assert float(fed(M.BrierScore, two, y % 2).compute()) == pytest.approx(expected, abs=1e-12)
    unlabelled = torch.where(y == 3, -1, y)
    known = y != 3
    for kind in SCORES:
        torch.testing.assert_close(fed(kind, p, unlabelled).compute(), fed(kind, p[known], y[known]).compute())
    certain = torch.tensor([[1.0, 0.0]])
    assert float(fed(M.NegativeLogLikelihood, certain, torch.tensor([1])).compute()) == float("inf")


levels = st.lists(st.tuples(st.integers(-4, 4), st.sampled_from([0.0, 0.1, 0.7, 1.0])), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(levels, st.randoms(use_true_random=False))
def test_only_the_order_counts(pairs: list[tuple[int, float]], random: Any) -> None:
    u, loss = np.array([each for each, _ in pairs], dtype=float), np.array([each for _, each in pairs])
    shuffled = list(range(len(u)))
    random.shuffle(shuffled)
    maps = [np.exp(u), u**3 - 7, np.where(u == u.max(), np.inf, u), np.where(u == u.min(), -np.inf, u / 1e3)]
    wrong = loss > 0.5
    for function, beside in (
        (ranking.spearman, loss),
        (ranking.kendall, loss),
        (ranking.aurc, loss),
        (ranking.excess_aurc, loss),
        (ranking.augrc, loss),
        (ranking.auroc, wrong),
        (ranking.average_precision, wrong),
        (ranking.fpr_at_tpr, wrong),
    ):
        value = function(u, beside)
        for mapped in maps:
            np.testing.assert_equal(function(mapped[shuffled], beside[shuffled]), value)  # to the last bit
    sure = (u + 4) / 8
    for grouped in (calibration.equal_width_bins, calibration.adaptive_bins):
        bins, again = grouped(sure, loss, 3), grouped(sure[shuffled], loss[shuffled], 3)
        assert all(torch.equal(first, second) for first, second in zip(bins, again, strict=True))


@pytest.mark.parametrize("kind", [*RANKING, *CALIBRATION, *SCORES])
def test_batches_copies_and_casts_change_nothing(kind: Any) -> None:
    arguments = arguments_of(kind)
    metric = kind()
    metric.update(*arguments)
    value = metric.compute()
    assert value.dtype == torch.float64
    assert torch.equal(fed(kind, *arguments).compute(), value)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).half().compute(), value)
    assert torch.equal(kind()(*arguments), value)
    metric.reset()
    metric.update(*[each[:0] for each in arguments])
    empty = metric.compute()
    assert empty.numel() == 0 if kind is M.RiskCoverageCurve else bool(empty.isnan())


@pytest.mark.parametrize("kind", [M.AUROC, M.AURC])
def test_narrow_numbers_are_taken_for_what_they_are(kind: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(fed(kind, U.to(dtype), L.bool()).compute(), fed(kind, U.to(dtype).double(), L).compute())


@pytest.mark.parametrize("kind", RANKING)
def test_what_cannot_be_ranked_is_refused_and_nothing_is_kept(kind: Any) -> None:
    metric = fed(kind, U, L)
    value, other = metric.compute(), "positive" if kind in (M.AUROC, M.AUPR, M.FPR95) else "loss"
    with pytest.raises(BatchError, match="uncertainty is nan in row 1, one of 2 that cannot be ranked"):
        metric.update(torch.tensor([0.1, torch.nan, torch.nan]), torch.tensor([0, 1, 1]))
    with pytest.raises(BatchError, match=f"uncertainty has 2 entries and {other} 3"):
        metric.update(torch.ones(2), torch.ones(3))
    with pytest.raises(BatchError, match=r"uncertainty has shape \(2, 1\)"):
        metric.update(torch.ones(2, 1), torch.ones(2))
    with pytest.raises(BatchError, match=f"{other} is inf in row 0" if other == "loss" else "positive"):
        metric.update(torch.ones(1), torch.tensor([torch.inf]))
    if other == "positive":
        with pytest.raises(BatchError, match="positive must be booleans, or 0 and 1"):
            metric.update(torch.ones(1), torch.tensor([2]))
    assert torch.equal(metric.compute(), value)


def test_what_is_no_probability_is_refused() -> None:
    metric = M.CalibrationError()
    with pytest.raises(BatchError, match=r"confidence must lie in \[0, 1\], got values from 0\.5 to 1\.5"):
        metric.update(torch.tensor([0.5, 1.5]), torch.tensor([0, 1]))
    with pytest.raises(BatchError, match=r"outcome must lie in \[0, 1\]"):
        metric.update(torch.tensor([0.5]), torch.tensor([3]))
    with pytest.raises(BatchError, match="confidence has 1 entries and outcome 2"):
        metric.update(torch.tensor([0.5]), torch.tensor([1, 1]))
    with pytest.raises(ArgumentError, match="bins must be an integer of at least 1, got 0"):
        M.CalibrationError(bins=0)
    with pytest.raises(ArgumentError, match="tpr must be a number above 0"):
        ranking.fpr_at_tpr(U, L, 0.0)
    for kind in SCORES:
        score = kind()
        with pytest.raises(BatchError, match=r"logits become probabilities by \.softmax"):
            score.update(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        with pytest.raises(BatchError, match=r"logits become probabilities"):
            score.update(torch.tensor([[torch.nan, 1.0]]), torch.tensor([0]))
        with pytest.raises(BatchError, match="class ids below 2"):
            score.update(torch.tensor([[0.5, 0.5]]), torch.tensor([2]))
        with pytest.raises(BatchError, match=r"probabilities must have shape \(1, C\)"):
            score.update(torch.tensor([0.5, 0.5]), torch.tensor([0]))
        score.update(torch.randn(4, 5).bfloat16().softmax(dim=1), torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("kind", [*RANKING, *CALIBRATION, *SCORES])
def test_every_metric_draws_itself(kind: Any, tmp_path: Path) -> None:
    metric = fed(kind, *arguments_of(kind))
    figure, axes = metric.plot()
    figure.savefig(tmp_path / "figure.png")
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    own_figure, own = pyplot.subplots()
    assert metric.plot(own)[1] is own
    pyplot.close(own_figure)
    assert not pyplot.get_fignums()
    empty = kind()
    empty.plot()[0].savefig(tmp_path / "empty.png")


def test_figures_show_what_is_computed() -> None:
    _, axes = uncertainty_figures.plot_risk_coverage(U, L, threshold=0.4)
    by_u, oracle, chance, mark = axes.lines
    np.testing.assert_allclose(by_u.get_ydata(), ranking.risk_coverage(U, L).numpy())
    np.testing.assert_allclose(oracle.get_ydata(), [0, 0, 0, 0, 1 / 5, 2 / 6, 3 / 7, 4 / 8])
    assert chance.get_ydata().tolist() == [0.5, 0.5]
    assert (float(mark.get_xdata()[0]), float(mark.get_ydata()[0])) == (62.5, pytest.approx(0.4))

    _, axes = uncertainty_figures.plot_loss_by_uncertainty(U, L, bins=4)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0, 0.75, 0.75, 0.5])

    _, axes = uncertainty_figures.plot_reliability(calibration.equal_width_bins(*calibration.top_label(P, Y), bins=4))
    points = np.asarray(axes.collections[-1].get_offsets())
    np.testing.assert_allclose(points, [[0.38, 1 / 3], [0.6, 2 / 3], [0.85, 1.0]])

    table = np.array([[0.1, 0.8, 0.7], [0.2, 0.1, 0.9], [0.3, 0.2, 0.2]])
    _, axes = uncertainty_figures.plot_around_learning(table, [0, 1, 2])
    thick = axes.lines[-1]
    assert thick.get_xdata().tolist() == [-2, -1, 0, 1, 2]
    np.testing.assert_allclose(thick.get_ydata(), [0.7, 0.85, 0.4 / 3, 0.2, 0.3])
    with pytest.raises(ArgumentError, match="learned must be a stage from 0, below 3, for each of 3 classes"):
        uncertainty_figures.plot_around_learning(table, [0, 1, 3])

    _, axes = uncertainty_figures.plot_histograms({"seen": U, "future": [0.9, np.inf]}, threshold=0.5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "seen (8)",
        "future (2, 1 infinite)",
        "threshold",
    ]


# ---- two processes


def scenario(name: str, folder: Path) -> dict[str, Any]:
    rank = enter_group()
    part = {"uneven": slice(0, 3) if rank == 0 else slice(3, 8), "one": slice(0, 0 if rank == 0 else 8)}[name]
    found: dict[str, Any] = {}
    for kind in (*RANKING, *CALIBRATION, *SCORES):
        metric = kind()
        rows = [each[part] for each in arguments_of(kind)]
        if len(rows[0]):
            metric.update(*rows)
        else:
            metric._update_count = 1  # no warning that nothing came: that is the subject
        found[kind.__name__] = metric.compute()
    return found


def test_two_processes_are_one(tmp_path: Path) -> None:
    for ranks in driven(__file__, tmp_path, ["uneven", "one"]).values():
        for found in ranks:
            for kind in (*RANKING, *CALIBRATION, *SCORES):
                assert torch.equal(found[kind.__name__], fed(kind, *arguments_of(kind)).compute()), kind


if __name__ == "__main__":
    sys.exit(drive(scenario))
