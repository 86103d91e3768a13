"""What an evaluation records, sample by sample, and what becomes of it: joined, averaged, saved and written."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import BatchError, ConfigurationError, StateError
from clkit.models import TimmClassifier
from clkit.report.results import Recorded, RunResults, results_document, write_predictions, write_results

Make = Callable[..., Any]


def recorded(experiences: list[int], **columns: list[Any]) -> Recorded:
    given = torch.tensor(experiences)
    blank = torch.full_like(given, -1)
    return Recorded(given, blank, torch.arange(len(given)), columns={k: torch.tensor(v) for k, v in columns.items()})


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_parts_are_joined_and_what_one_lacks_is_none_there() -> None:
    first, second = recorded([0, 1], sure=[0.5, 1.5], odd=[True, False]), recorded([2], odd=[True])
    first.predicted["nmc"], first.scores["nmc"] = torch.tensor([4, 5]), torch.tensor([0.1, 0.2])
    both = Recorded.join([recorded([]), first, second])
    assert both.experiences.tolist() == [0, 1, 2]
    assert both.rows.tolist() == [0, 1, 0]
    assert both.predicted["nmc"].tolist() == [4, 5, -1]
    assert both.scores["nmc"].isnan().tolist() == both.columns["sure"].isnan().tolist() == [False, False, True]
    assert both.columns["odd"].dtype == torch.bool
    assert both.columns["odd"].tolist() == [True, False, True]
    assert len(Recorded.join([recorded([])]).rows) == 0


def test_means_of_columns_by_stage_and_experience() -> None:
    results = RunResults()
    results.measure(0, recorded([0], sure=[9.0]))  # before any training: no row
    results.measure(1, recorded([0, 0], sure=[1.0, math.inf], odd=[True, False]))
    results.measure(2, recorded([0, 2, 2], sure=[math.nan, 1.0, 2.0], many=[1, 2, 4]))
    expected = {
        "sure": {"mean": [[1.0, None, None], [None, None, 1.5]], "count": [[1, 0, 0], [0, 0, 2]]},
        "odd": {"mean": [[0.5]], "count": [[2]]},
        "many": {"mean": [[None, None, None], [1.0, None, 3.0]], "count": [[0, 0, 0], [1, 0, 2]]},
    }
    assert results.column_means() == expected
    results.measure(2, recorded([2], sure=[4.0]))  # measured again, the last measurement counts
    assert results.column_means()["sure"]["mean"][1] == [None, None, 4.0]

    back, file = RunResults(), io.BytesIO()
    torch.save(results.state_dict(), file)
    file.seek(0)
    back.load_state_dict(torch.load(file, weights_only=True), "test")
    assert back.column_means() == results.column_means()


@pytest.mark.parametrize(
    "table",
    [None, [[1.0, 0.0, 0.5, 2.0]], torch.ones(1, 3).double(), torch.ones(1, 4), torch.ones(4).double()]
    + [torch.tensor([row]).double() for row in ([-1, 0, 1, 1], [1, 0.5, 1, 1], [1, 0, math.nan, 1], [1, 0, 1, -1])],
)
def test_damaged_columns_are_refused_and_change_nothing(table: Any) -> None:
    results = RunResults()
    results.measure(1, recorded([0], sure=[1.0]))
    with pytest.raises(StateError, match="sure"):
        results.load_state_dict({"rows": {}, "columns": {"sure": table}}, "test")
    with pytest.raises(StateError, match="columns"):
        results.load_state_dict({"rows": {}}, "test")
    assert results.column_means() == {"sure": {"mean": [[1.0]], "count": [[1]]}}


def test_columns_stand_behind_the_predictions(tmp_path: Path) -> None:
    what = recorded([0, 0, 0], sure=[0.25, math.nan, 1 / 3], odd=[True, False, False], many=[7, 8, 9])
    what.rows = torch.tensor([2, 0, 1])
    what.predicted["nmc"], what.scores["nmc"] = torch.tensor([4, -1, 5]), torch.tensor([0.5, torch.nan, 2.0])
    write_predictions(tmp_path / "predictions.csv", what, {4: "four"})
    assert read(tmp_path / "predictions.csv") == [
        ["row", "target", "target_name", "nmc", "nmc_name", "nmc_score", "sure", "odd", "many"],
        ["0", "", "", "", "", "", "", "False", "8"],
        ["1", "", "", "5", "", "2", "0.333333", "False", "9"],
        ["2", "", "", "4", "four", "0.5", "0.25", "True", "7"],
    ]


def test_confusions_of_ten_thousand_classes_are_written_in_a_moment(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(10_000).repeat(20)
    predicted = torch.randint(10_000, targets.shape, generator=generator)
    results = RunResults()
    results.measure(1, Recorded(0 * targets, targets, torch.arange(len(targets)), {"nmc": predicted}))
    tables = results.class_tables()
    began = time.process_time()
    write_results(tmp_path, {"predictors": {}}, tables, {})
    assert time.process_time() - began < 1.0
    header, *rows = read(tmp_path / "confusion_nmc.csv")
    assert header == ["true", "predicted", "count"]
    pairs, number = np.unique(np.stack([targets, predicted], axis=1), axis=0, return_counts=True)
    assert [[int(cell) for cell in row] for row in rows] == np.column_stack([pairs, number]).tolist()


# ---- columns of a callback in a run


class Stranger(pl.Callback):
    """Knows nothing of clkit, and has numbers of each sample."""

    def sample_columns(self, batch: Any) -> dict[str, torch.Tensor]:
        inputs = batch[0]
        return {
            "ink": inputs.sum(1),
            "dark": inputs.mean(1) > 0.31,
            "pixels": (inputs > 0).sum(1, dtype=torch.int32),
        }


def stream() -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=5), eval_batch_size=50)


def digits() -> tuple[torch.Tensor, np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """The test part, its targets, and what the stranger says of it."""
    images, targets = load_digits(return_X_y=True)
    part = (images[1::2] / 16).astype(np.float32)
    ink = part.astype(np.float64).sum(1)
    return torch.from_numpy(part), targets[1::2], {"ink": ink, "dark": ink / 64 > 0.31, "pixels": (part > 0).sum(1)}


def test_columns_of_a_strangers_callback_are_averaged_and_written(make_trainer: Make, tmp_path: Path) -> None:
    evaluation, module, data = StreamEvaluation(table=False, figures=False), TimmClassifier("identity"), stream()
    trainer = make_trainer(strategy="gradient_free", callbacks=[Stranger(), NMC(), evaluation])
    trainer.fit(module, datamodule=data)
    _, targets, expected = digits()
    document = json.loads((tmp_path / "results.json").read_text())
    assert set(document["columns"]) == set(expected)
    for name, column in document["columns"].items():
        for stage in range(5):
            for j in range(5):
                own = expected[name][targets // 2 == j]
                seen = j <= stage
                assert column["mean"][stage][j] == (pytest.approx(own.mean(), rel=1e-6) if seen else None)
                assert column["count"][stage][j] == (len(own) if seen else 0)

    trainer.predict(module, datamodule=data)
    header, *rows = read(tmp_path / "predictions.csv")
    assert header[-3:] == ["ink", "dark", "pixels"]
    ink, dark, pixels = zip(*(row[-3:] for row in rows), strict=True)
    assert [float(cell) for cell in ink] == pytest.approx(expected["ink"], rel=1e-5)
    assert [cell == "True" for cell in dark] == expected["dark"].tolist()
    assert [int(cell) for cell in pixels] == expected["pixels"].tolist()

    again = StreamEvaluation(table=False, figures=False)
    again.load_state_dict(evaluation.state_dict())
    assert again._measured.column_means() == document["columns"]


def test_columns_with_plain_loaders_are_those_of_the_users_validation(make_trainer: Make) -> None:
    inputs, targets, expected = digits()
    loader = DataLoader(TensorDataset(inputs, torch.from_numpy(targets)), 64)
    evaluation, module = StreamEvaluation(table=False, files=False), TimmClassifier("identity")
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(), evaluation, Stranger()], max_epochs=1)
    trainer.fit(module, loader)
    trainer.test(module, loader, verbose=False)
    means = evaluation._measured.column_means()
    assert means["pixels"] == {"mean": [[pytest.approx(expected["pixels"].mean())]], "count": [[len(targets)]]}


@pytest.mark.parametrize(
    ("columns", "error", "says"),
    [
        (lambda n: {"x": torch.zeros(n, 1)}, BatchError, r"of Odd gives shape \(\d+, 1\) for 'x': .* of \d+ real"),
        (lambda n: {"x": [0.0] * n}, BatchError, "gives list for 'x'"),
        (lambda n: {"x": torch.zeros(n, dtype=torch.complex64)}, BatchError, "real numbers"),
        (lambda n: {"nmc_score": torch.zeros(n)}, ConfigurationError, "'nmc_score', which another column is called"),
        (lambda n: {"ink": torch.zeros(n)}, ConfigurationError, "'ink'"),
    ],
)
def test_columns_of_another_form_or_a_taken_name_are_refused(
    make_trainer: Make, columns: Any, error: type[Exception], says: str
) -> None:
    class Odd(pl.Callback):
        def sample_columns(self, batch: Any) -> Any:
            return columns(len(batch[0]))

    trainer = make_trainer(strategy="gradient_free", callbacks=[Stranger(), Odd(), NMC(), StreamEvaluation()])
    with pytest.raises(error, match=says):
        trainer.fit(TimmClassifier("identity"), datamodule=stream())


def test_of_ten_thousand_classes_only_what_occurred_is_written(tmp_path: Path) -> None:
    classes, rows = 10_000, 50_000
    targets, predicted = torch.arange(rows) % classes, torch.randint(classes, (rows,), generator=torch.Generator())
    recorded = Recorded(torch.zeros_like(targets), targets, torch.arange(rows), {"nmc": predicted})
    results = RunResults()
    results.measure(1, recorded)
    write_results(tmp_path, results_document(results, None, {}, {}), results.class_tables(), {})
    lines = (tmp_path / "confusion_nmc.csv").read_text().splitlines()[1:]
    pairs = Counter(zip(targets.tolist(), predicted.tolist(), strict=True))  # a line a pair that occurred, not K x K
    assert sorted(tuple(map(int, line.split(","))) for line in lines) == sorted((*key, n) for key, n in pairs.items())
