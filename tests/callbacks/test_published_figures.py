"""Figures of the methods on scikit-learn's digits, through a trainer, against values computed without this library.

The expected values come from float64 NumPy computations on the same rows: train on even indices, test on odd ones,
pixels / 16, two classes an experience.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from small_runs import quiet_trainer
from torch.utils.data import TensorDataset

from clkit.callbacks import AEFOCL, LDA, NMC, PseudoFeatures, StreamEvaluation
from clkit.data import ClassIncremental, Custom, LongTailed, Scenario, Source, StreamDataModule
from clkit.models import TimmClassifier

# A_1 … A_5, average, last, task-averaged last (None: not published), forgetting; per cent
BALANCED: dict[str, tuple[list[float], float, float, float | None, float]] = {
    "ridge": ([100.0, 99.45, 97.59, 96.67, 92.32], 97.21, 92.32, None, 3.59),
    "ridge_weak": ([100.0, 99.17, 97.22, 96.26, 92.54], 97.04, 92.54, None, 3.45),
    "janson": ([99.44, 95.29, 95.93, 95.42, 89.87], 95.19, 89.87, 89.84, 4.47),
    "euclidean": ([99.44, 95.01, 95.74, 95.15, 89.87], 95.04, 89.87, 89.84, 4.74),
    "icarl": ([99.44, 94.74, 95.56, 95.28, 90.09], 95.02, 90.09, 90.06, 4.33),
    "cosine": ([99.44, 94.74, 95.56, 95.28, 89.98], 95.00, 89.98, 89.96, 4.46),
}
LONG_TAILED_COUNTS = [90, 54, 32, 19, 11, 6, 4, 2, 2, 2]


def run(
    make_trainer: Callable[..., pl.Trainer],
    scenario: Scenario,
    heads: list[Any],
    source: str | Source = "digits:flat",
    **options: Any,
) -> StreamEvaluation:
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[*heads, evaluation])
    trainer.fit(TimmClassifier("identity"), datamodule=StreamDataModule(source, scenario, **options))
    return evaluation


def digits() -> tuple[Any, Any, Any, Any]:
    images, targets = load_digits(return_X_y=True)
    images, targets = images / 16, targets.astype(np.int64)
    return images[::2], targets[::2], images[1::2], targets[1::2]


def dataset(features: Any, targets: Any) -> TensorDataset:
    return TensorDataset(torch.from_numpy(features).float(), torch.from_numpy(targets))


def balanced_heads() -> list[Any]:
    return [
        AEFOCL(gamma=1.0, balance="none", name="ridge"),
        AEFOCL(gamma=0.1, balance="none", name="ridge_weak"),
        *(NMC(metric=metric, name=metric) for metric in ("janson", "euclidean", "icarl", "cosine")),
    ]


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    make_trainer = partial(quiet_trainer, tmp_path_factory.mktemp("run"))
    return run(make_trainer, ClassIncremental(experiences=5), balanced_heads()).results


@pytest.mark.parametrize("name", BALANCED)
def test_balanced_digits_give_the_published_table(balanced: dict[str, dict[str, Any]], name: str) -> None:
    seen, average, last, task_averaged, forgetting = BALANCED[name]
    summary = balanced[name]
    assert [100 * value for value in summary["accuracy_seen"]] == pytest.approx(seen, abs=0.00501)
    assert 100 * summary["average_incremental_accuracy"] == pytest.approx(average, abs=0.00501)
    assert 100 * summary["final_accuracy"] == pytest.approx(last, abs=0.00501)
    assert 100 * summary["forgetting"] == pytest.approx(forgetting, abs=0.00501)
    if task_averaged is not None:
        assert 100 * summary["average_accuracy"] == pytest.approx(task_averaged, abs=0.00501)


def test_every_stage_evaluates_what_was_learned_so_far(balanced: dict[str, dict[str, Any]]) -> None:
    matrix = balanced["ridge"]["accuracy_matrix"]
    assert [[value is not None for value in row] for row in matrix] == np.tri(5, dtype=bool).tolist()


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_the_table_does_not_depend_on_the_batch_size(
    make_trainer: Callable[..., pl.Trainer], balanced: dict[str, dict[str, Any]], batch_size: int
) -> None:
    heads: list[Any] = [AEFOCL(gamma=1.0, balance="none", name="ridge"), NMC(name="janson")]
    scenario = ClassIncremental(experiences=5)
    results = run(make_trainer, scenario, heads, batch_size=batch_size).results
    for name in ("ridge", "janson"):
        assert results[name]["accuracy_matrix"] == balanced[name]["accuracy_matrix"]


def test_the_ridge_without_imbalance_correction_equals_pfg_where_classes_are_almost_balanced(
    make_trainer: Callable[..., pl.Trainer],
) -> None:
    # the digits have 83 to 95 rows a class, so a few pseudo-features are added and little may change
    heads: list[Any] = [AEFOCL(balance="none", name="plain"), AEFOCL(name="pfg")]
    results = run(make_trainer, ClassIncremental(experiences=5), heads).results
    assert abs(results["plain"]["final_accuracy"] - results["pfg"]["final_accuracy"]) < 0.01


def mean_class_accuracy(evaluation: StreamEvaluation, name: str) -> float:
    counts = evaluation.class_counts(name)
    assert sorted(counts) == list(range(10))
    return 100 * float(np.mean([correct / total for correct, total in counts.values()]))


def test_long_tailed_digits_give_the_published_mean_class_accuracies(make_trainer: Callable[..., pl.Trainer]) -> None:
    train, train_targets, test, test_targets = digits()
    # the published counts: the first max(2, floor(90 * 0.6^c)) rows of class c
    kept = np.concatenate([np.flatnonzero(train_targets == c)[:n] for c, n in enumerate(LONG_TAILED_COUNTS)])
    source = Custom(dataset(train[kept], train_targets[kept]), dataset(test, test_targets))
    heads: list[Any] = [
        AEFOCL(balance="none", name="plain"),
        AEFOCL(balance="expected", name="expected"),
        AEFOCL(balance="reweight", name="reweight"),
        NMC(metric="euclidean", name="euclidean"),
        NMC(metric="janson", name="janson"),
        *(AEFOCL(pseudo_features=PseudoFeatures(pfg_seed=seed), name=f"pfg{seed}") for seed in range(20)),
    ]
    evaluation = run(make_trainer, ClassIncremental(experiences=5), heads, source)
    assert heads[0].head.counts.tolist() == LONG_TAILED_COUNTS
    expected = {"plain": 61.1, "expected": 79.4, "reweight": 81.5, "euclidean": 80.2, "janson": 81.8}
    assert {name: round(mean_class_accuracy(evaluation, name), 1) for name in expected} == expected
    drawn = [mean_class_accuracy(evaluation, f"pfg{seed}") for seed in range(20)]
    assert 78.6 <= np.mean(drawn) <= 79.7
    assert len(set(drawn)) > 1  # the seed matters


def test_the_long_tailed_scenario_equals_a_computation_on_the_rows_that_it_keeps(
    make_trainer: Callable[..., pl.Trainer],
) -> None:
    train, train_targets, test, test_targets = digits()
    sizes = [max(2, int(np.sum(train_targets == c) * 0.6**c)) for c in range(10)]
    kept = np.concatenate([np.flatnonzero(train_targets == c)[:n] for c, n in enumerate(sizes)])
    x, y = train[kept], train_targets[kept]
    weight = np.linalg.solve(x.T @ x + np.eye(64), x.T @ np.eye(10)[y])
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    predicted = {
        "plain": (test @ weight).argmax(1),
        "euclidean": ((test[:, None] - means[None]) ** 2).sum(2).argmin(1),
    }
    heads: list[Any] = [AEFOCL(balance="none", name="plain"), NMC(metric="euclidean", name="euclidean")]
    evaluation = run(make_trainer, LongTailed(ClassIncremental(experiences=5), factor=0.6), heads)
    assert heads[0].head.counts.tolist() == sizes
    for name, ids in predicted.items():
        hits = {c: (int(np.sum(ids[test_targets == c] == c)), int(np.sum(test_targets == c))) for c in range(10)}
        assert evaluation.class_counts(name) == hits


def test_lda_equals_scikit_learn_through_a_trainer(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = LDA(shrinkage=1e-4)
    evaluation = run(make_trainer, ClassIncremental(experiences=5), [callback])
    train, train_targets, test, test_targets = digits()
    means = np.stack([train[train_targets == c].mean(0) for c in range(10)])
    residual = train - means[train_targets]
    covariance = (1 - 1e-4) * residual.T @ residual / len(train) + 1e-4 * np.eye(64)
    difference = test[:, None] - means[None]
    distance = np.einsum("ncd,de,nce->nc", difference, np.linalg.inv(covariance), difference)
    assert evaluation.results["lda"]["final_accuracy"] == accuracy_score(test_targets, distance.argmin(1))
