"""Benchmarks: their machinery on tiny inputs, what they compare, and what they say without data."""

from __future__ import annotations

import importlib.util
import io
import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid

from clkit.data import ClassIncremental
from clkit.methods import OnProLosses
from clkit.surgery.masks import maskable_weights

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_images.py"
ORDER = [4, 0, 5, 2, 1, 3]


def loaded(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    sys.path.append(str(script.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    return module


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return loaded(SCRIPT)


@pytest.fixture
def tiny(tmp_path: Path, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Part a with six overlapping classes of unequal size in place of its file."""
    rng = np.random.default_rng(0)
    centres = rng.random((6, 12)) * 1.5
    arrays: dict[str, Any] = {}
    for name, counts in (("train", [30, 12, 25, 8, 20, 40]), ("test", [10, 8, 9, 6, 7, 5])):
        ids = rng.permutation(np.repeat(np.arange(6), counts))
        arrays[f"f_{name}"] = np.maximum(centres[ids] + rng.normal(size=(len(ids), 12)), 0).astype(np.float16)
        arrays[f"y_{name}"] = ids.astype(np.uint8)
    np.savez(tmp_path / "features_tiny.npz", **arrays)
    part = benchmark.Part(
        title="tiny",
        files=("features_tiny.npz",),
        source="features:features_tiny",
        scenario=ClassIncremental(experiences=3, class_order=ORDER),
        backbone="identity",
        samples=lambda root: benchmark.cached_samples(root / "features_tiny.npz"),
        reference={"NMC": (50.0, None), "logistic": (60.0, 55.0)},
    )
    monkeypatch.setitem(benchmark.PARTS, "a", part)
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    return part


def stage_accuracies(arrays: Any, model: Any, prepare: Any) -> list[float]:
    """A joint fit of the classes seen, stage by stage, tested on them: what a learner without forgetting reaches."""
    reached = []
    for stage in (2, 4, 6):
        train, test = (np.isin(arrays[f"y_{name}"], ORDER[:stage]) for name in ("train", "test"))
        ids = arrays["y_train"][train]
        classes = np.unique(ids)
        predicted = model(prepare(arrays["f_train"][train]), ids, classes, prepare(arrays["f_test"][test]))
        reached.append(100 * float(np.mean(predicted == arrays["y_test"][test])))
    return reached


def ridge(train: Any, ids: Any, classes: Any, test: Any) -> Any:
    fitted = Ridge(alpha=1.0, fit_intercept=False).fit(train, ids[:, None] == classes)
    return classes[fitted.predict(test).argmax(axis=1)]


def nearest_mean(train: Any, ids: Any, classes: Any, test: Any) -> Any:
    return NearestCentroid().fit(train, ids).predict(test)


def test_learners_end_where_joint_fits_of_scikit_learn_end(benchmark: ModuleType, tiny: Any, tmp_path: Path) -> None:
    result = benchmark.run_part(tiny, tmp_path, lift=32)
    arrays = np.load(tmp_path / "features_tiny.npz")
    arrays = {name: arrays[name].astype(np.float64 if name[0] == "f" else np.int64) for name in arrays.files}
    unit = stage_accuracies(arrays, nearest_mean, lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))
    expected = {
        "ridge": stage_accuracies(arrays, ridge, lambda x: x),
        "NMC (janson)": unit,
        "NMC (euclidean)": stage_accuracies(arrays, nearest_mean, lambda x: x),
    }
    for name, stages in expected.items():
        assert result["learners"][name]["final"] == pytest.approx(stages[-1])
        assert result["learners"][name]["average"] == pytest.approx(np.mean(stages))
    assert result["joint"]["ridge"][0] == pytest.approx(expected["ridge"][-1])
    assert result["joint"]["NMC"][0] == pytest.approx(unit[-1])
    assert result["difference"] == pytest.approx({"NMC (janson)": 0.0, "ridge": 0.0})
    assert result["run"]["images"] == 135 + 17 + 31 + 45  # training rows, then the test rows after each stage


def test_all_learners_and_figures_are_in_report_and_file(
    benchmark: ModuleType,
    tiny: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark.run_part, "__defaults__", (32,))
    assert benchmark.main(["--parts", "a", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line[:1] in "│┃") <= 100
    written = json.loads((tmp_path / "out.json").read_text())
    for name, row in written["parts"]["a"]["learners"].items():
        line = next(line for line in printed.splitlines() if f" {name} " in line)
        assert [f"{value:.2f}" for value in row.values()] == line.replace("│", " ").split()[-5:]
    assert len(written["parts"]["a"]["learners"]) == 9
    for text in ("logistic", "60.00", "55.00", "OTHER SETTINGS", "83.70", "2210.04428", written["versions"]):
        assert text in printed


def test_a_learner_that_is_off_fails_the_benchmark(
    benchmark: ModuleType, tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.run_part, "__defaults__", (32,))
    wrong = benchmark.joint_ridge
    monkeypatch.setitem(benchmark.CHECKED, "ridge", ("ridge", lambda samples: (wrong(samples) + 1) % 6))
    assert benchmark.main(["--parts", "a"]) == 1
    assert "FAILED, more than 0.05 points" in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["x", "jpeg"])
def test_images_are_read_as_stored(benchmark: ModuleType, stored: str, tmp_path: Path) -> None:
    flat = np.repeat(np.arange(5, dtype=np.uint8) * 40, 8 * 8 * 3).reshape(5, 8, 8, 3)  # flat grey survives JPEG
    arrays: dict[str, Any] = {"x_test": flat}
    if stored == "jpeg":
        encoded = []
        for image in flat:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=95)
            encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
        offsets = np.cumsum([0, *map(len, encoded)])
        arrays = {"jpeg_test": np.concatenate(encoded), "offsets_test": offsets}
    np.savez(tmp_path / "images.npz", **arrays)
    with np.load(tmp_path / "images.npz") as archive:
        assert np.array_equal(benchmark._images(archive, "test", 2), flat[::2])


@pytest.mark.parametrize(
    ("value", "said"), [(None, "CLKIT_DATA"), ("nowhere", "not a folder"), (".", "gtsrb_subset.npz")]
)
def test_without_the_data_it_says_so_in_one_line(
    benchmark: ModuleType,
    value: str | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("CLKIT_DATA", str(tmp_path / value))
    assert benchmark.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_as_a_command_without_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--parts", "c"])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as for a script, which reads others beside it
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("real_images: ")


# ---- replay


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return loaded(SCRIPT.with_name("onpro.py"))


@pytest.mark.parametrize("rotation", [pytest.param("rot16", marks=pytest.mark.slow), "rot4", "none"])
def test_a_step_and_its_transcription_compute_the_same(speed: ModuleType, rotation: str) -> None:
    speed.check_equal(speed.small_setting(), rotation)


def test_a_step_that_computes_something_else_is_noticed(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = speed.PlainStep.prototypes
    monkeypatch.setattr(speed.PlainStep, "prototypes", staticmethod(lambda *args: 1.01 * right(*args)))
    with pytest.raises(AssertionError, match="losses"):
        speed.check_equal(speed.small_setting(), "none")


def test_the_ratio_to_replay_is_beside_the_one_that_the_images_predict(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["onpro.py", "--rounds", "1", "--only", "er", "--json", str(file)])
    assert speed.main() == 0
    notes = [line["note"] for line in json.loads(file.read_text())]
    assert notes == ["images 2560 / 74 = 34.6", "images 784 / 74 = 10.6", "images 340 / 74 = 4.6"]
    assert all(note in capsys.readouterr().out for note in notes[:1])


@pytest.mark.slow
def test_all_parts_of_the_speed_benchmark_run(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "ROTATIONS", ("none",))
    monkeypatch.setattr(speed, "MEMORY_GOAL", 0.0)
    file = str(tmp_path / "speed.json")
    monkeypatch.setattr(sys, "argv", ["onpro.py", "--rounds", "1", "--only", "er", "memory", "peak", "--json", file])
    assert speed.main() == 1  # no memory costs nothing
    lines = json.loads((tmp_path / "speed.json").read_text())
    assert len(lines) == 5
    assert lines[0]["note"] == "images 340 / 74 = 4.6"
    assert all(line["ratio"] == pytest.approx(line["ours"] / line["theirs"]) for line in lines)
    assert capsys.readouterr().out.count("MISSED") == 3


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return loaded(SCRIPT.with_name("onpro_digits.py"))


def test_the_table_of_digits_marks_what_is_off_and_fails_for_a_missed_direction(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "fine-tuning": [14.0, 44.0, 95.0],
        "ER, M 50": [80.0, 90.0, 15.0],
        "OnPro V 4, M 50": [68.0, 86.0, 5.0],
        "OnPro V 4, M 200": [76.0, 82.0, 1.0],
    }
    file = tmp_path / "results.json"
    options = ["--results", str(file), "--seeds", "2", "--rows", *figures]
    file.write_text(
        json.dumps(
            {
                row: {str(seed): {"figures": [v + seed for v in three]} for seed in (0, 1)}
                for row, three in figures.items()
            }
        )
    )
    assert digits.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.count(": holds") == 3
    (line,) = (line for line in printed.splitlines() if "OnPro V 4, M 50 " in line and "│" in line)
    assert "68.5 [68.0, 69.0]; 68.2; +0.3 " in line
    assert "86.5 [86.0, 87.0]; 79.9; +6.6 !" in line
    for row, figure, value in (
        ("OnPro V 4, M 50", 0, 53.9),
        ("OnPro V 4, M 50", 2, 15.5),
        ("OnPro V 4, M 200", 0, 68.0),
    ):
        worse = {name: {str(seed): {"figures": list(three)} for seed in (0, 1)} for name, three in figures.items()}
        for seed in worse[row].values():
            seed["figures"][figure] = value
        file.write_text(json.dumps(worse))
        assert digits.main(options) == 1
        assert capsys.readouterr().out.count("MISSED") >= 1


@pytest.mark.slow
def test_a_run_of_the_digits_benchmark_is_that_of_the_recipe(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = digits.read_recipe
    monkeypatch.setattr(digits, "read_recipe", lambda name: read(name).replace("digits:shifts", "digits"))
    runs = [digits.run(digits.Row("er", (0, 0, 0)), seed, weights) for seed, weights in ((0, "timm"), (0, "torch"))]
    assert runs[0] != runs[1]
    for run in runs:
        matrix = np.array(run["matrix"], dtype=np.float64)
        last, average, forgetting = run["figures"]
        assert np.shape(matrix) == (5, 5)
        best = [max(matrix[i][j] for i in range(j, 5)) for j in range(4)]
        assert forgetting == pytest.approx(100 * np.mean([best[j] - matrix[4][j] for j in range(4)]))
        assert abs(last - 100 * matrix[4].mean()) < 2  # stages of nearly equal size
        assert average > last


@pytest.mark.slow
def test_on_digits_replay_goes_in_the_directions_that_are_required(digits: ModuleType) -> None:
    rows = ("fine-tuning", "ER, M 50", "OnPro V 4, M 50", "OnPro V 4, M 200")
    results = {row: {str(seed): digits.run(digits.ROWS[row], seed) for seed in range(3)} for row in rows}
    said = digits.directions(results)
    assert len(said) == 3
    assert all(said.values()), said


@pytest.fixture(scope="module")
def images() -> ModuleType:
    return loaded(SCRIPT.with_name("onpro_images.py"))


TINY = ["--seeds", "1", "--capacities", "200", "--size", "8", "--width", "2"]


def test_replay_on_images_runs_and_says_which_order_holds(
    images: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0)
    ids = np.repeat(np.arange(10), 4)
    pixels = noise.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / images.FILE, x_train=pixels, y_train=ids, x_test=pixels, y_test=ids)
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    options = [*TINY, "--results", str(tmp_path / "results.json")]
    assert images.main(options) == 0
    printed = capsys.readouterr().out
    done = json.loads((tmp_path / "results.json").read_text())
    assert list(done) == ["ER, 200", "ER-ACE, 200", "OnPro rot4, 200"]
    for method in ("ER", "ER-ACE", "OnPro rot4"):
        assert f"{method} ({done[f'{method}, 200']['0'][0]:.1f})" in printed
    assert "65.5 ± 1.0" in printed
    for ours, said in ((90.0, "OnPro is above ER"), (-1.0, "OnPro is NOT above ER")):
        done["OnPro rot4, 200"]["0"][0] = ours
        (tmp_path / "results.json").write_text(json.dumps(done))
        assert images.main(options) == 0  # nothing is run again
        assert said in capsys.readouterr().out


def test_the_methods_on_images_have_the_settings_of_the_paper(images: ModuleType) -> None:
    er, ace, onpro = (images.strategy(method, 200, 3, 64) for method in ("ER", "ER-ACE", "OnPro rot16"))
    assert [each.state_key for each in (er, ace, onpro)] == ["er", "er_ace", "onpro"]
    assert onpro.losses == OnProLosses(rotation="rot16", similarity_scale=0.5)
    assert onpro.projection.dim == 16  # a quarter of the features, as published
    assert {each.replay_batch for each in (er, ace, onpro)} == {64}
    assert {each.seed for each in (er, ace, onpro)} == {3}


def test_replay_on_images_without_the_data_says_so_in_one_line(
    images: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    assert images.main([]) == 2
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert images.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(images.FILE in line for line in lines)


# ---- novelty


def test_novelty_is_measured_on_tiny_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    novelty = loaded(SCRIPT.with_name("novelty.py"))
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert novelty.main([]) == 2
    assert "CLKIT_DATA" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, 12))
    for name, offset in (("cifar100", 0.0), ("caltech101", 0.0), ("gtsrb", 1000 * np.eye(12)[0])):
        ids = np.repeat(np.arange(100), 4)
        rows = {part: centres[ids] + offset + 0.1 * rng.normal(size=(400, 12)) for part in ("train", "test")}
        arrays: dict[str, Any] = {"f_train": rows["train"], "f_test": rows["test"], "y_train": ids, "y_test": ids}
        np.savez(tmp_path / novelty.FEATURES.format(name), **arrays)
    assert novelty.main([]) == 0
    printed = capsys.readouterr().out.splitlines()
    curve, alarms = (line.split("│")[2:5] for line in printed if "unit length (Novelty)" in line)
    assert abs(float(curve[0]) - 50) < 5  # the same classes again
    assert abs(float(alarms[0]) - 95) < 5
    assert (float(curve[1]), float(alarms[1])) == (100.0, 0.0)
    assert float(curve[2].split("±")[0]) > 90
    assert float(alarms[2].split("±")[0]) < 50


# ---- sparse training


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark of masks on a small network."""
    module = loaded(SCRIPT.with_name("dst.py"))
    small = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32]}
    made = lambda name, device: timm.create_model("resnet18", num_classes=10, **small).to(device)  # noqa: E731  short
    monkeypatch.setattr(module, "network", made)
    monkeypatch.setattr(module, "PIXELS", 32)
    return module


def test_what_the_benchmark_of_masks_trains_has_masks(masks: ModuleType) -> None:
    plain, masked = (masks.Training("resnet18", "cpu", masked=each, every=2) for each in (False, True))
    assert plain.topology is None
    topology = masked.topology
    weights = dict(masked.model.named_parameters())
    before = topology.mask(0)
    for _ in range(2):
        masked.step()
    after = topology.mask(0)
    assert sum(int(mask.sum()) for mask in after.values()) == round(0.1 * sum(mask.numel() for mask in after.values()))
    assert any(not torch.equal(before[name], mask) for name, mask in after.items())
    assert all(weights[name][~mask].count_nonzero() == 0 for name, mask in after.items())


def test_the_benchmark_of_masks_fails_where_a_goal_is_missed(
    masks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "dst.json"
    options = ["dst.py", "--rounds", "1", "--only", "step", "update", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", options)
    masks.main()  # on a network as small as this the share of masks in a step is no figure
    found = json.loads(file.read_text())
    step, update = found["step of resnet18"], found["update of resnet18"]
    assert step["overhead"] == pytest.approx(step["masked"] / step["plain"] - 1)
    capsys.readouterr()
    weights = maskable_weights(masks.network("resnet18", "cpu"), ["fc"])
    assert update["weights"] == sum(weight.numel() for weight in weights.values())
    for overhead, status in ((0.02, 0), (0.04, 1)):
        monkeypatch.setattr(masks, "measure_step", lambda *args, over=overhead: {"overhead": over})
        assert masks.main() == status
        assert ("missed: step of resnet18" in capsys.readouterr().out) == bool(status)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return loaded(SCRIPT.with_name("dst_study.py"))


def test_the_study_of_sparse_training_says_what_holds_and_fails_if_anything_is_forgotten(
    study: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(stream: str, density: float, initial: str, growth: str, seed: int) -> tuple[float, float]:
        better = "erk" if density == 0.2 else "uniform"
        return 90.0 + (initial == better) + 3 * (growth == "random") + seed, forgotten

    monkeypatch.setattr(study, "run", given)
    monkeypatch.setattr(sys, "argv", ["dst_study.py", "--streams", "digits", "--seeds", "2"])
    for forgotten, status in ((0.0, 0), (-0.5, 1)):
        assert study.main() == status
        printed = capsys.readouterr().out
        assert printed.count("better holds here") == 3
        assert "digits, density 0.2: ERK 92.25, uniform 91.25; that ERK is better holds here" in printed
        assert "digits, density 0.05: ERK 91.25, uniform 92.25; that uniform is better holds here" in printed
        assert "that it depends on the density does not hold here" in printed
        assert f"largest backward transfer in magnitude: {abs(forgotten):g} points" in printed
        assert "digits density 0.1   erk      random    accuracy  93.50 ± 0.71" in printed


def test_the_study_goes_on_where_it_was_interrupted(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cells get a seed before any gets the next, what is done is kept, and it is printed with the rest."""
    ran: list[tuple[Any, ...]] = []

    def given(*key: Any) -> tuple[float, float]:
        if len(ran) == 11:
            raise KeyboardInterrupt
        ran.append(key)
        return 90.0 + key[-1], 0.0

    monkeypatch.setattr(study, "run", given)
    file = str(tmp_path / "done.json")
    options = ["dst_study.py", "--streams", "digits", "--densities", "0.1", "--seeds", "2", "--results", file]
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(KeyboardInterrupt):
        study.main()
    assert [key[-1] for key in ran] == [0] * 8 + [1] * 3
    monkeypatch.setattr(study, "run", lambda *key: ran.append(key) or (90.0 + key[-1], 0.0))
    assert study.main() == 0
    assert len(ran) == len(set(ran)) == 16
    assert capsys.readouterr().out.count("accuracy  90.50 ± 0.71") == 8


def test_the_study_leaves_out_what_the_folder_does_not_have(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dst_study.py", "--streams", "fashion"])
    with warnings.catch_warnings():
        assert study.main() == 0
    assert "fashion is left out: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*capacity runs low")  # on some processors, for the last task
def test_a_run_of_the_study_learns_and_forgets_nothing(study: ModuleType) -> None:
    accuracy, transfer = study.run("digits", 0.2, "erk", "gradient", 0)
    assert accuracy > 85
    assert transfer == 0


# ---- d-Simplex


@pytest.fixture(scope="module")
def simplex() -> ModuleType:
    return loaded(SCRIPT.with_name("simplex.py"))


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_bank_is_measured_beside_a_search_that_finds_the_same(simplex: ModuleType, storage: str) -> None:
    figures = simplex.measure_bank(storage, "cpu", 1, number=300, width=40)
    assert figures["ratio"] == figures["search_s"] / figures["bare_s"]
    assert figures["recall_at_1"] > 0.95
    assert figures["rows_mib"] == 300 * 40 * (4 if storage == "float32" else 2) / 2**20
    assert figures["file_mib"] > figures["rows_mib"]


@pytest.mark.slow
def test_the_head_is_measured_beside_its_matrix(simplex: ModuleType) -> None:
    figures = simplex.measure_head("cpu", 1, vertices=20_000, slab=100)
    assert figures["largest_difference"] < 1e-4
    assert figures["explicit_s"] > figures["implicit_s"]
    assert 0.5 < figures["share_of_logits"] < 6


def test_a_missed_goal_of_the_simplex_is_said(
    simplex: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"share_of_time": 0.004, "share_of_logits": 2.0}
    monkeypatch.setattr(simplex, "measure_head", lambda *_: head)
    monkeypatch.setattr(simplex, "measure_bank", lambda storage, *_: {"ratio": 1.0 if storage == "float32" else 1.2})
    monkeypatch.setattr(simplex, "measure_hoc", lambda *_: {"ratio": 1.06})
    file = tmp_path / "simplex.json"
    assert simplex.main(["--only", "head", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["head"] == head
    assert simplex.main([]) == 1
    said = capsys.readouterr().out
    assert "MISSED: bank, float16: ratio 1.2, goal 1.1" in said
    assert "MISSED: hoc: ratio 1.06, goal 1.05" in said


def test_the_step_with_the_term_is_measured_beside_the_forward_alone(simplex: ModuleType) -> None:
    figures = simplex.measure_hoc("cpu", 1, "test_resnet", 32)
    assert figures["ratio"] == figures["with_hoc_s"] / figures["forward_alone_s"]


# ---- replaced models


@pytest.fixture(scope="module")
def compatibility() -> ModuleType:
    return loaded(SCRIPT.with_name("compatibility.py"))


def tiny_data(compatibility: ModuleType) -> Any:
    """Gaussian classes of three widths: eight of the server's, eight of the client's, four to search."""
    rng = np.random.default_rng(0)
    widths = (4, 8, 12)
    centres = rng.normal(size=(20, sum(widths)))

    def rows(classes: range, each: int) -> Any:
        ids = np.repeat(np.arange(len(classes)), each)
        values = centres[ids + classes.start] + 0.3 * rng.normal(size=(len(ids), sum(widths)))
        return torch.from_numpy(values).float(), torch.from_numpy(ids)

    parts = [rows(range(8), 20), rows(range(8, 16), 40), rows(range(16, 20), 30), rows(range(16, 20), 10)]
    return compatibility.Data("tiny", *parts, widths, 2, 1, True)


def test_replaced_models_are_compared_in_a_matrix_and_by_their_goals(
    compatibility: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data(compatibility)
    monkeypatch.setattr(compatibility, "load", lambda options: data)
    file = tmp_path / "out.json"
    options = ["--steps", "20", "--epochs", "1", "--json", str(file)]
    status = compatibility.main(options)
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["ER", "ER + Procrustes", "d-Simplex-HOC"]
    for name, row in rows.items():
        matrix = row["matrix"]
        assert [len(line) for line in matrix] == [1, 2, 3, 4, 5, 6, 7]
        better = [matrix[i][j] > matrix[j][j] for i in range(7) for j in range(i)]
        assert row["AC"] == pytest.approx(sum(better) / 21)
        assert row["AM"] == pytest.approx(sum(map(sum, matrix)) / 28)
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {name} ") and line.count("│") == 6)
        assert line.replace("│", " ").split()[-4:-2] == [f"{row['AC']:.2f}", f"{100 * row['AM']:.2f}"]
        assert row["flips"][0] is None
        for i in range(1, 7):  # what is lost is at least by how much the score falls
            assert max(0, matrix[i - 1][i - 1] - matrix[i][i - 1]) - 1e-9 <= row["flips"][i] <= 1
    own = [[line[i] for i, line in enumerate(rows[name]["matrix"])] for name in ("ER", "ER + Procrustes")]
    assert own[0] == own[1]  # a model needs no rotation to itself
    holds = rows["ER"]["AC"] <= 0.2 and rows["d-Simplex-HOC"]["AC"] >= 0.6
    assert status == (0 if holds else 1)
    for texts in (("35.18", "68.90", "0.95"), ("starts with a network of the server",)):
        assert all(text in printed for text in texts)


@pytest.mark.parametrize(
    ("er", "simplex", "rich", "status"),
    [(0.2, 0.6, True, 0), (0.3, 0.6, True, 1), (0.2, 0.5, True, 1), (0.9, 0.0, False, 0), (0.9, -1.0, False, 1)],
)
def test_replaced_models_that_miss_a_goal_fail_the_benchmark(
    compatibility: ModuleType,
    er: float,
    simplex: float,
    rich: bool,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tiny_data(compatibility)
    data.rich = rich
    plain = {"matrix": [[0.5], [0.4, 0.5]], "flips": [None, 0.2]}
    found = {"ER": {**plain, "AC": er, "AM": 0.4}, "d-Simplex-HOC": {**plain, "AC": simplex, "AM": 0.5 + simplex}}
    monkeypatch.setattr(compatibility, "load", lambda options: data)
    monkeypatch.setattr(compatibility, "measured", lambda data, options: found)
    assert compatibility.main([]) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)


def test_replaced_models_without_a_file_say_so_in_one_line(
    compatibility: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert compatibility.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cifar100_subset.npz" in line
    assert "mobilenetv2_035" in line


def test_digits_of_the_replacement_benchmark_are_disjoint(
    compatibility: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    data = compatibility.load(compatibility.parsed([]))
    assert [len(side[1].unique()) for side in (data.server, data.client)] == [24, 24]
    assert set(data.queries[1].tolist()) == set(data.gallery[1].tolist()) == {0, 1, 6, 8}
    seen = {tuple(row) for side in (data.server, data.client) for row in side[0].tolist()}
    assert not seen & {tuple(row) for side in (data.queries, data.gallery) for row in side[0].tolist()}


# ---- DEUP


@pytest.fixture(scope="module")
def deup() -> ModuleType:
    return loaded(SCRIPT.with_name("deup.py"))


def test_an_error_predictor_is_measured_beside_the_same_forest(deup: ModuleType) -> None:
    for measure, seconds in ((deup.measure_fit, "fit_s"), (deup.measure_predict, "predict_s")):
        figures = measure(1, number=200)
        assert figures["ratio"] == pytest.approx(figures[seconds] / figures["bare_s"])
        assert figures.get("largest_difference", 0.0) <= 1e-12


def test_the_state_is_measured_after_a_long_stream_and_a_batch_late_in_one(deup: ModuleType) -> None:
    figures = deup.measure_state(batches=2, capacity=100, rows=20, width=4)
    assert figures["growth"] == figures["long_bytes"] / figures["short_bytes"] < 1.01
    assert figures["short_bytes"] > 100 * (6 + 4) * 8
    figures = deup.measure_stream(1, batches=2, rows=20, width=4)
    assert figures["growth"] == pytest.approx(figures["late_s"] / figures["early_s"])


def test_features_are_measured_beside_the_products_that_they_rest_on(deup: ModuleType) -> None:
    figures = deup.measure_features(1, width=8, classes=4, memory=20)
    assert figures["ratio"] == pytest.approx(figures["six_s"] / figures["bare_s"])
    assert min(figures.values()) > 0


def test_a_missed_goal_of_the_error_predictor_is_said(
    deup: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deup, "measure_fit", lambda rounds: {"ratio": 1.1})
    monkeypatch.setattr(deup, "measure_predict", lambda rounds: {"ratio": 0.2, "largest_difference": 1e-9})
    file = tmp_path / "deup.json"
    assert deup.main(["--only", "fit", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["fit"] == {"ratio": 1.1}
    assert deup.main(["--only", "fit", "predict"]) == 1
    assert "MISSED: predict: largest_difference 1e-09, goal 1e-12" in capsys.readouterr().out


@pytest.fixture
def deup_digits() -> ModuleType:
    return loaded(SCRIPT.with_name("deup_digits.py"))


def said_of(digits: ModuleType, seed: int) -> Any:
    """Five stages of a stream whose totals know what is to come, and every third mistake."""
    draws = torch.Generator().manual_seed(seed)
    came, labels = torch.arange(10) // 2, torch.arange(10).repeat(6)
    stages = []
    for number in range(digits.STAGES):
        stage: dict[str, Any] = {"y": labels}
        known = came[labels] <= number
        error = torch.where(known, torch.rand(60, generator=draws).round(), 1.0).double()
        total = torch.where(known, 0.1, 0.5) + 0.01 * torch.rand(60, generator=draws)
        for head in digits.HEADS:
            stage |= {f"m{size}_{head}_total": total for size in digits.MEMORIES}
            stage |= {f"r{rate}_{head}_abstain": total > 0.4 for rate in digits.RATES}
            stage |= {f"{head}/error": error, f"{head}/margin": torch.rand(60, generator=draws)}
        stages.append(stage | dict.fromkeys(digits.DISTANCES, total))
    return stages, came


def test_what_falls_when_a_digit_is_learned_is_measured_stage_by_stage(
    deup_digits: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, came = said_of(deup_digits, 0)
    found = deup_digits.figures(stages, came, "nmc", "m900_nmc_total")
    assert found["future"] == [1.0] * 4
    assert found["before"] == pytest.approx([0.505] * 4, abs=0.006)
    assert found["after"] == pytest.approx([0.105] * 4, abs=0.006)
    known = came[stages[2]["y"]] <= 2
    ranks, wrong = stages[2]["m900_nmc_total"][known], stages[2]["nmc/error"][known]
    assert found["mistakes"][1] == pytest.approx(roc_auc_score(wrong, ranks))
    monkeypatch.setattr(deup_digits, "run", lambda seed: said_of(deup_digits, seed))
    monkeypatch.setattr(deup_digits, "DRAWS", 4)
    assert deup_digits.main(["--only", "stream", "abstention", "--seeds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "0 0 0 0 0" in shown  # nothing of a class that was learned is refused
    assert "100 100 100 100" in shown  # and everything of one that was not
    for stage in stages:  # what is not lower afterwards is said
        stage["m900_nmc_total"] = torch.ones(60)
    monkeypatch.setattr(deup_digits, "run", lambda seed: (stages, came))
    assert deup_digits.main(["--only", "stream", "--seeds", "1"]) == 1
    assert "MISSED: means: before / after 1.00, goal 2" in capsys.readouterr().out


# ---- coverage


def test_coverage_is_measured_on_tiny_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    coverage = loaded(SCRIPT.with_name("coverage.py"))
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert coverage.main(["--parts", "cifar100"]) == 2
    assert "CLKIT_DATA" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    centres, ids = rng.normal(size=(10, 8)), np.repeat(np.arange(10), 30)
    rows = {part: centres[ids] + rng.normal(size=(300, 8)) for part in ("train", "test")}
    arrays: dict[str, Any] = {"f_train": rows["train"], "f_test": rows["test"], "y_train": ids, "y_test": ids}
    for name, step in (("cifar100", 1), ("gtsrb", 3)):
        few = {key: each[:: step if "test" in key else 1] for key, each in arrays.items()}
        np.savez(tmp_path / coverage.FEATURES.format(name), **few)
    stages = coverage.stream(coverage.kept("cifar100"), coverage.HEADS["nearest means"](8), 4, 0)
    last = stages[-1][1]  # of four stages, for nine tenths
    means = np.stack([rows["train"][ids == label].mean(axis=0) for label in range(10)])
    distance = ((rows["test"][:, None] - means) ** 2).sum(axis=2)
    assert last.accuracy == pytest.approx((distance.argmin(axis=1) == ids).mean(), abs=0.1)
    assert abs(last.covered - 0.9) < 3 * last.error
    assert last.resubstituted < last.covered
    assert coverage.main(["--parts", "signs", "drift"]) == 0
    shown = capsys.readouterr().out
    under = [line.split("│") for line in shown.splitlines() if "step" in line and "│" in line]
    assert {cells[2].strip() for cells in under} == {"step 0", f"step {coverage.STEP:g}"}
    fixed, followed = (float(cells[4]) for cells in under[:2])
    assert abs(followed - 0.9) <= abs(fixed - 0.9) + 0.02


def test_an_expected_error_is_measured_on_tiny_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # before a package of the name of one
    images = loaded(SCRIPT.with_name("deup_images.py"))
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert images.main([]) == 2
    rng = np.random.default_rng(0)
    centres, ids = 2 * rng.normal(size=(100, 12)), np.repeat(np.arange(100), 4)
    for name, offset in (("cifar100", 0.0), ("caltech101", 0.0), ("gtsrb", 1000 * np.eye(12)[0])):
        rows = {part: centres[ids] + offset + rng.normal(size=(400, 12)) for part in ("train", "test")}
        arrays: dict[str, Any] = {"f_train": rows["train"], "f_test": rows["test"], "y_train": ids, "y_test": ids}
        np.savez(tmp_path / images.FEATURES.format(name), **arrays)
    assert images.main(["--orders", "1"]) == 0
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines() if "│" in line]
    for line in lines:
        if line[2] in ("Mahalanobis", "5th neighbour, all rows"):
            assert abs(float(line[7]) - 0.5) < 0.1  # the same classes again
            assert float(line[8]) == 1.0
        if line[2] == "DEUP":
            assert min(map(float, line[4].split())) > 0.6  # mistakes
    assert sum(line[2] == "DEUP" for line in lines) == 2


# ---- edits of digits


@pytest.fixture
def mend() -> ModuleType:
    return loaded(SCRIPT.with_name("mend.py"))


@pytest.mark.parametrize(
    ("network", "parts", "rows"),
    [
        ("cnn", ["cnn-tables-0"], 12 + 1),
        pytest.param("vit", ["vit-layers-0", "vit-tables-0"], 12 + 15 + 2, marks=pytest.mark.slow),
    ],
)
def test_edits_of_digits_on_a_tiny_run(
    network: str,
    parts: list[str],
    rows: int,
    mend: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = mend.digits(0)
    monkeypatch.setattr(mend, "digits", lambda seed: whole._replace(test=(whole.test[0][:12], whole.test[1][:12])))
    for name, value in {"EDITS": 2, "META": 1, "KEPT": 4, "BASE_STEPS": {"cnn": 60, "vit": 60}, "FIRST": 8}.items():
        monkeypatch.setattr(mend, name, value)
    monkeypatch.setattr("editing.MOST_STEPS", 3)
    command = ["--network", network, "--seeds", "0", "--steps", "2", "--results", str(tmp_path)]
    status = mend.main(command)
    printed = capsys.readouterr().out
    assert status == (0 if "MISSED" not in printed else 1)
    assert sorted(file.stem for file in tmp_path.iterdir()) == parts
    assert printed.count("\n| ") == rows
    step = json.loads((tmp_path / f"{network}-tables-0.json").read_text())["one gradient step, 0.01"]["relabel"]
    assert step["reliability"] in (0.0, 0.5, 1.0)
    assert step["seconds"] > 0
    monkeypatch.setattr(mend, "trained_editor", None)  # all is done
    assert mend.main(command) == status
    assert capsys.readouterr().out.partition("\n\n")[2] == printed.partition("\n\n")[2]


def test_values_outside_of_a_range_have_a_star(mend: ModuleType) -> None:
    assert mend.beside([0.8, 0.749, 1.0], "0.80-0.98 / 0.75-0.94 / 1.6-4.6") == "0.80 / 0.75 / 1.00*"
    assert mend.beside([0.8, 0.2, 9.0], "1.0 / 0.71 / 3.7") == "0.80 / 0.20 / 9.00"  # of one seed
    assert mend.beside([0.8, 0.2, 9.0], "") == "0.80 / 0.20 / 9.00"


def test_goals_are_those_of_the_medians(mend: ModuleType) -> None:
    early = "MEND after 200 steps, unit scale"
    methods = (early, "MEND, smallest scale", "fine-tuning, RMSprop 1e-4", "MEND, unit scale")
    good = {kind: {"reliability": 1.0, "generality": 1.0, "drawdown": 0.4} for kind in ("relabel", "correct")}
    rows = {method: json.loads(json.dumps(good)) for method in methods}
    rows[methods[2]]["relabel"]["drawdown"] = 0.8
    seeds = [{"rows": json.loads(json.dumps(rows))} for _ in range(3)]
    assert all(mend.goals(seeds).values())
    seeds[0]["rows"][methods[0]]["relabel"]["drawdown"] = 9.0  # one of three
    assert all(mend.goals(seeds).values())
    seeds[1]["rows"][methods[0]]["relabel"]["drawdown"] = 9.0
    missed = [goal for goal, met in mend.goals(seeds).items() if not met]
    assert missed == ["after 200 steps: relabel drawdown <= half of fine-tuning's"]


def test_fine_tuning_ends_when_the_label_wins(mend: ModuleType) -> None:
    torch.manual_seed(0)
    model, x = mend.network("cnn").eval(), torch.rand(1, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    label = (mend.answers(model, x) + 1) % 10
    edit = mend.fine_tuned(["fc"], 1e-2, None, torch.rand(5, 1, 8, 8))
    changed = edit(model, x, label)
    assert torch.equal(mend.answers(changed, x), label)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    moved = [name for name, value in changed.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["fc.weight"]
    again = edit(changed, x, label)  # it has won already
    assert all(torch.equal(value, changed.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.slow
def test_edits_of_digits_hold_and_cost_less_than_fine_tuning(mend: ModuleType) -> None:
    data = mend.digits(0)
    model = mend.trained_network("cnn", data, 0)
    x, y = data.test
    first = mend.answers(model, x)
    assert float((first == y).double().mean()) > 0.97
    editor = mend.trained_editor(model, data, mend.LAYERS["cnn"], 0, mend.EARLY, alpha=mend.ALPHA["cnn"]).trained
    draws = np.random.default_rng(0)
    rows = draws.permutation(len(x))[: mend.EDITS].tolist()
    wrong = (first[rows] + torch.from_numpy(draws.integers(1, 10, mend.EDITS))) % 10
    missed = (first != y).nonzero()[:, 0].tolist()
    unit, least = mend.by_editor(editor, "unit"), mend.by_editor(editor, "smallest")
    tuned = mend.fine_tuned(editor.layers, 1e-4, None, data.editor[0])
    relabelled, by_tuning = (mend.measured(edit, model, data, rows, wrong) for edit in (unit, tuned))
    corrected, carefully = (mend.measured(edit, model, data, missed, y[missed]) for edit in (unit, least))
    assert relabelled["reliability"] >= 0.6
    assert relabelled["drawdown"] <= by_tuning["drawdown"] / 2
    assert corrected["reliability"] >= 0.95
    assert corrected["drawdown"] <= 4  # of one seed; the benchmark asks for 3 of the median of three
    assert carefully["reliability"] == 1.0
    assert carefully["drawdown"] <= 1  # likewise; there 0.5


@pytest.mark.filterwarnings("ignore:the reference has .* images, too few to see a drop")  # it is a tiny run
def test_edits_of_photos_on_a_tiny_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loaded(SCRIPT.with_name("mend_images.py"))
    taken = importlib.import_module("mend_photos")
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert module.main([]) == 2
    assert "imagenet1k_sample.npz" in capsys.readouterr().err
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=20).eval()
    monkeypatch.setattr(module, "network", lambda root: model)
    for name, value in {
        "SIZE": 32,
        "CORRECTED": 2,
        "VIEWS": 3,
        "KEPT": 4,
        "META": 1,
        "FIRST": 6,
        "HELD_OUT": 2,
    }.items():
        for place in (module, taken):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, value)
    monkeypatch.setattr("editing.MOST_STEPS", 3)
    # squares of one colour, which JPEG hardly changes
    pixels = np.random.default_rng(0).integers(0, 255, (24, 5, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    files = []
    for image in pixels:
        files.append(io.BytesIO())
        Image.fromarray(image).save(files[-1], format="JPEG")
    data = [np.frombuffer(file.getvalue(), dtype=np.uint8) for file in files]
    offsets = np.cumsum([0, *map(len, data)])
    (tmp_path / "weights").mkdir()
    (tmp_path / module.WEIGHTS).touch()
    arrays = {"jpeg": np.concatenate(data), "offsets": offsets}
    np.savez(tmp_path / module.PHOTOS, **arrays, y=np.zeros(24, dtype=np.uint16))
    x, _ = taken.photos(tmp_path)
    assert x.shape == (24, 3, 32, 32)
    assert float((x[0].permute(1, 2, 0).float() - torch.from_numpy(pixels[0, 4:36]).float()).abs().mean()) < 30  # JPEG
    y = module.answers(model, module.scaled(x))
    y[::3] = (y[::3] + 1) % 20
    np.savez(tmp_path / module.PHOTOS, **arrays, y=y.numpy().astype(np.uint16))
    halves = module.halves(tmp_path, model)
    assert [len(part.y) for part in (halves.editor, halves.wrong, halves.rest)] == [12, 2, 10]
    tail = module.Tail(model)
    assert torch.allclose(tail(halves.wrong.stem), model(module.scaled(halves.wrong.x)), atol=1e-5)
    assert not (module.answers(tail, halves.wrong.stem) == halves.wrong.y).any()
    command = ["--steps", "1", "--results", str(tmp_path / "results")]
    status = module.main(command)
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 7 + 10 + 5 + 3
    assert status == ("MISSED" in printed)
    assert (tmp_path / "results" / "editor-head.pt").is_file()
    monkeypatch.setattr(module, "measured", None)  # all is done
    assert module.main([*command, "--only", "layers", "sequence"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert all(row in printed for row in rows)
    assert len(rows) == 10 + 5 + 2


def test_the_cost_of_an_edit_is_measured_on_small_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loaded(SCRIPT.with_name("mend_cost.py"))
    monkeypatch.setattr(module, "NETWORKS", {"test_resnet": {"zero_init_last": False}})
    file = tmp_path / "cost.json"
    status = module.main(["--rounds", "1", "--json", str(file)])
    assert status == ("MISSED" in capsys.readouterr().out)
    found = json.loads(file.read_text())["test_resnet"]
    assert found["seconds"]["forward"] < found["seconds"]["forward and backward"]
    assert found["seconds"]["edit, unit scale"] > found["seconds"]["forward"]
    shapes = {"a": (3, 4), "b": (3, 4), "c": (7, 2)}
    # of each shape U, V and b of two blocks, then their s and o for each layer; and a step of each layer
    wanted = 2 * (2 * 5 * 7 + 7) + 2 * (2 * 2 * 7) + 2 * (2 * 5 * 9 + 9) + 2 * (2 * 9) + 3
    assert module.by_formula(shapes, 5) == wanted


# ---- shards, and extraction


def test_a_small_cluster_with_killed_processes_equals_one_process(tmp_path: Path) -> None:
    """In a process of its own, which forks its workers."""
    file = tmp_path / "shards.json"
    sizes = "--rows 7300 --width 16 --classes 5 --shards 7 --killed 2 "
    sizes += "--large-width 512 --large-classes 10 --large-parts 2 4"
    command = [sys.executable, str(SCRIPT.with_name("shards.py")), *sizes.split(), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    cluster = found["cluster"]
    assert (cluster["killed"], cluster["started"], cluster["samples"]) == (2, 9, 7300)
    assert cluster["difference"] <= 1e-12
    assert f"shard {cluster['doubled']}/7 of 'made rows' is held already" in cluster["twice"]
    assert f"shard {cluster['lost']}/7 of 'made rows' is missing" in cluster["missing"]
    assert [row["parts"] for row in found["merge"]] == [2, 4]
    assert all(found["goals"].values())


def test_learning_is_measured_beside_a_bare_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extraction = loaded(SCRIPT.with_name("extraction.py"))
    file = tmp_path / "extraction.json"
    sizes = "--backbone test_resnet --images 20 --side 32 --batch-size 8 --rounds 1"
    status = extraction.main([*sizes.split(), "--json", str(file)])
    figures = json.loads(file.read_text())
    assert figures["ratio"] == pytest.approx(figures["learn_images_s"] / figures["bare_images_s"])
    assert status == int(figures["ratio"] < extraction.GOAL)
    assert ("MISSED" in capsys.readouterr().out) == bool(status)


# ---- closed-form heads


def test_closed_form_heads_are_measured_on_tiny_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = loaded(SCRIPT.with_name("closed_form.py"))
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert heads.main([]) == 2
    assert "CLKIT_DATA" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    centres, ids = rng.normal(size=(20, 12)), np.repeat(np.arange(20), 12)
    rows = {part: centres[ids] + 0.5 * rng.normal(size=(240, 12)) for part in ("train", "test")}
    arrays: dict[str, Any] = {"f_train": rows["train"], "f_test": rows["test"], "y_train": ids, "y_test": ids}
    np.savez(tmp_path / heads.SETS["traffic signs"], **arrays)
    small = ["--sets", "traffic signs", "--width", "30", "--lift", "30", "--json", str(tmp_path / "found.json")]
    assert heads.main(small) == 0
    found = json.loads((tmp_path / "found.json").read_text())["traffic signs"]
    for name, course in found.items():
        assert course["final"] > 70
        if name in ("LDA, unit", "KLDA", "AnaCP", "AnaCP, nearest"):
            assert course["final"] == pytest.approx(course["joint"], abs=1e-9)
        if "stages" in course:
            assert len(course["stages"]) == 10
            assert course["average"] == pytest.approx(np.mean(course["stages"]))
    assert heads.main([*small, "--scan"]) == 0
    assert heads.main([*small, "--ranpac"]) == 0
    ways = json.loads((tmp_path / "found.json").read_text())["traffic signs"]
    assert len(ways) == 3
    assert all(len(way["stages"]) == 10 and way["final"] > 70 for way in ways.values())


# ---- what the first session may train


def test_first_sessions_are_compared_and_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = loaded(SCRIPT.with_name("first_session.py"))
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert sessions.main([]) == 2
    assert "CLKIT_DATA" in capsys.readouterr().err
    rng, ids = np.random.default_rng(0), np.repeat(np.arange(20), 5).astype(np.uint8)
    images = {f"x_{part}": rng.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / sessions.FILES[0], **images, y_train=ids, y_test=ids)
    file = tmp_path / "found.json"
    monkeypatch.setattr(sessions, "NETWORK", "test_efficientnet")
    small = ["--choices", "none,last_block", "--random-weights", "--size", "32", "--epochs", "1", "--lift", "30"]
    status = sessions.main([*small, "--results", str(file)])
    found = json.loads(file.read_text())
    assert sorted(found["search"]["last_block"]) == ["0.003", "0.03"]
    runs, rates = found["runs"], found["search"]["last_block"].values()
    means = {each["rate"]: np.mean([each[name]["final"] for name in sessions.HEADS]) for each in rates}
    assert means[runs["last_block"]["rate"]] == max(means.values())
    assert all(len(runs[choice][name]["stages"]) == 10 for choice in runs for name in sessions.HEADS)
    gain = runs["last_block"]["ranpac"]["final"] - runs["none"]["ranpac"]["final"]
    assert status == int(gain < sessions.GOAL)
    assert f"best with last_block, {gain:+.2f} points" in capsys.readouterr().out
    monkeypatch.setattr(sessions, "run", None)  # nothing is run again
    assert sessions.main([*small, "--results", str(file)]) == status
    with pytest.raises(SystemExit):
        sessions.main([*small, "--epochs", "2", "--results", str(file)])
    assert "is of other settings" in capsys.readouterr().err
