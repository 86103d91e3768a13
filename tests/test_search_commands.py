"""Galleries on the command line: what one model wrote, a later one finds; and what is refused."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread
from sklearn.datasets import load_digits

from clkit.callbacks import attach_simplex_head
from clkit.cli.main import main
from clkit.methods import FeatureBank, Neighbours, SimplexHead
from clkit.models import TimmClassifier
from clkit.report.neighbours import RIGHT, UNKNOWN, WRONG, neighbours_table, plot_neighbours
from clkit.runs.recipes import recipe_folder

SIGNATURE = "axis-simplex-v1/32"


class Runs(NamedTuple):
    """Checkpoints: of a model with four classes, of one that went on from it to six, and of one without vertices."""

    old: str
    new: str
    plain: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    simplex = yaml.safe_load((recipe_folder() / "d_simplex.yaml").read_text())
    simplex["data"]["init_args"]["source"] = "digits"
    simplex["trainer"]["callbacks"] = [c for c in simplex["trainer"]["callbacks"] if "Stream" not in c["class_path"]]
    plain = yaml.safe_load((recipe_folder() / "nmc.yaml").read_text())
    plain["trainer"]["callbacks"] = [{"class_path": "NMC"}, {"class_path": "ModelCheckpoint"}]
    plain["data"]["init_args"]["stop_after"] = 1
    with contextlib.chdir(folder):
        for name, settings in (("simplex", simplex), ("plain", plain)):
            settings["trainer"]["logger"][0]["init_args"]["name"] = name
            Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
        old = folder / "runs/simplex/version_0/checkpoints/last.ckpt"
        assert main(["fit", "--config", "simplex.yaml", *quiet, "--data.stop_after", "1"]) == 0
        assert main(["fit", "--config", "simplex.yaml", *quiet, "--data.stop_after", "2", "--ckpt_path", str(old)]) == 0
        assert main(["fit", "--config", "plain.yaml", *quiet]) == 0
    (other,) = (folder / "runs/plain").rglob("*.ckpt")
    return Runs(str(old), str(folder / "runs/simplex/version_1/checkpoints/last.ckpt"), str(other))


def digits(part: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Even rows of scikit-learn's are the training part, odd ones the test part."""
    images, labels = load_digits(return_X_y=True)
    rows = slice(0 if part == "train" else 1, None, 2)
    return images[rows].reshape(-1, 1, 8, 8) / 16, labels[rows]


def by_hand(checkpoint: str, part: str) -> np.ndarray[Any, Any]:
    """Unit features in float64 of a network that is built, filled and run without a trainer."""
    settings = yaml.safe_load((recipe_folder() / "d_simplex.yaml").read_text())["model"]["init_args"]
    model = TimmClassifier(settings["backbone"], small_images=True, model_kwargs=settings["model_kwargs"])
    attach_simplex_head(model, 32)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    model.double().eval()
    heard: list[torch.Tensor] = []
    model.network.fc.head.junction.register_forward_hook(lambda layer, inputs, output: heard.append(output))
    with torch.no_grad():
        model((torch.from_numpy(digits(part)[0]).expand(-1, 3, -1, -1) - 0.3) / 0.38)
    features = heard[0].numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_a_gallery_of_an_old_model_is_searched_by_a_newer_one(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    bank, picture = str(tmp_path / "gallery.pt"), str(tmp_path / "found.png")
    assert main(["embed", runs.old, "--data", "digits", "-o", bank]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"wrote {re.escape(bank)}: 899 rows by last\.ckpt [0-9a-f]{{12}}", said[0])
    assert said[1] == f"  899 x 31 numbers, float32, of {SIGNATURE}"
    written, gallery = FeatureBank.load(bank), by_hand(runs.old, "train")
    assert np.abs(written.features.numpy() - gallery).max() < 1e-4
    assert written.labels.tolist() == digits("train")[1].tolist()
    assert written.names == [f"digits/train/{row}" for row in range(899)]

    assert main(["search", bank, "--queries", runs.new, "--data", "digits", "-k", "3", "--picture", picture]) == 0
    said = capsys.readouterr().out.splitlines()
    cosines = by_hand(runs.new, "test") @ gallery.T
    order = np.argsort(-cosines, axis=1)[:, :3]
    right = digits("train")[1][order] == digits("test")[1][:, None]
    (line,) = [line for line in said if line.startswith("recall@1 ")]
    one, three = (float(number) for number in re.findall(r" ([\d.]+) %", line))
    assert line.endswith(" % of 898 queries")
    assert one == pytest.approx(100 * right[:, 0].mean(), abs=0.25)  # two rows may change their places by rounding
    assert three == pytest.approx(100 * right.any(axis=1).mean(), abs=0.25)
    assert one > 30  # ten classes, of which the old model has learned four
    rows = [re.findall(r"[\d.]+", line) for line in said if line.startswith("│")]
    assert [int(row[0]) for row in rows] == np.linspace(0, 897, 8).round().astype(int).tolist()
    for row in rows:
        assert int(row[1]) == digits("test")[1][int(row[0])]
        assert [float(score) for score in row[3::2]] == pytest.approx(-np.sort(-cosines[int(row[0])])[:3], abs=6e-4)
    assert said[-1] == f"wrote {picture}"
    assert imread(picture).shape[2] == 4
    assert not any("another vertex" in line for line in said)  # though the old model knows four classes alone


def test_a_gallery_whose_classes_have_other_vertices_is_said(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One party took vertices from below and one from above: queries of a class never find its rows."""
    vertices = SimplexHead(32).prototypes(31 - torch.arange(10)).float()
    bank = FeatureBank(31, SIGNATURE)
    bank.add(vertices, torch.arange(10), model="other side", signature=SIGNATURE)
    bank.save(tmp_path / "gallery.pt")
    assert main(["search", str(tmp_path / "gallery.pt"), "--queries", runs.new, "--data", "digits", "-k", "1"]) == 0
    said = capsys.readouterr().out
    nearest = (by_hand(runs.new, "test") @ SimplexHead(32).prototypes().numpy().T).argmax(axis=1)
    counts = [np.bincount(nearest[digits("test")[1] == label]) for label in range(10)]
    most = [int(each.argmax()) if 2 * each.max() > each.sum() else None for each in counts]
    own = [label for label, vertex in enumerate(most) if vertex == label and most.count(vertex) == 1]
    assert own  # those that the model has learned, and that no unlearned class is taken for
    (line,) = [line for line in said.splitlines() if "another vertex" in line]
    assert line.startswith(f"  {len(own)} labels have another vertex for the model of the queries")
    assert f"(label {own[0]}: {own[0]} and {31 - own[0]}), so that they cannot be found" in line


def test_banks_grow_and_may_be_half_as_large(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = str(tmp_path / "gallery.pt")
    assert main(["embed", runs.old, "--data", "digits", "--half", "-o", bank]) == 0
    before = FeatureBank.load(bank)
    assert main(["embed", runs.new, "--data", "digits", "--part", "test", "-o", bank, "--add"]) == 0
    assert " 898 rows by last.ckpt " in capsys.readouterr().out
    both = FeatureBank.load(bank)
    assert both.features.dtype == torch.float16
    assert torch.equal(both.features[:899], before.features)
    assert list(both.models.values()) == [899, 898]
    assert np.abs(both.features[899:].float().numpy() - by_hand(runs.new, "test")).max() < 1e-3

    assert main(["search", bank, "--queries", runs.new, "--data", "digits", "digits:shifts", "-k", "1"]) == 0
    said = capsys.readouterr().out
    assert "│ digits:shifts/test/" in said
    assert "898 of the queries are in the gallery themselves" in said
    assert "  digits:shifts: no source of the gallery (digits); equal ids count as the same class" in said


def test_images_that_are_gone_cost_the_picture_alone(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = FeatureBank(31, SIGNATURE)
    bank.add(torch.eye(31), torch.arange(31) % 10, model="m", signature=SIGNATURE, names=["nowhere"] * 31)
    bank.save(tmp_path / "gallery.pt")
    line = ["search", str(tmp_path / "gallery.pt"), "--queries", runs.new, "--data", "digits"]
    assert main([*line, "--picture", str(tmp_path / "found.png")]) == 2
    said, error = capsys.readouterr()
    assert " % of 898 queries" in said
    assert error == "clkit: the row 'nowhere' does not say by source/part/number where its image is\n"
    assert not (tmp_path / "found.png").exists()


def test_refusals_are_one_line(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank, other, empty = (str(tmp_path / f"{name}.pt") for name in ("gallery", "other", "empty"))
    assert main(["embed", runs.old, "--data", "digits", "-o", bank]) == 0
    before = Path(bank).read_bytes()
    others = FeatureBank(31, "orthoplex")
    others.add(torch.eye(31), model="m", signature="orthoplex")
    others.save(other)
    FeatureBank(31, SIGNATURE).save(empty)
    search = ["--data", "digits", "--queries", runs.new]
    lines = {
        ("embed", runs.old, "--data", "digits", "-o", bank): "gallery.pt' exists; give another name, or --force",
        ("embed", runs.old, "--data", "digits", "-o", bank, "--add"): "has the train part of digits by this model",
        ("embed", runs.new, "--data", "digits", "-o", bank, "--add", "--half"): "stores float32 and goes on so",
        ("embed", runs.new, "--data", "digits", "-o", f"{bank}.new", "--add"): "there is no bank to add to",
        ("embed", runs.new, "--data", "digits", "-o", other, "--add"): "has features for the prototypes 'orthoplex'",
        ("embed", runs.old, "--data", "digit", "-o", f"{bank}.new"): "did you mean 'digits'?",
        ("embed", runs.old, "--data", "digits", "digits", "-o", f"{bank}.new"): "'digits' is given twice",
        ("embed", runs.plain, "--data", "digits", "-o", f"{bank}.new"): "has no simplex head",
        ("embed", f"{runs.old}x", "--data", "digits", "-o", f"{bank}.new"): "is not a file; give the path of a check",
        ("search", other, *search): "has features for the prototypes 'orthoplex'",
        ("search", empty, *search): "the bank is empty",
        ("search", f"{bank}.new", *search): "gallery.pt.new' is not a file",
        ("search", bank, *search, "-k", "900"): "k must be at most 899",
        ("search", bank, *search, "--picture", "found.jpg"): "must end in .png",
        ("search", bank, *search, "--picture", str(tmp_path / "no" / "found.png")): "there is no folder",
    }
    for line, said in lines.items():
        capsys.readouterr()
        assert main(line) == 2, line
        error = capsys.readouterr().err
        assert error.startswith("clkit: "), line
        assert said in error, line
        assert error.count("\n") == 1, line
    assert Path(bank).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.pt", "gallery.pt", "other.pt"]


def test_table_and_picture_show_right_wrong_and_unknown() -> None:
    labels = torch.tensor([[7, 1, -1], [1, 1, 1]])
    found = Neighbours(torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.7, 0.6]]), torch.zeros_like(labels), labels)
    table = neighbours_table(["0", "12"], [7, -1], found, {1: "one"}, "nearest")
    cells = [list(column.cells) for column in table.columns]
    assert cells[:2] == [["0", "12"], ["7", "-"]]
    assert [[(str(cell), cell.style) for cell in column] for column in cells[2:]] == [
        [("7 0.900", RIGHT), ("one 0.800", UNKNOWN)],
        [("one 0.500", WRONG), ("one 0.700", UNKNOWN)],
        [("- 0.100", UNKNOWN), ("one 0.600", UNKNOWN)],
    ]
    images = [torch.full((3, 4, 5), 255, dtype=torch.uint8), torch.rand(1, 80, 80)]
    figure = plot_neighbours(images, [images[:1] * 3, images[1:] * 3], [7, -1], found, {})
    shown = {axes.get_title(): axes for axes in figure.axes}
    assert [shown[title].spines["top"].get_edgecolor()[:3] for title in ("7 0.900", "1 0.500", "- 0.100")] == [
        pytest.approx([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for colour in (RIGHT, WRONG, UNKNOWN)
    ]
    assert shown["7"].images[0].get_array().shape == (4, 5, 3)
    assert float(shown["7"].images[0].get_array().max()) == 1.0
