"""Recipes: every file is built by the command line itself, and those of the papers run on small trees of their form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import clkit.runs.recipes
from clkit.callbacks import DST
from clkit.cli.main import main
from clkit.data import Preprocessing, StreamDataModule, published_order
from clkit.methods import Mixing, OnProLosses, RandomViews
from clkit.runs.recipes import read_recipe, recipe_folder, recipe_lines, recipe_names
from clkit.runs.settings import StreamCLI
from clkit.strategies import DERPPStrategy, ERACEStrategy, ERStrategy, OnProStrategy, Projection, SCRStrategy

PAPERS = ["paper/core50", "paper/nmc_cifar100", "paper/ranpac_cifar100", "paper/soda10m", "paper/split_cifar100"]
REPLAY = ["er", "er_ace", "der_pp", "scr", "onpro"]
ONPRO_PAPERS = ["paper/onpro_cifar10", "paper/onpro_cifar100", "paper/onpro_tiny_imagenet"]
SMALL = ["--model.backbone", "test_vit", "--model.pretrained", "false"]


def built(name: str, *overrides: str) -> StreamCLI:
    """What the command line builds from a recipe before anything runs."""
    return StreamCLI(["--config", str(recipe_folder() / f"{name}.yaml"), *overrides], run=False)


@pytest.mark.parametrize("on", [True, False])
def test_settings_of_masks_go_on_and_off_on_the_command_line(on: bool) -> None:
    """In the published code any text is true, and the flags that its README gives do not parse."""
    word, own = str(on).lower(), "--trainer.callbacks.initial"
    given = [f"--trainer.callbacks.table={word}", f"{own}=Initial", f"{own}.dense_first_layer={word}"]
    cli = built("dst", "--trainer.callbacks=DST", *given, "--trainer.callbacks.growth=unfired")
    callbacks = yaml.safe_load(cli.parser.dump(cli.config))["trainer"]["callbacks"]
    (settings,) = [each["init_args"] for each in callbacks if each["class_path"].endswith("DST")]
    assert (settings["table"], settings["initial"]["dense_first_layer"], settings["growth"]) == (on, on, "unfired")
    (made,) = [each for each in cli.trainer.callbacks if isinstance(each, DST)]
    assert made.table is on


# ---- listing


def test_there_are_recipes_of_the_methods_and_of_the_papers() -> None:
    heads = {"aef_ocl", "anacp", "klda", "lda", "nmc", "ranpac"}
    assert {*heads, "d_simplex", "dst", *REPLAY, *PAPERS, *ONPRO_PAPERS} <= set(recipe_names())
    assert recipe_names().index("nmc") < recipe_names().index("paper/core50")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_starts_with_a_line_that_says_what_it_does(name: str) -> None:
    first = read_recipe(name).splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 120
    assert f"{name} " in "\n".join(recipe_lines())
    assert first[2:] in "\n".join(recipe_lines())


@pytest.mark.parametrize("name", [*PAPERS, *ONPRO_PAPERS])
def test_the_papers_recipes_say_what_is_reported_and_where_the_data_lie(name: str) -> None:
    text = read_recipe(name)
    assert "arXiv" in text
    assert " %" in text
    assert "CLKIT_DATA" in text


def test_an_unknown_recipe_is_named_with_its_neighbour() -> None:
    with pytest.raises(KeyError, match="no recipe 'nmcc', did you mean 'nmc'"):
        read_recipe("nmcc")
    with pytest.raises(KeyError, match=r"no recipe 'zzz'; there are: aef_ocl, "):
        read_recipe("zzz")


def test_the_folder_of_an_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clkit" / "configs").mkdir(parents=True)
    (tmp_path / "clkit" / "configs" / "mine.yaml").write_text("# my own\n")
    monkeypatch.setattr(clkit.runs.recipes, "__file__", str(tmp_path / "clkit" / "runs" / "recipes.py"))
    assert recipe_names() == ["mine"]
    assert recipe_lines() == ["mine  my own"]


# ---- building


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_built(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = built(name, *(SMALL if name in PAPERS else []))
    assert isinstance(cli.datamodule, StreamDataModule)
    assert isinstance(cli.model, pl.LightningModule)
    kinds = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {"StreamEvaluation", "StreamProgressBar"} <= kinds
    assert cli.trainer.max_epochs == -1  # as long as the stream
    assert cli.trainer.log_dir is not None
    assert cli.trainer.log_dir.startswith("runs/")


def test_the_settings_of_the_nearest_mean_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(read_recipe("paper/nmc_cifar100"))
    assert settings["model"]["init_args"]["backbone"] == "vit_base_patch16_224.augreg_in21k"
    assert settings["model"]["init_args"]["pretrained"] is True
    data = built("paper/nmc_cifar100", *SMALL).datamodule
    assert data.source.name == "CIFAR100"
    assert published_order(data.scenario.class_order)[:4] == (87, 0, 52, 58)
    assert data.scenario.experiences == 10
    assert data.preprocessing == Preprocessing(size=224, interpolation="bilinear")


def test_models_that_replace_others_stay_in_the_settings_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(read_recipe("d_simplex"))
    layer = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 64, "out_features": 32}}
    settings["trainer"]["callbacks"][0]["init_args"]["replacements"] = {1: layer, 2: "better.ckpt"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "mine.yaml"), "--print_config"])
    (simplex, *_) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    layer["init_args"] |= {"bias": True, "device": None, "dtype": None}
    assert simplex["init_args"]["replacements"] == {"1": layer, "2": "better.ckpt"}


# ---- replay


def test_the_replay_recipes_differ_in_the_strategy_alone() -> None:
    settings = {name: yaml.safe_load(read_recipe(name)) for name in REPLAY}
    for name in REPLAY:
        assert settings[name]["model"] == settings["onpro"]["model"]
        assert settings[name]["data"] == settings["onpro"]["data"]
        mine, theirs = (settings[each]["trainer"]["strategy"]["init_args"] for each in (name, "onpro"))
        for shared in ("capacity", "replay_batch", "transform"):
            assert mine[shared] == theirs[shared]


KINDS = {
    "onpro": OnProStrategy,
    "er": ERStrategy,
    "er_ace": ERACEStrategy,
    "der_pp": DERPPStrategy,
    "scr": SCRStrategy,
}


@pytest.mark.parametrize("name", REPLAY)
def test_a_replay_recipe_is_its_method(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["mixing.probability=0.5", "losses.ce_new=1"] if name == "onpro" else []
    options += ["memory.storage=uint8", "memory.mean=0.3", "memory.std=0.38"]
    cli = built(name, *[f"--trainer.strategy.init_args.{option}" for option in options])
    strategy = cli.trainer.strategy
    assert type(strategy) is KINDS[name]
    assert strategy.state_key == name
    assert strategy.memory.storage == "uint8"
    if name == "onpro":
        assert strategy.losses == OnProLosses(rotation="rot4", similarity_scale=0.5, ce_new=1)
        assert strategy.prototypes.mixing == Mixing(probability=0.5)
        assert strategy.projection == Projection(dim=32)
    elif name == "scr":
        assert strategy.projection == Projection("mlp")
    elif name == "der_pp":
        assert (strategy.alpha, strategy.beta) == (0.1, 0.5)
    assert strategy.augmentation.transform == RandomViews(flip=0.0)
    (optimizer,) = [cli.model.configure_optimizers()]
    assert type(optimizer) is torch.optim.Adam
    assert {key: optimizer.defaults[key] for key in ("lr", "betas", "weight_decay")} == {
        "lr": 1e-3,
        "betas": (0.9, 0.99),
        "weight_decay": 1e-4,
    }
    cli.datamodule.setup("fit")
    (images, _) = next(iter(cli.datamodule.train_dataloader()))
    pixels = load_digits().images / 16
    assert images.shape == (10, 3, 8, 8)
    assert float(images.min()) == pytest.approx((pixels.min() - 0.3) / 0.38)
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize(
    "name", [name if name == "scr" else pytest.param(name, marks=pytest.mark.slow) for name in REPLAY]
)
def test_a_replay_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fewer = ["--data.source", "digits", "--data.stop_after", "2", "--trainer.enable_progress_bar", "false"]
    fewer += ["--trainer.enable_model_summary", "false"]
    assert main(["fit", "--config", str(recipe_folder() / f"{name}.yaml"), *fewer]) == 0
    (folder,) = (tmp_path / "runs" / name).iterdir()
    results = json.loads((folder / "results.json").read_text())
    (predictor,) = results["predictors"]
    assert predictor == ("nmc" if name == "scr" else "module")
    matrix = results["predictors"][predictor]["accuracy_matrix"]
    assert matrix[0][0] > 0.6  # zeros and ones, after 19 steps
    assert np.shape(matrix) == (2, 2)
    logged = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    term = {"onpro": "instance_mem", "scr": "contrast", "der_pp": "logit", "er": "ce", "er_ace": "ce_mem"}[name]
    assert {f"{name}/{each}" for each in ("loss", "memory", "memory/class_0", term)} <= set(logged)
    assert (folder / "memory_balance.png").is_file()
    assert (folder / "prototype_similarity.png").is_file() == (name == "onpro")
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    counts = [stage["train_samples"] for stage in results["stream"]["experiences"]]
    assert saved["global_step"] == sum(-(-count // 10) for count in counts)


def small_onpro(recipe: str, tmp_path: Path, **data: Any) -> dict[str, Any]:
    """Fits a recipe of the paper with a narrow network at 8 px; gives results.json."""
    settings = yaml.safe_load(read_recipe(recipe))
    settings["model"]["init_args"]["model_kwargs"] |= {
        "layers": [1, 1, 1, 1],
        "channels": [4, 4, 4, 8],
        "stem_type": "deep",
        "stem_width": 2,
    }
    settings["data"]["init_args"] |= {**data, "root": str(tmp_path / "data"), "num_workers": 0}
    settings["data"]["init_args"]["preprocessing"]["init_args"]["size"] = 8
    trainer = settings["trainer"]
    trainer |= {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer["logger"][0]["init_args"]["save_dir"] = str(tmp_path / "runs")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(tmp_path / "mine.yaml")]) == 0
    (results,) = (tmp_path / "runs").rglob("results.json")
    document: dict[str, Any] = json.loads(results.read_text())
    return document


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "classes", "stages"), [("10", 10, 5), ("100", 100, 10)])
def test_onpro_on_cifar_runs_on_images_of_its_form(recipe: str, classes: int, stages: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 20 // stages)[::2]
    images = noise.integers(0, 256, (len(labels), 8, 8, 3)).astype(np.uint8)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "cifar.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    results = small_onpro(f"paper/onpro_cifar{recipe}", tmp_path, source="npz:cifar")
    expected = [rows.tolist() for rows in np.split(np.arange(classes), stages)]
    assert [stage["classes"] for stage in results["stream"]["experiences"]] == expected
    assert np.shape(results["predictors"]["module"]["accuracy_matrix"]) == (stages, stages)


@pytest.mark.slow
def test_onpro_on_tiny_imagenet_runs_on_its_layout(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for part in ("train", "test"):
        for thing in range(6):
            for number in range(3):
                file = tmp_path / "data" / "tiny_imagenet" / part / f"n{thing:08}" / f"n{thing:08}_{number}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file)
    scenario = {"class_path": "ClassIncremental", "init_args": {"classes_per_experience": 2}}
    results = small_onpro("paper/onpro_tiny_imagenet", tmp_path, scenario=scenario)
    assert [stage["train_samples"] for stage in results["stream"]["experiences"]] == [6] * 3
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    memory = torch.load(checkpoint, weights_only=True)["clkit_strategy"]["memory"][0]
    assert memory["data"].dtype == torch.uint8


def test_the_settings_of_the_onpro_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, scale, base_rate, probability in (("10", 0.5, 0.75, 0.6), ("100", 1.0, 0.9, 0.2)):
        cli = built(f"paper/onpro_cifar{name}", "--trainer.accelerator", "cpu")
        strategy, data = cli.trainer.strategy, cli.datamodule
        assert strategy.losses == OnProLosses(similarity_scale=scale)
        assert strategy.prototypes.mixing == Mixing(base_rate=base_rate, probability=probability)
        assert strategy.augmentation.transform == RandomViews()
        assert data.source.name == f"CIFAR{name}"
        assert data.preprocessing.mean == pytest.approx(np.array([125.3, 123.0, 113.9]) / 255, abs=1e-4)
        assert data.preprocessing.std == pytest.approx(np.array([63.0, 62.1, 66.7]) / 255, abs=1e-4)
        network = cli.model.network
        assert network.conv1.weight.shape == (64, 3, 3, 3)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)  # until the stream says how many
        assert network.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)


# ---- running on small trees of the form that the comments describe


def photo(path: Path, shade: int, noise: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(noise.normal(shade, 20, (12, 15, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def run(recipe: str, tmp_path: Path, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Fits a recipe with a tiny backbone and these other settings of the data; gives results.json."""
    settings = yaml.safe_load(read_recipe(recipe))
    settings["model"]["init_args"].update(
        backbone="test_vit", pretrained=False, model_kwargs={"img_size": 32, "pos_embed": "none"}
    )
    settings["data"]["init_args"].update(data, root=str(tmp_path / "data"), num_workers=0)
    settings["trainer"].update(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    settings["trainer"]["logger"][0]["init_args"]["save_dir"] = str(tmp_path / "runs")
    settings["trainer"]["callbacks"] = [
        callback for callback in settings["trainer"]["callbacks"] if callback["class_path"] != "StreamProgressBar"
    ]
    for callback in settings["trainer"]["callbacks"]:
        callback.setdefault("init_args", {}).update(changes.get(callback["class_path"], {}))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(tmp_path / "mine.yaml")]) == 0
    (results,) = (tmp_path / "runs").rglob("results.json")
    assert (results.parent / "config.yaml").is_file()
    document: dict[str, Any] = json.loads(results.read_text())
    return document


def test_core50_runs_on_its_layout(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    train, test = ["s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11"], ["s3", "s7", "s10"]
    for part, sessions in (("train", train), ("test", test)):
        for session in sessions:
            for thing in range(1, 51):
                file = tmp_path / "data" / "core50" / part / session / f"o{thing}" / f"C_{thing:02}_000.png"
                photo(file, 5 * thing, noise)
    small = {"class_path": "Preprocessing", "init_args": {"resize": 36, "size": 32, "interpolation": "bilinear"}}
    results = run("paper/core50", tmp_path, {"preprocessing": small})
    stages = results["stream"]["experiences"]
    assert [stage["name"] for stage in stages] == train
    assert all(len(stage["classes"]) == 50 and stage["train_samples"] == 50 for stage in stages)
    assert [stage["eval_samples"] for stage in stages] == [150] + [0] * 7
    nmc = results["predictors"]["nmc"]
    assert np.shape(nmc["accuracy_matrix"]) == (8, 1)  # one fixed test set, measured after each session
    assert len(nmc["accuracy_seen"]) == 8
    assert nmc["average_incremental_accuracy"] == pytest.approx(np.mean(nmc["accuracy_seen"]))
    assert set(results["predictors"]) == {"nmc"}


@pytest.mark.slow
def test_soda10m_runs_on_its_layout(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    periods = yaml.safe_load(read_recipe("paper/soda10m"))["data"]["init_args"]["scenario"]["init_args"]["domain_order"]
    assert periods == sorted(periods)
    assert len(periods) == 6
    counts = {1: 2, 2: 2, 3: 20, 4: 4, 5: 1, 6: 1}  # cars are most; at night nobody walks
    for period in periods:
        for label, count in counts.items():
            if period.endswith("night") and label in (1, 2):
                continue
            for number in range(count):
                file = tmp_path / "data" / "soda10m" / "train" / period / str(label) / f"{number:06}.jpg"
                photo(file, 40 * label, noise)
    for label in counts:
        for number in range(3):
            photo(tmp_path / "data" / "soda10m" / "test" / "all" / str(label) / f"{number}.jpg", 40 * label, noise)
    results = run("paper/soda10m", tmp_path, {}, AEFOCL={"lift": {"expansion_dim": 64}})
    stages = results["stream"]["experiences"]
    assert [stage["name"] for stage in stages] == periods
    assert stages[0]["classes"] == [1, 2, 3, 4, 5, 6]
    assert stages[1]["classes"] == [3, 4, 5, 6]
    assert [stage["train_samples"] for stage in stages] == [30, 26, 30, 26, 30, 26]
    assert [stage["eval_samples"] for stage in stages] == [18, 0, 0, 0, 0, 0]
    aef_ocl = results["predictors"]["aef_ocl"]
    assert len(aef_ocl["accuracy_seen"]) == 6
    assert 1 / 6 < aef_ocl["amca"] <= 1
    assert results["config"]["data"]["init_args"]["batch_size"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper/nmc_cifar100", "paper/ranpac_cifar100", "paper/split_cifar100"])
def test_cifar100_runs_on_images_of_its_form(recipe: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 2)
    images = np.clip(noise.normal(2.5 * labels[:, None, None, None], 9, (200, 32, 32, 3)), 0, 255).astype(np.uint8)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "cifar.npz", x_train=images, y_train=labels, x_test=images[::2], y_test=labels[::2])
    data = {"source": "npz:cifar"}
    if recipe == "paper/nmc_cifar100":
        data["preprocessing"] = {"class_path": "Preprocessing", "init_args": {"size": 32, "interpolation": "bilinear"}}
    results = run(recipe, tmp_path, data, AEFOCL={"lift": {"expansion_dim": 64}})
    stages = results["stream"]["experiences"]
    assert stages[0]["classes"] == sorted(published_order("cifar100_icarl")[:10])
    for predictor in results["predictors"].values():
        matrix = predictor["accuracy_matrix"]
        assert np.shape(matrix) == (10, 10)
        assert [sum(entry is not None for entry in row) for row in matrix] == list(range(1, 11))
    expected = {
        "nmc_cifar100": {"nmc"},
        "ranpac_cifar100": {"module", "ranpac", "ridge", "nmc", "lda"},  # its warm-up trains the module
        "split_cifar100": {"nmc", "aef_ocl", "lda"},
    }
    assert set(results["predictors"]) == expected[recipe.removeprefix("paper/")]


def test_data_that_are_not_there_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(recipe_folder() / "paper" / "core50.yaml")
    assert main(["fit", "--config", recipe, *SMALL, "--data.root", str(tmp_path), "--trainer.accelerator", "cpu"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clkit: ")]
    assert error == [f"clkit: folder:core50: nothing is at {tmp_path / 'core50'}"]
