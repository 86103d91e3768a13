"""DST in two processes: one topology on both, that of one process with the same batches, and earlier tasks to the bit.

Run as a program, ``test_dst_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from two_ranks import Ranks, Scenarios, drive

from clkit.callbacks import DST, StreamEvaluation
from clkit.callbacks._sparse_tasks import require_agreement
from clkit.data import Custom, StreamDataModule, TaskIncremental
from clkit.errors import ClkitError
from clkit.methods import PruneSchedule, SparseTopology

GROWTH = ("gradient", "random", "momentum", "unfired")
scenarios = Scenarios(__file__, quick=(), slow=(*GROWTH, "accumulated", "norm", "frozen", "apart"))
TASKS = 3


class Net(pl.LightningModule):
    """In float64, so that sums over two halves of a batch differ from those over all in the last digits only."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)
        self.body = nn.Sequential(nn.Linear(6, 16), middle, nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 6)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs.double()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=1e-2)


def data(batch_size: int) -> StreamDataModule:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(6).repeat_interleave(16)
    inputs = torch.randn(6, 6, generator=generator)[targets] + 0.5 * torch.randn(96, 6, generator=generator)
    part = TensorDataset(inputs, targets)
    return StreamDataModule(
        Custom(part, part),
        TaskIncremental(experiences=TASKS),
        batch_size=batch_size,
        epochs_per_experience=4,
        preprocessing=torch.as_tensor,
    )


class Outputs(pl.Callback):
    boundary_phase = 45  # after the masks

    def __init__(self, dst: DST) -> None:
        self.dst, self.rows = dst, list[list[Tensor]]()

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Any) -> None:
        inputs, found = torch.randn(8, 6, generator=torch.Generator().manual_seed(9)), []
        for task in range(self.dst.tasks):
            with self.dst.activate(task), torch.no_grad():
                found.append(pl_module.eval()(inputs))
        pl_module.train()
        self.rows.append(found)


def run(name: str, folder: Path, world: int = 1) -> dict[str, Any]:
    options: dict[str, Any] = {"density": 0.3, "table": False}
    options["schedule"] = PruneSchedule(update_every=1 if name == "accumulated" else 2)
    options["growth"] = name if name in GROWTH else "gradient"
    if name == "frozen":
        options["side_state"] = "freeze_after_first"
    dst, evaluation = DST(**options), StreamEvaluation(table=False, files=False, figures=False)
    seen, module = Outputs(dst), Net(norm=name in ("norm", "frozen"))
    trainer = quiet_trainer(
        folder,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=3 if name == "accumulated" else 1,
        callbacks=[dst, seen, evaluation],
    )
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data(8 // world))
    masks = [dst.topology.mask(task) for task in range(TASKS)]
    return {
        "masks": [{key: mask.clone() for key, mask in each.items()} for each in masks],
        "tasks": [dst.export(task) for task in range(TASKS)],
        "rows": seen.rows,
        "results": evaluation.results["module"]["accuracy_matrix"],
    }


def scenario(name: str, folder: Path) -> dict[str, Any]:
    if name == "apart":  # masks that drifted apart are noticed
        topology = SparseTopology({"w": torch.ones(8, 8)}, 0.5, seed=torch.distributed.get_rank())
        topology.begin_task(1)
        try:
            require_agreement("DST", topology)
        except ClkitError as error:
            return {"error": str(error)}
        return {"error": ""}
    return run(name, folder, world=2)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return scenarios.run_in(tmp_path_factory.mktemp("two"))


@scenarios.names(*GROWTH, "accumulated", "norm", "frozen")
def test_both_ranks_have_one_topology_and_forget_nothing(ranks: Ranks, name: str) -> None:
    first, second = ranks(name)
    for task in range(TASKS):
        for key in ("masks", "tasks"):
            assert all(torch.equal(value, second[key][task][path]) for path, value in first[key][task].items())
        for later in range(task, TASKS):
            assert torch.equal(first["rows"][later][task], first["rows"][task][task])
        assert [row[task] for row in first["results"][task:]] == [first["results"][task][task]] * (TASKS - task)


@scenarios.names(*GROWTH, "accumulated")
def test_two_processes_train_what_one_trains(ranks: Ranks, tmp_path: Path, name: str) -> None:
    two, one = ranks(name)[0], run(name, tmp_path)
    for task in range(TASKS):
        for path, mask in one["masks"][task].items():
            assert torch.equal(two["masks"][task][path], mask)
        for path, value in one["tasks"][task].items():
            torch.testing.assert_close(two["tasks"][task][path], value, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_masks_that_are_not_the_same_are_noticed(ranks: Ranks) -> None:
    for rank in ranks("apart"):
        assert "the processes have other masks of task 0" in rank["error"]


if __name__ == "__main__":
    sys.exit(drive(scenario))
