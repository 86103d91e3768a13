"""A replay memory in parts: each of two processes keeps rows of its own stream alone.

Run as a program, ``test_onpro_sharded.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from onpro_runs import onpro
from test_onpro_two_processes import (
    DER,
    GATHERED,
    SIZES,
    TASKS,
    Net,
    assert_close,
    batches,
    fit_each,
    plain_trainer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_ranks import Ranks, Scenarios, drive

from clkit.callbacks import NMC
from clkit.errors import ArgumentError, ClkitError, StateError
from clkit.methods import NearestMeanHead, ReservoirBuffer
from clkit.methods.replay.buffer import MemoryRows
from clkit.methods.replay.step import Block
from clkit.strategies import ERStrategy, MemorySettings, OnProStrategy
from clkit.strategies._ranks import Incoming, ReplayRanks
from clkit.testing._compare import changed

CAPACITY = 7
PARTS = [4, 3]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "er": {"kind": ERStrategy, **GATHERED},
    "contrasts": {"mixing": None, **GATHERED},
    "der": {**DER, **GATHERED},
    "a rank without rows": {"mixing": None, **GATHERED},
    "der without rows": {**DER, **GATHERED},
    "bytes without rows": {"storage": "uint8"},
    "der locally, without rows": DER,
    "seen only": {
        "mixing": None,
        "rotation": "none",
        "instance_new": 0,
        "instance_mem": 0,
        "ope_new": 0,
        "replay_batch": 1,
    },
    "balanced": {"policy": "class_balanced"},
    "saved": {},
    "whole": {"scope": "replicated"},
    "balanced saved": {"policy": "class_balanced"},
    "two epochs": {},
}
STARTS = {  # which file a run goes on from, and how many processes wrote it
    "resumed": ("saved", 2),
    "from one": ("saved", 1),
    "from a whole one": ("whole", 2),
    "whole from parts": ("saved", 2),
    "balanced from one": ("balanced saved", 1),
    "smaller": ("saved", 1),
    "smaller parts": ("saved", 2),
    "second epoch": ("two epochs", 2),
}
OPTIONS |= {
    "resumed": {},
    "from one": {},
    "from a whole one": {},
    "whole from parts": {"scope": "replicated"},
    "balanced from one": {"policy": "class_balanced"},
    "smaller": {"capacity": 5},
    "smaller parts": {"capacity": 5},
    "fewer rows than processes": {"capacity": 1},
    "second epoch": {},
}
QUICK = ("plain", "contrasts")
SLOW = tuple(name for name in OPTIONS if name not in QUICK)
UNLABELLED = ("a rank without rows", "der without rows", "bytes without rows", "der locally, without rows")


class Before(pl.Callback):
    """What the run goes on with."""

    state: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.state is None:
            self.state = saved_memory(trainer.strategy)


def saved_memory(strategy: Any) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in strategy.memory.state_dict().items()}


def run(
    devices: int, folder: Path, name: str, prepare: Callable[[Any], None] = lambda strategy: None
) -> dict[str, Any]:
    """One fit a task with one strategy, as users with plain loaders do; what it ended with."""
    module, before, nmc = Net(norm=False), Before(), NMC(memory="replay")
    options = {"capacity": CAPACITY, "rotation": "rot4", "replay_batch": 5, "scope": "sharded", **OPTIONS[name]}
    strategy = onpro(**options)
    prepare(strategy)
    callbacks: list[Any] = [before, nmc] if name in ("plain", "bytes without rows", "from one") else [before]
    writes = [each for each, _ in STARTS.values()]
    if name in writes:
        path = str(folder / f"{name}-{devices}")
        callbacks.append(ModelCheckpoint(path, filename="{epoch}", every_n_epochs=1, save_top_k=-1))
    trainer = plain_trainer(devices, folder, strategy, callbacks)
    rank = None if devices == 1 else trainer.global_rank
    tasks = [DataLoader(task, batch_size=None) for task in batches(rank, name in UNLABELLED)]
    if name in STARTS:
        file, processes = STARTS[name]
        trainer.fit_loop.max_epochs = 2
        task = tasks[0 if name == "second epoch" else 1]
        trainer.fit(module, task, ckpt_path=str(folder / f"{file}-{processes}" / "epoch=0.ckpt"))
    elif name == "two epochs":
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, tasks[0])
    else:
        fit_each(trainer, module, tasks)
    return {
        "weights": {key: value.detach().clone() for key, value in module.state_dict().items()},
        "projector": {}
        if strategy.projector is None
        else {k: v.clone() for k, v in strategy.projector.state_dict().items()},
        "memory": saved_memory(strategy),
        "before": before.state,
        "prototypes": strategy.prototypes.state_dict() if hasattr(strategy, "prototypes") else {},
        "balance": strategy._counters.held,
        "nmc": dict(nmc.head.state_dict()) if nmc in callbacks else {},
    }


def scenario(name: str, folder: Path) -> dict[str, Any]:
    try:
        return run(2, folder, name)
    except ClkitError as error:
        return {"error": f"{type(error).__name__}: {error}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


scenarios = Scenarios(__file__, QUICK, sorted(SLOW, key=lambda each: each in STARTS))  # those that write files first
names = scenarios.names


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return scenarios.run_in(folder, lambda: [run(1, folder, name) for name in ("saved", "balanced saved")])


def seed_of(rank: int) -> int:
    return int(np.random.SeedSequence((0, 5, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def labelled(rank: int, unlabelled: bool, tasks: int = len(TASKS)) -> list[tuple[Tensor, Tensor, int]]:
    """The batches that a rank learns, with their experience."""
    found = []
    for task, own in enumerate(batches(rank, unlabelled)[:tasks]):
        for images, labels in own:
            known = labels >= 0
            found.append((images[known].double(), labels[known], task))
    return found


# ---- each rank keeps its own stream


@names(*QUICK, "er", "der", "balanced", "seen only", *UNLABELLED)
def test_a_rank_keeps_what_a_memory_of_its_own_stream_keeps(ranks: Any, name: str) -> None:
    for rank, found in enumerate(ranks(name)):
        options = {key: OPTIONS[name][key] for key in ("policy", "storage") if key in OPTIONS[name]}
        alone = ReservoirBuffer(PARTS[rank], seed=seed_of(rank), **options)
        for images, labels, task in labelled(rank, name in UNLABELLED):
            alone.add(images, labels, task)
        expected = alone.state_dict()
        extras = {key: value for key, value in found["memory"].items() if key.startswith("extras.")}
        assert changed({k: v for k, v in found["memory"].items() if k not in extras}, expected) == []
        assert bool(extras) == ("der" in name)


@names(*QUICK, "er", "der", "balanced", "saved", "seen only", *UNLABELLED)
def test_both_ranks_train_the_same_weights_and_know_the_same_prototypes(ranks: Any, name: str) -> None:
    first, second = ranks(name)
    for part in ("weights", "projector", "prototypes", "balance"):
        assert changed(first[part], second[part]) == []
    start = Net(norm=False).double().state_dict()
    assert all(not torch.equal(value, first["weights"][key]) for key, value in start.items())


def test_the_counts_are_of_the_rows_of_all_parts(ranks: Any) -> None:
    first, second = ranks("plain")
    assert list(first["balance"]) == [0, 1]
    seen = np.cumsum(SIZES, axis=0)[[len(TASKS[0]) - 1, -1]]
    assert [sum(rows.values()) for rows in first["balance"].values()] == np.minimum(seen, PARTS).sum(axis=1).tolist()
    labels = torch.cat([first["memory"]["label"], second["memory"]["label"]])
    assert list(first["balance"][1].values()) == torch.unique(labels, return_counts=True)[1].tolist()


@names("plain", "bytes without rows", "from one")
def test_means_of_the_memory_are_those_of_all_parts(ranks: Any, name: str) -> None:
    found = ranks(name)
    assert changed(found[0]["nmc"], found[1]["nmc"]) == []
    module = Net(norm=False).double()
    module.load_state_dict(found[0]["weights"])
    memory = [each["memory"] for each in found]
    images = torch.cat([each["data"].double() / (255 if each["data"].dtype == torch.uint8 else 1) for each in memory])
    labels = torch.cat([each["label"] for each in memory])
    with torch.no_grad():
        features = nn.functional.normalize(module.body(images))
    head = NearestMeanHead(24)
    head.load_state_dict(found[0]["nmc"])
    for c in labels.unique().tolist():
        torch.testing.assert_close(
            head.means[head.classes.tolist().index(c)].double(), features[labels == c].mean(0), rtol=0, atol=1e-10
        )


# ---- the weights are those of one process that draws from two memories


class TwoMemories:
    """What two ranks keep, as one object: each is offered its rows of the joint batch."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.parts = [ReservoirBuffer(capacity, seed=seed_of(rank)) for rank, capacity in enumerate(PARTS)]
        self.sizes = iter(sizes)

    def add(self, images: Tensor, labels: Tensor, experience: int, **extras: Tensor) -> None:
        cut = next(self.sizes)
        given = [images.split(cut), labels.split(cut), *[rows.split(cut) for rows in extras.values()]]
        for part, own, own_labels, *more in zip(self.parts, *given, strict=True):
            part.add(own, own_labels, experience, **dict(zip(extras, more, strict=True)))

    def check(self, *batch: Any) -> None:
        for part in self.parts:
            part.check(*batch)

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def capacity(self) -> int:
        return sum(PARTS)

    def class_counts(self) -> dict[int, int]:
        labels = torch.cat([part.label for part in self.parts])
        return dict(zip(*(each.tolist() for each in labels.unique(return_counts=True)), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {}


class OneForTwo(ReplayRanks):
    """A single process that draws from two memories what two ranks would."""

    def incoming(self, images: Tensor, labels: Tensor, memory: Any) -> Incoming:
        return Incoming(Block.whole(images, labels), labels, images, labels, memory.size, images[:0])

    def retrieve(self, memory: Any, wanted: int, generators: list[torch.Generator]) -> MemoryRows:
        shares = [wanted - wanted // 2, wanted // 2]
        drawn = [
            part.sample(share, own)
            for part, share, own in zip(memory.parts, shares, generators, strict=True)
            if part.size
        ]
        starts = [0, shares[0]] if len(drawn) == 2 else [0 if memory.parts[0].size else shares[0]]
        self.at = torch.cat([start + torch.arange(len(rows.data)) for start, rows in zip(starts, drawn, strict=True)])
        data, label = (torch.cat([getattr(rows, key) for rows in drawn]) for key in ("data", "label"))
        extras = {key: torch.cat([rows.extras[key] for rows in drawn]) for key in drawn[0].extras}
        return MemoryRows(data, label, label, label, label, extras)

    def _places(self, rows: int, count: int) -> tuple[Tensor, int]:
        return self.at if rows else torch.arange(0), count


@names("contrasts", "er", "der", "a rank without rows", "der without rows")
def test_gathered_embeddings_train_the_weights_of_one_process_with_both_memories(
    ranks: Any, folder: Path, name: str
) -> None:
    sizes = [(first, 0 if name in UNLABELLED and n in (0, 6) else second) for n, (first, second) in enumerate(SIZES)]

    def prepare(strategy: Any) -> None:
        strategy._memory.rows = TwoMemories(sizes)
        ranks = strategy._memory.ranks = strategy._ranks = OneForTwo()
        drawn = type(strategy).drawn

        def of_both(new: Block, count: int, purpose: int) -> Any:
            generators = [strategy._generator(purpose, rank) for rank in (0, 1)]
            strategy.retrieve = lambda new, count, _: ranks.retrieve(strategy.memory, count, generators)
            return drawn(strategy, new, count, purpose)

        strategy.drawn = of_both

    one, two = run(1, folder, name, prepare), ranks(name)[0]
    for part in ("weights", "projector", "prototypes"):
        assert_close(two[part], one[part])


# ---- files


def saved_memories(run_folder: Path) -> list[dict[str, Any]]:
    saved = torch.load(run_folder / "epoch=0.ckpt", weights_only=True)["clkit_strategy"]["memory"]
    return list(saved)


def rows_of(*memories: dict[str, Any]) -> list[bytes]:
    return sorted(row.numpy().tobytes() for each in memories for row in each["data"])


@pytest.mark.slow
def test_the_file_holds_the_parts_in_rank_order(ranks: Any, folder: Path) -> None:
    ranks("saved")
    saved = saved_memories(folder / "saved-2")
    assert len(saved) == 2
    for rank, state in enumerate(saved):
        alone = ReservoirBuffer(PARTS[rank], seed=seed_of(rank))
        for images, labels, task in labelled(rank, False, tasks=1):
            alone.add(images, labels, task)
        assert changed(state, dict(alone.state_dict())) == []


@pytest.mark.slow
def test_the_same_number_of_processes_goes_on_with_the_same_bits(ranks: Any) -> None:
    for resumed, whole in zip(ranks("second epoch"), ranks("two epochs"), strict=True):
        assert int(resumed["before"]["seen"].sum()) == int(whole["memory"]["seen"].sum()) // 2
        for part in ("weights", "projector", "prototypes", "memory", "balance"):
            assert changed(resumed[part], whole[part]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["from one", "from a whole one", "balanced from one"])
def test_two_processes_take_the_rows_of_one_memory(ranks: Any, folder: Path, name: str) -> None:
    file, processes = STARTS[name]
    ranks(name)
    (whole,) = torch.load(folder / f"{file}-{processes}" / "epoch=0.ckpt", weights_only=True)["clkit_strategy"][
        "memory"
    ]
    parts = [each["before"] for each in ranks(name)]
    assert rows_of(*parts) == rows_of(whole)
    assert [int(part["capacity"]) for part in parts] == PARTS
    assert sum(int(part["seen"].sum()) for part in parts) == int(whole["seen"].sum())
    assert not torch.equal(parts[0]["generator"], parts[1]["generator"])
    first, second = ranks(name)
    assert changed(first["weights"], second["weights"]) == []
    seen = sum(int(each["memory"]["seen"].sum()) for each in (first, second))
    assert seen == sum(map(sum, SIZES))


@pytest.mark.slow
def test_one_process_takes_the_rows_of_both(ranks: Any, folder: Path) -> None:
    ranks("saved")
    parts = saved_memories(folder / "saved-2")
    found = run(1, folder, "resumed")
    assert rows_of(found["before"]) == rows_of(*parts)
    assert int(found["before"]["capacity"]) == CAPACITY
    assert found["before"]["seen"].tolist() == [sum(int(part["seen"].sum()) for part in parts)]
    assert int(found["memory"]["seen"].sum()) == sum(map(sum, SIZES))


@pytest.mark.slow
def test_a_replicated_run_takes_the_rows_of_both(ranks: Any, folder: Path) -> None:
    first, second = ranks("whole from parts")
    parts = saved_memories(folder / "saved-2")
    assert changed(first["before"], second["before"]) == []
    assert rows_of(first["before"]) == rows_of(*parts)
    assert changed(first["memory"], second["memory"]) == []


@pytest.mark.slow
def test_another_capacity_with_another_number_of_processes_is_refused(ranks: Any) -> None:
    for found in ranks("smaller"):
        assert found["error"].startswith("StateError: onpro: the 1 saved memories have a capacity of 7 rows together")


@pytest.mark.slow
def test_parts_that_are_too_large_for_the_capacity_are_refused(ranks: Any) -> None:
    for found in ranks("smaller parts"):
        assert found["error"].startswith("StateError: the saved memory has a capacity of")


@pytest.mark.slow
def test_fewer_rows_than_processes_are_refused(ranks: Any) -> None:
    for found in ranks("fewer rows than processes"):
        assert found["error"] == (
            "ArgumentError: memory.scope='sharded' needs at least one image for each of the 2 processes, got capacity=1"
        )


# ---- one process


@pytest.mark.parametrize("gather", [None, "embeddings"])
def test_alone_a_part_is_the_whole(folder: Path, gather: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "sharded", {"gather": gather})
    monkeypatch.setitem(OPTIONS, "replicated", {"gather": gather, "scope": "replicated"})
    found, expected = run(1, folder, "sharded"), run(1, folder, "replicated")
    for part in ("weights", "projector", "prototypes", "memory", "balance"):
        assert changed(found[part], expected[part]) == []


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ArgumentError, match="scope must be one of"):
        MemorySettings(scope="everywhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda memories: memories.clear(), "the saved run has no memory"),
        (lambda memories: memories.append("no memory"), r"memory\[2\] must be dict"),
        (lambda memories: memories[1].update(capacity=torch.tensor(0)), "memory 1: capacity must be"),
        (lambda memories: memories[1].update(capacity=torch.tensor([3.0, 1.0])), "memory 1: capacity must be"),
        (lambda memories: memories[1]["data"].fill_(torch.nan), "'data' must be .*with finite values"),
        (lambda memories: memories[1].update(capacity=torch.tensor(5)), "have a capacity of 9 rows together"),
        (lambda memories: memories[1].update(storage="uint8"), "storage"),
        (lambda memories: memories[1].update(other_rows()), "do not fit together"),
    ],
)
def test_damaged_parts_change_nothing(change: Callable[[Any], None], message: str) -> None:
    strategy = OnProStrategy(capacity=CAPACITY)
    assert strategy.memory is not None
    strategy.memory.add(torch.rand(9, 3, 8, 8), torch.arange(9))
    before, state = saved_memory(strategy), strategy.stream_state()
    memories = [ReservoirBuffer(capacity) for capacity in PARTS]
    for memory in memories:
        memory.add(torch.rand(2, 3, 8, 8), torch.arange(2))
    state["memory"] = [dict(memory.state_dict()) for memory in memories]
    change(state["memory"])
    with pytest.raises(StateError, match=message):
        strategy.load_stream_state(state)
    assert changed(saved_memory(strategy), before) == []


def other_rows() -> dict[str, Any]:
    memory = ReservoirBuffer(PARTS[1])
    memory.add(torch.rand(2, 3, 4, 4), torch.arange(2))
    return dict(memory.state_dict())


if __name__ == "__main__":
    sys.exit(drive(scenario))
