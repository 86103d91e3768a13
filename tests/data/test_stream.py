"""The data module: which samples a fit sees, in which order, and what it refuses."""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import (
    ClassIncremental,
    Custom,
    Joint,
    LongTailed,
    NaturalOrder,
    Preprocessing,
    StreamDataModule,
    TaskIncremental,
)
from clkit.data.position import StreamPosition
from clkit.errors import ArgumentError, ConfigurationError, DataError, StateError
from clkit.methods import NearestMeanHead
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy

Trainers = Callable[..., pl.Trainer]


def numbered(targets: list[int] | np.ndarray, test: list[int] | np.ndarray | None = None) -> Custom:
    """Features that say which row they are: (row, part)."""

    def part(labels: Any, of: int) -> TensorDataset:
        rows = torch.arange(len(labels), dtype=torch.float32)
        return TensorDataset(torch.stack([rows, torch.full_like(rows, of)], 1), torch.as_tensor(np.asarray(labels)))

    return Custom(part(targets, 0), part(targets if test is None else test, 1))


class Watcher(pl.LightningModule):
    """Learns nothing and keeps what it was shown."""

    def __init__(self, stop_in: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[tuple[int, list[int], list[int]]] = []  # epoch, rows, targets
        self.evaluated: list[list[tuple[int, int]]] = []  # for each evaluation, (row, part)
        self.stop_in = stop_in
        self.more: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if (self.current_epoch, batch_idx) == self.stop_in:
            raise KeyError("stop here")
        self.trained.append((self.current_epoch, batch[0].flatten(1)[:, 0].int().tolist(), batch[1].tolist()))
        self.more.append(batch[2:])
        return self.weight.sum()

    def on_validation_start(self) -> None:
        self.evaluated.append([])

    on_test_start = on_predict_start = on_validation_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated[-1] += [(int(row), int(part)) for row, part in batch[0][:, :2]]

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def rows(self, epoch: int) -> list[int]:
        return [row for at, rows, _ in self.trained if at == epoch for row in rows]


UNEQUAL = [0] * 5 + [1] * 4 + [2] * 21 + [3] * 2 + [4] * 9 + [5] * 9  # 9, 23 and 18 rows in three experiences


def stream(**options: Any) -> StreamDataModule:
    defaults: dict[str, Any] = {
        "source": numbered(UNEQUAL),
        "scenario": ClassIncremental(experiences=3),
        "batch_size": 4,
    }
    return StreamDataModule(**{**defaults, **options})


# ---- what a fit sees


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Lightning's logger says, whatever level and handlers it has elsewhere."""
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("epochs", [1, 2])
def test_every_epoch_gives_each_sample_of_its_experience_once(epochs: int, make_trainer: Trainers) -> None:
    model, data = Watcher(), stream(epochs_per_experience=epochs)
    make_trainer().fit(model, datamodule=data)
    expected = [range(9), range(9, 32), range(32, 50)]
    for epoch in range(3 * epochs):
        assert sorted(model.rows(epoch)) == list(expected[epoch // epochs])
    assert {len(rows) for _, rows, _ in model.trained} <= {3, 4}
    for _, rows, targets in model.trained:
        assert targets == [UNEQUAL[row] for row in rows]
    if epochs == 2:
        assert model.rows(0) != model.rows(1)


def test_the_order_is_a_function_of_seed_and_epoch(make_trainer: Trainers) -> None:
    def order(seed: int, global_seed: int, **options: Any) -> list[list[int]]:
        torch.manual_seed(global_seed)
        model = Watcher()
        make_trainer(num_sanity_val_steps=global_seed % 3).fit(model, datamodule=stream(seed=seed, **options))
        return [rows for _, rows, _ in model.trained]

    assert order(0, 1) == order(0, 2)
    assert order(0, 1) != order(5, 1)
    assert [row for rows in order(0, 1, shuffle=False) for row in rows] == list(range(50))


def test_a_sequence_in_time_is_never_shuffled(make_trainer: Trainers) -> None:
    model = Watcher()
    make_trainer().fit(model, datamodule=stream(scenario=NaturalOrder(3)))
    assert [row for _, rows, _ in model.trained for row in rows] == list(range(50))


@pytest.mark.filterwarnings("ignore:predict returned None")
def test_every_validation_is_over_all_experiences_seen(make_trainer: Trainers) -> None:
    model, data = Watcher(), stream(eval_batch_size=3)
    trainer = make_trainer(num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    assert [sorted(row for row, _ in rows) for rows in model.evaluated] == [
        list(range(9)),
        list(range(32)),
        list(range(50)),
    ]
    assert {part for rows in model.evaluated for _, part in rows} == {1}
    assert not isinstance(trainer.val_dataloaders, list)
    trainer.test(model, datamodule=data, verbose=False)
    trainer.predict(model, datamodule=data)
    for rows in model.evaluated[-2:]:
        assert sorted(row for row, _ in rows) == list(range(50))


def test_batches_of_an_evaluation_belong_to_one_experience_each() -> None:
    data = stream(eval_batch_size=4)
    data.setup("validate")
    loader = data.val_dataloader()
    turns = [experience for experience, _ in loader.batches]
    assert turns[:6] == [0, 1, 2, 0, 1, 2]
    for index, (_, targets) in enumerate(loader):
        assert set(targets.tolist()) <= set(data.experiences[turns[index]].classes)


def test_future_experiences_are_evaluated_on_request(make_trainer: Trainers) -> None:
    model = Watcher()
    make_trainer(num_sanity_val_steps=0).fit(model, datamodule=stream(evaluate="all"))
    assert [len(rows) for rows in model.evaluated] == [50, 50, 50]


def test_a_shorter_stream_is_evaluated_as_far_as_it_went(make_trainer: Trainers) -> None:
    model, data = Watcher(), stream()
    trainer = make_trainer(limit_val_batches=0, max_steps=4)  # 3 batches of the first experience, 1 of the second
    trainer.fit(model, datamodule=data)
    make_trainer().validate(model, datamodule=data, verbose=False)
    assert len(model.evaluated[-1]) == 32


def test_loaders_can_be_asked_for_after_a_fit_too(make_trainer: Trainers) -> None:
    data = stream()
    with pytest.raises(ConfigurationError, match=r"not set up yet; call setup\('fit'\)"):
        data.evaluation_loader(0)
    make_trainer().fit(Watcher(), datamodule=data)
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 50


def test_workers_change_nothing(make_trainer: Trainers) -> None:
    def noisy(image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand(2) * 0.5

    seen = []
    for num_workers in (0, 2):
        model = Watcher()
        model.training_step = lambda batch, index, kept=(got := []), own=model: (
            kept.append(batch[0]) or own.weight.sum()
        )
        make_trainer().fit(model, datamodule=stream(train_transform=noisy, num_workers=num_workers))
        seen.append(torch.cat(got))
    assert torch.equal(seen[0], seen[1])
    assert (seen[0][:, 0] % 1 != 0).all()


def test_the_worker_processes_end_with_the_fit(make_trainer: Trainers) -> None:
    data = stream(num_workers=2)
    trainer = make_trainer()
    trainer.fit(Watcher(), datamodule=data)
    assert not multiprocessing.active_children()
    assert len(list(data.val_dataloader())) == 3  # and start anew where somebody asks
    data.teardown("fit")
    assert not multiprocessing.active_children()


def test_ranks_share_the_same_samples_and_pixels() -> None:
    def noisy(image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand(2) * 0.5

    def batches(rank: int, world_size: int) -> list[torch.Tensor]:
        data = stream(train_transform=noisy)
        data.setup("fit")
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, current_epoch=1, lightning_module=None)
        return [inputs for inputs, _ in data.train_dataloader()]

    alone = torch.cat(batches(0, 1))
    ranks = [batches(rank, 3) for rank in range(3)]
    assert len({len(own) for own in ranks}) == 1
    shared = torch.cat([batch for own in ranks for batch in own])
    assert torch.equal(shared[shared[:, 0].argsort()], alone[alone[:, 0].argsort()])


# ---- length of the fit


def test_a_longer_fit_is_cut_to_the_stream_and_said_once(
    make_trainer: Trainers, said: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_epochs=50)
    trainer.fit(Watcher(), datamodule=stream())
    assert trainer.current_epoch == trainer.max_epochs == 3
    messages = [record.message for record in said.records if "clkit" in record.message]
    assert messages == ["clkit: the stream has 3 epochs; max_epochs=50 is cut to that"]


@pytest.mark.parametrize("max_epochs", [-1, None])
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")  # of Lightning, before it asks
def test_an_open_end_is_filled_in_silently(
    max_epochs: int | None, make_trainer: Trainers, said: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_epochs=max_epochs)
    trainer.fit(Watcher(), datamodule=stream())
    assert trainer.current_epoch == 3
    assert "clkit" not in said.text


@pytest.mark.parametrize(("options", "needed"), [({}, 3), ({"epochs_per_experience": 4}, 12), ({"stop_after": 2}, 2)])
def test_a_shorter_fit_is_refused_with_the_right_number(
    options: dict[str, int], needed: int, make_trainer: Trainers
) -> None:
    with pytest.raises(ConfigurationError, match=rf"max_epochs={needed - 1} ends before.*needs max_epochs={needed};"):
        make_trainer(max_epochs=needed - 1).fit(Watcher(), datamodule=stream(**options))


def test_a_warm_up_lengthens_the_first_experience(make_trainer: Trainers) -> None:
    class OneMore(TimmClassifier):
        epochs: list[tuple[int, str, int]]

        def on_train_epoch_start(self) -> None:
            here = self.trainer.datamodule.experience_at(self.current_epoch)
            self.epochs.append((here.index, here.phase, len(self.trainer.train_dataloader)))

    model = OneMore("identity", model_kwargs={"in_features": 64})
    model.epochs = []
    data = StreamDataModule("digits:flat", ClassIncremental(experiences=5), batch_size=64, epochs_per_experience=2)
    trainer = make_trainer(strategy=GradientFreeStrategy(warmup_epochs=3), limit_val_batches=0)
    with pytest.raises(ConfigurationError, match="needs max_epochs=13"):
        make_trainer(strategy=GradientFreeStrategy(warmup_epochs=3), max_epochs=10).fit(model, datamodule=data)
    trainer.fit(model, datamodule=data)
    assert trainer.max_epochs == 13
    phases = [(index, phase) for index, phase, _ in model.epochs]
    assert phases == [(0, "warmup")] * 3 + [(index, "learn") for index in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert [data.is_last_epoch(epoch) for epoch in range(7)] == [False, False, False, False, True, False, True]
    assert data.experience_at(13) is None


def test_trying_the_code_is_no_stream(make_trainer: Trainers) -> None:
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(Watcher(), datamodule=stream())
    assert trainer.global_step == 1


def test_stop_after_keeps_the_classes_of_the_whole_stream() -> None:
    data = stream(stop_after=2)
    data.setup("fit")
    assert [experience.classes for experience in data.experiences] == [(0, 1), (2, 3)]
    assert data.epochs == 2
    assert (data.num_classes, data.classes) == (6, [0, 1, 2, 3, 4, 5])
    with pytest.raises(DataError, match="stop_after=4, but the stream has 3 experiences; leave stop_after out"):
        stream(stop_after=4).setup("fit")


# ---- classes


def test_ids_with_gaps_are_kept() -> None:
    data = stream(source=numbered([7, 7, 3, 3, 90, 90]))
    data.setup("fit")
    assert [experience.classes for experience in data.experiences] == [(3,), (7,), (90,)]
    assert data.num_classes == 91
    assert data.original_ids is None
    assert sorted(torch.cat([targets for _, targets in data.val_dataloader()]).tolist()) == [3, 3, 7, 7, 90, 90]


def test_relabelling_numbers_the_classes_in_the_order_of_the_stream() -> None:
    labels = [7, 7, 3, 3, 90, 90, -1]
    data = stream(
        source=numbered(labels), scenario=ClassIncremental(experiences=3, class_order=[90, 3, 7]), relabel=True
    )
    data.setup("fit")
    assert data.num_classes == 3
    assert data.original_ids == [90, 3, 7]
    assert [experience.classes for experience in data.experiences] == [(90,), (3,), (7,)]  # for people
    for inputs, targets in data.val_dataloader():
        for row, target in zip(inputs[:, 0].int().tolist(), targets.tolist(), strict=True):
            assert target == (-1 if labels[row] < 0 else data.original_ids.index(labels[row]))


def test_relabelling_needs_no_table_as_long_as_the_largest_id() -> None:
    ids = [7, 2**62, 3_000_000_000]
    labels = np.array([-1, *ids * 20])
    data = stream(source=numbered(labels), scenario=ClassIncremental(experiences=3, class_order=ids), relabel=True)
    data.setup("fit")
    assert data._cut.targets("train", relabel=True).tolist() == [-1, *[0, 1, 2] * 20]
    assert data.original_ids == ids
    assert data.num_classes == 3
    # rows of a class that the stream has not, which a test part may hold where experiences are no classes
    other = stream(
        source=numbered([5, 9] * 4, [9, 5, 6, 8, 10, -1]), scenario=NaturalOrder(experiences=2), relabel=True
    )
    other.setup("fit")
    assert other._cut.targets("test", relabel=True).tolist() == [1, 0, -1, -1, -1, -1]


def test_a_task_is_given_where_the_scenario_says_so(make_trainer: Trainers) -> None:
    model, data = Watcher(), stream(scenario=TaskIncremental(experiences=3), val_fraction=0.3)
    make_trainer().fit(model, datamodule=data)
    assert data.gives_task_id
    for (epoch, rows, _), more in zip(model.trained, model.more, strict=True):
        assert more[0].tolist() == [epoch] * len(rows)
    for _, targets, tasks in data.val_dataloader():
        assert tasks.tolist() == [target // 2 for target in targets.tolist()]
    for _, targets, tasks in data.test_dataloader():
        assert tasks.tolist() == [target // 2 for target in targets.tolist()]
    other = stream()
    other.setup("fit")
    assert not other.gives_task_id
    assert len(next(iter(other.val_dataloader()))) == 2


class DictModule(Watcher):
    """A module that has only ever seen batches of another library; its network is a classifier."""

    def __init__(self, inputs: str = "image", targets: str = "label", get: Any = dict.get) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
        self.read = lambda batch: (get(batch, inputs), get(batch, targets))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = self.read(batch)
        return torch.nn.functional.cross_entropy(self(inputs), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(self.read(batch)[0])


@pytest.mark.parametrize(
    ("form", "inputs", "targets", "get"),
    [
        ("tuple", 0, 1, tuple.__getitem__),
        ("dict", "image", "label", dict.__getitem__),
        (["pixel_values", "labels"], "pixel_values", "labels", dict.__getitem__),
        ("named", "image", "label", getattr),
        (lambda batch: SimpleNamespace(x=batch[0], y=batch[1]), "x", "y", getattr),
    ],
)
def test_batches_come_in_the_form_that_the_module_reads(
    form: Any, inputs: Any, targets: Any, get: Any, make_trainer: Trainers
) -> None:
    reader = (lambda batch: (batch.x, batch.y)) if callable(form) else None
    module, nmc = DictModule(inputs, targets, get), NMC(metric="euclidean", batch_reader=reader)
    evaluation = StreamEvaluation(table=False, files=False, batch_reader=reader)
    trainer = make_trainer(callbacks=[nmc, evaluation], strategy=GradientFreeStrategy(batch_reader=reader))
    trainer.fit(module, datamodule=stream(batch_form=form, num_workers=2 if form == "named" else 0))
    rows = torch.stack([torch.arange(50.0), torch.zeros(50)], dim=1)
    with torch.no_grad():
        features = module.net[:2](rows).double()
    head = NearestMeanHead(8, metric="euclidean")  # of all rows at once, in no order and in no form
    head.update(features, torch.tensor(UNEQUAL))
    assert torch.allclose(nmc.head.forward(features), head.forward(features), rtol=0, atol=1e-9)
    assert len(evaluation.results["nmc"]["accuracy_matrix"]) == 3


def test_a_task_has_a_name_in_every_form() -> None:
    for form, name in (("dict", "task"), (["x", "y", "session"], "session"), (["x", "y"], "task")):
        data = stream(scenario=TaskIncremental(experiences=3), batch_form=form)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert set(batch[name].tolist()) == {0}
        assert len(batch) == 3


def test_counts_of_the_digits_are_those_of_scikit_learn() -> None:
    data = StreamDataModule("digits:flat", ClassIncremental(experiences=5))
    data.setup("fit")
    target = load_digits().target
    train, test = Counter(target[::2].tolist()), Counter(target[1::2].tolist())
    for experience in data.experiences:
        assert experience.train_samples == sum(train[label] for label in experience.classes)
        assert experience.eval_samples == sum(test[label] for label in experience.classes)


# ---- validation part


def test_a_validation_part_is_stratified_disjoint_and_seeded(make_trainer: Trainers) -> None:
    def cut(seed: int) -> tuple[set[int], set[int]]:
        model, data = Watcher(), stream(val_fraction=0.25, seed=seed)
        make_trainer(num_sanity_val_steps=0).fit(model, datamodule=data)
        assert data.evaluated_on == "validation"
        assert {part for _, part in model.evaluated[-1]} == {0}
        trained = {row for _, rows, _ in model.trained for row in rows}
        assert sum(experience.eval_samples or 0 for experience in data.experiences) == len(model.evaluated[-1])
        assert sum(experience.train_samples or 0 for experience in data.experiences) == len(trained)
        return trained, {row for row, _ in model.evaluated[-1]}

    trained, held_out = cut(0)
    assert not trained & held_out
    assert trained | held_out == set(range(50))
    counts = Counter(UNEQUAL[row] for row in held_out)
    assert dict(counts) == {0: 1, 1: 1, 2: 5, 4: 2, 5: 2}  # a quarter of 5, 4, 21, 2, 9 and 9, rounded
    assert cut(0)[1] == held_out
    assert cut(1)[1] != held_out


def test_the_test_part_stays_the_sources_own() -> None:
    data = stream(val_fraction=0.25)
    data.setup("fit")
    assert {int(part) for inputs, _ in data.test_dataloader() for part in inputs[:, 1]} == {1}
    assert stream().evaluated_on == "test"


def test_a_validation_part_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match=r"val_fraction=0.01 leaves no validation sample in experience 'classes 0-1'"):
        stream(val_fraction=0.01).setup("fit")


# ---- preprocessing


def test_the_modules_own_preprocessing_is_taken(make_trainer: Trainers) -> None:
    model = TimmClassifier("test_vit", num_classes=10, model_kwargs={"img_size": 32})
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    data = StreamDataModule("digits", Joint(), eval_batch_size=8)
    make_trainer(limit_val_batches=1).validate(model, datamodule=data, verbose=False)
    digits = torch.from_numpy(load_digits().images[1::2][:8]).float()[:, None] / 16
    expected = Preprocessing(size=32, resize=33, interpolation="bicubic", mean=0.5, std=0.5, channels=3)(digits)
    assert torch.allclose(seen[0], expected, atol=1e-6)  # test_vit: mean and std 0.5, crop 0.95: 32 of floor(33.7)


@pytest.mark.parametrize("preprocessing", ["unit", Preprocessing(size=16), lambda images: images * 2])
def test_a_given_preprocessing_is_kept(preprocessing: Any, make_trainer: Trainers) -> None:
    model = Watcher()
    seen: list[torch.Tensor] = []
    model.data_config = {"input_size": (3, 32, 32)}
    model.validation_step = lambda batch: seen.append(batch[0])
    data = StreamDataModule("digits", Joint(), preprocessing=preprocessing)
    make_trainer(limit_val_batches=1).validate(model, datamodule=data, verbose=False)
    digits = torch.from_numpy(load_digits().images[1::2][: len(seen[0])]).float()[:, None] / 16
    prepare = Preprocessing() if preprocessing == "unit" else preprocessing
    assert torch.equal(seen[0], prepare(digits))


# ---- position in a checkpoint


@pytest.mark.parametrize("stop_in", [(0, 1), (0, 2), (1, 0), (1, 3), (2, 4)])
def test_a_stopped_run_goes_on_with_the_next_sample(
    stop_in: tuple[int, int], make_trainer: Trainers, tmp_path: Path
) -> None:
    whole = Watcher()
    make_trainer().fit(whole, datamodule=stream())
    first = Watcher(stop_in)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False, filename="last")
    with pytest.raises(KeyError):
        make_trainer(callbacks=[saver], enable_checkpointing=True).fit(first, datamodule=stream())
    second = Watcher()
    files = list(tmp_path.glob("*.ckpt"))
    path = max(files, key=lambda file: file.stat().st_mtime_ns) if files else None
    make_trainer().fit(second, datamodule=stream(), ckpt_path=path)
    assert first.trained + second.trained == whole.trained


def test_a_checkpoint_on_the_last_batch_loses_nothing(make_trainer: Trainers, tmp_path: Path) -> None:
    """The next experience is longer, which Lightning alone gets wrong; no callback of clkit is there to help."""
    whole = Watcher()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(callbacks=[saver], enable_checkpointing=True, limit_val_batches=0).fit(whole, datamodule=stream())
    for step in (3, 9):  # 3 and 6 batches in the first two experiences
        second = Watcher()
        make_trainer(limit_val_batches=0).fit(second, datamodule=stream(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert second.trained == whole.trained[step:]


@pytest.fixture
def saved(make_trainer: Trainers, tmp_path: Path) -> dict[str, Path]:
    """Checkpoints in the middle of the second experience and at the end of the first."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(callbacks=[saver], enable_checkpointing=True).fit(Watcher(), datamodule=stream())
    return {"inside": tmp_path / "step=5.ckpt", "boundary": tmp_path / "step=3.ckpt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3}, "inside an experience with batch_size=4, this run has batch_size=3"),
        ({"seed": 1}, "inside an experience with seed=0, this run has seed=1"),
        ({"shuffle": False}, "inside an experience with shuffle=True, this run has shuffle=False"),
        ({"val_fraction": 0.2}, "inside an experience with train_samples=23, this run has train_samples=19"),
    ],
)
def test_what_the_order_depends_on_must_not_change_inside_an_experience(
    options: dict[str, Any], message: str, saved: dict[str, Path], make_trainer: Trainers
) -> None:
    with pytest.raises(StateError, match=message):
        make_trainer().fit(Watcher(), datamodule=stream(**options), ckpt_path=saved["inside"])
    model = Watcher()
    make_trainer().fit(model, datamodule=stream(**options), ckpt_path=saved["boundary"])
    assert sorted({epoch for epoch, _, _ in model.trained}) == [1, 2]


def test_another_number_of_processes_must_wait_for_a_boundary(saved: dict[str, Path]) -> None:
    for name, start in (("inside", None), ("boundary", 0)):
        data = stream()
        data.setup("fit")
        state = torch.load(saved[name], weights_only=True)["StreamDataModule"]
        assert state["order"]["world_size"] == 1
        data._position = StreamPosition.saved({**state, "order": {**state["order"], "world_size": 2}})
        if start is None:
            with pytest.raises(StateError, match="with world_size=2, this run has world_size=1"):
                data._start_of(1)
        else:
            assert data._start_of(1) == start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenario": ClassIncremental(experiences=2)}, "comes from another stream"),
        ({"scenario": ClassIncremental(experiences=3, seed=1)}, "comes from another stream"),
        ({"source": "digits:flat"}, "comes from another stream"),
        ({"epochs_per_experience": 2}, "saved with epochs_per_experience=1, this run has epochs_per_experience=2: "),
    ],
)
def test_another_stream_is_refused(
    options: dict[str, Any], message: str, saved: dict[str, Path], make_trainer: Trainers
) -> None:
    for path in saved.values():
        with pytest.raises(StateError, match=message):
            make_trainer().fit(Watcher(), datamodule=stream(**options), ckpt_path=path)


def test_the_error_says_only_what_differs() -> None:
    def position(experiences: list[list[Any]]) -> StreamPosition:
        return StreamPosition(3, 0, 3, experiences, {"epochs_per_experience": 1, "warmup_epochs": 0}, {})

    whole = [[f"part {i}", list(range(10 * i, 10 * i + 10))] for i in range(100)]
    other = [*whole[:40], ["part 40", [400, 401, *range(500, 515)]], ["night", [7]], *whole[42:90]]
    with pytest.raises(
        StateError, match=r"100 experiences, here are 90; 2 of 90 differ, .* experience 40, .* 'part 40'"
    ) as e:
        position(whole).check_fit(position(other))
    assert "lacks the classes 402, 403, 404, 405, 406, 407, 408, 409 and has the classes 500, 501, " in str(e.value)
    assert str(e.value).count("509, … (15)") == 1
    assert len(str(e.value)) < 450
    with pytest.raises(StateError, match="experience 41, which is 'part 41', here 'night'") as e:
        position(whole).check_replay(position([*whole[:41], *other[41:]]), np.array([0]), 10)
    assert len(str(e.value)) < 250
    with pytest.raises(StateError, match=r"come to experience 3 \(of 100, counted from 0\); here are only 2"):
        position(whole).check_replay(position(whole[:2]), np.array([0]), 10)


def test_a_position_of_another_format_is_refused(make_trainer: Trainers, saved: dict[str, Path]) -> None:
    file = torch.load(saved["inside"], weights_only=True)
    file["StreamDataModule"]["format"] = 99
    torch.save(file, saved["inside"])
    with pytest.raises(StateError, match="format must be 1, the saved state has 99"):
        make_trainer().fit(Watcher(), datamodule=stream(), ckpt_path=saved["inside"])


def test_a_run_that_max_steps_cut_goes_on(make_trainer: Trainers, tmp_path: Path) -> None:
    whole = Watcher()
    make_trainer().fit(whole, datamodule=stream())
    for steps in (2, 3, 5, 9):  # inside an experience and at the ends of two
        first, second, trainer = Watcher(), Watcher(), make_trainer(max_steps=steps)
        trainer.fit(first, datamodule=stream())
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        make_trainer().fit(second, datamodule=stream(), ckpt_path=tmp_path / "cut.ckpt")
        assert len(first.trained) == steps
        assert first.trained + second.trained == whole.trained


def test_a_stream_that_was_stopped_goes_on(make_trainer: Trainers, tmp_path: Path) -> None:
    whole, first, second = Watcher(), Watcher(), Watcher()
    make_trainer().fit(whole, datamodule=stream())
    trainer = make_trainer()
    trainer.fit(first, datamodule=stream(stop_after=2))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    make_trainer().fit(second, datamodule=stream(), ckpt_path=tmp_path / "two.ckpt")
    assert first.trained + second.trained == whole.trained


def test_an_evaluation_of_a_checkpoint_covers_what_was_learned(make_trainer: Trainers, saved: dict[str, Path]) -> None:
    model = Watcher()
    make_trainer().validate(model, datamodule=stream(), ckpt_path=saved["boundary"], verbose=False)
    make_trainer().test(model, datamodule=stream(), ckpt_path=saved["inside"], verbose=False)
    make_trainer().validate(  # other data: nothing is known of it, so all of it
        model, datamodule=stream(source=numbered([0, 1, 2, 3])), ckpt_path=saved["boundary"], verbose=False
    )
    assert [len(rows) for rows in model.evaluated] == [9, 32, 4]


def test_a_second_fit_from_the_start_forgets_the_position(make_trainer: Trainers, saved: dict[str, Path]) -> None:
    data, whole, again = stream(), Watcher(), Watcher()
    make_trainer().fit(Watcher(), datamodule=data, ckpt_path=saved["inside"])
    make_trainer().fit(again, datamodule=data)
    make_trainer().fit(whole, datamodule=stream())
    assert again.trained == whole.trained


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"eval_batch_size": -1}, "eval_batch_size"),
        ({"epochs_per_experience": 0}, "epochs_per_experience"),
        ({"stop_after": 0}, "stop_after"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1.0"),
        ({"val_fraction": "a"}, r"val_fraction must be a finite number, got 'a'"),
        ({"evaluate": "past"}, "evaluate must be one of 'seen', 'all', got 'past'"),
        ({"preprocessing": "imagenet"}, "preprocessing must be .* got 'imagenet'"),
        ({"scenario": "class_incremental"}, "scenario must be a Scenario .* got 'class_incremental'"),
        ({"batch_form": "list"}, "batch_form must be one of 'tuple', 'dict', 'named', .* got 'list'"),
        ({"batch_form": ["x"]}, r"batch_form must be .* got \['x'\]"),
        ({"batch_form": ["x", "x"]}, "batch_form must be .* keys"),
        ({"source": "cifar"}, "source='cifar' is not known; allowed: 'digits'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        stream(**options)


def test_a_data_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.root is '.*nowhere', which is not a folder"):
        stream(source="npz:x", root=str(tmp_path / "nowhere")).setup("fit")


def test_a_stream_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(DataError, match="6 classes cannot fill 7 experiences"):
        stream(scenario=ClassIncremental(experiences=7)).setup("fit")
    with pytest.raises(DataError, match="experiences=51, but the training part has 50 rows"):
        stream(scenario=NaturalOrder(51)).setup("fit")
    with pytest.raises(DataError, match="no labelled row"):
        stream(source=numbered([-1, -1]), scenario=NaturalOrder(2)).setup("fit")


def test_a_source_without_a_test_part_can_train_and_says_so_when_evaluated(make_trainer: Trainers) -> None:
    data = stream(source=numbered(UNEQUAL, test=[]))
    model = Watcher()
    make_trainer(limit_val_batches=0).fit(model, datamodule=data)
    assert len(model.trained) == 14
    with pytest.raises(DataError, match=r"'custom' has no test samples to evaluate on; .* val_fraction above 0"):
        make_trainer().validate(model, datamodule=data, verbose=False)
    held_out = stream(source=numbered(UNEQUAL, test=[]), val_fraction=0.3)
    make_trainer().validate(model, datamodule=held_out, verbose=False)
    assert len(model.evaluated[-1]) > 0


def test_a_validation_interval_longer_than_an_experience_is_refused_early(make_trainer: Trainers) -> None:
    for options in ({}, {"limit_train_batches": 0.9}):
        with pytest.raises(ConfigurationError, match=r"val_check_interval=4 is longer than experience 'classes 0-1'"):
            make_trainer(val_check_interval=4, **options).fit(Watcher(), datamodule=stream())
    for options in ({"val_check_interval": 2}, {"val_check_interval": 4, "check_val_every_n_epoch": None}):
        model = Watcher()
        make_trainer(**options).fit(model, datamodule=stream())
        assert len(model.trained) == 14


def test_early_stopping_is_refused_on_a_stream_and_allowed_on_one_experience(make_trainer: Trainers) -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("x", check_on_train_epoch_end=True, strict=False)

    with pytest.raises(ConfigurationError, match="EarlyStopping would end the whole stream"):
        make_trainer(callbacks=[stopping()]).fit(Watcher(), datamodule=stream())
    make_trainer(callbacks=[stopping()]).fit(Watcher(), datamodule=stream(scenario=Joint()))


def test_too_many_processes_for_an_experience_are_named() -> None:
    data = stream()
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=0, world_size=10, current_epoch=0, lightning_module=None)
    with pytest.raises(DataError, match="experience 'classes 0-1': 9 rows cannot be shared by 10 processes"):
        data.train_dataloader()


def test_a_long_tail_keeps_the_test_part_whole() -> None:
    data = stream(scenario=LongTailed(ClassIncremental(experiences=3), factor=0.5))
    data.setup("fit")
    assert [experience.train_samples for experience in data.experiences] == [5 + 2, 5 + 2, 2 + 2]
    assert [experience.eval_samples for experience in data.experiences] == [9, 23, 18]
