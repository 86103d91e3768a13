"""Under DST each batch of an evaluation has the network of its own task, also where kept features answer for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import quiet_trainer
from sparse_runs import DIGITS, LABELS, Net, quick, run, said_by_dst, stream
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import NMC, StreamEvaluation
from clkit.errors import ConfigurationError
from clkit.methods import PruneSchedule
from clkit.stream.boundaries import backbone_changed

pytestmark = pytest.mark.filterwarnings("ignore:.*backbone (still trains|changed)")
TASKS = 5


def silent(**options: Any) -> StreamEvaluation:
    return StreamEvaluation(table=False, files=False, figures=False, **options)


# ---- kept features


class Scaled(nn.Module):
    """A network whose features a plain attribute scales, that counts the rows that pass it."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.body, self.hidden, self.fc = body, nn.Linear(8 * 36, 24), nn.Linear(24, 10)
        self.scale, self.rows = 1.0, 0

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows += 0 if self.training else len(inputs)
        return self.fc(torch.relu(self.hidden(self.body(inputs))) * self.scale)


class Module(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.body, self.head
        self.network = Scaled()
        self.logged: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.logged.append(self(batch[0]))


class Change(pl.Callback):
    """Changes what features are, after the masks and before the evaluation, at the end of some tasks."""

    boundary_phase = 45

    def __init__(self, how: str) -> None:
        self.how = how

    def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
        network = pl_module.network
        if self.how in ("announced", "said by nobody"):
            network.scale = 1.0 + experience.index // 2
            if self.how == "announced":
                backbone_changed(trainer, "a test scaled its features")
        elif self.how == "written to":  # a statistic of the network that the module holds, which is the task's own
            network.body[1].running_mean.add_(0.5)


def measured(folder: Path, keep: int, how: str, **options: Any) -> tuple[Module, StreamEvaluation, list[Any], Any]:
    torch.manual_seed(0)
    module, dst, nmc, evaluation = (
        Module(),
        quick(schedule=PruneSchedule(update_every=1)),
        NMC(epochs="last"),
        silent(keep_features=keep),
    )
    seen: list[Any] = []

    class Seen(pl.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            seen.append(nmc.observer.features())

    trainer = quiet_trainer(folder, callbacks=[nmc, Seen(), dst, Change(how), evaluation], **options)
    data = stream(epochs_per_experience=2, batch_size=48)
    trainer.fit(module, datamodule=data)
    return module, evaluation, [*seen, *module.logged], data


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("", {"check_val_every_n_epoch": 2}),
        ("", {"check_val_every_n_epoch": 100}),
        ("announced", {}),
        pytest.param("said by nobody", {}, marks=pytest.mark.warns("were kept differ from fresh ones")),
        ("written to", {}),
    ],
    ids=["validation of Lightning", "own pass", "announced", "said by nobody", "written to"],
)
def test_kept_features_are_used_and_are_those_of_each_tasks_network(
    tmp_path: Path, how: str, options: dict[str, Any]
) -> None:
    module, evaluation, seen, data = measured(tmp_path, 64, how, **options)
    plain, fresh, expected, _ = measured(tmp_path, 0, how, **options)
    assert evaluation.results == fresh.results
    assert len(seen) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
    assert "forward" not in vars(module.network)
    assert evaluation._kept.served > 0
    assert module.network.rows < plain.network.rows
    if how:
        return
    # a task is run when it ends, and once more by the network that it is shown then; after that 8 rows a time
    batches = data.evaluation_loader(TASKS - 1).batches
    sizes = [sum(len(rows) for index, rows in batches if index == task) for task in range(TASKS)]
    kept = sum(size * max(0, TASKS - 2 - task) for task, size in enumerate(sizes))
    first = len(batches[0][1])
    compared = len(range(0, first, min(-(-first // 8), 16))) * sum(range(1, TASKS))
    assert plain.network.rows - module.network.rows == kept - compared


# ---- plain loaders: classes say whose a batch is, and one part alone decides


def loader(*classes: int) -> DataLoader[Any]:
    labels = torch.from_numpy(LABELS).long()
    rows = torch.cat([(labels == each).nonzero().squeeze(1)[:64] for each in classes])
    return DataLoader(TensorDataset(DIGITS[rows], labels[rows]), batch_size=64)


Loaders = Callable[[int], Any]
CASES: list[Any] = [
    pytest.param(lambda task: [loader(2 * each, 2 * each + 1) for each in (2, 0, 1)], id="in another order"),
    pytest.param(lambda task: loader(*range(2 * task + 2)), id="one for all so far"),
]


@pytest.mark.parametrize("first", ["dst", "evaluation"])
@pytest.mark.parametrize("val", CASES)
def test_a_batch_of_a_plain_loader_has_the_network_that_its_classes_say(
    tmp_path: Path, val: Loaders, first: str
) -> None:
    """Each fit is a task; the list of loaders is in another order, or there is one loader with batches of one class."""
    dst, evaluation, module = quick(), silent(), Net()
    parts = [dst, evaluation] if first == "dst" else [evaluation, dst]
    for task in range(3):
        train = DataLoader(loader(2 * task, 2 * task + 1).dataset, batch_size=16)
        quiet_trainer(tmp_path, max_epochs=6, callbacks=parts).fit(module, train, val(task))
    module.eval()
    matrix = evaluation.results["module"]["accuracy_matrix"]
    for task in range(3):
        correct = total = 0
        with dst.activate(task), torch.no_grad():
            for images, labels in loader(2 * task, 2 * task + 1):
                correct, total = correct + int((module(images).argmax(1) == labels).sum()), total + len(labels)
        for row in matrix[task:]:
            assert row[task] == correct / total
    assert min(matrix[2]) > 0.9


def test_without_an_evaluation_the_place_of_a_loader_says_whose_it_is(tmp_path: Path) -> None:
    class Watching(Net):
        shown: list[Tensor]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.shown.append(self(batch[0]))

    dst, module = quick(), Watching()
    module.shown = []
    run(tmp_path, dst, module=module, data=stream(stop_after=2, epochs_per_experience=1))
    same = loader(0)
    module.shown = []
    quiet_trainer(tmp_path, callbacks=[dst]).validate(module, [same, same], verbose=False)
    images = next(iter(same))[0]
    assert len(module.shown) == 2
    with torch.inference_mode():
        for task, given in enumerate(module.shown):
            with dst.activate(task):
                assert torch.equal(module.eval()(images), given)
    assert not torch.equal(*module.shown)


class Shown(Net):
    """Keeps what it gave for each batch, whatever its form."""

    given: list[Tensor]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.given.append(self(batch[0]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.validation_step(batch, batch_idx)
        return self.given[-1]


def two_tasks(folder: Path) -> tuple[Any, Shown, list[Any]]:
    """Two fits on plain loaders without an evaluation, and the loader of each."""
    dst, module, loaders = quick(), Shown(), [loader(0, 1), loader(2, 3)]
    for each in loaders:
        quiet_trainer(folder, max_epochs=3, callbacks=[dst]).fit(module, DataLoader(each.dataset, batch_size=16))
    return dst, module, loaders


def assert_shown(dst: Any, module: Shown, loaders: list[Any], tasks: list[int]) -> None:
    """The batches in work were given to the networks of these tasks, one for each loader."""
    expected = []
    module.eval()
    with torch.inference_mode():
        for each, task in zip(loaders, tasks, strict=True):
            with dst.activate(task):
                expected += [module(batch[0]) for batch in each]
    assert len(module.given) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(module.given, expected, strict=True))


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_plain_loaders_alone_and_in_any_order_have_the_network_of_their_classes(tmp_path: Path, how: str) -> None:
    dst, module, loaders = two_tasks(tmp_path)
    for order in ([0], [1], [1, 0]):
        module.given = []
        shown = [loaders[task] for task in order]
        trainer = quiet_trainer(tmp_path, callbacks=[dst])
        getattr(trainer, how)(module, shown if len(shown) > 1 else shown[0])
        assert_shown(dst, module, shown, order)
    state = torch.load(_saved(tmp_path, dst, module), weights_only=True)
    assert state["callbacks"]["DST"]["about"][1]["classes"] == [2, 3]


def _saved(folder: Path, dst: Any, module: Any) -> Path:
    trainer = quiet_trainer(folder, max_epochs=6, callbacks=[dst])
    trainer.fit(module, DataLoader(loader(4).dataset, batch_size=16))
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


@pytest.mark.parametrize(
    ("guessed", "beside"),
    [
        ("no labels", False),
        ("no labels", True),
        ("labels that are none", False),
        ("several tasks", False),
        ("several tasks", True),
    ],
)
def test_a_batch_whose_task_is_guessed_is_said_once(tmp_path: Path, guessed: str, beside: bool) -> None:
    dst, module, _ = two_tasks(tmp_path)
    if guessed == "several tasks":
        labels, said = (
            torch.arange(64) % 4,
            "rows of several tasks, and all of them are shown the network of task 1; give a list",
        )
    else:
        labels, said = torch.rand(64), r"all are shown the network of task 1, the last.*with callback.activate\(task\):"
    rows = (DIGITS[:64],) if guessed == "no labels" else (DIGITS[:64], labels)
    mixed = DataLoader(TensorDataset(*rows), batch_size=32)
    module.given = []

    def evaluate_twice() -> None:
        for _ in range(2):
            parts = [dst, silent()] if beside else [dst]
            quiet_trainer(tmp_path, callbacks=parts).predict(module, mixed)

    with pytest.warns(UserWarning, match=said) as warned:
        evaluate_twice()
    assert len(said_by_dst(warned)) == 1
    assert_shown(dst, module, [mixed, mixed], [1, 1])
    with dst.activate(0):  # who says it is told nothing
        quiet_trainer(tmp_path, callbacks=[dst]).predict(module, mixed)


# ---- what is measured, and what is saved


def test_forgetting_is_measured_and_would_show(tmp_path: Path) -> None:
    """Somebody writes to what the first task has learned, after the third: the matrix has it."""

    class Spoil(pl.Callback):
        boundary_phase = 45

        def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
            if experience.index == 2:
                dst.stream_state()["side"]["tasks"][0]["network.fc.bias"][0] += 1e3

    dst, evaluation = quick(), silent()
    run(tmp_path, dst, Spoil(), evaluation, module=Module(), data=stream(stop_after=3))
    results = evaluation.results["module"]
    column = [row[0] for row in results["accuracy_matrix"]]
    assert column[0] == column[1] > 0.9
    assert column[2] == pytest.approx(0.5, abs=0.05)
    assert results["backward_transfer"] < -0.2
    assert results["forgetting"] > 0.2


def test_a_checkpoint_is_not_saved_with_the_weights_of_another_task(tmp_path: Path) -> None:
    dst, module = quick(), Net()
    _, _, trainer = run(tmp_path, dst, module=module, data=stream(stop_after=2, epochs_per_experience=1))
    refused = pytest.raises(ConfigurationError, match="a checkpoint was to be saved while DST shows the network")
    with dst.activate(0), refused:
        trainer.save_checkpoint(tmp_path / "away.ckpt")
    assert not (tmp_path / "away.ckpt").exists()
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    with pytest.raises(ConfigurationError, match=r"no fit can begin inside of activate\(\)"), dst.activate(0):
        run(tmp_path, dst, module=module, data=stream(stop_after=3))
    assert dst.tasks == 2
