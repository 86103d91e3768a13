"""Files of every release load for ever: each kept one resumes, validates and predicts as on the day it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clkit.runs.learned import LearnedModel
from tests.saved_runs import FOLDER, STRATEGIES, Run, scores

EXPECTED: dict[Path, Any] = {
    path.parent: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/expected.json"))
}
RESUMED = [(folder, name) for folder, expected in EXPECTED.items() for name in expected if "fit" in expected[name]]
PREDICTING = [
    (folder, name) for folder, expected in EXPECTED.items() for name in expected if "scores" in expected[name]
]


def assert_close(found: Any, expected: Any) -> None:
    """Weights and scores agree across processors and versions of PyTorch, up to float32's rounding."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_there_is_a_file_of_every_strategy() -> None:
    assert set(STRATEGIES) == {name for _, name in RESUMED}


@pytest.mark.parametrize(("folder", "name"), RESUMED, ids=lambda value: getattr(value, "name", value))
def test_a_run_goes_on_from_the_file_to_the_end_that_was_reached(folder: Path, name: str, tmp_path: Path) -> None:
    expected = EXPECTED[folder][name]["fit"]
    run = Run(name, tmp_path)
    reached = run.fit(ckpt_path=folder / f"{name}.ckpt")
    assert_close(reached["logits"], expected["logits"])
    assert reached["accuracy"] == expected["accuracy"]
    assert reached.get("memory") == expected.get("memory")
    assert_close(reached.get("tasks", []), expected.get("tasks", []))  # with DST the network of each


@pytest.mark.parametrize(("folder", "name"), PREDICTING, ids=lambda value: getattr(value, "name", value))
def test_heads_of_the_file_predict_as_they_did(folder: Path, name: str) -> None:
    path = next(folder.glob(f"{name}.*"))
    for head, expected in EXPECTED[folder][name]["scores"].items():
        assert_close(scores(path, head), expected)


@pytest.mark.parametrize("folder", [folder for folder, expected in EXPECTED.items() if "learned" in expected])
def test_a_part_still_says_what_it_holds(folder: Path) -> None:
    model = LearnedModel.read(folder / "learned.ckpt")
    assert model.holds.rows == model.samples == 30
    assert model.holds.missing() == ["shard 1/2 of 'features:./features.npz'"]
    assert model.names == {label: str(label) for label in model.names}
