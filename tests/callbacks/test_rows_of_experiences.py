"""Whose the evaluated rows are: an experience without any, and plain loaders of every habit, each by its own count."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from small_runs import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import Custom, Labels, Scenario, Split, StreamDataModule
from clkit.models import TimmClassifier

Make = Callable[..., Any]
IMAGES, TARGETS = load_digits(return_X_y=True)
IMAGES = (IMAGES / 16).astype(np.float32)
TRAIN, TEST = (IMAGES[::2], TARGETS[::2]), (IMAGES[1::2], TARGETS[1::2])
TASKS = [(0, 3, 7), (1, 2), (8, 4, 9, 5, 6)]


def rows_of(part: Any, classes: Sequence[int]) -> Any:
    inputs, targets = part
    return inputs[np.isin(targets, classes)], targets[np.isin(targets, classes)]


def loader(part: Any, classes: Sequence[int] = range(10), **options: Any) -> DataLoader[Any]:
    inputs, targets = rows_of(part, classes)
    return DataLoader(TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets)), 32, **options)


def nearest_means(tasks: Sequence[Sequence[int]], part: Any = TRAIN) -> list[Any]:
    """Predictions of all test rows after each task, by plain NumPy."""
    predicted = []
    for stage in range(1, len(tasks) + 1):
        classes = np.array(sorted(label for task in tasks[:stage] for label in task))
        means = np.stack([part[0][part[1] == label].astype(np.float64).mean(0) for label in classes])
        distances = ((TEST[0][:, None].astype(np.float64) - means) ** 2).sum(2)
        predicted.append(classes[distances.argmin(1)])
    return predicted


def expected(tasks: Sequence[Sequence[int]], without: Sequence[int] = (), part: Any = TRAIN) -> dict[str, Any]:
    """The values of ``results.json`` over the tasks that have test rows, by their definitions."""
    right = [predicted == TEST[1] for predicted in nearest_means(tasks, part)]
    own = [np.isin(TEST[1], task) for task in tasks]
    tested = [j for j in range(len(tasks)) if j not in without]
    R = [
        [right[i][own[j]].mean() if j <= i and j in tested else None for j in range(len(tasks))]
        for i in range(len(tasks))
    ]
    seen = []
    for i in range(len(tasks)):
        rows = np.any([own[j] for j in tested if j <= i] or [np.zeros_like(own[0])], axis=0)
        seen.append(right[i][rows].mean() if rows.any() else None)
    last, earlier = len(tasks) - 1, [j for j in tested if j < len(tasks) - 1]
    classes = [label for j in tested for label in tasks[j]]
    by_class = [
        [right[i][TEST[1] == label].mean() if any(label in tasks[j] for j in range(i + 1)) else 0 for label in classes]
        for i in range(len(tasks))
        if any(j <= i for j in tested)
    ]
    return {
        "accuracy_matrix": R,
        "accuracy_seen": seen,
        "average_incremental_accuracy": np.mean([value for value in seen if value is not None]),
        "final_accuracy": seen[-1],
        "average_accuracy": np.mean([R[last][j] for j in tested]),
        "forgetting": np.mean([max(R[i][j] for i in range(j, last)) - R[last][j] for j in earlier]),
        "backward_transfer": np.mean([R[last][j] - R[j][j] for j in earlier]),
        "forward_transfer": None,
        "amca": np.mean(by_class),
    }


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["accuracy_matrix"] == [
        [None if value is None else pytest.approx(value, abs=1e-12) for value in row]
        for row in wanted["accuracy_matrix"]
    ]
    for name in wanted.keys() - {"accuracy_matrix"}:
        assert found[name] == (None if wanted[name] is None else pytest.approx(wanted[name], abs=1e-12)), name


# ---- an experience without test rows


class Tasks(Scenario):
    """The tasks above, also where rows have no label."""

    name = "tasks"

    def split(self, train: Labels, test: Labels) -> list[Split]:
        return [
            Split.of(str(task), train, *(np.flatnonzero(np.isin(part[1], task)) for part in (TRAIN, TEST)))
            for task in TASKS
        ]


@pytest.mark.filterwarnings("ignore:Total length of `EvaluationLoader`")
@pytest.mark.parametrize(("without", "unlabelled"), [([0], False), ([1], True), ([1, 2], False)])
def test_an_experience_without_test_rows_costs_only_itself(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: list[int], unlabelled: bool
) -> None:
    inputs, targets = TEST
    gone = np.isin(targets, [label for j in without for label in TASKS[j]])
    wanted = expected(TASKS, without)
    left = (inputs, np.where(gone, -1, targets)) if unlabelled else (inputs[~gone], targets[~gone])
    if not unlabelled:
        monkeypatch.setattr(f"{__name__}.TEST", left)
    source = Custom(*(TensorDataset(*map(torch.from_numpy, part)) for part in (TRAIN, left)))
    evaluation = StreamEvaluation(table=not unlabelled, figures=without == [0])
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC("euclidean"), evaluation])
    trainer.fit(TimmClassifier("identity"), datamodule=StreamDataModule(source, Tasks()))
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["predictors"] == evaluation.results
    assert_same(evaluation.results["nmc"], wanted)
    assert document["notes"] == []


# ---- plain loaders


def fitted(folder: Path, fits: Sequence[Any], val: Callable[[int], Any], how: str = "in the fit") -> Any:
    """The evaluation after a fit for each training loader; ``resumed`` has new callbacks that load what was saved."""
    callbacks: list[Any] = []
    for stage, train in enumerate(fits):
        saved = folder / "saved" / f"{stage}.ckpt"
        options: dict[str, Any] = {"strategy": "gradient_free", "max_epochs": 1}
        path = None
        if not callbacks or how == "resumed":
            callbacks = [NMC("euclidean"), StreamEvaluation(table=False, figures=False)]
        if how == "resumed":
            callbacks.append(ModelCheckpoint(saved.parent, filename=str(stage)))
            options["max_epochs"] = stage + 1
            path = saved.with_stem(str(stage - 1)) if stage else None
        trainer = quiet_trainer(folder, callbacks=callbacks, **options)
        trainer.fit(TimmClassifier("identity"), train, None if how == "validate" else val(stage), ckpt_path=path)
        if how == "validate":
            trainer.validate(TimmClassifier("identity"), val(stage), verbose=False)
    return callbacks[1]


FITS = [loader(TRAIN, task, shuffle=True) for task in TASKS]


@pytest.mark.parametrize("how", ["in the fit", "validate", "resumed"])
def test_one_loader_over_all_classes_gives_every_metric(tmp_path: Path, how: str) -> None:
    evaluation = fitted(tmp_path, FITS, lambda stage: loader(TEST), how)
    assert_same(evaluation.results["nmc"], expected(TASKS))
    if how != "validate":  # which writes no files
        document = json.loads((tmp_path / "results.json").read_text())
        assert document["notes"] == []
        assert [each["classes"] for each in document["stream"]["experiences"]] == [sorted(task) for task in TASKS]


def test_loaders_in_another_order_than_the_tasks_are_told_apart_by_their_classes(tmp_path: Path) -> None:
    loaders = [loader(TEST, TASKS[j]) for j in (2, 0, 1)]
    assert_same(fitted(tmp_path, FITS, lambda stage: loaders).results["nmc"], expected(TASKS))


def test_domains_are_told_apart_by_a_list_of_loaders_from_the_first_fit_on(tmp_path: Path) -> None:
    """All loaders have the same classes, so only their places say which task each is of."""
    shifts = np.float32([0, 0.3, -0.5])
    loaders = [loader((TEST[0] + shift, TEST[1])) for shift in shifts]
    evaluation = fitted(tmp_path, [loader((TRAIN[0] + shift, TRAIN[1])) for shift in shifts], lambda stage: loaders)
    wanted = np.empty((3, 3))
    for i in range(3):
        seen = (np.concatenate([TRAIN[0] + shift for shift in shifts[: i + 1]]), np.tile(TRAIN[1], i + 1))
        means = np.stack([seen[0][seen[1] == label].astype(np.float64).mean(0) for label in range(10)])
        for j, shift in enumerate(shifts):
            distances = (((TEST[0] + shift)[:, None].astype(np.float64) - means) ** 2).sum(2)
            wanted[i, j] = (distances.argmin(1) == TEST[1]).mean()
    found = evaluation.results["nmc"]
    assert np.array(found["accuracy_matrix"], dtype=float) == pytest.approx(wanted, abs=1e-12)
    assert found["backward_transfer"] == pytest.approx(np.mean([wanted[2, j] - wanted[j, j] for j in range(2)]))


def test_tasks_that_share_a_class_count_the_rows_of_each_loader_once(tmp_path: Path) -> None:
    tasks = [(0, 1, 2), (2, 3, 4)]
    loaders = [loader(TEST, task) for task in tasks]
    found = fitted(tmp_path, [loader(TRAIN, task) for task in tasks], lambda stage: loaders).results["nmc"]
    means = {}
    for i in range(2):
        rows = np.concatenate([np.flatnonzero(np.isin(TRAIN[1], task)) for task in tasks[: i + 1]])
        labels = sorted(set(TRAIN[1][rows]))
        means[i] = labels, [TRAIN[0][rows][TRAIN[1][rows] == label].astype(np.float64).mean(0) for label in labels]
    for i, j in ((0, 0), (1, 0), (1, 1)):
        inputs, targets = rows_of(TEST, tasks[j])
        distances = ((inputs[:, None].astype(np.float64) - np.stack(means[i][1])) ** 2).sum(2)
        right = (np.array(means[i][0])[distances.argmin(1)] == targets).mean()
        assert found["accuracy_matrix"][i][j] == pytest.approx(right, abs=1e-12)


def test_exemplars_of_earlier_classes_in_the_training_data_move_no_rows(tmp_path: Path) -> None:
    kept, fits = [np.flatnonzero(TRAIN[1] == label)[:5] for label in range(10)], []
    for stage, task in enumerate(TASKS):
        own = np.flatnonzero(np.isin(TRAIN[1], task))
        rows = np.concatenate([own, *(kept[label] for earlier in TASKS[:stage] for label in earlier)])
        fits.append(loader((TRAIN[0][rows], TRAIN[1][rows])))
    evaluation = fitted(tmp_path, fits, lambda stage: loader(TEST))
    samples = [int(np.isin(TEST[1], task).sum()) for task in TASKS]
    total = evaluation._measured.counts["nmc"].tables().total
    assert total.tolist() == [[samples[j] if j <= i else 0 for j in range(3)] for i in range(3)]
    assert None not in (evaluation.results["nmc"][name] for name in ("forgetting", "backward_transfer", "amca"))


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    return caplog


def test_a_loader_of_the_current_task_alone_leaves_a_sentence_why_metrics_are_null(tmp_path: Path, info: Any) -> None:
    evaluation = fitted(tmp_path, FITS, lambda stage: loader(TEST, TASKS[stage]))
    wanted = expected(TASKS)
    found = evaluation.results["nmc"]["accuracy_matrix"]
    assert [[value is None for value in row] for row in found] == (~np.eye(3, dtype=bool)).tolist()
    assert [found[i][i] for i in range(3)] == pytest.approx([wanted["accuracy_matrix"][i][i] for i in range(3)])
    assert info.text.count("null: experience 1 was not evaluated after experience 2") == 1
    (note,) = json.loads((tmp_path / "results.json").read_text())["notes"]
    assert note.startswith(
        "accuracy_seen, average_incremental_accuracy, average_accuracy, forgetting, backward_transfer, amca of nmc are "
        "null: experiences 1, 2 were not evaluated after experience 3"
    )


def test_where_classes_come_again_a_sentence_says_whose_the_rows_are_taken_for(tmp_path: Path, info: Any) -> None:
    evaluation = fitted(tmp_path, [loader(TRAIN), loader(TRAIN)], lambda stage: loader(TEST))
    assert [row[j] is not None for j, row in enumerate(evaluation.results["nmc"]["accuracy_matrix"])] == [True, True]
    assert info.text.count("count as those of experience 2") == 1
    assert len(json.loads((tmp_path / "results.json").read_text())["notes"]) == 2  # and why metrics are null


@pytest.mark.parametrize("listed", [list, lambda loaders: dict(zip("ab", loaders, strict=True))])
def test_the_loaders_of_validate_count_and_not_those_of_the_fit_before(make_trainer: Make, listed: Any) -> None:
    head, evaluation = NMC("euclidean"), StreamEvaluation(table=False, files=False)
    parts = [tuple(each[rows] for each in TEST) for rows in (slice(0, 300), slice(300, None))]
    trainer = make_trainer(strategy="gradient_free", callbacks=[head, evaluation], max_epochs=1)
    for _ in parts:  # the same classes again, so only the list tells whose a row is
        trainer.fit(TimmClassifier("identity"), loader(TRAIN), loader(parts[0]))
        trainer.fit_loop.max_epochs += 1
    trainer.validate(TimmClassifier("identity"), listed([loader(part) for part in parts]), verbose=False)
    right = nearest_means([range(10)])[0] == TEST[1]
    assert evaluation.results["nmc"]["accuracy_matrix"][1] == pytest.approx([right[:300].mean(), right[300:].mean()])


def test_an_experience_measured_on_different_samples_is_named(tmp_path: Path) -> None:
    cuts = [slice(None), slice(0, 500), slice(0, 500)]
    fitted(tmp_path, FITS, lambda stage: loader((TEST[0][cuts[stage]], TEST[1][cuts[stage]])))
    most, least = (int(np.isin(TEST[1][:count], TASKS[0]).sum()) for count in (None, 500))
    notes = json.loads((tmp_path / "results.json").read_text())["notes"]
    assert f"experience 1 was evaluated on {least} samples after one experience and on {most} after another" in str(
        notes
    )


def test_a_classifier_that_grows_is_measured_on_the_classes_it_has_learned(make_trainer: Make) -> None:
    """The rows of classes still to come are no sign that a network with fewer columns is no classifier."""
    evaluation = StreamEvaluation(table=False, files=False)
    module = TimmClassifier("identity", num_classes=4, model_kwargs={"in_features": 64})
    make_trainer(callbacks=[evaluation], max_epochs=1, limit_train_batches=8).fit(
        module, loader(TRAIN, range(4)), loader(TEST)
    )
    weight, bias = (part.detach().double().numpy() for part in (module.network.fc.weight, module.network.fc.bias))
    inputs, targets = rows_of(TEST, range(4))
    right = (inputs.astype(np.float64) @ weight.T + bias).argmax(1) == targets
    assert evaluation.results["module"]["accuracy_matrix"] == [[pytest.approx(right.mean())]]
