"""The base strategy on one device is Lightning's simplest one, bit for bit; on several it is DDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import clkit
from clkit.data import ClassIncremental, StreamDataModule
from clkit.strategies import LearningStrategy

Make = Callable[..., Any]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_one_device_equals_lightnings_own_strategy(make_trainer: Make, options: dict[str, Any]) -> None:
    outcomes = []
    for strategy in ("auto", LearningStrategy()):
        torch.manual_seed(0)
        module = Module()
        trainer = make_trainer(strategy=strategy, **options)
        trainer.fit(module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=3)))
        metrics = dict(trainer.callback_metrics)
        trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
        state = trainer.optimizers[0].state_dict()["state"]
        outcomes.append((module.state_dict(), state, {**metrics, **trainer.callback_metrics}, torch.get_rng_state()))
    (one, optimizer, metrics, rng), (two, other_optimizer, other_metrics, other_rng) = outcomes
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(optimizer[i]["exp_avg"], other_optimizer[i]["exp_avg"]) for i in optimizer)
    assert metrics == other_metrics
    assert torch.equal(rng, other_rng)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_users_own_loaders_keep_their_order(make_trainer: Make, shuffle: bool) -> None:
    """Lightning gives every loader of a DDP strategy a sampler of its own, which shuffles."""
    data = TensorDataset(torch.rand(90, 64), torch.arange(90) % 10)
    orders = []
    for strategy in ("auto", LearningStrategy(), "gradient_free"):
        seen: list[int] = []

        class Look(pl.Callback):
            def __init__(self, seen: list[int]) -> None:
                self.seen = seen

            def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
                self.seen += [int(index) for index in batch[1]]

        torch.manual_seed(0)
        module = Module()
        trainer = make_trainer(strategy=strategy, callbacks=[Look(seen)], max_epochs=2)
        torch.manual_seed(1)
        trainer.fit(module, DataLoader(data, 20, shuffle=shuffle), DataLoader(data, 20))
        orders.append(seen)
    assert orders[0] == orders[1]
    if shuffle:
        assert len(orders[2]) == 180
    else:
        assert orders[2] == orders[0] == 2 * [i % 10 for i in range(90)]


class ByHand(Module):
    """Runs the closure and the step on its own."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step()


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        for _ in range(2):  # two steps for one batch
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", [Module, ByHand, Manual])
def test_each_batch_is_learned_once(make_trainer: Make, kind: type[Module], accumulate: int) -> None:
    learned: list[int] = []

    class Counting(LearningStrategy):
        def on_batch_learned(self) -> None:
            learned.append(self._module.trainer.fit_loop.epoch_loop.batch_progress.current.processed)

    loader = DataLoader(TensorDataset(torch.randn(20, 64), torch.arange(20) % 10), batch_size=4)
    options = {} if kind is Manual else {"accumulate_grad_batches": accumulate}
    make_trainer(strategy=Counting(), max_epochs=1, **options).fit(kind(), loader)
    assert learned == [0, 1, 2, 3, 4]


def test_one_device_needs_no_process_group_and_no_wrapper(make_trainer: Make) -> None:
    class Look(pl.Callback):
        seen: tuple[bool, bool, bool]

        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            strategy = trainer.strategy
            self.seen = (
                torch.distributed.is_initialized(),
                strategy.launcher is None,
                strategy.model is pl_module,
            )

    look = Look()
    module = Module()
    trainer = make_trainer(strategy=LearningStrategy(), callbacks=[look])
    trainer.fit(module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)))
    assert look.seen == (False, True, True)
    # validating on a trainer that never fitted
    make_trainer(strategy=LearningStrategy()).validate(
        module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)), verbose=False
    )


PROGRAM = """
import sys
from pathlib import Path

import torch
from small_runs import quiet_trainer
from torch.utils.data import TensorDataset

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy

folder, warmup = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
y = torch.tensor([0] * 11 + [1] * 10 + [2] * 9 + [3] * 11)
data = TensorDataset(torch.randn(41, 6) + y[:, None], y)
head, evaluation = NMC(), StreamEvaluation(table=False, figures=False)
strategy = GradientFreeStrategy(warmup_epochs=warmup)
trainer = quiet_trainer(folder, devices=2, strategy=strategy, callbacks=[head, evaluation])
model = TimmClassifier("identity", num_classes=4, model_kwargs={"in_features": 6})
trainer.fit(model, datamodule=StreamDataModule(Custom(data, data), ClassIncremental(experiences=2), batch_size=4))
if trainer.is_global_zero:
    torch.save([head.head.counts.tolist(), evaluation.class_counts("nmc")], folder / "out.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 1])
def test_processes_that_lightning_starts_itself_learn_every_sample_once(tmp_path: Path, warmup: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join(str(Path(file).parents[1]) for file in (clkit.__file__, __file__))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), str(warmup)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    learned, evaluated = torch.load(tmp_path / "out.pt", weights_only=True)
    assert learned == [total for _, total in evaluated.values()] == [11, 10, 9, 11]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stream"]["experiences"][0]["train_samples"] == 21
