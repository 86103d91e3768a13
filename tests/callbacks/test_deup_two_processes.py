"""DEUP in two processes: the memory, the records and the forest that one process makes of the same samples.

Run as a program, ``test_deup_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from two_ranks import Ranks, Scenarios, drive

from clkit.callbacks import AEFOCL, DEUP, NMC, Records
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.testing._compare import changed

pytestmark = pytest.mark.filterwarnings("ignore:.*samples that val_fraction keeps")
HEADS = ("aef_ocl", "nmc")
scenarios = Scenarios(__file__, quick=(), slow=("left_out", "gaussian", "kept_out"))


class Net(pl.LightningModule):
    """In float64, so that sums over two halves of a batch differ from those over all in the last digits only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 6)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs.double()).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> None:
        return None


def data(batch_size: int, **options: Any) -> StreamDataModule:
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(6).repeat_interleave(30)
    inputs = 1.2 * torch.randn(6, 8, generator=draw).double()[targets] + torch.randn(180, 8, generator=draw).double()
    part = TensorDataset(inputs, targets)
    settings: dict[str, Any] = {"preprocessing": torch.as_tensor, "evaluate": "all", **options}
    return StreamDataModule(Custom(part, part), ClassIncremental(experiences=3), batch_size=batch_size, **settings)


def run(name: str, folder: Path, world: int = 1) -> dict[str, Any]:
    options: dict[str, Any] = {"records": Records(memory_size=60), "false_alarm_rate": 0.1, "coverage": 0.8}
    if name == "gaussian":
        options = {"records": Records(memory="gaussian")}
    stream = data(8 // world, **({"val_fraction": 0.4} if name == "kept_out" else {}))
    if name == "kept_out":
        options = {"sources": ["calibration", "novel"], "records": Records(memory_size=60), "coverage": 0.8}
    deup = DEUP(abstain_rate=0.2, **options)
    trainer = quiet_trainer(
        folder, devices=world, strategy="gradient_free", callbacks=[AEFOCL(balance="none"), NMC(), deup]
    )
    trainer.fit(Net(), datamodule=stream)
    state = deup.state_dict()
    found: dict[str, Any] = {"reports": deup.reports, "layers": state["layers"], "watched": state["watched"]}
    own = state["processes"][-1]["watched"]
    watched = [deup.error_predictor(each) for each in HEADS]
    probe = torch.linspace(-3, 3, 40, dtype=torch.float64)[:, None].expand(-1, len(watched[0].names))
    return {
        **found,
        "sets": {each: own[each]["sets"] for each in HEADS},
        "fitted": [each.errors.is_fitted for each in watched],
        "totals": [each.errors.predict(probe.contiguous()) for each in watched],
        "thresholds": [each.abstain_above for each in watched],
    }


def scenario(name: str, folder: Path) -> dict[str, Any]:
    return run(name, folder, world=2)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return scenarios.run_in(tmp_path_factory.mktemp("two"))


@scenarios.names("left_out", "gaussian", "kept_out")
def test_two_processes_learn_the_errors_that_one_learns(ranks: Ranks, tmp_path: Path, name: str) -> None:
    first, second = ranks(name)
    one = run(name, tmp_path)
    assert not changed(first, second)  # the same bits on both
    assert one["fitted"] == first["fitted"] == [True, True]
    for head in HEADS:
        mine, theirs = (each["watched"][head]["records"] for each in (one, first))
        for key in ("ids", "strata", "error", "label", "experience"):
            assert torch.equal(mine[key], theirs[key])
        torch.testing.assert_close(mine["phi"], theirs["phi"], rtol=1e-7, atol=1e-7)
        forest, other = (each["watched"][head]["errors"]["model"] for each in (one, first))
        for key in ("roots", "feature", "children"):
            assert torch.equal(forest[key], other[key])
        for key in ("threshold", "value"):
            torch.testing.assert_close(forest[key], other[key], rtol=1e-5, atol=1e-6)
        if one["sets"][head] is not None:
            values, others = (each["sets"][head]["values"] for each in (one, first))
            torch.testing.assert_close(values, others, rtol=1e-9, atol=1e-9)
        assert one["reports"][head] == pytest.approx(first["reports"][head], abs=1e-9)
    torch.testing.assert_close(one["totals"], first["totals"], rtol=1e-9, atol=1e-9)
    assert one["thresholds"] == pytest.approx(first["thresholds"], abs=1e-9)
    if name == "left_out":
        (mine,), (theirs,) = (list(each["layers"]["known"].values()) for each in (one, first))
        for key in ("ids", "strata", "seen"):
            assert torch.equal(mine["memory"][key], theirs["memory"][key])
        torch.testing.assert_close(mine["memory"]["features"], theirs["memory"]["features"], rtol=1e-6, atol=1e-6)
        assert torch.equal(mine["statistics"]["counts"], theirs["statistics"]["counts"])
        assert mine["alarm"] == pytest.approx(theirs["alarm"], abs=1e-9)


if __name__ == "__main__":
    sys.exit(drive(scenario))
