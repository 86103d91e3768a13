"""Edits on the command line: what is written, what the log says, what takes it back, and what is refused."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.image import imread
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from clkit import load_head
from clkit.cli.main import main
from clkit.methods import GradientEditor, LocalityReport
from clkit.models import TimmClassifier
from clkit.report.corrections import edits_table, plot_edit
from clkit.runs.correcting import logged_edits
from clkit.runs.recipes import recipe_folder


def fitted(folder: Path, name: str, settings: dict[str, Any], *callbacks: str) -> Path:
    """A run of the command line on digits, all classes at once."""
    trainer = settings["trainer"]
    settings["data"]["init_args"].update(scenario={"class_path": "ClassIncremental", "init_args": {"experiences": 1}})
    trainer["callbacks"] = [{"class_path": "ModelCheckpoint"}, *({"class_path": each} for each in callbacks)]
    trainer["logger"][0]["init_args"]["name"] = name
    with contextlib.chdir(folder):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        assert main(["fit", "--config", f"{name}.yaml", *quiet]) == 0
    (checkpoint,) = (folder / "runs" / name).rglob("*.ckpt")
    shutil.copy(checkpoint, checkpoint.parent / "run.ckpt")
    return folder


@pytest.fixture(scope="module")
def head_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learned a head on pixels."""
    recipe = yaml.safe_load((recipe_folder() / "nmc.yaml").read_text())
    return fitted(tmp_path_factory.mktemp("head"), "head", recipe, "NMC")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained a small network."""
    recipe = yaml.safe_load((recipe_folder() / "er.yaml").read_text())
    recipe["data"]["init_args"].update(source="digits", batch_size=64)
    recipe["trainer"]["strategy"] = "auto"
    return fitted(tmp_path_factory.mktemp("runs"), "trained", recipe)


def checkpoint_of(folder: Path, name: str, fresh: str) -> str:
    """A copy of the run's checkpoint beside it."""
    (found,) = (folder / "runs" / name).rglob("run.ckpt")
    shutil.copy(found, found.with_name(f"{fresh}.ckpt"))
    return str(found.with_name(f"{fresh}.ckpt"))


def network(folder: Path, checkpoint: str) -> Any:
    """The network of a file, built and filled without clkit's reading of runs."""
    settings = yaml.safe_load((folder / "trained.yaml").read_text())["model"]["init_args"]
    arguments = {name: settings[name] for name in ("small_images", "model_kwargs") if name in settings}
    model = TimmClassifier(settings["backbone"], num_classes=10, **arguments)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return model.eval()


def rows() -> tuple[Tensor, Tensor]:
    """The test part, odd rows of scikit-learn's, as the network takes it."""
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images[1::2]).float().view(-1, 1, 8, 8) / 16
    return ((x - 0.3) / 0.38).expand(-1, 3, -1, -1), torch.from_numpy(labels[1::2])


def wrong_row(answers: Tensor) -> int:
    return int((answers != rows()[1]).nonzero()[0, 0])


@pytest.mark.slow
def test_an_edit_is_written_listed_and_taken_back(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoint_of(runs, "trained", "edited")
    before = torch.load(checkpoint, weights_only=True)
    x, y = rows()
    with torch.no_grad():
        row = wrong_row(network(runs, checkpoint)(x).argmax(1))
    label, picture = str(int(y[row])), runs / "edit.png"
    stored = (torch.from_numpy(load_digits().images[1::2][row]) / 16 * 255).round().to(torch.uint8)
    Image.fromarray(stored.numpy()).save(runs / "digit.png")
    given = ["edit", checkpoint, "--image", str(runs / "digit.png"), "--label", label, "--picture", str(picture)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the editor is not trained, which is said
        assert main(given) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {checkpoint}: edit 0 of the network, applied at scale ")
    assert f"-> {label}, p of {label} " in said
    assert "validation samples keep their answer" in said
    assert imread(picture).ndim == 3
    with torch.no_grad():
        assert int(network(runs, checkpoint)(x[row : row + 1]).argmax(1)) == int(y[row])
    edited = torch.load(checkpoint, weights_only=True)
    moved = [name for name, value in edited["state_dict"].items() if not torch.equal(value, before["state_dict"][name])]
    assert moved
    assert all(name.endswith("weight") for name in moved)
    for name, value in before.items():  # what else a resume needs is untouched
        if name not in ("state_dict", "callbacks"):
            assert str(edited[name]) == str(value), name
    assert main(["edits", checkpoint]) == 0
    (entry,) = logged_edits(checkpoint)
    assert (entry.id, entry.label, entry.after, entry.route) == (0, [int(y[row])], [int(y[row])], "editor")
    assert "network" in capsys.readouterr().out
    other = str(Path(checkpoint).with_name("without.ckpt"))
    assert main(["revert", checkpoint, "0", "-o", other]) == 0
    assert capsys.readouterr().out == f"wrote {other} without edit 0; left: none\n"
    left = torch.load(other, weights_only=True)
    assert all(torch.equal(value, before["state_dict"][name]) for name, value in left["state_dict"].items())
    assert len(logged_edits(checkpoint)) == 1
    edited["state_dict"][moved[0]] += 0.01  # something else has changed the network since
    torch.save(edited, Path(checkpoint).with_name("moved.ckpt"))
    changed = str(Path(checkpoint).with_name("moved.ckpt"))
    assert main(["revert", changed, "0"]) == 2
    assert "--inexact" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="not to the bit"):
        assert main(["revert", changed, "0", "--inexact"]) == 0
    weight = torch.load(changed, weights_only=True)["state_dict"][moved[0]]
    torch.testing.assert_close(weight, before["state_dict"][moved[0]] + 0.01, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main(["edits", other]) == 0
    assert "has no edits" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["edit", other, *given[2:6], "--no-guard"]) == 0  # a new editor takes its statistics all the same
    assert "validation samples keep their answer" in capsys.readouterr().out


def test_where_a_head_decides_it_is_corrected_in_the_file(
    head_run: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    checkpoint = checkpoint_of(head_run, "head", "edited")
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[1::2]).double() / 16, torch.from_numpy(labels[1::2])
    row = int((load_head(checkpoint, "nmc").predict(x) != y).nonzero()[0, 0])
    given = ["--image", f"digits:flat/test/{row}", "--label", str(int(y[row])), "--no-guard"]
    assert main(["edit", checkpoint, *given]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {checkpoint}: edit 0 of the head 'nmc', applied at scale ")
    (entry,) = logged_edits(checkpoint)
    assert (entry.route, entry.after) == ("exact", [int(y[row])])
    assert entry.scale in (30.0, 90.0, 300.0)
    assert int(load_head(checkpoint, "nmc").predict(x[row : row + 1])) == int(y[row])
    assert int(load_head(checkpoint, "nmc").counts.sum()) == 899 + entry.scale
    assert main(["edits", checkpoint]) == 0
    assert "nmc" in capsys.readouterr().out
    assert main(["revert", checkpoint, "0"]) == 0
    assert capsys.readouterr().out == f"wrote {checkpoint} without edit 0; left: none\n"
    assert int(load_head(checkpoint, "nmc").predict(x[row : row + 1])) != int(y[row])
    assert main(["edits", checkpoint]) == 0
    assert "has no edits" in capsys.readouterr().out
    assert main(["revert", checkpoint, "3"]) == 2
    assert "there is no edit 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--image", "no.png", "--label", "1"], "--image 'no.png' is no file"),
        (["--image", "digits:flat/test/5000", "--label", "1"], "--image 'digits:flat/test/5000'"),
        (["--image", "digits:flat/test/0", "--label", "cat"], "--label 'cat' is the name of no class"),
        (["--image", "digits:flat/test/0", "--label", "12"], "--label 12 is no class of this run"),
        (["--image", "digits:flat/test/0", "--label", "1", "2"], "--label must be one for each --image"),
        (["--image", "digits:flat/test/0", "--label", "1", "--picture", "a.jpg"], "--picture a.jpg must end in .png"),
        (["--image", "digits:flat/test/0", "--label", "1", "--head", "lda"], "there is no head 'lda'"),
        (["--image", "digits:flat/test/0", "--label", "1", "--layers", "x", "--editor", "y"], "leave one out"),
    ],
)
def test_what_is_wrong_is_said_by_its_argument(
    head_run: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    checkpoint = checkpoint_of(head_run, "head", "refused")
    assert main(["edit", checkpoint, *given]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told


def test_a_refused_edit_has_an_exit_status_and_files_are_replaced_on_request_alone(
    head_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(head_run, "head", "other")
    before, other = Path(checkpoint).read_bytes(), Path(checkpoint).with_name("there.ckpt")
    _, y = rows()
    wrong = str((int(y[0]) + 1) % 10)
    given = ["edit", checkpoint, "--image", "digits:flat/test/0", "--label", wrong]
    assert main([*given, "-o", str(other)]) == 1
    assert capsys.readouterr().out.startswith("refused: the accuracy on 511 reference images drops by")
    assert Path(checkpoint).read_bytes() == before
    assert not other.exists()
    other.write_text("")
    for command in ([*given, "--no-guard"], ["revert", str(other), "0"]):
        target = other if command[0] == "edit" else Path(checkpoint)
        assert main([*command, "-o", str(target)]) == 2
        assert f"output={str(target)!r} exists; give another name, or --force" in capsys.readouterr().err
        assert main([*command, "-o", str(target), "--force"]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {checkpoint} without edit 0; left: none\n")


@pytest.mark.slow
def test_the_editor_that_a_run_has_trained_is_the_one_that_edits_it(
    runs: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    checkpoint = checkpoint_of(runs, "trained", "with_editor")
    (x, y), model = rows(), network(runs, checkpoint)
    editor = GradientEditor(model, example=x[:2])
    editor.fit_statistics([(x[:50], (y[:50] + 1) % 10)])
    with torch.no_grad():
        row = wrong_row(model(x).argmax(1))
        for parameter in editor.networks.networks.parameters():
            parameter.add_(1e-3)
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "strategy": {"editor": editor.state_dict()}}, checkpoint)
    given = ["edit", checkpoint, "--image", f"digits/test/{row}", "--label", str(int(y[row])), "--no-guard"]
    assert main(given) == 0
    assert not [each for each in recwarn if "the editor is not trained" in str(each.message)]
    (state,) = (each for key, each in torch.load(checkpoint, weights_only=True)["callbacks"].items() if "MEND" in key)
    for name, value in editor.networks.state_dict().items():
        assert torch.equal(state["editor"]["networks"][name], value), name
    capsys.readouterr()
    Image.new("L", (3, 3)).save(runs / "small.png")
    two = ["--image", str(runs / "small.png"), f"digits/test/{row}", "--label", "1", "2"]
    assert main(["edit", checkpoint, *two]) == 2
    assert "inputs of several shapes" in capsys.readouterr().err


def test_what_cannot_be_taken_back_is_said(head_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoint_of(head_run, "head", "plain")
    assert main(["revert", checkpoint, "3"]) == 2
    assert "has no edits" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["revert", checkpoint, "-1"])


def test_the_picture_shows_both_answers_views_and_what_else_moved() -> None:
    report = LocalityReport(50, 0.96, 4, 0.5, 0.01, 0.9, 0.88, 0.02, 0.02, {3: 1})
    before, after = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.1, 0.3, 0.4])
    views = [torch.rand(1, 8, 8) for _ in range(3)]
    figure = plot_edit(views[0], before, after, 3, equivalents=views, locality=report, names={3: "cat"})
    upper = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in upper] == ["wanted: cat", "probability", "reference: same answer"]
    bars = {bar.get_width() for bar in upper[1].patches}
    assert {0.4, 0.7} <= {round(each, 6) for each in bars}
    assert upper[2].get_xlabel() == "accuracy 90.0 -> 88.0 %\nlost: 1 of class cat"
    assert len(figure.axes) == 6
    table = edits_table([], {}, "none")
    assert table.row_count == 0


@pytest.mark.slow
def test_edits_of_another_editor_than_the_runs_own_are_taken_back(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(runs, "trained", "other_editor")
    (config,) = (runs / "runs" / "trained").rglob("config.yaml")
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] += [{"class_path": "MEND", "init_args": {"editor": {"rank": 8}, "guard": None}}]
    own = runs / "with_mend.yaml"
    own.write_text(yaml.safe_dump(settings))
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    (x, y), places = rows(), ["--config", str(own)]
    with torch.no_grad():
        row = wrong_row(network(runs, checkpoint)(x).argmax(1))
    given = ["edit", checkpoint, "--image", f"digits/test/{row}", "--label", str(int(y[row])), *places]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the editor is not trained, which is said
        assert main([*given, "--layers", "head"]) == 0
        edited = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert [name for name in before if not torch.equal(edited[name], before[name])] == ["network.fc.weight"]
        assert main([*given[:3], f"digits/test/{row + 1}", *given[4:]]) == 0  # by the editor of the first edit
        assert main([*given, "--layers", "auto"]) == 2
    assert "leave the editor out (editor=None, no --editor and --layers)" in capsys.readouterr().err
    numbers = [str(entry.id) for entry in logged_edits(checkpoint)]
    assert main(["revert", checkpoint, *numbers, *places]) == 0
    after = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(after[name], before[name]) for name in before)
