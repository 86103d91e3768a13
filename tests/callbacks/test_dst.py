"""DST in real runs: every earlier task gives the same bits, whatever comes after, however the run is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import hooks_of
from sparse_runs import outputs, quick, run, stream
from torch import Tensor

from clkit.callbacks import StreamEvaluation
from clkit.methods import Growth, PruneSchedule
from clkit.surgery.change import changes_of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3},
        {"num_sanity_val_steps": -1, "val_check_interval": 0.5},
    ],
    ids=["plain", "clipped, 3 batches a step with a remainder", "validated on the way"],
)
def test_no_output_of_an_earlier_task_changes(tmp_path: Path, options: dict[str, Any]) -> None:
    dst, evaluation = quick(), StreamEvaluation(table=False, files=False, figures=False)
    module, seen, _ = run(tmp_path, dst, evaluation, **options)
    assert dst.tasks == 5
    for later in range(5):
        for task in range(later + 1):
            assert torch.equal(seen.rows[later][task], seen.rows[task][task])
    # they are five networks, and each has learned its task
    assert not any(torch.equal(seen.rows[4][task], seen.rows[4][task + 1]) for task in range(4))
    results = evaluation.results["module"]
    assert results["forgetting"] == 0
    assert min(results["accuracy_matrix"][-1]) > 0.9
    assert changes_of(module) == []
    assert hooks_of(module) == 0


@pytest.mark.parametrize("growth", ["gradient", "random", "momentum", "unfired"])
def test_a_run_killed_in_the_middle_of_a_task_ends_with_the_same_bits(tmp_path: Path, growth: Any) -> None:
    """Gradient growth averages over two steps, and 3 batches make one, so that something is on its way at any time."""
    options: dict[str, Any] = {"data": None, "accumulate_grad_batches": 3}
    make = {"growth": Growth(growth, accumulate=2), "schedule": PruneSchedule(update_every=3), "grow_from": "any"}

    def finished(*beside: Any, **more: Any) -> tuple[Any, list[Tensor], Any]:
        dst = quick(**make)
        data = stream(stop_after=3)
        module, _, _ = run(tmp_path, dst, *beside, **{**options, "data": data}, **more)
        return dict(module.state_dict()), [outputs(dst, module, task) for task in range(3)], dst.reports

    saver = ModelCheckpoint(str(tmp_path), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    weights, given, reports = finished(saver)
    steps = sorted(int(path.stem.split("=")[1]) for path in tmp_path.glob("step=*.ckpt"))
    assert len(steps) == 45
    for step in (16, 20, 22, 30):  # at an update, before one, after one, and at the last step of the task
        again, same, told = finished(ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert told == reports
        assert all(torch.equal(again[name], value) for name, value in weights.items())
        assert all(torch.equal(one, other) for one, other in zip(given, same, strict=True))
