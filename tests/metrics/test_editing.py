"""Metrics of edits: functions against loops and scikit-learn, objects against functions, whatever the batches."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score
from torch import Tensor
from torchmetrics import MetricCollection

from clkit import metrics as M
from clkit.errors import BatchError
from clkit.metrics import editing as E


def drawn(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Answers before and after, right ones with some unlabelled, and the edit of each row."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(5, (n,), generator=generator)
    before, after = (torch.where(torch.rand(n, generator=generator) < p, targets, targets + 1) for p in (0.9, 0.7))
    targets[::11] = -1
    return before, after, targets, torch.randint(30, (n,), generator=generator) * 1000


def test_functions_are_those_of_loops() -> None:
    before, after, targets, edits = drawn()
    counted = targets >= 0
    right = accuracy_score(targets[counted], after[counted])
    assert E.reliability(after, targets) == E.generality(after, targets) == pytest.approx(right)
    was = accuracy_score(targets[counted], before[counted])
    assert E.drawdown(before, after, targets) == pytest.approx(100 * (was - right))
    assert E.locality(before, after) == pytest.approx(float(np.mean(before.numpy() == after.numpy())))
    by_edit: dict[int, list[bool]] = {}
    for answer, target, edit in zip(after.tolist(), targets.tolist(), edits.tolist(), strict=True):
        if target >= 0:
            by_edit.setdefault(edit, []).append(answer == target)
    assert E.edit_success(after, targets, edits) == pytest.approx(np.mean([np.mean(hits) for hits in by_edit.values()]))
    assert E.retention(after, targets, edits) == pytest.approx(np.mean([all(hits) for hits in by_edit.values()]))


def test_divergence_is_that_of_scipy_also_for_extreme_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = 20 * torch.randn(2, 50, 7, generator=generator)
    wanted = rel_entr(softmax(before.double().numpy(), 1), softmax(after.double().numpy(), 1)).sum(1).mean()
    assert E.locality_kl(before, after) == pytest.approx(wanted, rel=1e-9)
    assert E.locality_kl(before, before) == 0.0
    assert math.isfinite(E.locality_kl(torch.tensor([[0.0, 1e4]]), torch.tensor([[1e4, 0.0]])))


CASES: list[tuple[Any, Any]] = [
    (M.Reliability, lambda b, a, t, e: ((a, t), E.reliability(a, t))),
    (M.Generality, lambda b, a, t, e: ((a, t), E.generality(a, t))),
    (M.Locality, lambda b, a, t, e: ((b, a), E.locality(b, a))),
    (M.Drawdown, lambda b, a, t, e: ((b, a, t), E.drawdown(b, a, t))),
    (M.LocalityKL, lambda b, a, t, e: ((logits(b), logits(a)), E.locality_kl(logits(b), logits(a)))),
]


def logits(answers: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(answers, 7).double() * answers[:, None].double()


@pytest.mark.parametrize(("cls", "case"), CASES)
def test_objects_add_up_over_batches_and_keep_their_precision(cls: Any, case: Any) -> None:
    given, wanted = case(*drawn())
    metric = cls()
    for start, end in [(0, 1), (1, 1), (1, 130), (130, 200)]:
        metric.update(*(each[start:end] for each in given))
    metric = pickle.loads(pickle.dumps(metric.half()))
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(wanted, rel=1e-12)
    empty = cls()
    empty.update(*(each[:0] for each in given))
    assert math.isnan(empty.compute())


def test_edits_are_counted_one_by_one() -> None:
    _, after, targets, edits = drawn()
    success, kept = M.EditSuccess(), M.Retention()
    for edit in edits.unique():
        own = edits == edit
        success.update(after[own], targets[own])
        kept.update(after[own], targets[own])
    assert float(success.compute()) == pytest.approx(E.edit_success(after, targets, edits), rel=1e-12)
    assert float(kept.compute()) == pytest.approx(E.retention(after, targets, edits), rel=1e-12)
    success.update(after[:0], targets[:0])  # an edit of nothing is none
    assert int(success.number) == len(edits.unique())


def test_nothing_is_nan_and_two_processes_add_up() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    unlabelled = torch.full((2,), -1)
    assert math.isnan(E.reliability(none, none))
    assert math.isnan(E.reliability(none.new_zeros(2), unlabelled))
    assert math.isnan(E.edit_success(none, none, none))
    assert math.isnan(E.retention(none.new_zeros(2), unlabelled, none.new_zeros(2)))
    assert math.isnan(E.drawdown(none, none, none))
    before, after, targets, _ = drawn()
    halves = []
    for part in (slice(0, 50), slice(50, 200)):
        metric = M.Drawdown()
        metric.update(before[part], after[part], targets[part])
        halves.append(metric)
    assert all(
        reduction is torch.sum or reduction.__name__ == "dim_zero_sum" for reduction in metric._reductions.values()
    )
    total = sum(half.total for half in halves) / sum(half.number for half in halves)
    assert 100 * float(total) == pytest.approx(E.drawdown(before, after, targets), rel=1e-12)


def test_metrics_of_the_same_arguments_share_a_collection() -> None:
    collection = MetricCollection([M.Reliability(), M.Generality()])
    collection.update(torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert {name: float(value) for name, value in collection.compute().items()} == {
        "Reliability": 0.5,
        "Generality": 0.5,
    }


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: E.reliability(torch.zeros(2), torch.zeros(2).long()),
            "predictions has shape",
        ),
        (lambda: E.locality(torch.zeros(2).long(), torch.zeros(3).long()), "before has 2 entries and after 3"),
        (
            lambda: E.edit_success(*[torch.zeros(2).long()] * 2, torch.zeros(3).long()),
            "edits has 3 entries",
        ),
        (lambda: E.locality_kl(torch.zeros(2).long(), torch.zeros(2, 3)), r"before is torch.int64 \(2,\)"),
        (lambda: E.locality_kl(torch.zeros(2, 2), torch.zeros(2, 3)), r"before has shape \(2, 2\) and after \(2, 3\)"),
        (lambda: M.Drawdown().update(torch.zeros(2).long(), [1, 2], torch.zeros(2).long()), "predictions is a list"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Any, says: str) -> None:
    with pytest.raises(BatchError, match=says):
        call()


def test_plots_show_the_value() -> None:
    for cls, update, text in [
        (M.Reliability, (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])), "75.0"),
        (M.Drawdown, (torch.tensor([1, 2]), torch.tensor([1, 0]), torch.tensor([1, 2])), "50"),
        (M.Drawdown, (torch.tensor([1, 0]), torch.tensor([1, 2]), torch.tensor([1, 2])), "-50"),
        (M.LocalityKL, (torch.zeros(1, 2), torch.zeros(1, 2)), "0"),
    ]:
        metric = cls()
        metric.update(*update)
        _, axes = metric.plot()
        assert [each.get_text() for each in axes.texts] == [text]
        assert axes.patches[0].get_width() == pytest.approx(float(text))
        assert axes.get_xlabel() == cls._unit
        assert axes.get_yticklabels()[0].get_text() == cls._label
