"""Two processes learn what one learns: every sample once, the same bits on both ranks, checkpoints that fit both.

Run as a program, ``test_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from two_ranks import Ranks, Scenarios, drive

from clkit.callbacks import AEFOCL, LDA, NMC, Lift, StreamEvaluation
from clkit.data import ClassIncremental, Custom, Joint, StreamDataModule
from clkit.errors import ClkitError, StateError
from clkit.strategies import GradientFreeStrategy
from clkit.testing._compare import changed

COUNTS = [5, 4, 4, 4, 3, 5, 4, 4, 3, 5]  # 41 samples of 10 classes, in five experiences of 9, 8, 8, 8 and 8
STEPS = 11  # of each of two ranks with at most two samples a batch: 3, 2, 2, 2, 2
TEST = [3] * 10


def part(counts: list[int], seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    centres = torch.randn(10, 6, generator=torch.Generator().manual_seed(7))
    return TensorDataset(centres[targets] + 0.7 * torch.randn(len(targets), 6, generator=generator), targets)


def stream(**options: Any) -> StreamDataModule:
    defaults = {"scenario": ClassIncremental(experiences=5), "batch_size": 2, "eval_batch_size": 4}
    return StreamDataModule(
        Custom(part(COUNTS, 0), part(TEST, 1)), preprocessing=torch.as_tensor, **{**defaults, **options}
    )


class Net(pl.LightningModule):
    """Trains by gradient in float64, so that features of other batch sizes differ in the last digits only."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()) if norm else nn.Identity()
        self.classify = nn.Linear(8 if norm else 6, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.body(inputs))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def learners(**options: Any) -> list[Any]:
    return [
        AEFOCL(balance="none", **options),
        AEFOCL(name="pfg"),
        AEFOCL(0.1, Lift(12), balance="reweight", name="lift"),
        NMC(),
        LDA(),
    ]


def run(
    devices: int,
    folder: Path,
    strategy: Any = "gradient_free",
    *,
    norm: bool = False,
    data: dict[str, Any] | None = None,
    heads: Callable[[], list[Any]] = learners,
    save: str | None = None,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One fit, and everything that may be asked of it."""
    torch.manual_seed(0)
    module, learned = Net(norm), heads()
    evaluation = StreamEvaluation(table=False, files=False)
    callbacks: list[Any] = [*learned, evaluation]
    if save is not None:
        name = str(folder / save)
        callbacks.append(ModelCheckpoint(name, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    if strategy in ("warm", "lora"):
        strategy = GradientFreeStrategy(2, "all" if strategy == "warm" else "lora", lora_rank=2)
    options = {"devices": devices, "strategy": strategy, "precision": "64-true", **options}
    trainer = quiet_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(module, datamodule=stream(**(data or {})), ckpt_path=None if resume is None else str(resume))
    before = [callback.head.counts.tolist() for callback in learned]
    for _ in range(2):  # merging again adds nothing
        for callback in learned:
            callback.head.synchronize()
    (again,) = trainer.validate(module, datamodule=stream(**(data or {})), verbose=False)
    return {
        "counts": {callback.name: callback.head.counts.tolist() for callback in learned},
        "merged once": before == [callback.head.counts.tolist() for callback in learned],
        "readouts": {callback.name: list(callback.head.linear_readout()) for callback in learned},
        "states": {callback.name: dict(callback.head.state_dict()) for callback in learned},
        "results": evaluation.results,
        "totals": {
            callback.name: {str(label): list(n) for label, n in evaluation.class_counts(callback.name).items()}
            for callback in learned
        },
        "validated": {key: float(value) for key, value in again.items()},
        "module": {name: value.clone() for name, value in module.state_dict().items()},
        "gives gradients back": all(parameter.requires_grad for parameter in module.parameters()),
        "steps": trainer.fit_loop.epoch_loop.batch_progress.total.processed,
    }


def graft_in_place() -> list[Any]:
    return [AEFOCL(balance="none", graft="experience_end")]


def graft_by_replacing() -> list[Any]:
    return [NMC(graft="experience_end")]


def scenario(name: str, folder: Path) -> dict[str, Any]:
    """What the ranks do under a name; the folder holds what one process saved before."""
    by_replacing: dict[str, Any] = {"norm": True, "data": {"batch_size": 4}, "heads": graft_by_replacing}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "free": lambda: run(2, folder, val_check_interval=1),
        "joint": lambda: run(2, folder, data={"scenario": Joint()}),
        "ddp": lambda: run(2, folder, "ddp", val_check_interval=1, num_sanity_val_steps=-1),
        "ddp unwatched": lambda: run(2, folder, "ddp", val_check_interval=1.0, num_sanity_val_steps=0),
        "ddp norm": lambda: run(2, folder, "ddp", norm=True, data={"batch_size": 4}),
        # a validation would be a forward of DDP, which happens to send buffers from rank 0 to the others
        "warm": lambda: run(2, folder, "warm", norm=True, data={"batch_size": 4}, check_val_every_n_epoch=1000),
        "lora": lambda: run(2, folder, "lora", norm=True, data={"batch_size": 4}),
        "saved": lambda: run(2, folder, save="two"),
        "resumed inside": lambda: run(2, folder, save="again", resume=folder / "two/step=4.ckpt"),
        "from one": lambda: run(2, folder, resume=folder / "one/step=5.ckpt"),
        "one inside": lambda: run(2, folder, resume=folder / "one/step=7.ckpt"),
        "batch size": lambda: run(2, folder, data={"batch_size": 3}, resume=folder / "two/step=4.ckpt"),
        "graft in place": lambda: run(2, folder, "ddp", heads=graft_in_place),
        "graft by replacing": lambda: run(2, folder, "ddp", **by_replacing),
        "graft and unused parameters": lambda: run(2, folder, "ddp_find_unused_parameters_true", **by_replacing),
    }
    try:
        return runs[name]()
    except ClkitError as error:
        return {"error": f"{type(error).__name__}: {error}"}


# ---- what the ranks ended with, against one process

QUICK = (
    "free",
    "warm",
    "lora",
    "one inside",
    "graft by replacing",
)  # one start of the driver, within the ordinary suite
SLOW = (
    "joint",
    "ddp",
    "ddp unwatched",
    "ddp norm",
    "saved",
    "resumed inside",
    "from one",
    "batch size",
    "graft in place",
    "graft and unused parameters",
)


scenarios = Scenarios(__file__, QUICK, SLOW)
names = scenarios.names
complete = names("free", "warm", "lora", *(name for name in SLOW if name != "batch size"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """One process over the same stream, which saved after every step."""
    return run(1, folder, save="one")


@pytest.fixture(scope="module")
def ranks(folder: Path, one: dict[str, Any]) -> Ranks:
    return scenarios.run_in(folder)


def features() -> tuple[Tensor, Tensor]:
    x, y = part(COUNTS, 0).tensors
    return x.double(), y


def assert_close(first: list[Tensor], second: list[Tensor]) -> None:
    for mine, theirs in zip(first, second, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-10 * max(1.0, float(theirs.abs().max()))


@complete
def test_every_sample_is_learned_and_evaluated_once(ranks: Ranks, name: str) -> None:
    for rank in ranks(name):
        assert set(map(tuple, rank["counts"].values())) == {tuple(COUNTS)}
        for counts in rank["totals"].values():
            assert {int(label): total for label, (_, total) in counts.items()} == dict.fromkeys(range(10), 3)
        assert rank["merged once"]
    if name == "free":
        assert ranks(name)[0]["steps"] == STEPS


@complete
def test_both_ranks_end_with_the_same_bits(ranks: Ranks, name: str) -> None:
    first, second = ranks(name)
    assert first["results"] == second["results"]
    assert first["validated"] == second["validated"]
    assert changed(first["states"], second["states"]) == []
    assert changed(first["readouts"], second["readouts"]) == []
    assert changed(first["module"], second["module"]) == []


@names("free", "joint", "ddp", "saved", "resumed inside", "from one", "graft in place")
def test_the_ridge_weights_are_those_of_numpy_over_all_samples(ranks: Ranks, name: str) -> None:
    x, y = (tensor.numpy() for tensor in features())
    wanted = np.linalg.solve(x.T @ x + np.eye(6), x.T @ np.eye(10)[y])
    weight, _ = ranks(name)[0]["readouts"]["aef_ocl"]
    assert np.abs(weight.numpy() - wanted.T).max() <= 1e-10


@names("free", "ddp", "ddp unwatched", "saved", "resumed inside", "from one")
def test_every_head_and_every_row_equal_one_process(ranks: Ranks, one: dict[str, Any], name: str) -> None:
    for rank in ranks(name):
        for head, readout in one["readouts"].items():
            assert_close(rank["readouts"][head], readout)
            assert rank["results"][head] == one["results"][head]
            assert rank["validated"][f"{head}/accuracy"] == one["validated"][f"{head}/accuracy"]


def test_after_a_warm_up_all_heads_learn_from_one_network(ranks: Ranks) -> None:
    """Batch statistics differ between the ranks when a warm-up ends; sums over two networks would be of neither."""
    module = Net(norm=True).double()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(ranks("warm")[0]["module"])
    module.eval()
    assert not torch.equal(module.body[1].running_mean, start["body.1.running_mean"])
    x, y = features()
    with torch.no_grad():
        rows = module.body(x)
    for callback in learners():
        head = callback.make_head(8)
        with (
            pytest.warns(UserWarning, match="feature vectors of a batch are zero")
            if callback.name == "nmc"
            else nullcontext()
        ):
            head.update(rows, y)
        assert_close(ranks("warm")[0]["readouts"][callback.name], list(head.linear_readout()))
    assert all(rank["gives gradients back"] for rank in ranks("warm"))


def test_a_part_of_the_network_warms_up_alike_on_all_ranks(ranks: Ranks) -> None:
    torch.manual_seed(0)
    start, ends = Net(norm=True).double().state_dict(), [rank["module"] for rank in ranks("lora")]
    assert list(ends[0]) == list(start)
    assert changed(ends[0], ends[1]) == []
    moved = {name for name in start if not torch.equal(start[name], ends[0][name])}
    assert moved == {"body.0.weight", "classify.weight", "classify.bias"}
    assert torch.linalg.matrix_rank(ends[0]["body.0.weight"] - start["body.0.weight"], rtol=1e-12) == 2
    assert all(rank["gives gradients back"] for rank in ranks("lora"))


@pytest.mark.slow
def test_evaluating_after_every_batch_changes_no_bit(ranks: Ranks) -> None:
    for watched, unwatched in zip(ranks("ddp"), ranks("ddp unwatched"), strict=True):
        assert changed(watched["states"], unwatched["states"]) == []
        assert changed(watched["module"], unwatched["module"]) == []


@pytest.mark.slow
def test_a_resume_inside_an_experience_ends_with_the_same_bits(ranks: Ranks) -> None:
    for resumed, whole in zip(ranks("resumed inside"), ranks("saved"), strict=True):
        assert changed(resumed["states"], whole["states"]) == []
        assert resumed["results"] == whole["results"]


@pytest.mark.slow
def test_one_process_goes_on_from_two_at_a_boundary_and_not_inside(
    ranks: Ranks, one: dict[str, Any], folder: Path
) -> None:
    assert ranks("saved")
    alone = run(1, folder, resume=folder / "two/step=3.ckpt")
    assert alone["counts"] == one["counts"]
    assert alone["results"] == one["results"]
    for head, readout in one["readouts"].items():
        assert_close(alone["readouts"][head], readout)
    with pytest.raises(StateError, match="inside an experience with world_size=2, this run has world_size=1"):
        run(1, folder, resume=folder / "two/step=4.ckpt")


@names("one inside", "batch size")
def test_what_the_order_depends_on_is_refused_on_both_ranks(ranks: Ranks, name: str) -> None:
    setting = {
        "one inside": "world_size=1, this run has world_size=2",
        "batch size": "batch_size=2, this run has batch_size=3",
    }
    for rank in ranks(name):
        assert rank["error"].startswith("StateError: ")
        assert f"inside an experience with {setting[name]}" in rank["error"]


def test_a_graft_for_which_ddp_would_wait_is_refused_before_training(ranks: Ranks) -> None:
    for rank in ranks("graft by replacing"):
        assert rank["error"].startswith("ConfigurationError: NMC(nmc) with graft='experience_end'")
        assert "ddp_find_unused_parameters_true" in rank["error"]


if __name__ == "__main__":
    sys.exit(drive(scenario))
