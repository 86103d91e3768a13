"""NMC on a replay memory: means of its rows by the network as it is, at each boundary and wherever somebody looks."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from small_runs import quiet_trainer
from torch import Tensor, nn
from two_ranks import drive, driven

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.distributed import gather_objects
from clkit.errors import ArgumentError, ConfigurationError
from clkit.methods import OnProLosses, ReservoirBuffer
from clkit.strategies import LearningStrategy, OnProStrategy, ReplayStrategy, SCRStrategy
from clkit.testing._compare import changed

Make = Callable[..., Any]
Table = np.ndarray[Any, np.dtype[np.float64]]

NEVER: dict[str, Any] = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
OFTEN: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": -1}
CAPACITY = 300  # more rows than one pass takes


class Remembering(LearningStrategy):
    """The user's own step, and a memory of what it was given: the same on all processes."""

    def __init__(self, memory: ReservoirBuffer | None, **options: Any) -> None:
        super().__init__(**options)
        self.memory = memory

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        assert self.memory is not None
        for data, label in gather_objects((args[0][0], args[0][1]), "the batches"):
            self.memory.add(data, label)
        return loss


class Net(pl.LightningModule):
    """Batch statistics and dropout, so that it matters in which mode and when the network is asked."""

    def __init__(self, inputs: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.classify = nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.drop(torch.relu(self.norm(self.hidden(inputs)))))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=3)
    return StreamDataModule("digits:flat", scenario, **{"batch_size": 64, **options})


def features(module: Net, inputs: Tensor) -> Table:
    """Features of the network in evaluation mode, of length one, computed without torch."""
    weights = {name: value.double().numpy() for name, value in module.state_dict().items()}
    hidden = inputs.double().numpy() @ weights["hidden.weight"].T + weights["hidden.bias"]
    hidden = (hidden - weights["norm.running_mean"]) / np.sqrt(weights["norm.running_var"] + module.norm.eps)
    hidden = np.maximum(hidden * weights["norm.weight"] + weights["norm.bias"], 0)
    return np.asarray(hidden / np.linalg.norm(hidden, axis=1, keepdims=True))


# a ridge head beside the memory's stands on a network that trains
pytestmark = pytest.mark.filterwarnings("ignore:.*the backbone still trains:UserWarning")


def means(module: Net, memory: ReservoirBuffer) -> dict[int, Table]:
    rows = features(module, memory.data)
    labels = memory.label.numpy()
    return {int(c): rows[labels == c].mean(axis=0) for c in np.unique(labels)}


def assert_means(head: Any, expected: dict[int, Table], tolerance: float = 1e-6) -> None:
    assert head.classes.tolist() == sorted(expected)
    found = head.statistics.means.numpy()
    for row, label in enumerate(sorted(expected)):
        np.testing.assert_allclose(found[row], expected[label], rtol=0, atol=tolerance)


def fitted(
    make_trainer: Make, callbacks: list[Any], data: dict[str, Any] | None = None, **options: Any
) -> tuple[pl.Trainer, Net, ReservoirBuffer]:
    pl.seed_everything(3, verbose=False)
    memory, module = ReservoirBuffer(CAPACITY, seed=1), Net()
    trainer = make_trainer(strategy=Remembering(memory), callbacks=callbacks, **{**NEVER, **options})
    trainer.fit(module, datamodule=stream(**(data or {})))
    return trainer, module, memory


class AtBoundary(pl.Callback):
    """Looks at each end of an experience, when everybody else has heard of it."""

    boundary_phase = 45

    def __init__(self, look: Callable[[pl.Trainer, Any], None]) -> None:
        self.look = look
        self.looks = 0

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Any) -> None:
        self.look(trainer, pl_module)
        self.looks += 1


# ---- the means


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("64-true", 1e-13), ("bf16-mixed", 2e-2)])
def test_means_at_each_boundary_are_those_of_the_memory_by_the_network_of_then(
    make_trainer: Make, precision: str, tolerance: float
) -> None:
    nmc = NMC(memory="replay")
    old: list[dict[int, Table]] = []

    def look(trainer: pl.Trainer, module: Any) -> None:
        strategy: Any = trainer.strategy
        memory = strategy.memory
        assert_means(nmc.head, means(module, memory), tolerance)
        assert dict(zip(nmc.head.classes.tolist(), nmc.head.counts.tolist(), strict=True)) == memory.class_counts()
        old.append(means(module, memory))

    boundary = AtBoundary(look)
    fitted(make_trainer, [nmc, boundary], precision=precision)
    assert boundary.looks == 3
    assert np.abs(old[1][0] - old[0][0]).max() > 1e-2  # the network did move in between


@pytest.mark.parametrize("storage", ["float16", "uint8"])
def test_rows_come_back_from_the_storage_as_the_network_knows_them(make_trainer: Make, storage: str) -> None:
    nmc, module = NMC(memory="replay"), Net()
    memory = ReservoirBuffer(50, storage=storage)
    inputs = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(0)) / 255
    labels = torch.arange(40) % 4
    trainer = make_trainer(strategy=Remembering(memory), callbacks=[nmc], max_epochs=1, **NEVER)
    trainer.fit(module, torch.utils.data.DataLoader([(inputs, labels)], batch_size=None))
    rows = features(module, inputs if storage == "uint8" else inputs.half())
    expected = {c: rows[labels.numpy() == c].mean(axis=0) for c in range(4)}
    assert_means(nmc.head, expected, 1e-6)


def test_a_fit_that_is_cut_ends_with_the_means_of_its_end(make_trainer: Make) -> None:
    nmc = NMC(memory="replay")
    _, module, memory = fitted(make_trainer, [nmc], max_steps=9)  # the second experience ends at 11
    assert len(memory.class_counts()) > 4
    assert_means(nmc.head, means(module, memory))


@pytest.mark.parametrize("graft", ["experience_end", "fit_end"])
def test_it_can_be_grafted(make_trainer: Make, graft: Any) -> None:
    nmc = NMC(memory="replay", graft=graft)
    _, module, memory = fitted(make_trainer, [nmc])
    inputs = memory.data[:100]
    module.eval()
    expected = means(module, memory)
    near = np.stack([((features(module, inputs) - expected[c]) ** 2).sum(axis=1) for c in range(10)], axis=1)
    assert nmc.grafted
    assert module(inputs).argmax(1).tolist() == near.argmin(axis=1).tolist()


# ---- what it costs, and what it leaves alone


def test_no_pass_is_paid_for_a_batch_and_two_for_a_boundary_of_300_rows(make_trainer: Make) -> None:
    sizes: list[tuple[bool, int]] = []

    class Counting(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            sizes.append((self.training, len(inputs)))
            return super().forward(inputs)

    module, memory = Counting(), ReservoirBuffer(CAPACITY)
    make_trainer(strategy=Remembering(memory), callbacks=[NMC(memory="replay")], **NEVER).fit(
        module, datamodule=stream()
    )
    assert [size for training, size in sizes if not training] == [256, 44] * 3
    assert sum(size for training, size in sizes if training) == 899  # one pass a batch over the training half
    assert module.training


class Inner(nn.Module):
    """A network with a classifier that others can find, as timm's are."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16)
        self.classify = nn.Linear(16, 10)
        self.calls = 0

    def get_classifier(self) -> nn.Module:
        return self.classify

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.classify(torch.relu(self.hidden(inputs)))
        return logits


class Around(pl.LightningModule):
    """Prepares the inputs of a frozen network, and in training mode disturbs them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Inner().requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(self.drop(inputs) - 0.5)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum() * self.unused.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.unused], lr=0.05)


@pytest.mark.parametrize("options", [{"val_check_interval": 1}, {"check_val_every_n_epoch": 1000}])
@pytest.mark.parametrize("first", [True, False])
def test_what_the_module_does_around_its_network_is_part_of_the_pass_and_kept_features_stay(
    make_trainer: Make, first: bool, options: dict[str, Any]
) -> None:
    served = []
    for nmc in (NMC(memory="replay"), NMC(forward="shared")):
        module, memory = Around(), ReservoirBuffer(CAPACITY)
        evaluation = StreamEvaluation(table=False, files=False)
        callbacks = [nmc, evaluation] if first else [evaluation, nmc]
        trainer = make_trainer(strategy=Remembering(memory), callbacks=callbacks, num_sanity_val_steps=0, **options)
        trainer.fit(module, datamodule=stream())
        served.append(evaluation._kept.served)
        if nmc.memory:
            assert_means(nmc.head, around_means(module, memory))
    assert served[0] == served[1] > 0


def around_means(module: Around, memory: ReservoirBuffer) -> dict[int, Table]:
    weights = {name: value.double().numpy() for name, value in module.net.state_dict().items()}
    hidden = (memory.data.double().numpy() - 0.5) @ weights["hidden.weight"].T + weights["hidden.bias"]
    rows = np.maximum(hidden, 0) / np.linalg.norm(np.maximum(hidden, 0), axis=1, keepdims=True)
    labels = memory.label.numpy()
    return {c: rows[labels == c].mean(axis=0) for c in range(10)}


class Deaf(pl.Callback):
    """What a checkpoint of any batch would hold of the callback, and all that training goes on from, at its end."""

    state: dict[str, Any]

    def __init__(self) -> None:
        self.heads: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        (nmc,) = (callback for callback in trainer.callbacks if isinstance(callback, NMC))
        self.heads.append(nmc.state_dict()["head"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (nmc,) = (callback for callback in trainer.callbacks if isinstance(callback, NMC))
        self.state = {
            "module": {name: value.clone() for name, value in pl_module.state_dict().items()},
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "nmc": nmc.state_dict()["head"],
            "memory": trainer.strategy.memory.state_dict(),
            "random": torch.get_rng_state(),
            "more random": [random.getstate(), np.random.get_state()[2]],  # noqa: NPY002  the global state is meant
            "heads": dict(enumerate(self.heads)),
            "modes": [part.training for part in pl_module.modules()],
        }


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluating_at_every_opportunity_changes_no_bit(make_trainer: Make, inference_mode: bool) -> None:
    ends = []
    for options in (NEVER, {**OFTEN, "inference_mode": inference_mode}):
        end = Deaf()
        fitted(make_trainer, [NMC(memory="replay"), StreamEvaluation(table=False, files=False), end], **options)
        ends.append(end.state)
    assert changed(*ends) == []


# ---- evaluations


class Looks(pl.Callback):
    """The scores that evaluations get, against those of means computed beside."""

    def __init__(self, nmc: NMC) -> None:
        self.nmc = nmc
        self.empty = self.full = 0

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        strategy: Any = trainer.strategy
        memory = strategy.memory
        rows = features(pl_module, batch[0])
        scores = self.nmc.scores(torch.from_numpy(rows))
        if not memory.size:
            assert scores.shape == (len(rows), 0)
            self.empty += 1
            return
        for label, mean in means(pl_module, memory).items():
            np.testing.assert_allclose(scores[:, label], -((rows - mean) ** 2).sum(axis=1), rtol=0, atol=2e-6)
        self.full += 1


def test_an_evaluation_inside_an_experience_has_the_means_of_that_moment(make_trainer: Make) -> None:
    nmc = NMC(memory="replay")
    looks = Looks(nmc)
    logged: list[Any] = []

    class Logged(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            logged.append(trainer.callback_metrics.get("nmc/accuracy"))

    fitted(make_trainer, [nmc, looks, Logged()], {"eval_batch_size": 512}, **OFTEN)
    assert looks.empty >= 1  # the sanity check, before the first batch
    assert looks.full >= 15
    assert logged[0] is None
    assert logged[1] is not None  # the first batch is learned, though no experience is over


def test_nothing_is_known_before_the_first_batch(make_trainer: Make) -> None:
    evaluation = StreamEvaluation(table=False, files=False)
    fitted(make_trainer, [evaluation, NMC(memory="replay")], {"evaluate": "all"}, **{**NEVER, "limit_val_batches": 1.0})
    assert evaluation.results["nmc"]["forward_transfer"] is None
    assert evaluation.results["module"]["forward_transfer"] is not None
    assert len(evaluation.results["nmc"]["accuracy_seen"]) == 3


def test_the_state_is_that_of_any_head(make_trainer: Make, tmp_path: Path) -> None:
    nmc = NMC(memory="replay")
    trainer, module, memory = fitted(make_trainer, [nmc])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]["NMC(nmc)"]
    for other in (NMC(memory="replay"), NMC()):
        plain = make_trainer(callbacks=[other])  # no memory is needed to evaluate
        plain.validate(Net(), datamodule=stream(), ckpt_path=str(tmp_path / "run.ckpt"), verbose=False)
        assert_means(other.head, means(module, memory))
        assert changed(dict(other.stream_state()["head"]), dict(saved["head"])) == []


# ---- with the library's own replay


class Images(Net):
    """The same network for images, which counts its forward calls by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, int]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.append((self.training, len(inputs)))
        return super().forward(inputs.flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("the strategy computes the loss")


def replayed(
    make_trainer: Make, order: list[int], kind: Make, **options: Any
) -> tuple[list[Any], Images, ReplayStrategy]:
    pl.seed_everything(3, verbose=False)
    strategy, module = kind(CAPACITY), Images()
    parts: list[Any] = [NMC(memory="replay"), AEFOCL(), StreamEvaluation(table=False, files=False)]
    callbacks = [parts[position] for position in order]
    trainer = make_trainer(strategy=strategy, callbacks=callbacks, **{"num_sanity_val_steps": 0, **options})
    scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=3)
    trainer.fit(module, datamodule=StreamDataModule("digits", scenario, batch_size=32))
    return parts, module, strategy


ROT4 = partial(OnProStrategy, losses=OnProLosses(rotation="rot4"))


@pytest.mark.parametrize("kind", [ROT4, SCRStrategy], ids=["onpro", "scr"])
def test_it_reads_the_memory_of_a_strategy_in_any_order_of_callbacks(make_trainer: Make, kind: Make) -> None:
    found = []
    for order in ([0, 1, 2], [2, 1, 0]):
        (nmc, analytic, evaluation), module, strategy = replayed(make_trainer, order, kind)
        memory = strategy.memory
        assert memory is not None
        rows = features(module, memory.data.flatten(1))
        labels = memory.label.numpy()
        assert_means(nmc.head, {c: rows[labels == c].mean(axis=0) for c in range(10)})
        states = {"nmc": nmc.state_dict()["head"], "aef_ocl": analytic.state_dict()["head"]}
        found.append({"states": states, "results": evaluation.results, "weights": dict(module.state_dict())})
    assert changed(*found) == []
    assert found[0]["results"]["nmc"]["accuracy_seen"][-1] > 0.5  # ten classes


def test_its_passes_are_apart_from_the_one_call_of_a_step(make_trainer: Make) -> None:
    (_, analytic, _), module, strategy = replayed(make_trainer, [0, 1, 2], ROT4, limit_val_batches=0)
    assert analytic.head.statistics.samples == 899
    steps = strategy._counters.step
    assert sum(training for training, _ in module.calls) == steps
    heads = [size for training, size in module.calls if not training]
    # AEF-OCL pays one a batch for eval-mode features, NMC two a boundary
    assert len(heads) == steps + 6
    assert sorted(heads)[-3:] == [256] * 3
    assert heads.count(CAPACITY - 256) == 3


@pytest.mark.parametrize("step", [5, 12])  # in the first experience, and in the second of which the first has means
def test_a_resumed_run_ends_with_the_same_bits(make_trainer: Make, tmp_path: Path, step: int) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    ends = []
    for path in (None, str(tmp_path / "run.ckpt")):
        pl.seed_everything(3, verbose=False)
        strategy, nmc = SCRStrategy(CAPACITY), NMC(memory="replay")
        evaluation = StreamEvaluation(table=False, files=False)
        callbacks: list[Any] = [nmc, evaluation] if path else [nmc, evaluation, Save()]
        trainer = make_trainer(strategy=strategy, callbacks=callbacks, val_check_interval=2)
        scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=3)
        trainer.fit(Images(), datamodule=StreamDataModule("digits", scenario, batch_size=32), ckpt_path=path)
        ends.append({"nmc": nmc.state_dict()["head"], "results": evaluation.results})
    assert changed(*ends) == []


# ---- mistakes


@pytest.mark.parametrize("make", [LearningStrategy, lambda: Remembering(None), lambda: Remembering([])])
def test_a_strategy_without_a_memory_is_refused_before_training(make_trainer: Make, make: Callable[[], Any]) -> None:
    strategy = make()
    trainer = make_trainer(strategy=strategy, callbacks=[NMC(memory="replay")], **NEVER)
    wanted = rf"NMC\(nmc\) with memory='replay'.* {type(strategy).__name__} has none; use a strategy"
    with pytest.raises(ConfigurationError, match=wanted):
        trainer.fit(Net(), datamodule=stream())
    assert trainer.global_step == 0


def test_arguments_that_would_say_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match="memory must be 'replay' or None, got 'stream'"):
        NMC(memory="stream")
    with pytest.raises(ArgumentError, match="forward='eval'"):
        NMC(memory="replay", forward="eval")
    with pytest.raises(ArgumentError, match="reset_each_task=True"):
        NMC(memory="replay", reset_each_task=True)


# ---- two processes


def scenario(name: str, folder: Path) -> dict[str, Any]:
    """One of two ranks: each learns half of every batch and remembers all."""
    options = {"never": NEVER, "often": {**OFTEN, "val_check_interval": 3}}[name]
    torch.manual_seed(0)
    memory, module = ReservoirBuffer(CAPACITY, seed=1), Net()
    nmc, evaluation = NMC(memory="replay"), StreamEvaluation(table=False, files=False)
    more = {"strategy": Remembering(memory), "callbacks": [nmc, evaluation], "precision": "64-true", **options}
    trainer = quiet_trainer(folder, devices=2, **more)
    trainer.fit(module, datamodule=stream(batch_size=32))
    expected = means(module, memory)
    found = dict(zip(nmc.head.classes.tolist(), nmc.head.statistics.means.numpy(), strict=True))
    return {
        "same classes": found.keys() == expected.keys(),
        "error": max(float(np.abs(found[c] - expected[c]).max()) for c in expected),
        "counts": [nmc.head.counts.tolist(), list(memory.class_counts().values())],
        "saved": dict(nmc.state_dict()["head"]),
        "stages": len(evaluation.results["nmc"]["accuracy_seen"]) if evaluation.results else 0,
        "seen": memory.n_seen,
    }


@pytest.mark.slow
def test_two_processes_know_each_row_once_and_the_same(tmp_path: Path) -> None:
    ends = driven(__file__, tmp_path, ("never", "often"))
    for name, stages in (("never", 0), ("often", 3)):
        first, second = ends[name]
        assert changed(first["saved"], second["saved"]) == []
        for end in (first, second):
            assert end["same classes"]
            assert end["counts"][0] == end["counts"][1]
            assert sum(end["counts"][0]) == CAPACITY
            assert end["seen"] == 899
            assert end["stages"] == stages
        assert first["error"] < 1e-12  # rank 1 sends its network's buffers nowhere, so only rank 0's are of use


if __name__ == "__main__":
    sys.exit(drive(scenario))
