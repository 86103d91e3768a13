"""Every setting of the trainer: what was learned, and every row of R, against NumPy and scikit-learn.

The stream is not shuffled and the network passes its input on, so which rows were learned can be said beforehand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ConfigurationError
from clkit.strategies import GradientFreeStrategy

Make = Callable[..., Any]
Rows = npt.NDArray[np.int64]

TASKS = ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))  # 12, 12 and 6 batches of at most 32
BATCHES = (12, 12, 6)


class Net(pl.LightningModule):
    """A classifier on the input itself, trained by the user."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classify = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classify(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Deep(Net):
    """With a layer of its own before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
        del self.classify

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=4)
    return StreamDataModule("digits:flat", scenario, **{"shuffle": False, "batch_size": 32, **options})


def digits() -> tuple[Any, Any, Any, Any]:
    images, targets = load_digits(return_X_y=True)
    return images[::2] / 16, targets[::2], images[1::2] / 16, targets[1::2]


def batches() -> list[list[Rows]]:
    """Rows of each batch of each experience, as even as possible."""
    _, train, _, _ = digits()
    cut = []
    for classes in TASKS:
        rows = np.flatnonzero(np.isin(train, classes))
        cut.append(np.array_split(rows, -(-len(rows) // 32)))
    assert tuple(map(len, cut)) == BATCHES
    return cut


def taken(*counts: int, times: int = 1) -> list[Rows]:
    """The first so many batches of each experience."""
    return [np.concatenate([*experience[:count]] * times) for experience, count in zip(batches(), counts, strict=False)]


def nearest_mean_matrix(learned: list[Rows], stages: int) -> list[list[float | None]]:
    """R of the nearest mean of unit features, by scikit-learn."""
    train, labels, test, targets = digits()
    matrix: list[list[float | None]] = []
    for stage in range(stages):
        rows = np.concatenate(learned[: stage + 1])
        unit = train[rows] / np.linalg.norm(train[rows], axis=1, keepdims=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "self.within_class_std_dev_")  # pixels that are zero in a whole class
            nearest = NearestCentroid().fit(unit, labels[rows])
        row: list[float | None] = [None] * stages
        for j in range(stage + 1):
            own = np.isin(targets, TASKS[j])
            predicted = nearest.predict(test[own] / np.linalg.norm(test[own], axis=1, keepdims=True))
            row[j] = float((predicted == targets[own]).mean())
        matrix.append(row)
    return matrix


def check_sums(head: AEFOCL, learned: list[Rows]) -> None:
    train, labels, _, _ = digits()
    rows = np.concatenate(learned)
    x, y = train[rows], labels[rows]
    statistics = head.head.statistics
    assert statistics.classes.tolist() == np.unique(y).tolist()
    assert statistics.counts.tolist() == [int((y == c).sum()) for c in np.unique(y)]
    assert np.abs(statistics.sums.numpy() - np.stack([x[y == c].sum(0) for c in np.unique(y)])).max() < 1e-9
    assert np.abs(statistics.gram.numpy() - x.T @ x).max() < 1e-9
    assert statistics.gram.dtype == statistics.sums.dtype == torch.float64


ALL = taken(*BATCHES)

# settings of the trainer, of the stream, rows learned of each experience, rows of R
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], list[Rows], int]] = {
    "none": ({}, {}, ALL, 3),
    "max_steps inside": ({"max_steps": 14}, {}, taken(12, 2), 2),
    "max_steps at a boundary": ({"max_steps": 24}, {}, taken(12, 12), 2),
    "max_steps beyond": ({"max_steps": 99}, {}, ALL, 3),
    "limit_train_batches number": ({"limit_train_batches": 3}, {}, taken(3, 3, 3), 3),
    "limit_train_batches share": ({"limit_train_batches": 0.5}, {}, taken(6, 6, 3), 3),
    "fast_dev_run": ({"fast_dev_run": True}, {}, taken(1), 0),
    "fast_dev_run of three": ({"fast_dev_run": 3}, {}, taken(3), 0),
    "overfit_batches number": ({"overfit_batches": 2}, {}, taken(2, 2, 2), 0),
    "overfit_batches share": ({"overfit_batches": 0.25}, {"eval_batch_size": 16}, taken(3, 3, 1), 0),
    "overfit_batches shuffled": ({"overfit_batches": 2}, {"shuffle": True}, taken(2, 2, 2), 0),
    "overfit_batches epochs": (
        {"overfit_batches": 2},
        {"shuffle": True, "epochs_per_experience": 3},
        taken(2, 2, 2, times=3),
        0,
    ),
    "accumulation": ({"accumulate_grad_batches": 5}, {}, ALL, 3),
    "64-true": ({"precision": "64-true"}, {}, ALL, 3),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}, ALL, 3),
    "bf16-true": ({"precision": "bf16-true"}, {}, ALL, 3),  # sixteenths are exact in bfloat16
    "clipping by norm": ({"gradient_clip_val": 0.01}, {}, ALL, 3),
    "clipping by value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}, ALL, 3),
    "no validation": ({"limit_val_batches": 0}, {}, ALL, 0),
    "no sanity check": ({"num_sanity_val_steps": 0}, {}, ALL, 3),
    "whole sanity check": ({"num_sanity_val_steps": -1}, {}, ALL, 3),
    "validation every second epoch": ({"check_val_every_n_epoch": 2}, {}, ALL, 3),
    "validation across epochs": ({"check_val_every_n_epoch": None, "val_check_interval": 7}, {}, ALL, 3),
    "validation never by itself": ({"check_val_every_n_epoch": None, "val_check_interval": 10**6}, {}, ALL, 3),
    "validation by batches": ({"val_check_interval": 5}, {}, ALL, 3),
    "validation by share": ({"val_check_interval": 0.3}, {}, ALL, 3),
    "reload never": ({"reload_dataloaders_every_n_epochs": 0}, {}, ALL, 3),
    "reload seldom": ({"reload_dataloaders_every_n_epochs": 5}, {}, ALL, 3),
    "own sampler": ({"use_distributed_sampler": False}, {}, ALL, 3),
    "anomaly": ({"detect_anomaly": True}, {}, ALL, 3),
    "no inference mode": ({"inference_mode": False}, {}, ALL, 3),
    "barebones": ({"barebones": True}, {}, ALL, 3),
    "deterministic": ({"deterministic": True}, {}, ALL, 3),
    "max_time": ({"max_time": {"hours": 1}}, {}, ALL, 3),
    "min_epochs": ({"min_epochs": 3}, {}, ALL, 3),
    "no end": ({"max_epochs": None}, {}, ALL, 3),
    "too many epochs": ({"max_epochs": 50}, {}, ALL, 3),
    "two loader processes": ({}, {"num_workers": 2}, ALL, 3),
}


@pytest.fixture(autouse=True)
def ordinary_algorithms() -> Iterator[None]:
    """`deterministic=True` is a switch of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


# variants of a setting that stays in the ordinary run
ALIKE = {
    "max_time",
    "min_epochs",
    "too many epochs",
    "own sampler",
    "reload seldom",
    "validation by share",
    "no sanity check",
    "anomaly",
    "clipping by value",
    "fast_dev_run of three",
    "overfit_batches shuffled",
    "max_steps beyond",
    "no inference mode",
}


# what Lightning and heads say of a setting
SAID = {
    "no end": "`max_epochs` was not set",
    "barebones": "You are trying to `self.log",
    "overfit_batches epochs": "a second epoch over an experience",
}


@pytest.mark.parametrize("strategy", ["auto", "gradient_free"])
@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in SETTINGS]
)
def test_what_is_learned_and_measured(make_trainer: Make, setting: str, strategy: str) -> None:
    options, data, learned, stages = SETTINGS[setting]
    head, evaluation = AEFOCL(balance="none"), StreamEvaluation(table=False, files=False)
    with pytest.warns(UserWarning, match=SAID[setting]) if setting in SAID else nullcontext():
        trainer = make_trainer(strategy=strategy, callbacks=[head, evaluation, NMC()], **options)
        trainer.fit(Net(), datamodule=stream(**data))
    check_sums(head, learned)
    if stages:
        assert evaluation.results["nmc"]["accuracy_matrix"] == nearest_mean_matrix(learned, stages)
    elif setting == "no validation":
        assert evaluation.results == {}


# ---- the forward pass in other number formats, and compiled


def learned_in(callback: AEFOCL, feature_batches: list[Tensor]) -> None:
    x = np.concatenate([batch.double().numpy() for batch in feature_batches])
    statistics = callback.head.statistics
    assert np.abs(statistics.gram.numpy() - x.T @ x).max() <= 1e-12 * np.abs(x.T @ x).max()
    assert statistics.samples == len(x) == 899


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_features_are_those_of_the_precision_and_sums_are_float64(make_trainer: Make, precision: Any) -> None:
    module, callback = Deep(), AEFOCL(balance="none")
    make_trainer(strategy="gradient_free", callbacks=[callback], precision=precision).fit(module, datamodule=stream())
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    body = module.net[:2].to(dtype)
    features = []
    for experience in batches():
        for rows in experience:
            x = torch.from_numpy(digits()[0][rows]).to(dtype)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                features.append(body(x))
    assert features[0].dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
    learned_in(callback, features)


def compiled_inside(module: Deep, backend: str) -> Any:
    module.net = torch.compile(module.net, backend=backend)
    return module


def compiled_whole(module: Deep, backend: str) -> Any:
    return torch.compile(module, backend=backend)


@pytest.mark.filterwarnings("ignore:.*the backbone still trains:UserWarning")  # in an ordinary run
@pytest.mark.filterwarnings("ignore:clkit. no forward of the step is given")  # which a wholly compiled one hides
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of torch, while it compiles a step
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ["gradient_free", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiled", [compiled_inside, pytest.param(compiled_whole, marks=pytest.mark.slow)])
def test_compiled_modules_learn_the_same(
    make_trainer: Make, compiled: Callable[[Deep, str], Any], strategy: str, backend: str
) -> None:
    torch.compiler.reset()
    outcomes = []
    for wrap in (None, compiled):
        module, head = Deep(), AEFOCL(balance="none")
        evaluation = StreamEvaluation(table=False, files=False)
        trainer = make_trainer(strategy=strategy, callbacks=[head, NMC(), evaluation], limit_train_batches=3)
        trainer.fit(module if wrap is None else wrap(module, backend), datamodule=stream())
        outcomes.append((head.head.statistics, evaluation.results, trainer.global_step))
    (eager, results, steps), (other, other_results, other_steps) = outcomes
    assert other.counts.tolist() == eager.counts.tolist()
    assert torch.allclose(other.sums, eager.sums, rtol=1e-5, atol=1e-5)
    assert torch.allclose(other.gram, eager.gram, rtol=1e-5, atol=1e-5)
    assert other_steps == steps == 9
    assert other_results.keys() == results.keys()
    assert other_results["nmc"]["final_accuracy"] == pytest.approx(results["nmc"]["final_accuracy"], abs=0.005)
    torch.compiler.reset()


# ---- gradients


def test_accumulated_gradients_are_those_without_callbacks(make_trainer: Make) -> None:
    weights = []
    for callbacks in ([], [AEFOCL(balance="none"), NMC(), StreamEvaluation(table=False, files=False)]):
        module = Net()
        trainer = make_trainer(callbacks=callbacks, accumulate_grad_batches=5)
        trainer.fit(module, datamodule=stream())
        weights.append(module.classify.weight.detach().clone())
        assert trainer.global_step == 3 + 3 + 2  # the rest of an epoch is a step too
    assert torch.equal(*weights)


def test_a_schedule_on_a_value_that_is_not_logged_is_not_asked(make_trainer: Make) -> None:
    class Plateau(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss"}}

    head = AEFOCL(balance="none")
    make_trainer(strategy="gradient_free", callbacks=[head]).fit(Plateau(), datamodule=stream())
    check_sums(head, ALL)
    warm = AEFOCL(balance="none")
    make_trainer(strategy=GradientFreeStrategy(warmup_epochs=2), callbacks=[warm]).fit(Plateau(), datamodule=stream())
    check_sums(warm, ALL)


# ---- refused before anything is learned


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"val_check_interval": 7}, ConfigurationError, "val_check_interval=7 is longer than experience 'classes 8-9'"),
        ({"overfit_batches": 0.25}, MisconfigurationException, "limit_val_batches"),
        (
            {"callbacks": [pl.callbacks.EarlyStopping("val_loss")]},
            ConfigurationError,
            "EarlyStopping would end the whole stream",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named_before_training(
    make_trainer: Make, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    head = AEFOCL(balance="none")
    trainer = make_trainer(**{**options, "callbacks": [head, *options.get("callbacks", [])]})
    with pytest.raises(error, match=message):
        trainer.fit(Net(), datamodule=stream())
    assert trainer.global_step == 0
    assert head._head is None
