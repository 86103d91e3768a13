"""DST in real runs: every earlier task gives the same bits, whatever comes after, however the run is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from small_runs import hooks_of, quiet_trainer
from torch import Tensor, nn

from clkit.callbacks import AEFOCL, DST, NMC, StreamEvaluation
from clkit.data import StreamDataModule, TaskIncremental
from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.methods import Growth, Initial, Prune, PruneSchedule
from clkit.surgery.change import changes_of

PIXELS, LABELS = load_digits(return_X_y=True)
DIGITS = torch.from_numpy(PIXELS / 16).float().view(-1, 1, 8, 8)
OFTEN = PruneSchedule(update_every=2)


class Net(pl.LightningModule):
    """Convolutions with a batch norm, a linear layer with a bias, and a classifier."""

    def __init__(self, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 36, 24),
            nn.ReLU(),
        )
        self.head = nn.Linear(24, 10)
        self.optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule(
        "digits", TaskIncremental(experiences=5), **{"batch_size": 14, "epochs_per_experience": 3, **options}
    )


class Outputs(pl.Callback):
    """Keeps what the network gives for all digits after each task, under each task so far."""

    boundary_phase = 45  # after the masks, before the evaluation

    def __init__(self, dst: DST) -> None:
        self.dst = dst
        self.rows: list[list[Tensor]] = []

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Any) -> None:
        self.rows.append([outputs(self.dst, pl_module, task) for task in range(self.dst.tasks)])


@torch.no_grad()
def outputs(dst: DST, module: nn.Module, task: int, size: int = 64) -> Tensor:
    modes = {part: part.training for part in module.modules()}
    with dst.activate(task):
        module.eval()
        found = torch.cat([module(part) for part in DIGITS[:256].split(size)])
    for part, mode in modes.items():
        part.training = mode
    return found


def run(folder: Path, dst: DST, *beside: Any, module: Net | None = None, data: Any = None, **options: Any) -> Any:
    module = module or Net()
    seen = Outputs(dst)
    ckpt = options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, callbacks=[dst, seen, *beside], **options)
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data or stream(), ckpt_path=ckpt, weights_only=True)
    return module, seen, trainer


def quick(**options: Any) -> DST:
    return DST(**{"density": 0.2, "schedule": OFTEN, "table": False, **options})


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
