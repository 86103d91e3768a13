"""Forward passes only: nothing of the network moves, and Lightning's own machinery goes on working."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy, LearningStrategy

Make = Callable[..., Any]


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=3), **options)


class Base(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.classify = nn.Linear(16, 10)
        self.steps: list[int] = []
        self.optimizers_made = 0

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.body(inputs))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append(self.current_epoch)
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        self.optimizers_made += 1
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Manual(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("not called in a gradient-free run")


class NoForward(pl.LightningModule):
    """Its forward is inside its training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.SGD(self.classify.parameters(), 0.1)]


class Schedule(Base):
    """Its schedule looks at a loss that its training step would log."""

    def configure_optimizers(self) -> Any:
        self.optimizers_made += 1
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss"}}


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Steps(pl.Callback):
    """The trainer's step at the end, while the strategy still holds the run."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.count = trainer.global_step


# ---- nothing moves


@pytest.mark.parametrize("kind", [Base, Manual, NoForward, TwoOptimizers, Schedule])
def test_no_parameter_and_no_statistic_moves(make_trainer: Make, kind: Callable[[], Any]) -> None:
    module = kind()
    before = values(module)
    head, steps = NMC(), Steps()
    trainer = make_trainer(strategy="gradient_free", callbacks=[head, steps, StreamEvaluation(table=False)])
    trainer.fit(module, datamodule=stream())
    assert equal(values(module), before)
    assert steps.count == sum(-(-e.train_samples // 32) for e in trainer.datamodule.experiences)
    assert int(head.head.counts.sum()) == 899
    assert getattr(module, "steps", []) == []
    assert getattr(module, "optimizers_made", 0) == 0
    assert module.automatic_optimization is (kind not in (Manual, TwoOptimizers))


def test_every_forward_runs_in_eval_mode_without_gradients(make_trainer: Make) -> None:
    module, seen = Base(), set()
    module.classify.register_forward_hook(lambda m, args, out: seen.add((m.training, out.requires_grad)))
    make_trainer(strategy="gradient_free", callbacks=[NMC()]).fit(module, datamodule=stream())
    assert seen == {(False, False)}


def test_one_forward_a_batch_whatever_the_network_and_the_number_of_heads(make_trainer: Make) -> None:
    module, calls = Base(), []
    module.body.register_forward_hook(lambda *args: calls.append(1))
    heads = [AEFOCL(), *(NMC(name=f"nmc{i}") for i in range(6))]
    trainer = make_trainer(strategy="gradient_free", callbacks=heads, limit_val_batches=0)
    trainer.fit(module, datamodule=stream())
    assert len(calls) == trainer.global_step


def test_max_steps_stops(make_trainer: Make) -> None:
    head, steps = NMC(), Steps()
    data = stream()
    make_trainer(strategy="gradient_free", callbacks=[head, steps], max_steps=14).fit(Manual(), datamodule=data)
    assert steps.count == 14
    assert int(head.head.counts.sum()) < 14 * 32 + 1 < 899


def test_last_batch_of_one_row_does_not_break_batch_norm(make_trainer: Make) -> None:
    head = NMC()
    data = stream(batch_size=1)
    make_trainer(strategy="gradient_free", callbacks=[head], limit_train_batches=3).fit(Base(), datamodule=data)
    assert int(head.head.counts.sum()) == 9


# ---- what monitors see


def test_the_loss_is_the_cross_entropy_of_the_modules_own_output(make_trainer: Make) -> None:
    module = Base()
    logged: list[float] = []
    rows: list[tuple[Tensor, Tensor]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rows.append((batch[0], batch[1]))

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            logged.append(float(trainer.callback_metrics["gradient_free/loss"]))

    make_trainer(strategy="gradient_free", callbacks=[Look()]).fit(module, datamodule=stream(stop_after=1))
    module.eval()
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(module(torch.cat([x for x, _ in rows])), torch.cat([y for _, y in rows]))
    assert logged == [pytest.approx(float(wanted), rel=1e-5)]


def test_monitors_of_the_logged_loss_work(make_trainer: Make, tmp_path: Any) -> None:
    data = stream()
    data.setup("validate")
    stop = EarlyStopping("gradient_free/loss", patience=2)
    checkpoint = pl.callbacks.ModelCheckpoint(str(tmp_path), monitor="gradient_free/loss")
    trainer = make_trainer(
        strategy="gradient_free", callbacks=[NMC(), stop, checkpoint], enable_checkpointing=True, max_epochs=9
    )
    trainer.fit(Schedule(), data.train_dataloader())  # its ReduceLROnPlateau finds no "train_loss" and is not asked
    assert trainer.current_epoch == 3  # the loss of a frozen network never improves
    assert checkpoint.best_model_path


def test_a_learning_rate_monitor_does_not_fail(make_trainer: Make, tmp_path: Any) -> None:
    trainer = make_trainer(
        strategy="gradient_free", callbacks=[NMC(), LearningRateMonitor()], logger=CSVLogger(str(tmp_path))
    )
    trainer.fit(Base(), datamodule=stream())
    assert trainer.global_step > 0


# ---- warm-up


class Watch(pl.Callback):
    """Weights and statistics at the end of each epoch."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after.append(values(pl_module))


@pytest.mark.parametrize("kind", [Base, Schedule])
def test_the_warm_up_trains_and_then_everything_freezes(make_trainer: Make, kind: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    module, watch, head = kind(), Watch(), NMC()
    start = values(module)
    trainer = make_trainer(strategy=GradientFreeStrategy(warmup_epochs=2), callbacks=[watch, head])
    trainer.fit(module, datamodule=stream())
    assert module.steps == [0] * (len(module.steps) // 2) + [1] * (len(module.steps) // 2)
    assert module.optimizers_made == 1
    assert not torch.equal(watch.after[0]["body.1.running_mean"], start["body.1.running_mean"])
    assert not torch.equal(watch.after[1]["body.0.weight"], watch.after[0]["body.0.weight"])
    for later in watch.after[2:]:
        assert equal(later, watch.after[1])
    assert equal(values(module), watch.after[1])
    assert int(head.head.counts.sum()) == 899
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert all(part.training for part in module.modules())


def test_the_warm_up_equals_ordinary_training(make_trainer: Make) -> None:
    torch.manual_seed(3)
    warm = Base()
    torch.manual_seed(5)  # of the dropout
    make_trainer(strategy=GradientFreeStrategy(warmup_epochs=2), callbacks=[NMC()]).fit(warm, datamodule=stream())
    torch.manual_seed(3)
    plain = Base()
    torch.manual_seed(5)
    make_trainer().fit(plain, datamodule=stream(epochs_per_experience=2, stop_after=1))
    assert equal(values(warm), values(plain))


def test_heads_learn_from_the_warmed_up_network_only(make_trainer: Make) -> None:
    torch.manual_seed(0)
    module, head = Base(), NMC("euclidean")
    data = stream()
    make_trainer(strategy=GradientFreeStrategy(warmup_epochs=1), callbacks=[head]).fit(module, datamodule=data)
    again = NMC("euclidean")
    make_trainer(strategy="gradient_free", callbacks=[again]).fit(module, datamodule=stream())
    assert torch.allclose(again.head.means, head.head.means, rtol=1e-6)


@pytest.mark.parametrize("step", [3, 10, 11, 15])
def test_the_phase_comes_back_on_a_resume(make_trainer: Make, step: int, tmp_path: Any) -> None:
    """Saved in the warm-up, on its last batch, right after it and later: the same end, and no gradient too many."""

    def run(path: str | None = None, save: int | None = None) -> tuple[Base, NMC]:
        torch.manual_seed(0)
        module, head = Base(), NMC()
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        callbacks: list[Any] = [head]
        if save is not None:
            name = pl.callbacks.ModelCheckpoint(
                str(tmp_path), filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False
            )
            callbacks.append(name)
        trainer = make_trainer(
            strategy=GradientFreeStrategy(warmup_epochs=1), callbacks=callbacks, enable_checkpointing=save is not None
        )
        trainer.fit(module, datamodule=stream(), ckpt_path=path)
        return module, head

    straight, head = run(save=step)
    resumed, again = run(path=str(tmp_path / f"step={step}.ckpt"))
    assert equal(values(resumed), values(straight))
    assert equal(dict(again.head.statistics.state_dict()), dict(head.head.statistics.state_dict()))
    assert resumed.steps == [0] * max(0, 10 - step) or len(resumed.steps) < len(straight.steps)


# ---- again and elsewhere


@pytest.mark.warns("it has learned before")
def test_a_second_fit_and_validation_on_a_fresh_trainer(make_trainer: Make) -> None:
    module, head = TimmClassifier("identity"), NMC()
    trainer = make_trainer(strategy="gradient_free", callbacks=[head])
    trainer.fit(module, datamodule=stream(stop_after=1))
    (first,) = trainer.validate(module, datamodule=stream(stop_after=1), verbose=False)
    make_trainer(strategy="gradient_free", callbacks=[head]).fit(module, datamodule=stream())
    (after,) = make_trainer(strategy="gradient_free", callbacks=[head]).validate(
        module, datamodule=stream(), verbose=False
    )
    (plain,) = make_trainer(callbacks=[head]).validate(module, datamodule=stream(), verbose=False)
    assert first["nmc/accuracy"] > 0.95
    assert after == plain
    assert 0.8 < after["nmc/accuracy"] < first["nmc/accuracy"]


def test_unused_parameters_are_refused_by_name() -> None:
    for strategy in (GradientFreeStrategy, LearningStrategy):
        with pytest.raises(ConfigurationError, match="find_unused_parameters=True"):
            strategy(find_unused_parameters=True)


@pytest.mark.parametrize("wrong", [-1, 1.5, "2", True])
def test_a_wrong_number_of_warm_up_epochs_is_named(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"warmup_epochs.*{wrong!r}"):
        GradientFreeStrategy(warmup_epochs=wrong)
