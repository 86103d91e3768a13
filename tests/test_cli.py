"""The command line: what it runs, what it writes, and how it refuses."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from small_runs import put

import clkit
from clkit.cli.main import main
from clkit.cli.settings_help import CLASSES, OPTIONS
from clkit.runs.recipes import read_recipe, recipe_names
from clkit.runs.settings import StreamCLI, line_for_settings

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes the nearest-mean recipe with some changes into the test's folder; gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(*changes: Change, file: str = "mine.yaml") -> str:
        recipe = yaml.safe_load(read_recipe("nmc"))
        recipe["trainer"].update(
            callbacks=[{"class_path": "NMC"}, {"class_path": "StreamEvaluation", "init_args": {"figures": False}}],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        for change in changes:
            change(recipe)
        Path(file).write_text(yaml.safe_dump(recipe))
        return file

    return write


def results(folder: str = "runs") -> dict[str, Any]:
    """The results.json of the only run below a folder."""
    (file,) = Path(folder).rglob("results.json")
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, first: bool = True) -> str:
    """Runs a command that must fail with status 2; gives the line that says why, which is the only one in general."""
    capsys.readouterr()
    try:
        status: Any = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("clkit: ")]
    assert len(lines) == 1
    if first:
        assert error == f"{lines[0]}\n"
    return lines[0].removeprefix("clkit: ")


# ---- without a trainer


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for command in (
        "fit",
        "validate",
        "test",
        "predict",
        "recipes",
        "demo",
        "compare",
        "learn",
        "merge",
        "forget",
        "export",
        "embed",
        "search",
        "complete",
    ):
        assert f"    {command} " in text
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == text


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"clkit {clkit.__version__}\n"


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == recipe_names()
    assert main(["recipes", "aef_ocl"]) == 0
    assert capsys.readouterr().out == read_recipe("aef_ocl")
    assert main(["recipes", "aef_oc"]) == 2
    assert capsys.readouterr().err == "clkit: no recipe 'aef_oc', did you mean 'aef_ocl'?\n"


def test_help_and_recipes_import_nothing_heavy() -> None:
    code = (
        "import sys; from clkit.cli.main import main; main(['recipes']); main([]); "
        "print([name for name in ('torch', 'lightning', 'timm', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fitt"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'fitt'" in line


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_each_command_is_one_screen_of_clkits_settings(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([command, "--config", "x.yaml", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: clkit {command} [--config FILE]")
    assert "--trainer.strategy" in text
    assert "--help.all" in text
    assert len(text.splitlines()) <= 55
    assert max(map(len, text.splitlines())) <= 120


def test_all_settings_are_shown_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help.all"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "usage: clkit [options] fit" in text
    assert {"--trainer.barebones", "--optimizer", "--model", "--data"} <= set(re.findall(r"--[\w.]+", text))


def test_the_short_help_names_what_there_is() -> None:
    import clkit.callbacks
    import clkit.data
    import clkit.models
    from clkit._registry import STRATEGIES

    for option in OPTIONS:
        section, _, name = option.removeprefix("--").partition(".")
        inside = {"data": clkit.data.StreamDataModule, "model": clkit.models.TimmClassifier}
        if section in inside:
            assert name.split(".")[0] in inspect.signature(inside[section]).parameters, option
        elif section == "trainer" and "SETTING" not in name:
            assert name.split(".")[0] in inspect.signature(pl.Trainer).parameters, option
    scenarios = {name for name in clkit.data.__all__ if issubclass_of(clkit.data, name, clkit.data.Scenario)}
    assert set(CLASSES["--data.scenario"]) == scenarios - {"Scenario"}
    assert set(CLASSES["--trainer.strategy"]) == set(STRATEGIES)
    ours = {name for name in clkit.callbacks.__all__ if issubclass_of(clkit.callbacks, name, pl.Callback)}
    assert set(CLASSES["--trainer.callbacks"]) == ours - {"StreamCallback", "FeatureCallback", "HeadCallback"}


def issubclass_of(package: Any, name: str, base: type) -> bool:
    kind = getattr(package, name)
    return isinstance(kind, type) and issubclass(kind, base)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["clkit", "val"], {"validate"}),
        (["clkit", "recipes", "on"], {"onpro"}),
        (["clkit", "compare", "er", "er_"], {"er_ace"}),
        (["clkit", "fit", "--data.sc"], {"--data.scenario", "--data.scenario.experiences"}),
        (["clkit", "fit", "--trainer.strategy", "er"], {"er", "er_ace"}),
        (["clkit", "fit", "--trainer.callbacks+", "A"], {"AEFOCL", "AnaCP"}),
        (["clkit", "forget", "run.ckpt", "--sam"], {"--samples"}),
        (["clkit", "search", "bank.pt", "--que"], {"--queries"}),
        (["clkit", "embed", "run.ckpt", "--part", "te"], {"test"}),
        (["clkit", "learn", "--sh"], {"--shard"}),
        (["clkit", "learn", "--unreadable", "s"], {"stop", "skip"}),
        (["clkit", "search", "bank.pt", "-k", ""], set()),  # a number
        (["clkit", "fit", "--config", "on"], set()),  # a file
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs the shell whose completion is tested")
def test_bash_completes(line: list[str], expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "bash"]) == 0
    words = " ".join(map(shlex.quote, line))
    ask = f'COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _clkit; printf "%s\\n" "${{COMPREPLY[@]}}"'
    script = capsys.readouterr().out + ask
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


# ---- fit, validate, test, predict


def test_a_run_from_fit_to_predict(settings: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    config = settings()
    assert main(["fit", "--config", config]) == 0
    fitted = results()
    (folder,) = Path("runs/nmc").iterdir()
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["init_args"]["batch_size"] == 32
    assert saved["data"]["init_args"]["val_fraction"] == 0.0  # what was not given is there, too
    assert fitted["config"]["data"] == saved["data"]
    assert fitted["config"]["seed_everything"] == 0
    (checkpoint,) = folder.rglob("*.ckpt")

    last = fitted["predictors"]["nmc"]["accuracy_matrix"][-1]
    seen = fitted["predictors"]["nmc"]["accuracy_seen"][-1]
    for command in ("validate", "test"):
        logged = evaluated(command, config, checkpoint)
        assert logged["nmc/accuracy_seen"] == pytest.approx(seen, abs=1e-7)

    assert main(["predict", "--config", config, "--ckpt_path", str(checkpoint)]) == 0
    (file,) = Path("runs").rglob("predictions.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert len(rows) == 898
    for index, accuracy in enumerate(last):
        own = [row for row in rows if int(row["target"]) in (2 * index, 2 * index + 1)]
        assert sum(row["nmc"] == row["target"] for row in own) / len(own) == pytest.approx(accuracy, abs=1e-12)
    assert "Traceback" not in capsys.readouterr().err


def evaluated(command: str, config: str, checkpoint: Path) -> dict[str, float]:
    """The numbers that a command of evaluation logs."""
    cli = StreamCLI([command, "--config", config, "--ckpt_path", str(checkpoint)])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def test_the_printed_configuration_gives_the_same_numbers(
    settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(lambda c: c["trainer"]["callbacks"].append({"class_path": "StreamProgressBar"}))  # switched off
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", config, "--data.seed", "3", "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "num_classes" in printed
    Path("printed.yaml").write_text(printed)
    assert main(["fit", "--config", config, "--data.seed", "3"]) == 0
    assert main(["fit", "--config", "printed.yaml"]) == 0
    first, second = (json.loads(file.read_text()) for file in sorted(Path("runs").rglob("results.json")))
    assert first["predictors"] == second["predictors"]
    assert first["seed"] == 3


def test_the_defaults_alone_are_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = StreamCLI([], run=False)
    assert type(cli.model).__name__ == "TimmClassifier"
    assert type(cli.datamodule).__name__ == "StreamDataModule"


def test_the_number_of_outputs_follows_the_data_and_contradictions_are_refused(
    settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(
        lambda c: c["model"]["init_args"].update(model_kwargs={"in_features": 64}),
        lambda c: c["trainer"].update(strategy="auto"),
    )
    cli = StreamCLI(["fit", "--config", config])
    assert cli.model.network.num_classes == 10
    said = refused(capsys, "fit", "--config", config, "--model.num_classes", "7", first=False)
    assert said.startswith("num_classes=7 of the model is too small for the data, whose class ids need 10 outputs")


@pytest.mark.warns("it has learned nothing")
def test_results_need_a_folder(settings: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(lambda c: c["trainer"].update(logger=False))
    said = refused(capsys, "fit", "--config", config, first=False)
    assert said.startswith("trainer.logger is false and trainer.default_root_dir is not set")
    assert main(["fit", "--config", config, "--trainer.default_root_dir", "out"]) == 0
    assert Path("out/config.yaml").is_file()
    assert Path("out/results.json").is_file()
    before = Path("out/config.yaml").read_text()
    assert main(["validate", "--config", config, "--trainer.default_root_dir", "out", "--data.seed", "9"]) == 0
    assert Path("out/config.yaml").read_text() == before  # the fit's results keep the fit's settings


# ---- names in YAML


@pytest.mark.warns("feature vectors of a batch are zero")
def test_short_names_of_classes_are_enough(settings: Callable[..., str], tmp_path: Path) -> None:
    import numpy as np

    data = {"x_train": np.zeros((6, 4, 4), np.uint8), "y_train": np.arange(6) % 3}
    np.savez(tmp_path / "tiny.npz", x_test=data["x_train"], y_test=data["y_train"], **data)

    def everything(c: dict[str, Any]) -> None:
        c["data"]["init_args"].update(
            source={"class_path": "NpzImages", "init_args": {"name": "tiny"}},
            root=str(tmp_path),
            scenario={
                "class_path": "LongTailed",
                "init_args": {
                    "inner": {"class_path": "TaskIncremental", "init_args": {"experiences": 3}},
                    "factor": 0.5,
                },
            },
            preprocessing={"class_path": "Preprocessing", "init_args": {"size": 2}},
        )
        c["trainer"].update(
            strategy={"class_path": "GradientFreeStrategy", "init_args": {"warmup_epochs": 0}},
            enable_progress_bar=True,
            callbacks=[
                *[{"class_path": name} for name in ("AEFOCL", "LDA", "StreamProgressBar", "ModelCheckpoint")],
                {"class_path": "NMC", "init_args": {"metric": "cosine"}},
                {"class_path": "StreamEvaluation", "init_args": {"figures": False}},
            ],
            logger=[
                {"class_path": "CSVLogger", "init_args": {"save_dir": "runs"}},
                {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs"}},
            ],
        )

    config = settings(everything)
    cli = StreamCLI(["fit", "--config", config])
    assert type(cli.trainer.strategy).__name__ == "GradientFreeStrategy"
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == ["CSVLogger", "TensorBoardLogger"]
    assert cli.datamodule.scenario.inner.experiences == 3
    assert set(results()["predictors"]) == {"aef_ocl", "lda", "nmc"}
    assert results()["stream"]["scenario"] == "long_tailed"


class OwnModule(pl.LightningModule):
    """A module of the user's."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnData(pl.LightningDataModule):
    """A data module of the user's: one fit is one experience."""

    def __init__(self, rows: int = 12) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> Any:
        data = torch.utils.data.TensorDataset(torch.randn(self.rows, 64), torch.arange(self.rows) % 3)
        return torch.utils.data.DataLoader(data, batch_size=4)

    val_dataloader = train_dataloader


def own_reader(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A reader of the user's."""
    return batch[0], batch[1]


def test_classes_of_the_user_work_by_dotted_path(settings: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_code", sys.modules[__name__])

    def own(c: dict[str, Any]) -> None:
        c["model"] = {"class_path": "own_code.OwnModule", "init_args": {"width": 4}}
        c["data"] = {"class_path": "own_code.OwnData", "init_args": {"rows": 15}}
        c["trainer"].update(
            strategy="auto",
            max_epochs=1,
            callbacks=[{"class_path": "NMC", "init_args": {"batch_reader": "own_code.own_reader"}}],
        )

    cli = StreamCLI(["fit", "--config", settings(own)])
    assert type(cli.model).__name__ == "OwnModule"
    (nmc,) = (callback for callback in cli.trainer.callbacks if type(callback).__name__ == "NMC")
    assert nmc.head.classes.tolist() == [0, 1, 2]


# ---- refusals: what jsonargparse finds


def called(name: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options} if options else {"class_path": name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("data.bach_size", 3), "data: StreamDataModule has no setting 'bach_size', did you mean 'batch_size'?"),
        (
            put("data.scenario.experience", 3),
            "data.scenario: ClassIncremental has no setting 'experience', did you mean",
        ),
        (put("trainer.max_epoch", 3), "there is no setting 'trainer.max_epoch', did you mean 'trainer.max_epochs'?"),
        (put("data.batch_size", "many"), "data.batch_size: 'many' does not fit, expected int"),
        (
            put("trainer.callbacks", [called("AEFOCL", lift=200)]),
            "trainer.callbacks.lift: '200' does not fit, expected the settings of Lift or None",
        ),
        (
            put("trainer.callbacks", [called("NMC"), called("AEFOCL", gamma="x")]),
            "trainer.callbacks.gamma: 'x' does not fit, expected float",
        ),
        (
            put("trainer.strategy", called("ERStrategy", memory={"polcy": "uniform"})),
            "trainer.strategy.memory: there is no setting 'polcy', did you mean 'policy'?",
        ),
        (
            put("trainer.strategy", called("OnProStrategy", memory={"policy": "unifrom"})),
            "trainer.strategy.memory.policy: 'unifrom' does not fit, expected Literal['uniform', 'class_balanced']",
        ),
        (
            put("trainer.strategy", called("OnProStrategy", memory="sharded")),
            "trainer.strategy.memory: 'sharded' does not fit, expected a group of settings",
        ),
        (put("data", called("StreamDataModul")), "data: there is no class 'StreamDataModul', did you mean"),
        (put("data.source", called("NpzImage", name="x")), "data.source: there is no class 'NpzImage', did you mean"),
        (
            put("trainer.strategy", called("GradientFreeStrategy", warmup_epoch=3)),
            "trainer.strategy: GradientFreeStrategy has no setting 'warmup_epoch', did you mean 'warmup_epochs'?",
        ),
        (put("model", called("nowhere.Net")), "model: No module named 'nowhere'"),
    ],
)
def test_a_wrong_setting_in_the_file_is_named_first(
    change: Change, said: str, settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "fit", "--config", settings(change)).startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainr.max_epochs", "3"], "there is no setting 'trainr.max_epochs', did you mean 'trainer.max_epochs'?"),
        (["--data.bach_size", "3"], "data: StreamDataModule has no setting 'bach_size', did you mean 'batch_size'?"),
        (["--trainer.logger", "CSVLoger"], "trainer.logger: there is no class 'CSVLoger', did you mean 'CSVLogger'?"),
        (["--model", "Nett"], "model: there is no class 'Nett'; give its dotted path, package.module.Class"),
    ],
)
def test_a_wrong_option_is_named_first(
    arguments: list[str], said: str, settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "fit", "--config", settings(), *arguments) == f"{said}; see clkit fit --help"


def test_a_setting_without_neighbours_is_shown_what_there_is(
    settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", settings(lambda c: c.update(xyzzy=3)), "--verbose"])
    said, *report = capsys.readouterr().err.removeprefix("clkit: ").splitlines()
    assert "xyzzy" in " ".join(report[:-1])  # jsonargparse's own
    assert report[-1] == "all settings: clkit fit --help.all"
    assert said.startswith("there is no setting 'xyzzy'; at the top there are config, seed_everything, trainer, model")


def test_files_that_cannot_be_read_are_named(settings: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "fit", "--config", "nothere.yaml")
    assert said.startswith("config: File does not exist: ")
    assert said.endswith("nothere.yaml'; see clkit fit --help")
    settings()
    Path("broken.yaml").write_text("trainer:\n  max_epochs: [1\nmodel: x\n")
    said = refused(capsys, "fit", "--config", "broken.yaml")
    assert said.startswith("broken.yaml is no file of settings: ")
    assert "expected ',' or ']'" in said
    assert "line 3" in said


def test_a_message_that_nobody_foresaw_is_shown_as_it_is() -> None:
    assert line_for_settings("something\n  quite new") == "something quite new"


# ---- refusals: what clkit finds


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("trainer.strategy", "xyz"), "trainer.strategy: there is no 'xyz'; clkit's own are gradient_free"),
        (put("trainer.accelerator", "gpux"), "trainer.accelerator: there is no 'gpux', did you mean 'gpu'?"),
        (put("trainer.max_epochs", 3), "max_epochs=3 ends before the stream does"),
        (put("data.root", "/nowhere"), "data.root is '/nowhere', which is not a folder"),
    ],
)
def test_a_setting_that_clkit_refuses_is_one_line(
    change: Change, said: str, settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(change)
    assert said in refused(capsys, "fit", "--config", config, first=False)
    assert sorted(path.name for path in Path.cwd().iterdir()) == [config]  # no folder of a run that never was


def test_what_lightning_refuses_is_one_line_and_leaves_a_finished_run_alone(
    settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    place = called("CSVLogger", save_dir="runs", name="nmc", version="")
    config = settings(put("trainer.logger", [place]))
    assert main(["fit", "--config", config]) == 0
    before = {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}
    del before[Path("runs/nmc/metrics.csv")]  # Lightning's logger begins it anew
    wrong = ["--trainer.max_epochs", "3", "--data.seed", "7"]
    assert "max_epochs=3" in refused(capsys, "fit", "--config", config, *wrong, first=False)
    assert {file: file.read_bytes() for file in before} == before
    wrong = ["--trainer.limit_train_batches", "1.5"]
    said = refused(capsys, "fit", "--config", config, *wrong, first=False)
    assert said.startswith("Lightning refuses the settings")
    assert "limit_train_batches" in said


def test_verbose_adds_the_traceback_of_a_refusal(
    settings: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", settings(put("trainer.max_epochs", 3)), "--print_config", "--verbose"])
    capsys.readouterr()
    assert main(["fit", "--config", "mine.yaml", "--verbose"]) == 2
    *report, last = capsys.readouterr().err.splitlines()
    assert last.startswith("clkit: max_epochs=3 ends before the stream does")
    assert any(line.startswith("Traceback") for line in report)


def test_an_error_of_the_users_code_keeps_its_traceback(
    settings: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "own_code", sys.modules[__name__])

    def broken(self: OwnModule, batch: Any, batch_idx: int) -> torch.Tensor:
        raise ValueError("a bug of the user's")

    monkeypatch.setattr(OwnModule, "training_step", broken)
    config = settings(
        lambda c: c.update(model={"class_path": "own_code.OwnModule"}), lambda c: c["trainer"].update(strategy="auto")
    )
    with pytest.raises(ValueError, match="a bug of the user's"):
        main(["fit", "--config", config])


def test_the_installed_command_is_this_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clkit", "fit", "--data.root", "x", "--trainer.strategy", "gradient_fre"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "clkit: trainer.strategy: there is no 'gradient_fre', did you mean 'gradient_free'?"
    )
