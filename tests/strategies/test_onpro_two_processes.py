"""OnPro in two processes: one memory, and with gathered embeddings the weights of one process.

Run as a program, ``test_onpro_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from onpro_runs import onpro
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_ranks import Ranks, Scenarios, drive

from clkit.errors import ClkitError
from clkit.strategies import DERPPStrategy, ERStrategy
from clkit.testing._compare import changed

SIZES = [(3, 3), (3, 3), (3, 2), (1, 3), (2, 2), (3, 3), (3, 3), (3, 2)]  # of the batches of both ranks
TASKS = [range(4), range(4, 8)]  # which batches an experience has
QUICK = ("gathered", "local")
SLOW = ("a rank without rows", "er without rows", "norm", "er", "der", "class balanced", "bytes", "saved", "from two")


def batches(rank: int | None, unlabelled: bool) -> list[list[tuple[Tensor, Tensor]]]:
    """The batches of each task, of one rank or of both together."""
    generator = torch.Generator().manual_seed(3)
    tasks = []
    for task, numbers in enumerate(TASKS):
        own = []
        for number in numbers:
            parts = [
                (
                    torch.randint(0, 256, (size, 3, 8, 8), generator=generator) / 255.0,
                    torch.randint(2, (size,), generator=generator) + 2 * task,
                )
                for size in SIZES[number]
            ]
            x, y = (torch.cat(each) for each in zip(*parts, strict=True))
            if unlabelled and number in (0, 6):  # the very first batch, and one with a memory
                parts[1] = (parts[1][0], torch.full_like(parts[1][1], -1))
                y = torch.cat([parts[0][1], parts[1][1]])
            own.append((x, y) if rank is None else parts[rank])
        tasks.append(own)
    return tasks


class Net(pl.LightningModule):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norm else nn.GroupNorm(2, 6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.classify = nn.Linear(24, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.body(images))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("the strategy does not call it")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


GATHERED = {"gather": "embeddings"}
DER: dict[str, Any] = {"kind": DERPPStrategy, "alpha": 0.5, "beta": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "gathered": GATHERED,
    "local": {},
    "norm": {},
    "er": {"kind": ERStrategy, **GATHERED},
    "der": {**DER, **GATHERED},
    "class balanced": {"policy": "class_balanced", **GATHERED},
    "bytes": {"storage": "uint8"},
    "saved": GATHERED,
    "a rank without rows": GATHERED,
    "er without rows": {"kind": ERStrategy},
    "from two": GATHERED,
}


def plain_trainer(devices: int, folder: Path, strategy: Any, callbacks: list[Any]) -> pl.Trainer:
    options = {"max_epochs": 1, "precision": "64-true", "use_distributed_sampler": False}
    return quiet_trainer(folder, devices=devices, strategy=strategy, callbacks=callbacks, **options)


def fit_each(trainer: pl.Trainer, module: pl.LightningModule, tasks: list[Any]) -> None:
    """One fit a task."""
    for task, loader in enumerate(tasks):
        trainer.fit_loop.max_epochs = task + 1
        trainer.fit(module, loader)


def run(devices: int, folder: Path, name: str, resume: Path | None = None) -> dict[str, Any]:
    """One fit a task with one strategy, as users with plain loaders do; what it ended with."""
    module = Net(norm=name == "norm")
    options = {"capacity": 7, "rotation": "rot4", "replay_batch": 6, **OPTIONS[name]}
    strategy = onpro(**options)
    saved = folder / f"{name}-{devices}"
    callbacks: list[Any] = []
    if name == "saved":
        callbacks = [ModelCheckpoint(str(saved), filename="{epoch}", every_n_epochs=1, save_top_k=-1)]
    trainer = plain_trainer(devices, folder, strategy, callbacks)
    rank = None if devices == 1 else trainer.global_rank
    tasks = [
        DataLoader(task, batch_size=None) for task in batches(rank, "without rows" in name)
    ]  # each with its own sizes
    if resume is not None:
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, tasks[1], ckpt_path=str(resume))
    else:
        fit_each(trainer, module, tasks)
    memory = strategy.memory
    return {
        "weights": {key: value.detach().clone() for key, value in module.state_dict().items()},
        "projector": {}
        if strategy.projector is None
        else {k: v.detach().clone() for k, v in strategy.projector.state_dict().items()},
        "memory": {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in memory.state_dict().items()
        },
        "prototypes": strategy.prototypes.state_dict() if hasattr(strategy, "prototypes") else {},
        "experience": strategy._counters.experience,
    }


def scenario(name: str, folder: Path) -> dict[str, Any]:
    resume = folder / "saved-2" / "epoch=0.ckpt" if name == "from two" else None
    try:
        return run(2, folder, name, resume)
    except ClkitError as error:
        return {"error": f"{type(error).__name__}: {error}"}


# ---- what the ranks ended with, against one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replay")


scenarios = Scenarios(__file__, QUICK, SLOW)
names = scenarios.names


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return scenarios.run_in(folder)


def assert_close(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-12, msg=key)


@names(*QUICK, *SLOW)
def test_the_memory_is_that_of_one_process_on_both_ranks(ranks: Any, folder: Path, name: str) -> None:
    first, second = ranks(name)
    resume = folder / "saved-2" / "epoch=0.ckpt" if name == "from two" else None
    assert changed(first["memory"], second["memory"]) == []
    assert changed(first["prototypes"], second["prototypes"]) == []
    assert changed(first["memory"], run(1, folder, name, resume)["memory"]) == []
    unlabelled = SIZES[0][1] + SIZES[6][1] if "without rows" in name else 0
    assert int(first["memory"]["seen"].sum()) == sum(map(sum, SIZES)) - unlabelled


@names(*QUICK, *SLOW)
def test_both_ranks_train_the_same_weights(ranks: Any, name: str) -> None:
    first, second = ranks(name)
    parameters = dict(Net(norm=name == "norm").named_parameters())  # running statistics are each rank's own
    assert (
        changed({key: first["weights"][key] for key in parameters}, {key: second["weights"][key] for key in parameters})
        == []
    )
    assert changed(first["projector"], second["projector"]) == []


@names("gathered", "er", "der", "class balanced", "saved", "from two", "a rank without rows")
def test_gathered_embeddings_train_the_weights_of_one_process(ranks: Any, folder: Path, name: str) -> None:
    resume = folder / "saved-2" / "epoch=0.ckpt" if name == "from two" else None
    one, two = run(1, folder, name, resume), ranks(name)[0]
    for part in ("weights", "projector", "prototypes"):
        assert_close(two[part], one[part])
    start = Net(norm=False).double().state_dict()
    assert all(not torch.equal(value, two["weights"][key]) for key, value in start.items())


def test_local_losses_are_not_those_of_one_process(ranks: Any, folder: Path) -> None:
    """Else the comparison above could not fail."""
    one, two = run(1, folder, "local"), ranks("local")[0]
    assert not torch.allclose(one["weights"]["classify.weight"], two["weights"]["classify.weight"])


if __name__ == "__main__":
    sys.exit(drive(scenario))
