"""What cannot work is refused when a run begins, by name, and with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, Timer
from lightning.pytorch.tuner import Tuner
from small_runs import LitSmall
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clkit._registry
from clkit.callbacks import AEFOCL, LDA, NMC, StreamCallback, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import BatchError, ConfigurationError, StateError
from clkit.strategies import ERStrategy, GradientFreeStrategy, OnProStrategy

Make = Callable[..., Any]


class Finding(LitSmall):
    """A module whose learning rate and batch size can be looked for."""

    lr = 0.05
    batch_size = 32
    flops_per_batch = 1  # a monitor asks

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        self.backbone = self.net[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def stream(source: str = "digits:flat") -> StreamDataModule:
    return StreamDataModule(source, ClassIncremental(experiences=2))


def loader(rows: int = 40) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(rows, 64, generator=generator), torch.arange(rows) % 10
    return DataLoader(TensorDataset(inputs, targets), batch_size=10)


# ---- Lightning's callbacks beside a strategy that trains nothing, or not for long

MISFITS: dict[str, tuple[Callable[[], pl.Callback], bool]] = {  # whether a warm-up makes sense of it
    "BackboneFinetuning": (lightning_callbacks.BackboneFinetuning, True),
    "LearningRateFinder": (LearningRateFinder, False),
    "BatchSizeFinder": (BatchSizeFinder, False),
    "GradientAccumulationScheduler": (partial(lightning_callbacks.GradientAccumulationScheduler, {0: 2}), True),
    "StochasticWeightAveraging": (partial(lightning_callbacks.StochasticWeightAveraging, 0.1), False),
    "EMAWeightAveraging": (lightning_callbacks.EMAWeightAveraging, False),
    "ModelPruning": (partial(lightning_callbacks.ModelPruning, "l1_unstructured"), False),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("warmup", [0, 1])
def test_callbacks_that_need_an_optimizer_are_refused_by_name(make_trainer: Make, name: str, warmup: int) -> None:
    make, works_in_a_warmup = MISFITS[name]
    module, head = Finding(), NMC()
    trainer = make_trainer(strategy=GradientFreeStrategy(warmup), callbacks=[make(), head])
    if warmup and works_in_a_warmup:
        trainer.fit(module, datamodule=stream())
        assert int(head.head.counts.sum()) > 0
        return
    with pytest.raises(ConfigurationError, match=rf"^{name} makes no sense beside GradientFreeStrategy: .*; "):
        trainer.fit(module, datamodule=stream())
    assert trainer.global_step == 0
    if name != "BatchSizeFinder":  # the others do nothing in a validation
        make_trainer(strategy="gradient_free", callbacks=[make()]).validate(module, datamodule=stream(), verbose=False)


def test_each_callback_of_lightning_is_refused_or_changes_nothing_of_a_frozen_network(
    make_trainer: Make, tmp_path: Path
) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "Callback": pl.Callback,
        "EarlyStopping": partial(EarlyStopping, "gradient_free/loss", patience=9),
        "LambdaCallback": lightning_callbacks.LambdaCallback,
        "LearningRateMonitor": lightning_callbacks.LearningRateMonitor,
        "ModelCheckpoint": partial(lightning_callbacks.ModelCheckpoint, str(tmp_path)),
        "ModelSummary": lightning_callbacks.ModelSummary,
        "SpikeDetection": lightning_callbacks.SpikeDetection,
        "ThroughputMonitor": partial(lightning_callbacks.ThroughputMonitor, lambda batch: len(batch[0])),
        "Timer": partial(Timer, "01:00:00:00"),
    }
    shown = {"ProgressBar", "RichModelSummary", "RichProgressBar", "TQDMProgressBar"}  # they show, and no more
    shown |= {"Checkpoint", "OnExceptionCheckpoint"}  # or save
    elsewhere = {"BaseFinetuning", "WeightAveraging"}  # by what derives from them
    elsewhere |= {"BasePredictionWriter", "DeviceStatsMonitor"}  # of other runs, and of a device
    assert set(lightning_callbacks.__all__) <= {*makers, *MISFITS, *shown, *elsewhere}
    module, head = Finding(), NMC()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callbacks = [make() for make in makers.values()]
    logger = pl.loggers.CSVLogger(str(tmp_path))
    trainer = make_trainer(strategy="gradient_free", callbacks=[*callbacks, head], logger=logger, max_epochs=2)
    trainer.fit(module, loader())
    assert int(head.head.counts.sum()) == 80
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_batch_size_finder_is_refused_beside_every_strategy(make_trainer: Make) -> None:
    trainer = make_trainer(strategy=ERStrategy(capacity=20), callbacks=[BatchSizeFinder()])
    with pytest.raises(ConfigurationError, match=r"BatchSizeFinder makes no sense beside ERStrategy: .*pass it on"):
        trainer.fit(Finding(), datamodule=stream("digits"))
    with pytest.raises(ConfigurationError, match=r"LearningRateFinder makes no sense beside GradientFreeStrategy"):
        Tuner(make_trainer(strategy="gradient_free")).lr_find(Finding(), datamodule=stream())


@pytest.mark.parametrize(
    "make",
    [partial(ERStrategy, capacity=20), pytest.param(partial(OnProStrategy, capacity=20), marks=pytest.mark.slow)],
)
def test_a_search_for_the_learning_rate_leaves_nothing_behind(make_trainer: Make, make: Callable[[], Any]) -> None:
    def weights(*callbacks: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module, strategy = Finding(), make()
        trainer = make_trainer(strategy=strategy, callbacks=list(callbacks))
        trainer.fit(module, datamodule=stream("digits"))
        return [*module.parameters(), strategy.memory.label, strategy.memory.data]

    # over both experiences, so that the memory, the projector and the place in the stream have moved when it ends
    search = LearningRateFinder(num_training_steps=25, update_attr=False, early_stop_threshold=None)
    for plain, searched in zip(weights(), weights(search), strict=True):
        assert torch.equal(plain, searched)


# ---- a fit that nothing ends


@pytest.mark.parametrize("parts", ["callback", "strategy"])
def test_a_fit_without_an_end_is_refused(make_trainer: Make, parts: str) -> None:
    own: dict[str, Any] = {"callbacks": [NMC()]} if parts == "callback" else {"strategy": "gradient_free"}
    trainer = make_trainer(max_epochs=-1, **own)
    with pytest.raises(ConfigurationError, match=r"max_epochs=-1 .* would never end.*max_epochs=1"):
        trainer.fit(LitSmall(), loader())
    assert trainer.global_step == 0
    make_trainer(max_epochs=-1, strategy="gradient_free").validate(LitSmall(), loader(), verbose=False)


@pytest.mark.warns("the backbone trains for several epochs")
def test_a_fit_with_any_end_is_not_refused(make_trainer: Make) -> None:
    stop = EarlyStopping("train_loss", patience=0, mode="max")
    ends: list[dict[str, Any]] = [{"max_steps": 3}, {"callbacks": [stop]}, {"fast_dev_run": True}]
    ends += [{"max_time": {"seconds": 1}, "limit_train_batches": 1}]
    for end in ends:
        trainer = make_trainer(**{"max_epochs": -1, **end, "callbacks": [*end.get("callbacks", []), NMC()]})
        trainer.fit(LitSmall(), loader())
        assert trainer.global_step > 0


# ---- the other package of the same name


def test_a_trainer_of_the_other_package_is_told_which_import_to_change(tmp_path: Path) -> None:
    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(64, 10)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise AssertionError("nothing may be trained")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("nor evaluated")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(**options: Any) -> Any:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
        quiet |= {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "default_root_dir": str(tmp_path)}
        return pytorch_lightning.Trainer(**quiet, **options)

    says = pytest.raises(ConfigurationError, match=r"write `import lightning\.pytorch as pl` for `import pytorch_l")
    for callback in (AEFOCL(), LDA(), StreamEvaluation(), StreamCallback()):
        with says:
            trainer(callbacks=[callback]).fit(Other(), loader())
        with says:
            trainer(callbacks=[callback]).validate(Other(), loader())
    with says:
        trainer().fit(Other(), datamodule=stream())
    clkit._registry.register_strategies()  # as the import of clkit does once the other package is there
    with says:
        trainer(strategy="gradient_free")


# ---- a forward that does not take the inputs


class OwnError(Exception):
    """What a user's own code raises and catches."""


class TwoInputs(LitSmall):
    """A forward that needs more than the inputs."""

    def forward(self, inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # so it is
        return self.net(inputs * scale)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0], torch.ones(1)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0], torch.ones(1))


class Whole(LitSmall):
    """A forward that takes the whole batch, as that of many a library does."""

    def forward(self, batch: Any) -> torch.Tensor:
        return self.net(batch["x"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self({"x": batch[0]}), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self({"x": batch[0]})


@pytest.mark.parametrize(
    ("strategy", "callback"),
    [
        ("gradient_free", NMC),
        ("auto", partial(NMC, forward="eval")),
        (partial(ERStrategy, capacity=9), NMC),
    ],
)
def test_a_forward_that_takes_something_else_is_named(make_trainer: Make, strategy: Any, callback: Any) -> None:
    def fit(module: pl.LightningModule, **options: Any) -> None:
        own = strategy if isinstance(strategy, str) else strategy()
        make_trainer(strategy=own, callbacks=[callback(**options)], max_epochs=1).fit(module, loader())

    seen = r"a float32 tensor \(10, 64\), as its one argument"
    with pytest.raises(BatchError, match=rf"clkit called forward\(\) of TwoInputs .*{seen}.*'scale'.*batch_reader="):
        fit(TwoInputs())
    with pytest.raises(BatchError, match=rf"clkit called forward\(\) of Whole .*{seen}.* batch_reader=") as caught:
        fit(Whole())
    assert caught.value.__cause__ is not None  # with the traceback of the user's own

    class Interrupting(LitSmall):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise OwnError

    with pytest.raises(OwnError):  # a class of one's own is meant to be caught
        fit(Interrupting())


@pytest.mark.parametrize("strategy", ["gradient_free", "auto"])
def test_what_the_message_says_helps(make_trainer: Make, strategy: str) -> None:
    def read(batch: Any) -> Any:
        return {"x": batch[0]}, batch[1]

    module, head = Whole(), NMC(batch_reader=read, forward="eval")
    own = GradientFreeStrategy(batch_reader=read) if strategy == "gradient_free" else strategy
    make_trainer(strategy=own, callbacks=[head], max_epochs=1).fit(module, loader())
    assert int(head.head.counts.sum()) == 40
    if strategy == "auto":  # what it runs is not the batch's input, which is said
        warns = pytest.warns(UserWarning, match="no forward of the step is given the batch's own inputs")
        shared = NMC(forward="shared")
        with warns:
            make_trainer(callbacks=[shared], max_epochs=1).fit(TwoInputs(), loader())
        assert int(shared.head.counts.sum()) == 40


# ---- the checkpoint of another strategy


@pytest.mark.parametrize("kinds", [(OnProStrategy, ERStrategy), (ERStrategy, OnProStrategy)])
def test_the_checkpoint_of_another_strategy_names_both(make_trainer: Make, tmp_path: Path, kinds: Any) -> None:
    theirs, own = (partial(kind, capacity=9) for kind in kinds)
    trainer = make_trainer(strategy=theirs(), max_steps=2)
    trainer.fit(Finding(), datamodule=stream("digits"))
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    resumed = make_trainer(strategy=own())
    names = trainer.strategy.state_key, resumed.strategy.state_key
    with (
        pytest.warns(UserWarning, match=rf"no state for the strategy '{names[1]}', but for '{names[0]}'"),
        pytest.raises(StateError, match=rf"of the strategy '{names[0]}', .* is '{names[1]}', .* ckpt_path out"),
    ):
        resumed.fit(Finding(), datamodule=stream("digits"), ckpt_path=str(tmp_path / "theirs.ckpt"))
