"""Boundaries of experiences: announced once, in fixed phases, in every setting that Lightning offers."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.datasets import load_digits
from small_runs import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from clkit import Experience
from clkit.callbacks import AEFOCL, NMC, StreamCallback, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy
from clkit.stream.boundaries import Boundaries, BoundaryPhase

Make = Callable[..., Any]
EXPERIENCES = 3


class Listener(pl.Callback):
    """A user's own callback: no class of the library, merely methods of that name."""

    def __init__(self, head: Any = None) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.head = head

    def _learned(self) -> int:
        return 0 if self.head is None or self.head._head is None else int(self.head.head.counts.sum())

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        self.events.append(("start", experience.index, experience.phase, self._learned()))

    def on_experience_phase(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        self.events.append(("phase", experience.index, experience.phase, self._learned()))

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        self.events.append(("end", experience.index, experience.phase, self._learned()))


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=4)
    return StreamDataModule("digits:flat", scenario, **options)


def sizes() -> list[int]:
    data = stream()
    data.setup("validate")
    return [experience.train_samples or 0 for experience in data.experiences]


def expected(epochs: int = 1) -> list[tuple[Any, ...]]:
    events: list[tuple[Any, ...]] = []
    learned = 0
    for index, samples in enumerate(sizes()):
        events.append(("start", index, "learn", learned))
        learned += epochs * samples
        events.append(("end", index, "learn", learned))
    return events


def says_twice(epochs: int) -> Any:
    """A ridge head that sees an experience twice says so."""
    return nullcontext() if epochs == 1 else pytest.warns(UserWarning, match="a second epoch over an experience")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The accuracy matrices of the ordinary setting, for one and two epochs an experience."""
    matrices = {}
    for epochs in (1, 2):
        evaluation = StreamEvaluation(table=False, files=False)
        heads = [AEFOCL(balance="none"), NMC()]
        trainer = quiet_trainer(tmp_path_factory.mktemp("reference"), callbacks=[*heads, evaluation])
        with says_twice(epochs):
            trainer.fit(module(), datamodule=stream(epochs_per_experience=epochs))
        matrices[epochs] = {name: value["accuracy_matrix"] for name, value in evaluation.results.items()}
    return matrices


class WithoutValidation(TimmClassifier):
    """A user who validates elsewhere: Lightning then has no validation hooks at all."""

    validation_step = pl.LightningModule.validation_step


def module(kind: type[TimmClassifier] = TimmClassifier) -> TimmClassifier:
    torch.manual_seed(0)
    return kind("identity", num_classes=10, model_kwargs={"in_features": 64})


# ---- any order of the list


# each of the four stands before and behind each other one
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_order_of_the_list_never_matters(make_trainer: Make, reference: Any, order: tuple[int, ...]) -> None:
    head = AEFOCL(balance="none")
    listener, evaluation = Listener(head), StreamEvaluation(table=False, files=False)
    parts: list[Any] = [head, NMC(), listener, evaluation]
    make_trainer(callbacks=[parts[i] for i in order]).fit(module(), datamodule=stream())
    assert listener.events == expected()
    assert {name: value["accuracy_matrix"] for name, value in evaluation.results.items()} == reference[1]


class Part(StreamCallback):
    def __init__(self, phase: BoundaryPhase, log: list[Any]) -> None:
        super().__init__()
        self.boundary_phase = phase
        self.name = phase.name.lower()
        self.log_of = log

    def on_experience_start(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
        self.log_of.append(("start", experience.index, self.boundary_phase))

    def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
        self.log_of.append(("end", experience.index, self.boundary_phase))


def test_phases_are_kept_for_any_order(make_trainer: Make) -> None:
    log: list[Any] = []
    parts = [Part(phase, log) for phase in BoundaryPhase]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist()
    make_trainer(callbacks=[parts[i] for i in order]).fit(module(), datamodule=stream())
    ends = sorted(BoundaryPhase)
    starts = [BoundaryPhase.EVALUATE, *ends[:-1]]  # what is still to be measured belongs to the experience before
    wanted = [
        (what, index, phase)
        for index in range(EXPERIENCES)
        for what, phases in (("start", starts), ("end", ends))
        for phase in phases
    ]
    assert log == wanted


def test_a_plain_callback_hears_in_the_learning_phase(make_trainer: Make) -> None:
    log: list[Any] = []

    class Plain(pl.Callback):
        def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
            log.append(("end", experience.index, "plain"))

    make_trainer(callbacks=[Part(BoundaryPhase.ERROR, log), Plain()]).fit(module(), datamodule=stream())
    ends = [event for event in log if event[0] == "end"]
    assert ends[:2] == [("end", 0, "plain"), ("end", 0, BoundaryPhase.ERROR)]


# ---- any setting of the trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "no validation step": {},
    "half an epoch": {"val_check_interval": 0.5},
    "every third epoch": {"check_val_every_n_epoch": 3},
    "by batches": {"check_val_every_n_epoch": None, "val_check_interval": 7},
}


@pytest.mark.parametrize(
    ("setting", "epochs"),
    [*((name, 1) for name in SETTINGS), ("no validation step", 2), ("half an epoch", 2), ("every third epoch", 2)],
)
def test_rows_are_filled_once_and_equal_in_every_setting(
    make_trainer: Make, reference: Any, capsys: pytest.CaptureFixture[str], setting: str, epochs: int
) -> None:
    head = AEFOCL(balance="none")
    listener, evaluation = Listener(head), StreamEvaluation(files=False)
    trainer = make_trainer(callbacks=[head, NMC(), evaluation, listener], **SETTINGS[setting])
    network = module(WithoutValidation if setting == "no validation step" else TimmClassifier)
    with says_twice(epochs):
        trainer.fit(network, datamodule=stream(epochs_per_experience=epochs))
    assert listener.events == expected(epochs)
    assert {name: value["accuracy_matrix"] for name, value in evaluation.results.items()} == reference[epochs]
    titles = re.findall(r"after experience (\d+): ", capsys.readouterr().out)
    assert titles == ["1", "2", "3"]


def test_limited_validation_counts_what_it_saw_of_each_experience(make_trainer: Make) -> None:
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(), evaluation], limit_val_batches=2)
    data = stream(eval_batch_size=50)
    trainer.fit(module(), datamodule=data)
    matrix = evaluation.results["nmc"]["accuracy_matrix"]
    # round robin: two batches of the first experience, then one each of the first two
    assert [[value is not None for value in row] for row in matrix] == [
        [True, False, False],
        [True, True, False],
        [True, True, False],
    ]
    assert sum(total for _, total in evaluation.class_counts("nmc").values()) == sum(
        len(rows) for _, rows in data.evaluation_loader(2).batches[:2]
    )
    assert evaluation.results["nmc"]["accuracy_seen"][2] is None


def test_a_run_cut_by_max_steps_inside_an_experience_announces_no_end(make_trainer: Make) -> None:
    head = NMC()
    listener = Listener(head)
    trainer = make_trainer(callbacks=[head, listener], max_steps=14)
    trainer.fit(module(), datamodule=stream())
    assert [event[:2] for event in listener.events] == [("start", 0), ("end", 0), ("start", 1)]
    assert Boundaries.of(trainer).running


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_strategy_alone_announces_everything_to_a_plain_callback(
    make_trainer: Make, options: dict[str, Any], epochs: int
) -> None:
    listener = Listener()
    trainer = make_trainer(strategy="gradient_free", callbacks=[listener], **options)
    trainer.fit(module(), datamodule=stream(epochs_per_experience=epochs))
    assert [event[:2] for event in listener.events] == [(w, i) for i in range(3) for w in ("start", "end")]


# ---- the sanity check


def test_the_sanity_check_announces_and_records_nothing(make_trainer: Make) -> None:
    listener, evaluation = Listener(), StreamEvaluation(table=False, files=False)
    state: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            state.update(events=list(listener.events), results=dict(evaluation.results), metrics=trainer.logged_metrics)

    make_trainer(callbacks=[NMC(), evaluation, listener, Look()], num_sanity_val_steps=-1).fit(
        module(), datamodule=stream()
    )
    assert state == {"events": [], "results": {}, "metrics": {}}


# ---- warm-up


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}])
def test_the_warm_up_is_a_phase_of_the_first_experience(make_trainer: Make, options: dict[str, Any]) -> None:
    head = NMC()
    listener, evaluation = Listener(head), StreamEvaluation(table=False, files=False)
    trainer = make_trainer(
        strategy=GradientFreeStrategy(warmup_epochs=2), callbacks=[evaluation, listener, head], **options
    )
    trainer.fit(module(), datamodule=stream())
    first, *_ = sizes()
    assert trainer.current_epoch == 2 + EXPERIENCES
    assert listener.events == [
        ("start", 0, "warmup", 0),
        ("phase", 0, "learn", 0),
        ("end", 0, "learn", first),
        *expected()[2:],
    ]
    if options:
        assert evaluation.results == {}
    else:
        matrix = evaluation.results["nmc"]["accuracy_matrix"]
        assert [[value is not None for value in row] for row in matrix] == [
            [i >= j for j in range(3)] for i in range(3)
        ]


# ---- plain loaders: one fit is one experience


def tasks() -> list[tuple[DataLoader[Any], DataLoader[Any]]]:
    images, targets = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(targets)
    loaders = []
    for low, high in ((0, 4), (4, 8), (8, 10)):
        train = (y[::2] >= low) & (y[::2] < high)
        test = (y[1::2] >= low) & (y[1::2] < high)
        loaders.append(
            (
                DataLoader(TensorDataset(x[::2][train], y[::2][train]), 32, shuffle=True),
                DataLoader(TensorDataset(x[1::2][test], y[1::2][test]), 256),
            )
        )
    return loaders


@pytest.mark.parametrize("new_trainer", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_one_fit_a_task_gives_the_same_boundaries(make_trainer: Make, new_trainer: bool, epochs: int) -> None:
    head = NMC()
    listener = Listener(head)
    net = module()
    trainer = make_trainer(callbacks=[listener, head], max_epochs=epochs)
    for index, (train, _) in enumerate(tasks()):
        if index and new_trainer:
            trainer = make_trainer(callbacks=[listener, head], max_epochs=epochs)
        elif index:
            trainer.fit_loop.max_epochs += epochs
        trainer.fit(net, train)
    assert listener.events == expected(epochs)


@pytest.mark.parametrize("new_trainer", [False, True])
@pytest.mark.parametrize("how", ["validation in fit", "validate"])
def test_one_fit_a_task_gives_the_same_matrix(make_trainer: Make, reference: Any, new_trainer: bool, how: str) -> None:
    heads = [AEFOCL(balance="none"), NMC()]
    evaluation = StreamEvaluation(table=False, files=False)
    net = TimmClassifier("identity")
    options: dict[str, Any] = {"strategy": "gradient_free", "callbacks": [*heads, evaluation]}
    trainer = make_trainer(max_epochs=1, **options)
    for index, (train, _) in enumerate(tasks()):
        if index and new_trainer:
            trainer = make_trainer(max_epochs=1, **options)
        elif index:
            trainer.fit_loop.max_epochs += 1
        seen = [test for _, test in tasks()[: index + 1]]
        if how == "validate":
            trainer.fit(net, train)
            trainer.validate(net, seen, verbose=False)
        else:
            trainer.fit(net, train, seen)
    for name in ("aef_ocl", "nmc"):
        assert evaluation.results[name]["accuracy_matrix"] == reference[1][name]


def test_early_stopping_with_plain_loaders_ends_the_experience(make_trainer: Make) -> None:
    head = NMC()
    listener = Listener(head)
    stop = EarlyStopping("train/loss", stopping_threshold=100.0)
    (train, _), *_ = tasks()
    trainer = make_trainer(callbacks=[stop, head, listener], max_epochs=5)
    trainer.fit(module(), train)
    assert trainer.current_epoch == 1
    assert [event[:2] for event in listener.events] == [("start", 0), ("end", 0)]


def test_a_user_data_module_with_a_schedule_of_its_own_is_followed(make_trainer: Make) -> None:
    """Two questions about an epoch are the whole protocol."""

    class Mine(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            assert self.trainer is not None
            return tasks()[self.trainer.current_epoch // 2][0]

        def experience_at(self, epoch: int) -> Experience | None:
            return Experience(index=epoch // 2, name=f"part {epoch // 2}") if epoch < 6 else None

        def is_last_epoch(self, epoch: int) -> bool:
            return epoch % 2 == 1

    head = NMC()
    listener = Listener(head)
    trainer = make_trainer(callbacks=[head, listener], max_epochs=6, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module(), datamodule=Mine())
    assert listener.events == expected(epochs=2)
