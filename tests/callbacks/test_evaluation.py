"""What a person reads of a run: counts, tables, files and figures, each against a computation of its own."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, confusion_matrix
from small_runs import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

import clkit
from clkit.callbacks import AEFOCL, LDA, NMC, StreamEvaluation
from clkit.data import ClassIncremental, Custom, Joint, StreamDataModule, TaskIncremental
from clkit.errors import ArgumentError, ConfigurationError, NotFittedError
from clkit.models import TimmClassifier

Make = Callable[..., Any]
METRICS = {
    "accuracy_matrix",
    "accuracy_seen",
    "average_incremental_accuracy",
    "final_accuracy",
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "amca",
}


def digits() -> tuple[Any, Any, Any, Any]:
    images, targets = load_digits(return_X_y=True)
    images, targets = (images / 16).astype(np.float32), targets.astype(np.int64)
    return images[::2], targets[::2], images[1::2], targets[1::2]


def dataset(features: Any, targets: Any) -> TensorDataset:
    return TensorDataset(torch.from_numpy(np.asarray(features)), torch.from_numpy(np.asarray(targets)))


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=3)
    return StreamDataModule("digits:flat", scenario, **options)


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run with three predictors and all files, followed by a prediction."""
    folder = tmp_path_factory.mktemp("run")

    heads, evaluation, data = [AEFOCL(balance="none"), NMC()], StreamEvaluation(), stream()
    trainer = quiet_trainer(folder, callbacks=[*heads, evaluation])
    torch.manual_seed(0)
    module = TimmClassifier("identity", num_classes=10, model_kwargs={"in_features": 64})
    trainer.fit(module, datamodule=data)
    trainer.predict(module, datamodule=data)
    return SimpleNamespace(heads=heads, evaluation=evaluation, data=data, path=folder)


# ---- results.json


def test_results_json_has_the_documented_format(run: Any) -> None:
    text = (run.path / "results.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(text, parse_constant=refuse)
    assert set(document) == {
        "format",
        "clkit",
        "seed",
        "config",
        "evaluated_on",
        "stream",
        "layers",
        "predictors",
        "notes",
        "cut_short",
        "seconds",
        "peak_memory_bytes",
    }
    assert document["format"] == 1
    assert document["clkit"] == clkit.__version__
    assert document["seed"] == 0
    assert document["evaluated_on"] == "test"
    assert document["stream"]["scenario"] == "class_incremental"
    _, train, _, test = digits()
    for experience, classes in zip(
        document["stream"]["experiences"], ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9]), strict=True
    ):
        assert experience["classes"] == classes
        assert experience["train_samples"] == int(np.isin(train, classes).sum())
        assert experience["eval_samples"] == int(np.isin(test, classes).sum())
    assert set(document["predictors"]) == {"aef_ocl", "nmc", "module"}
    for summary in document["predictors"].values():
        assert set(summary) == METRICS
        assert summary["forward_transfer"] is None
        assert [[value is not None for value in row] for row in summary["accuracy_matrix"]] == np.tri(
            3, dtype=bool
        ).tolist()
    assert document["predictors"] == run.evaluation.results
    point, width = run.heads[1].stream_state()["tap"], run.heads[1].head.in_features
    assert document["layers"] == {name: {"layer": point, "features": width} for name in document["predictors"]}
    assert document["seconds"]["fit"] > 0
    assert document["seconds"]["evaluate"] > 0
    assert document["peak_memory_bytes"] > 10**7
    assert not (run.path / "results.json.part").exists()


def test_metrics_follow_from_the_matrix_by_their_definitions(run: Any) -> None:
    _, _, _, test = digits()
    n = [int(np.isin(test, classes).sum()) for classes in ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9])]
    for summary in run.evaluation.results.values():
        R = [[math.nan if value is None else value for value in row] for row in summary["accuracy_matrix"]]
        seen = [sum(n[j] * R[i][j] for j in range(i + 1)) / sum(n[: i + 1]) for i in range(3)]
        assert summary["accuracy_seen"] == pytest.approx(seen)
        assert summary["average_incremental_accuracy"] == pytest.approx(np.mean(seen))
        assert summary["final_accuracy"] == pytest.approx(seen[-1])
        assert summary["average_accuracy"] == pytest.approx(np.mean(R[2]))
        lost = [max(R[i][j] for i in range(j, 2)) - R[2][j] for j in range(2)]
        assert summary["forgetting"] == pytest.approx(np.mean(lost))
        assert summary["backward_transfer"] == pytest.approx(np.mean([R[2][j] - R[j][j] for j in range(2)]))


# ---- per class, confusions, predictions: against scikit-learn


def predicted(run: Any, name: str) -> Any:
    _, _, test, _ = digits()
    head = {"aef_ocl": run.heads[0], "nmc": run.heads[1]}[name].head
    return head.predict(torch.from_numpy(test)).numpy()


@pytest.mark.parametrize("name", ["aef_ocl", "nmc"])
def test_per_class_counts_equal_scikit_learn(run: Any, name: str) -> None:
    _, _, _, targets = digits()
    matrix = confusion_matrix(targets, predicted(run, name))
    counts = run.evaluation.class_counts(name)
    assert counts == {c: (int(matrix[c, c]), int(matrix[c].sum())) for c in range(10)}
    rows = [row for row in read(run.path / "per_class.csv")[1:] if row[0] == name]
    assert [(int(row[1]), int(row[3]), int(row[4])) for row in rows] == [
        (c, int(matrix[c].sum()), int(matrix[c, c])) for c in range(10)
    ]
    assert run.evaluation.results[name]["final_accuracy"] == accuracy_score(targets, predicted(run, name))


@pytest.mark.parametrize("name", ["aef_ocl", "nmc"])
def test_confusions_equal_scikit_learn(run: Any, name: str) -> None:
    _, _, _, targets = digits()
    header, *rows = read(run.path / f"confusion_{name}.csv")
    assert header == ["true", "predicted", "count"]
    matrix = confusion_matrix(targets, predicted(run, name))
    assert [[int(cell) for cell in row] for row in rows] == [[a, b, matrix[a, b]] for a, b in np.argwhere(matrix)]


def test_predictions_csv_holds_ids_names_and_scores(run: Any) -> None:
    header, *rows = read(run.path / "predictions.csv")
    _, _, test, targets = digits()
    assert header[:3] == ["row", "target", "target_name"]
    assert [int(row[0]) for row in rows] == list(range(len(test)))
    assert [int(row[1]) for row in rows] == targets.tolist()
    names = run.data.class_names
    assert [row[2] for row in rows] == [names[int(t)] for t in targets]
    for name, head in (("aef_ocl", run.heads[0]), ("nmc", run.heads[1])):
        column = header.index(name)
        assert header[column : column + 3] == [name, f"{name}_name", f"{name}_score"]
        assert [int(row[column]) for row in rows] == predicted(run, name).tolist()
        assert [row[column + 1] for row in rows] == [names[int(row[column])] for row in rows]
        scores = head.head(torch.from_numpy(test).double()).max(1).values.numpy()
        assert np.array([float(row[column + 2]) for row in rows]) == pytest.approx(scores, rel=1e-5, abs=1e-12)


def test_the_accuracy_table_equals_the_results(run: Any) -> None:
    header, *rows = read(run.path / "accuracy.csv")
    assert header == ["predictor", "stage", "accuracy_seen", "experience_1", "experience_2", "experience_3"]
    for name, summary in run.evaluation.results.items():
        own = [row for row in rows if row[0] == name]
        assert [int(row[1]) for row in own] == [1, 2, 3]
        for row, seen, values in zip(own, summary["accuracy_seen"], summary["accuracy_matrix"], strict=True):
            assert float(row[2]) == pytest.approx(seen, abs=1e-6)
            assert [cell == "" for cell in row[3:]] == [value is None for value in values]


def test_figures_are_pictures(run: Any) -> None:
    from matplotlib.image import imread

    for name in ("accuracy_matrix.png", "accuracy_over_time.png"):
        picture = imread(run.path / name)
        assert picture.shape[0] > 200
        assert float(picture[..., :3].std()) > 0.02  # something is drawn


# ---- the table


def test_the_table_shows_the_numbers(make_trainer: Make, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    evaluation = StreamEvaluation(files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(), LDA(), evaluation])
    trainer.fit(TimmClassifier("identity"), datamodule=stream())
    text = capsys.readouterr().out
    assert [f"after experience {k}: {name}" in text for k, name in ((1, "classes 0-3"), (3, "classes 7-9"))] == [
        True
    ] * 2
    last = text.split("after experience 3")[1]
    for name in ("nmc", "lda"):
        (line,) = [line for line in last.splitlines() if f" {name} " in line]
        summary = evaluation.results[name]
        wanted = [
            *summary["accuracy_matrix"][-1],
            summary["accuracy_seen"][-1],
            summary["average_incremental_accuracy"],
            summary["forgetting"],
        ]
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        assert cells == [name, *[f"{100 * value:.1f}" for value in wanted]]
    trainer.validate(TimmClassifier("identity"), datamodule=stream(), verbose=False)
    shown = capsys.readouterr().out
    assert f"{100 * evaluation.results['nmc']['final_accuracy']:.1f}" in shown


def test_nothing_is_printed_or_written_when_not_asked_for(
    make_trainer: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evaluation = StreamEvaluation(table=False, files=False)
    make_trainer(strategy="gradient_free", callbacks=[NMC(), evaluation]).fit(
        TimmClassifier("identity"), datamodule=stream()
    )
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
    assert evaluation.results["nmc"]["final_accuracy"] > 0.8


def test_fast_dev_run_writes_nothing(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(), StreamEvaluation()], fast_dev_run=True)
    trainer.fit(TimmClassifier("identity"), datamodule=stream())
    assert list(tmp_path.iterdir()) == []


# ---- logs


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 0.5}])
def test_every_metric_is_logged_by_its_full_name(make_trainer: Make, tmp_path: Path, options: Any) -> None:
    evaluation = StreamEvaluation(table=False)
    trainer = make_trainer(
        strategy="gradient_free", callbacks=[NMC(), evaluation], logger=CSVLogger(str(tmp_path)), **options
    )
    trainer.fit(TimmClassifier("identity"), datamodule=stream())
    header, *rows = read(Path(trainer.log_dir) / "metrics.csv")
    logged = {name: [row[i] for row in rows if row[i]] for i, name in enumerate(header)}
    summary = evaluation.results["nmc"]
    assert [float(v) for v in logged["nmc/accuracy_seen"]] == pytest.approx(summary["accuracy_seen"], rel=1e-5)
    for metric in METRICS - {"accuracy_matrix", "accuracy_seen", "final_accuracy", "forward_transfer"}:
        assert float(logged[f"nmc/{metric}"][-1]) == pytest.approx(summary[metric], rel=1e-5), metric
    assert (Path(trainer.log_dir) / "results.json").is_file()


def test_the_logged_metric_can_be_monitored(make_trainer: Make, tmp_path: Path) -> None:
    best = pl.callbacks.ModelCheckpoint(str(tmp_path), monitor="nmc/accuracy_seen", mode="max")
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[best, evaluation, NMC()], enable_checkpointing=True)
    trainer.fit(TimmClassifier("identity"), datamodule=stream())
    assert float(best.best_model_score or 0) == pytest.approx(max(evaluation.results["nmc"]["accuracy_seen"]))


# ---- protocols


def test_task_ids_restrict_the_prediction_to_the_tasks_own_classes(make_trainer: Make, tmp_path: Path) -> None:
    train, train_targets, test, targets = digits()
    means = np.stack([train[train_targets == c].mean(0) for c in range(10)]).astype(np.float64)
    distance = ((test[:, None].astype(np.float64) - means[None]) ** 2).sum(2)
    task = targets // 2
    for sample, own in enumerate(task):
        others = [c for c in range(10) if c // 2 != own]
        distance[sample, others] = np.inf
    ids = distance.argmin(1)
    for relabel in (False, True):
        evaluation = StreamEvaluation(table=False)
        data = StreamDataModule("digits:flat", TaskIncremental(experiences=5), relabel=relabel)
        trainer = make_trainer(strategy="gradient_free", callbacks=[NMC("euclidean"), evaluation])
        module = TimmClassifier("identity")
        trainer.fit(module, datamodule=data)
        assert evaluation.results["nmc"]["accuracy_matrix"][-1] == [
            accuracy_score(targets[task == t], ids[task == t]) for t in range(5)
        ]
        trainer.predict(module, datamodule=data)
        header, *rows = read(tmp_path / "predictions.csv")
        assert [int(row[header.index("nmc")]) for row in rows] == ids.tolist()


def gapped(relabel: bool, class_names: dict[int, str] | None = None) -> tuple[StreamDataModule, Any]:
    train, train_targets, test, targets = digits()
    ids = np.array([11, 3, 40])
    kept, kept_test = train_targets < 3, targets < 3
    source = Custom(
        dataset(train[kept], ids[train_targets[kept]]),
        dataset(test[kept_test], ids[targets[kept_test]]),
        class_names=class_names or {},
    )
    scenario = ClassIncremental(experiences=3, class_order=[40, 11, 3])
    return StreamDataModule(source, scenario, relabel=relabel), ids[targets[kept_test]]


def test_relabelled_ids_are_mapped_back_everywhere(make_trainer: Make, tmp_path: Path) -> None:
    outcomes = []
    for relabel in (False, True):
        names = {3: "three", 11: "eleven", 40: "forty"}
        data, targets = gapped(relabel, names)
        head, evaluation = NMC(), StreamEvaluation(table=False)
        module = TimmClassifier("identity")
        trainer = make_trainer(strategy="gradient_free", callbacks=[head, evaluation])
        trainer.fit(module, datamodule=data)
        trainer.predict(module, datamodule=data)
        assert head.head.classes.tolist() == ([0, 1, 2] if relabel else [3, 11, 40])
        assert sorted(evaluation.class_counts("nmc")) == [3, 11, 40]
        header, *rows = read(tmp_path / "predictions.csv")
        assert [int(row[1]) for row in rows] == targets.tolist()
        assert {row[header.index("nmc_name")] for row in rows} == set(names.values())
        document = json.loads((tmp_path / "results.json").read_text())
        assert [experience["classes"] for experience in document["stream"]["experiences"]] == [[40], [11], [3]]
        outcomes.append(
            (
                [row[: header.index("nmc") + 2] for row in rows],
                evaluation.results,
                read(tmp_path / "confusion_nmc.csv"),
                read(tmp_path / "per_class.csv"),
            )
        )
    assert outcomes[0] == outcomes[1]


def test_unlabelled_rows_are_predicted_but_neither_counted_nor_learned(make_trainer: Make, tmp_path: Path) -> None:
    train, train_targets, test, targets = digits()
    hidden_train, hidden = train_targets.copy(), targets.copy()
    hidden_train[::3], hidden[::4] = -1, -1
    source = Custom(dataset(train, hidden_train), dataset(test, hidden))
    head, evaluation = NMC("euclidean"), StreamEvaluation(table=False)
    module = TimmClassifier("identity")
    trainer = make_trainer(strategy="gradient_free", callbacks=[head, evaluation])
    data = StreamDataModule(source, Joint())
    trainer.fit(module, datamodule=data)
    labelled = hidden_train >= 0
    assert head.head.counts.tolist() == np.bincount(train_targets[labelled]).tolist()
    means = np.stack([train[labelled & (train_targets == c)].mean(0) for c in range(10)]).astype(np.float64)
    ids = ((test[:, None].astype(np.float64) - means[None]) ** 2).sum(2).argmin(1)
    seen = hidden >= 0
    assert evaluation.results["nmc"]["final_accuracy"] == accuracy_score(targets[seen], ids[seen])
    assert sum(total for _, total in evaluation.class_counts("nmc").values()) == int(seen.sum())
    trainer.predict(module, datamodule=data)
    header, *rows = read(tmp_path / "predictions.csv")
    assert [int(row[header.index("nmc")]) for row in rows] == ids.tolist()
    assert [row[1] == "" for row in rows] == (~seen).tolist()


def test_all_experiences_give_forward_transfer(make_trainer: Make) -> None:
    torch.manual_seed(0)
    module = TimmClassifier("identity", num_classes=10, model_kwargs={"in_features": 64})
    before = module.network.fc.weight.clone(), module.network.fc.bias.clone()
    evaluation = StreamEvaluation(table=False, files=False)
    make_trainer(callbacks=[NMC(), evaluation]).fit(module, datamodule=stream(evaluate="all"))
    summary = evaluation.results["module"]
    _, _, test, targets = digits()
    logits = torch.from_numpy(test) @ before[0].T + before[1]
    baseline = [
        accuracy_score(targets[own], logits.argmax(1).numpy()[own])
        for own in (np.isin(targets, classes) for classes in ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9]))
    ]
    R = summary["accuracy_matrix"]
    assert all(value is not None for row in R for value in row)
    assert summary["forward_transfer"] == pytest.approx(np.mean([R[j - 1][j] - baseline[j] for j in (1, 2)]))
    heads = evaluation.results["nmc"]
    assert heads["accuracy_matrix"][0][1:] == [0.0, 0.0]  # classes never seen are never predicted
    assert heads["forward_transfer"] is None  # there was no head before anything was learned


def test_validation_samples_are_named_in_the_results(make_trainer: Make, tmp_path: Path) -> None:
    evaluation = StreamEvaluation(table=False, figures=False)
    data = stream(val_fraction=0.2)
    make_trainer(strategy="gradient_free", callbacks=[NMC(), evaluation]).fit(
        TimmClassifier("identity"), datamodule=data
    )
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["evaluated_on"] == "validation"
    total = sum(total for _, total in evaluation.class_counts("nmc").values())
    assert total == sum(experience["eval_samples"] for experience in document["stream"]["experiences"])
    assert 0.15 * 899 < total < 0.25 * 899


def test_module_is_a_predictor_only_where_something_trains_it(make_trainer: Make) -> None:
    for strategy, choice, wanted in (
        ("auto", "auto", True),
        ("gradient_free", "auto", False),
        ("gradient_free", True, True),
        ("auto", False, False),
    ):
        evaluation = StreamEvaluation(module=choice, table=False, files=False)
        module = TimmClassifier("identity", num_classes=10, model_kwargs={"in_features": 64})
        make_trainer(strategy=strategy, callbacks=[evaluation, NMC()]).fit(module, datamodule=stream(stop_after=1))
        assert ("module" in evaluation.results) is wanted


def test_a_users_own_predictor_is_found_by_its_form(make_trainer: Make) -> None:
    class Constant(pl.Callback):
        name = "always_zero"

        def scores(self, features: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]]).repeat(len(features), 1)

    evaluation = StreamEvaluation(table=False, files=False)
    make_trainer(strategy="gradient_free", callbacks=[Constant(), evaluation]).fit(
        TimmClassifier("identity"), datamodule=stream()
    )
    _, _, _, targets = digits()
    assert evaluation.results["always_zero"]["final_accuracy"] == float(np.mean(targets == 0))


def test_an_unknown_predictor_is_named(run: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"predictor='ncm' was not evaluated; there are \['aef_ocl', 'module', 'nmc'\]"
    ):
        run.evaluation.class_counts("ncm")


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"module must be 'auto' or True or False, got 'yes'"):
        StreamEvaluation(module="yes")


def test_measuring_a_stage_twice_with_plain_loaders_counts_the_last_time(make_trainer: Make) -> None:
    train, train_targets, test, targets = digits()
    fit = DataLoader(dataset(train, train_targets), 64)
    half, rest = DataLoader(dataset(test[:400], targets[:400]), 64), DataLoader(dataset(test[400:], targets[400:]), 64)
    head, evaluation = NMC(), StreamEvaluation(table=False, files=False)
    module = TimmClassifier("identity")
    trainer = make_trainer(strategy="gradient_free", callbacks=[head, evaluation], max_epochs=1)
    trainer.fit(module, fit)
    trainer.test(module, half, verbose=False)  # where nothing was measured yet
    assert sum(total for _, total in evaluation.class_counts("nmc").values()) == 400
    trainer.validate(module, half, verbose=False)
    trainer.validate(module, rest, verbose=False)
    ids = head.head.predict(torch.from_numpy(test[400:])).numpy()
    assert evaluation.results["nmc"]["accuracy_matrix"] == [[accuracy_score(targets[400:], ids)]]
    assert [total for _, total in evaluation.class_counts("nmc").values()] == np.bincount(targets[400:]).tolist()


def test_a_later_test_leaves_the_row_that_a_validation_measured(make_trainer: Make) -> None:
    """Its samples are others, and a row of others among those of the validation would look like forgetting."""
    train, train_targets, test, targets = digits()
    fit = DataLoader(dataset(train, train_targets), 64)
    half, rest = DataLoader(dataset(test[:400], targets[:400]), 64), DataLoader(dataset(test[400:], targets[400:]), 64)
    head, evaluation = NMC(), StreamEvaluation(table=False, files=False)
    module = TimmClassifier("identity")
    trainer = make_trainer(strategy="gradient_free", callbacks=[head, evaluation], max_epochs=1)
    trainer.fit(module, fit, half)
    measured = evaluation.results
    (shown,) = trainer.test(module, rest, verbose=False)
    assert evaluation.results == measured
    ids = [head.head.predict(torch.from_numpy(rows)).numpy() for rows in (test[:400], test[400:])]
    assert measured["nmc"]["accuracy_matrix"] == [[accuracy_score(targets[:400], ids[0])]]
    assert shown["nmc/accuracy_seen"] == pytest.approx(accuracy_score(targets[400:], ids[1]), abs=1e-6)


@pytest.mark.warns("it has learned nothing")
def test_an_evaluation_before_anything_is_learned_is_null_not_an_error(make_trainer: Make) -> None:
    evaluation = StreamEvaluation(table=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(), evaluation])
    module = TimmClassifier("identity")
    (metrics,) = trainer.validate(module, datamodule=stream(), verbose=False)
    assert not metrics
    assert evaluation.results == {}
    trainer.predict(module, datamodule=stream())
    header, *rows = read(Path(trainer.default_root_dir) / "predictions.csv")
    assert header == ["row", "target", "target_name"]
    assert len(rows) == 898


def test_no_validation_at_all_means_no_rows_and_no_files(make_trainer: Make, tmp_path: Path) -> None:
    evaluation = StreamEvaluation()
    head = NMC()
    trainer = make_trainer(strategy="gradient_free", callbacks=[head, evaluation], limit_val_batches=0)
    trainer.fit(TimmClassifier("identity"), datamodule=stream())
    assert evaluation.results == {}
    assert int(head.head.counts.sum()) == 899
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clkit.callbacks._showing.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_matplotlib")
def test_a_run_without_matplotlib_ends_without_figures_and_says_so(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(), StreamEvaluation(table=False)])
        trainer.fit(TimmClassifier("identity"), datamodule=StreamDataModule("digits:flat", ClassIncremental(5)))
    assert "figures need matplotlib" in caplog.text
    assert (tmp_path / "results.json").exists()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.usefixtures("without_matplotlib")
def test_wanted_figures_without_matplotlib_are_an_error_before_any_training(make_trainer: Make) -> None:
    head = NMC()
    trainer = make_trainer(strategy="gradient_free", callbacks=[head, StreamEvaluation(figures=True)])
    with pytest.raises(ConfigurationError, match=r"clkit\[report\]"):
        trainer.fit(TimmClassifier("identity"), datamodule=StreamDataModule("digits:flat", ClassIncremental(5)))
    with pytest.raises(NotFittedError):
        _ = head.head
