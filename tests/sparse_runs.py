"""Runs of DST on digits that tests look at: a network with norms and biases, and what it gives after each task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from small_runs import quiet_trainer
from torch import Tensor, nn

from clkit.callbacks import DST
from clkit.data import StreamDataModule, TaskIncremental
from clkit.methods import PruneSchedule

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


def said_by_dst(warned: Any) -> list[str]:
    """The texts that DST gave among recorded warnings, where Lightning may have said something, too."""
    return [text for each in warned if (text := str(each.message)).startswith("DST: ")]


def quick(**options: Any) -> DST:
    return DST(**{"density": 0.2, "schedule": OFTEN, "table": False, **options})
