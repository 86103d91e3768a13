"""The benchmark on real images: its machinery on a tiny file of the same form, and what it says without data."""

from __future__ import annotations

import importlib.util
import io
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from clkit.data import ClassIncremental

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_images.py"
ORDER = [4, 0, 5, 2, 1, 3]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_images", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


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
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("real_images: ")
