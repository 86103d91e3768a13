"""Comparing recipes: one stream for all, what the table says, and going on after an interruption."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from lightning.pytorch.strategies import StrategyRegistry
from scipy.stats import ttest_1samp

import clkit.runs.comparing
from clkit._registry import STRATEGIES
from clkit.cli.main import main
from clkit.data import ClassIncremental, StreamDataModule
from clkit.models import TimmClassifier
from clkit.report.comparison import t_interval
from clkit.runs import settings
from clkit.runs._run_settings import RunSettings
from clkit.runs.recipes import read_recipe

METRICS = ("average_accuracy", "final_accuracy", "average_incremental_accuracy", "forgetting")
STREAM = ("digits:flat", 5, 32)  # of the recipes below: source, experiences, batch size
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
QUIET = {"class_path": "StreamEvaluation", "init_args": {"figures": False, "table": False}}

in_a_process = clkit.runs.comparing._fit
fitted: list[str] = []  # folders of the runs that were done, in order


def fit_here(arguments: Sequence[str], log: Path) -> int:
    """``clkit fit`` in this process, which saves the seconds that a new one takes to import everything."""
    fitted.append(log.parent.relative_to(log.parents[2]).as_posix())
    with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            return settings.run(["fit", *arguments])
        except Exception:  # as a process ends that nobody catches anything in
            traceback.print_exc()
            return 1


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted.clear()
    monkeypatch.setattr(clkit.runs.comparing, "_fit", fit_here)
    monkeypatch.setitem(sys.modules, "own_code", sys.modules[__name__])
    monkeypatch.setenv("COLUMNS", "100")


def recipe(file: str, *changes: Callable[[dict[str, Any]], object]) -> str:
    """Writes a recipe that trains a linear classifier on the stream, with some changes; gives its name."""
    source, experiences, batch_size = STREAM
    settings: dict[str, Any] = {
        "seed_everything": 0,
        "model": {
            "class_path": "TimmClassifier",
            "init_args": {"backbone": "identity", "model_kwargs": {"in_features": 64}, "optimizer": SGD},
        },
        "data": {
            "class_path": "StreamDataModule",
            "init_args": {
                "source": source,
                "scenario": {"class_path": "ClassIncremental", "init_args": {"experiences": experiences}},
                "batch_size": batch_size,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "enable_model_summary": False,
            "callbacks": [QUIET],
        },
    }
    for change in changes:
        change(settings)
    Path(file).write_text(yaml.safe_dump(settings))
    return file


def heads(settings: dict[str, Any]) -> None:
    """Two heads and no gradient, with a checkpoint and a bar of the recipe's own."""
    settings["trainer"]["strategy"] = "gradient_free"
    settings["trainer"]["callbacks"] = [
        {"class_path": "AEFOCL", "init_args": {"lift": {"expansion_dim": 100}}},
        {"class_path": "NMC"},
        {"class_path": "StreamEvaluation", "init_args": {"figures": False, "module": True}},
        {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "dirpath": "elsewhere"}},
        {"class_path": "StreamProgressBar"},
    ]


def document(folder: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "compare.json").read_text())
    return found


def predictors(folder: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "results.json").read_text())["predictors"]
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Compares what must fail with status 2; gives the only line that it says."""
    capsys.readouterr()
    try:
        status: Any = main(["compare", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clkit: ")
    return line.removeprefix("clkit: ")


# ---- one comparison that several tests look at


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A trained recipe and one of two heads, two seeds, with both outer rows: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(clkit.runs.comparing, "_fit", fit_here)
        patch.setenv("COLUMNS", "100")
        recipe("linear.yaml")
        recipe("heads.yaml", heads)
        with (folder / "said").open("w") as said, contextlib.redirect_stdout(said):
            assert main(["compare", "linear.yaml", "--seeds", "2", "heads.yaml", "--out", "out"]) == 0
    return folder / "out", (folder / "said").read_text()


def test_rows_stand_between_the_outer_ones(compared: tuple[Path, str]) -> None:
    folder, said = compared
    names = [row["name"] for row in document(folder)["rows"]]
    assert names == ["fine-tuning", "linear", "heads / aef_ocl", "heads / nmc", "joint"]
    shown = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert shown == names  # the untrained module of heads.yaml has a row in its results, and none here
    assert "module" in predictors(folder / "heads" / "seed_0")


def test_what_is_printed(compared: tuple[Path, str]) -> None:
    folder, said = compared
    lines = said.splitlines()
    progress = ["fine-tuning, seed 0", "linear, seed 0", "heads, seed 0", "joint, seed 0", "fine-tuning, seed 1"]
    for number, (line, title) in enumerate(zip(lines, progress, strict=False), start=1):
        start, seconds, unit = line.rsplit(" ", 2)
        assert (start, unit) == (f"{number}/8  {title}:", "s")
        assert 0 < float(seconds) < 100
    assert "digits:flat: 5 experiences, class_incremental, evaluated on test (%)" in said
    caption = " ".join(said[said.index("└") :].split())
    assert "n = 2 seeds (0, 1): mean ± half-width of the 95 % t-interval" in caption
    assert "train the network of linear with its optimizer and nothing else: 1 epoch on each experience" in caption
    assert "A network that a recipe keeps frozen is trained in these two rows." in caption
    row = next(line for line in lines if line.startswith("│ linear"))
    summary = document(folder)["rows"][1]["summary"]
    cells = [f"{100 * summary[metric]['mean']:.1f} ± {100 * summary[metric]['half_width']:4.1f}" for metric in METRICS]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == cells
    joint = next(line for line in lines if line.startswith("│ joint"))
    assert joint.split("│")[-2].strip() == "-"  # nothing is forgotten of what came at once


def test_the_numbers_are_those_of_the_runs(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    for row in document(folder)["rows"][:-1]:
        values: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for seed, run in enumerate(row["runs"]):
            assert run["seed"] == seed
            found = predictors(folder / run["folder"])[row["predictor"]]
            matrix = np.array(found["accuracy_matrix"], dtype=float)
            values["average_accuracy"].append(matrix[-1].mean())
            values["final_accuracy"].append(found["accuracy_seen"][-1])
            values["average_incremental_accuracy"].append(np.mean(found["accuracy_seen"]))
            best = np.array([np.nanmax(matrix[:-1, j]) for j in range(4)])
            values["forgetting"].append((best - matrix[-1, :4]).mean())
            for metric in METRICS:
                assert run[metric] == pytest.approx(values[metric][-1], abs=1e-12)
        for metric, seen in values.items():
            summary = row["summary"][metric]
            assert summary["mean"] == pytest.approx(np.mean(seen), abs=1e-12)
            if np.ptp(seen):
                low, high = ttest_1samp(seen, 0).confidence_interval(0.95)
                assert summary["low"] == pytest.approx(low, abs=1e-9)
                assert summary["high"] == pytest.approx(high, abs=1e-9)
            else:
                assert summary["low"] == summary["high"] == summary["mean"]
    (rows,) = [list(csv.DictReader((folder / "compare.csv").read_text().splitlines()))]
    assert [row["name"] for row in rows] == [row["name"] for row in document(folder)["rows"]]
    for line, row in zip(rows, document(folder)["rows"], strict=True):
        assert line["seeds"] == "2"
        for metric in METRICS:
            for column, end in ((metric, "mean"), (f"{metric}_low", "low"), (f"{metric}_high", "high")):
                value = row["summary"][metric][end]
                assert line[column] == ("" if value is None else f"{value:.6f}")


def by_hand(folder: Path, *arguments: str) -> Path:
    """The linear recipe, trained by ``clkit fit`` as a person would."""
    with contextlib.chdir(folder):
        recipe("linear.yaml")
        assert main(["fit", "--config", "linear.yaml", "--trainer.logger", "CSVLogger", *arguments]) == 0
    (file,) = folder.rglob("results.json")
    return file.parent


def test_outer_rows_are_plain_training(compared: tuple[Path, str], tmp_path: Path) -> None:
    (folder, _), seed = compared, 1
    logger = ["--trainer.logger.save_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    plain = predictors(by_hand(tmp_path, *logger, "--seed_everything", str(seed), "--data.seed", str(seed)))
    assert predictors(folder / "fine_tuning" / f"seed_{seed}") == plain
    assert predictors(folder / "linear" / f"seed_{seed}") == plain  # nothing else is in that recipe


def test_the_joint_row_is_measured_as_the_stream_is(compared: tuple[Path, str], tmp_path: Path) -> None:
    (folder, _), seed = compared, 1
    joint = folder / "joint" / f"seed_{seed}"
    with contextlib.chdir(tmp_path):  # each sample of the test part as the trained network sees it
        checkpoint = ["--ckpt_path", str(joint / "checkpoints" / "last.ckpt"), "--trainer.default_root_dir", "."]
        logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
        assert main(["predict", "--config", str(joint / "config.yaml"), *checkpoint, *logger]) == 0
    (file,) = tmp_path.rglob("predictions.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    right = np.array([row["module"] == row["target"] for row in rows])
    experience = np.array([int(row["target"]) // 2 for row in rows])
    found = document(folder)["rows"][-1]["runs"][seed]
    last = [right[experience == j].mean() for j in range(5)]
    seen = [right[experience <= i].mean() for i in range(5)]
    assert found["average_accuracy"] == pytest.approx(np.mean(last), abs=1e-12)
    assert found["final_accuracy"] == pytest.approx(right.mean(), abs=1e-12)
    assert found["average_incremental_accuracy"] == pytest.approx(np.mean(seen), abs=1e-12)
    assert found["forgetting"] is None


def test_seeds_differ_in_all_that_draws_and_the_stream_is_the_same(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    for name in ("fine_tuning", "linear", "heads", "joint"):
        runs = [yaml.safe_load((folder / name / f"seed_{seed}" / "config.yaml").read_text()) for seed in (0, 1)]
        for seed, config in enumerate(runs):
            assert config["seed_everything"] == seed
            assert config["data"]["init_args"].pop("seed") == seed
        assert runs[0]["data"] == runs[1]["data"]
    for seed in (0, 1):
        lift = yaml.safe_load((folder / "heads" / f"seed_{seed}" / "config.yaml").read_text())["trainer"]["callbacks"][
            0
        ]
        settings = lift["init_args"]
        assert settings["lift"]["projection_seed"] == settings["pseudo_features"]["pfg_seed"] == seed
    first, second = (predictors(folder / "linear" / f"seed_{seed}") for seed in (0, 1))
    assert first != second


def test_every_run_has_a_folder_with_a_last_checkpoint(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    for name in ("fine_tuning", "linear", "heads", "joint"):
        for seed in (0, 1):
            files = {file.name for file in (folder / name / f"seed_{seed}").iterdir()}
            assert {"config.yaml", "settings.yaml", "results.json", "metrics.csv", "log.txt"} <= files
            assert (folder / name / f"seed_{seed}" / "checkpoints" / "last.ckpt").is_file()
    assert not (folder.parent / "elsewhere").exists()


# ---- going on


@pytest.fixture
def again(compared: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(compared[0].parent)
    return compared[0]


def test_finished_runs_are_not_run_again(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = document(again)
    assert main(["compare", "linear.yaml", "heads.yaml", "--seeds", "2", "--out", "out"]) == 0
    assert fitted == []
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1/8  fine-tuning, seed 0: finished before, not run again"
    assert sum(line.endswith("finished before, not run again") for line in said) == 8
    assert document(again) == before


def test_fewer_and_other_recipes_find_what_is_there(again: Path) -> None:
    before = document(again)
    assert main(["compare", "heads.yaml", "linear.yaml", "--seeds", "2", "--no-outer", "--out", "out"]) == 0
    assert fitted == []
    assert [row["name"] for row in document(again)["rows"]] == ["heads / aef_ocl", "heads / nmc", "linear"]
    assert main(["compare", "linear.yaml", "heads.yaml", "--seeds", "2", "--out", "out"]) == 0
    assert document(again) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.batch_size", "16"], "out/fine_tuning/seed_0 holds a run of other settings: data.batch_size was 32, "),
        (["--trainer.max_steps=9"], "out/fine_tuning/seed_0 holds a run of other settings: trainer.max_steps was -1, "),
        (
            ["--model.optimizer.lr", "0.2", "--no-outer"],
            "out/linear/seed_0 holds a run of other settings: model.optimizer.lr was 0.1, now it is 0.2; give another",
        ),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    again: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = ["linear.yaml"] if "lr" in arguments[0] else ["linear.yaml", "heads.yaml"]
    assert refused(capsys, *recipes, "--seeds", "2", "--out", "out", *arguments).startswith(said)
    assert fitted == []


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out/nmc/seed_0").mkdir(parents=True)
    Path("out/nmc/seed_0/thesis.txt").write_text("mine")
    said = refused(capsys, "nmc", "--no-outer", "--out", "out")
    assert said.startswith("out/nmc/seed_0 is there and holds no run of clkit compare; give another folder with --out")
    assert [file.name for file in Path("out/nmc/seed_0").iterdir()] == ["thesis.txt"]


def test_damaged_results_are_named(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = again / "linear" / "seed_1" / "results.json"
    whole = file.read_text()
    try:
        file.write_text(whole[:100])
        said = refused(capsys, "linear.yaml", "--seeds", "2", "--no-outer", "--out", "out")
    finally:
        file.write_text(whole)
    assert said.startswith("out/linear/seed_1/results.json cannot be read (")


def test_two_comparisons_do_not_share_a_folder(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(again / ".lock"):
        said = refused(capsys, "linear.yaml", "--seeds", "2", "--no-outer", "--out", "out")
    assert said == "out is in use by another clkit compare; wait until it has ended, or end it"


class Breaking(TimmClassifier):
    """Ends a run at a training step, once."""

    ends_at: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == Breaking.ends_at:
            Breaking.ends_at = None
            raise MemoryError("all used up")
        return super().training_step(batch, batch_idx)


def breaking(settings: dict[str, Any]) -> None:
    """A network that can break, with two epochs an experience and a momentum to be restored."""
    settings["model"]["class_path"] = "own_code.Breaking"
    settings["model"]["init_args"]["optimizer"] = {**SGD, "init_args": {"lr": 0.1, "momentum": 0.9}}
    settings["data"]["init_args"]["epochs_per_experience"] = 2
    settings["data"]["init_args"]["scenario"]["init_args"]["experiences"] = 2


def test_an_unfinished_run_is_resumed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe("broken.yaml", breaking)
    arguments = ["compare", "broken.yaml", "--no-outer", "--seeds", "1"]
    assert main([*arguments, "--out", "whole"]) == 0
    monkeypatch.setattr(Breaking, "ends_at", 50)  # in the second epoch of the first experience
    said = refused(capsys, *arguments[1:], "--out", "out")
    assert said.startswith("broken, seed 0 was ended by status 1: MemoryError: all used up; what it printed is in out/")
    assert said.endswith("the same command goes on from here")
    assert not Path("out/compare.json").exists()
    assert main([*arguments, "--out", "out"]) == 0
    assert "1/1  broken, seed 0: resumed from last.ckpt, " in capsys.readouterr().out
    assert predictors("out/broken/seed_0") == predictors("whole/broken/seed_0")
    ends = [torch.load(f"{name}/broken/seed_0/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "out")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    for name, weights in ends[0]["state_dict"].items():
        assert torch.equal(weights, ends[1]["state_dict"][name])
    moments = [end["optimizer_states"][0]["state"] for end in ends]
    assert all(torch.equal(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"]) for i in moments[0])
    assert Path("out/broken/seed_0/metrics_before_1.csv").is_file()


def test_a_run_that_ends_early_is_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe("linear.yaml")
    said = refused(capsys, "linear.yaml", "--no-outer", "--seeds", "1", "--out", "out", "--trainer.max_steps", "20")
    assert said.startswith("linear, seed 0 ended before its stream did, so there is nothing to compare; a limit of the")


# ---- what is compared with what


def test_recipes_of_different_streams_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    natural = {"scenario": {"class_path": "NaturalOrder"}, "batch_size": 16}
    recipe("a.yaml", lambda c: c["data"]["init_args"].update(seed=7))
    recipe("b.yaml", lambda c: c["data"]["init_args"].update(natural))
    recipe("c.yaml", lambda c: c["data"]["init_args"].update(batch_size=16))
    assert refused(capsys, "a.yaml", "b.yaml") == (
        "a and b run different streams: data.scenario is ClassIncremental in a and NaturalOrder in b (and 1 more); "
        "set it for all, with --data.scenario or a file of settings by --config"
    )
    said = refused(capsys, "a.yaml", "c.yaml")  # seeds are set by the command, so only the first is a difference
    assert said.startswith(
        "a and c run different streams: data.batch_size is 32 in a and 16 in c; set it for all, with"
    )
    assert not Path("runs").exists()


def test_an_override_goes_to_all_and_can_make_the_streams_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe("a.yaml", heads)
    recipe("b.yaml", heads, lambda c: c["data"]["init_args"].update(batch_size=99))
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"log_every_n_steps": 3}}))
    line = ["compare", "a.yaml", "b.yaml", "--data.batch_size", "64", "--seeds", "1", "--no-outer", "--out", "out"]
    assert main([*line, "--config", "more.yaml", "--data.scenario.experiences=2"]) == 0
    assert fitted == ["a/seed_0", "b/seed_0"]
    for name in "ab":
        config = yaml.safe_load(Path(f"out/{name}/seed_0/config.yaml").read_text())
        assert config["data"]["init_args"]["batch_size"] == 64
        assert config["data"]["init_args"]["scenario"]["init_args"]["experiences"] == 2
        assert config["trainer"]["log_every_n_steps"] == 3
    summary = document("out")["rows"][0]["summary"]["final_accuracy"]
    assert summary["half_width"] is summary["low"] is None  # one seed has no interval
    assert document("out")["notes"] == ["n = 1 seed (0), which gives no interval."]


def test_outer_rows_need_a_network_that_can_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "nmc", "--out", "out")
    assert said.startswith("fine-tuning, seed 0: the network 'identity' has no classifier to train")
    assert said.endswith(
        "(the outer rows train the network of the first recipe: put another first, or give --no-outer)"
    )
    assert fitted == ["fine_tuning/seed_0"]  # the first of all runs: no time is lost
    assert not Path("out/fine_tuning/seed_0").exists()  # in the way of the corrected command


@pytest.mark.slow
def test_outer_rows_of_a_warm_up_and_of_a_shortened_stream_whose_classes_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def repeated(c: dict[str, Any]) -> None:
        c["data"]["init_args"].update(
            scenario={"class_path": "NaturalOrder", "init_args": {"experiences": 4}}, stop_after=2
        )
        c["trainer"]["strategy"] = {"class_path": "GradientFreeStrategy", "init_args": {"warmup_epochs": 3}}
        c["trainer"]["callbacks"].append({"class_path": "NMC", "init_args": {"graft": "experience_end"}})

    recipe("warm.yaml", repeated)
    assert main(["compare", "warm.yaml", "--seeds", "1", "--out", "out"]) == 0
    rows = {row["name"]: row["runs"][0] for row in document("out")["rows"]}
    assert list(rows) == ["fine-tuning", "warm / module", "warm / nmc", "joint"]  # a graft makes the module a predictor
    assert "3 epochs on each experience" in document("out")["notes"][1]
    assert rows["joint"]["average_accuracy"] is rows["joint"]["average_incremental_accuracy"] is None
    found = json.loads(Path("out/joint/seed_0/results.json").read_text())
    assert rows["joint"]["final_accuracy"] == found["predictors"]["module"]["final_accuracy"]
    stages = {
        name: json.loads(Path(f"out/{name}/seed_0/results.json").read_text())["stream"]["experiences"]
        for name in ("joint", "fine_tuning")
    }
    assert len(stages["fine_tuning"]) == 2
    assert stages["joint"][0]["train_samples"] == sum(stage["train_samples"] for stage in stages["fine_tuning"])
    steps = [torch.load(f"out/{name}/seed_0/checkpoints/last.ckpt", weights_only=True) for name in stages]
    assert [step["epoch"] for step in steps] == [2, 5]  # counted from 0


class Drawing(pl.strategies.SingleDeviceStrategy):
    """A strategy with a seed."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__("cpu", **options)


def test_a_strategy_gets_the_seed_by_class_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STRATEGIES, "drawing", "own_code.Drawing")
    monkeypatch.setitem(StrategyRegistry, "drawing", {})
    for strategy, kind, seed in (
        ("drawing", "own_code.Drawing", 4),
        ({"class_path": "own_code.Drawing"}, "own_code.Drawing", 4),
        ("gradient_free", "clkit.strategies.gradient_free.GradientFreeStrategy", None),
    ):
        settings = RunSettings.of_recipe("a", Path(recipe("a.yaml", strategy_of(strategy))), [])
        seeded = settings.with_seed(4).trainer["strategy"]
        assert (seeded["class_path"], seeded["init_args"].get("seed")) == (kind, seed)
        assert settings.trainer["strategy"]["init_args"].get("seed") != 4
    settings = RunSettings.of_recipe("a", Path(recipe("a.yaml")), [])
    assert settings.with_seed(4).trainer["strategy"] == "auto"


def strategy_of(strategy: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["trainer"].update(strategy=strategy)


# ---- the mathematics


@pytest.mark.parametrize(("n", "confidence"), [(2, 0.5), (3, 0.95), (10, 0.99)])
def test_the_interval_is_students(n: int, confidence: float) -> None:
    values = np.random.default_rng(n).normal(0.7, 0.1, n).tolist()
    mean, half_width = t_interval(values, confidence)
    low, high = ttest_1samp(values, 0).confidence_interval(confidence)
    assert half_width is not None
    assert mean - half_width == pytest.approx(low, abs=1e-12)
    assert mean + half_width == pytest.approx(high, abs=1e-12)


def test_the_interval_of_one_value_and_of_equal_ones() -> None:
    assert t_interval([0.25]) == (0.25, None)
    assert t_interval([0.25, 0.25]) == (0.25, 0.0)


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: RECIPE; see clkit compare --help"),
        (["nmc", "--seeds", "0"], "argument --seeds: '0' is no number of at least 1; see clkit compare --help"),
        (["nmc", "--seeds", "two"], "argument --seeds: 'two' is no number of at least 1; see clkit compare --help"),
        (["nmc", "--seeds"], "argument --seeds: expected one argument; see clkit compare --help"),
        (["nmc", "--data.seed", "3"], "--data.seed is what clkit compare sets for each of its runs; leave it out"),
        (["nmc", "--ckpt_path=x"], "--ckpt_path=x is what clkit compare sets for each of its runs; leave it out"),
        (["nmcc"], "there is no recipe or file 'nmcc', did you mean 'nmc'?"),
        (["nmc", "nmc"], "two recipes are called 'nmc'; give each once, and files names of their own"),
        (["nmc", "--data.bach_size", "3"], "nmc: data: StreamDataModule has no setting 'bach_size', did you mean"),
        (["nmc", "--trainr.x", "3"], "nmc: there is no setting 'trainr.x'"),
        (["joint.yaml"], "the recipe 'joint.yaml' has the name of an outer row; rename the file, or give --no-outer"),
        (["list.yaml"], "list: list.yaml is no file of settings: it holds a list, not names with values"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("joint.yaml").write_text("{}")
    Path("list.yaml").write_text("[1]")
    assert refused(capsys, *arguments).startswith(said)
    assert not Path("runs").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom clkit.cli.main import main\n"
        "for arguments in (['--help'], [], ['nmc', '--seeds', 'x'], ['nmc', '--data.seed', '1']):\n"
        "    try:\n        main(['compare', *arguments])\n    except SystemExit as stopped:\n        pass\n"
        "print([name for name in ('torch', 'lightning', 'timm', 'scipy', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: clkit compare RECIPE")
    assert done.stdout.splitlines()[-1] == "[]"
    assert "95 % t-interval" in " ".join(done.stdout.split())


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for Python")
def test_a_run_is_a_command_whose_output_is_added_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, log = tmp_path / "python", tmp_path / "log.txt"
    python.write_text('#!/bin/sh\necho "$@"\necho problem >&2\nexit 3\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    log.write_text("before\n")
    assert in_a_process(["--config", "a.yaml"], log) == 3
    quiet, command = log.read_text().splitlines()[1].split(" -m ")
    assert log.read_text() == f"before\n{quiet} -m {command}\nproblem\n"
    assert command == "clkit fit --config a.yaml"
    assert quiet.startswith("-Wignore:Experiment logs directory")


@pytest.mark.slow
def test_a_run_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clkit.runs.comparing, "_fit", in_a_process)
    monkeypatch.chdir(tmp_path)
    Path("nmc.yaml").write_text(read_recipe("nmc"))
    assert main(["compare", "nmc", "--seeds", "1", "--no-outer", "--out", "out", "--config", "nmc.yaml"]) == 0
    assert fitted == []
    by_fit = StreamDataModule("digits:flat", ClassIncremental(experiences=5), batch_size=32)
    by_fit.setup("validate")
    assert [stage["classes"] for stage in document("out")["stream"]["experiences"]] == [
        list(experience.classes) for experience in by_fit.experiences
    ]
    printed = Path("out/nmc/seed_0/log.txt").read_text()
    assert "results: out/nmc/seed_0" in printed
    assert "not empty" not in printed  # Lightning warns of folders; what was in this one is kept


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="process groups are killed")
@pytest.mark.parametrize("wait", [0.0, 0.4])
def test_a_comparison_that_was_killed_goes_on_to_the_same_numbers(wait: float, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        recipe("linear.yaml", lambda c: c["data"]["init_args"].update(epochs_per_experience=20))
    command = [sys.executable, "-m", "clkit", "compare", "linear.yaml", "--seeds", "1", "--out"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    process = subprocess.Popen([*command, "out"], cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    last = tmp_path / "out" / "linear" / "seed_0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "compare.json").exists()
    done = subprocess.run([*command, "out"], cwd=tmp_path, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "1/3  fine-tuning, seed 0: finished before, not run again"
    assert lines[1].startswith("2/3  linear, seed 0: resumed from last.ckpt, ")
    assert lines[2].startswith("3/3  joint, seed 0: ")
    assert document(tmp_path / "out") == document(tmp_path / "whole")
