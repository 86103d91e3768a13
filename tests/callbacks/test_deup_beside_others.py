"""DEUP beside the other methods in one run, in mixed precision, with augmented views, and whatever a step returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import LitPlain, LitSmall, quiet_trainer
from torch import Tensor, nn

from clkit.callbacks import AEFOCL, DEUP, DST, NMC, DSimplex, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.methods import OnProLosses, PruneSchedule
from clkit.strategies import ERStrategy, OnProStrategy
from clkit.testing._compare import changed

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(samples that val_fraction keeps|backbone still trains|no forward of the step|first one, which may be)"
)


def stream(spec: str = "digits:flat", **options: Any) -> StreamDataModule:
    settings: dict[str, Any] = {"batch_size": 40, "stop_after": 2, "evaluate": "all", "val_fraction": 0.3, **options}
    return StreamDataModule(spec, ClassIncremental(experiences=5), **settings)


class Images(LitPlain):
    """One convolution on digits of 8 x 8, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def fit(folder: Path, module: Any, data: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.mark.filterwarnings(
    "ignore:.*(balance=|heads pay one|the module is left out|the backbone changed|connections move every)"
)
def test_all_methods_in_one_run_in_any_order(tmp_path: Path) -> None:
    """AEF-OCL, NMC, DST, d-Simplex and OnPro; the order of the list changes nothing."""
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [4, 2, 5, 3, 0, 1]):
        deup, evaluation = DEUP(abstain_rate=0.2), StreamEvaluation(table=False, files=False, figures=False)
        dst = DST(0.5, schedule=PruneSchedule(update_every=3), table=False)
        parts = [deup, AEFOCL(balance="none"), NMC(), dst, DSimplex(16, alignment="hoc"), evaluation]
        strategy = OnProStrategy(capacity=60, losses=OnProLosses(rotation="none"), replay_batch=20)
        fit(tmp_path, Images(), stream("digits"), *(parts[place] for place in order), strategy=strategy)
        found.append((deup.state_dict(), deup.reports))
        assert deup.reports.keys() >= {"aef_ocl", "nmc"}
        for name, report in deup.reports.items():
            assert deup.error_predictor(name).errors.is_fitted
            assert 0 <= report["mean_total"] <= 1
        assert {"nmc_total", "nmc_abstain"} <= evaluation._measured.columns.keys()
    assert not changed(*found)


@pytest.mark.filterwarnings("ignore:.*(heads pay one|views of the arriving)")
@pytest.mark.parametrize("way", ["shared", "eval"])
def test_a_step_of_augmented_views_shows_no_arriving_sample(tmp_path: Path, way: Any) -> None:
    """Nothing is recorded of them then, unless one pass more is paid; heads pay it anyway."""
    deup = DEUP(forward=way)
    strategy = ERStrategy(capacity=40, replay_batch=10)  # by default images are augmented
    fit(tmp_path, Images(), stream("digits", epochs_per_experience=1), NMC(), deup, strategy=strategy)
    module, nmc = deup.error_predictor("module"), deup.error_predictor("nmc")
    assert module.sources == nmc.sources == ("calibration", "novel")
    assert module.errors.is_fitted
    assert nmc.errors.is_fitted
    assert nmc.arrived.samples > 0
    assert (module.arrived.samples > 0) == (way == "eval")


@pytest.mark.warns("views of the arriving samples")
@pytest.mark.filterwarnings("ignore:.*network trains, so that")
def test_and_that_is_said(tmp_path: Path) -> None:
    deup = DEUP(sources=["prequential"])
    data = stream("digits", stop_after=1, val_fraction=0.0)
    fit(tmp_path, Images(), data, deup, strategy=ERStrategy(capacity=40, replay_batch=10))
    module = deup.error_predictor("module")
    assert module.records.counts == {}
    assert not module.errors.is_fitted
    assert deup.reports["module"]["mean_total"] == 1


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision(tmp_path: Path, precision: Any) -> None:
    """Features and scores of half the digits; sums, records and what is said are in float64."""
    deup = DEUP(abstain_rate=0.2, coverage=0.8, false_alarm_rate=0.1)
    parts = [AEFOCL(balance="none"), NMC(), deup]
    data = stream(val_fraction=0.0)
    trainer = fit(tmp_path, LitSmall(), data, *parts, strategy="gradient_free", precision=precision)
    for name in ("aef_ocl", "nmc"):
        watched, report = deup.error_predictor(name), deup.reports[name]
        assert watched.sources == ("loo", "novel")  # rows and sums hold the same numbers, so that each can be left out
        assert watched.records.state_dict()["phi"].dtype == torch.float64
        assert abs(report["mean_total"] - report["mean_loss"]) < 0.15
        assert report["auroc_error"] > 0.75
    module = trainer.lightning_module
    trainer.predict(module, datamodule=data)
    assert all(torch.isfinite(each["nmc"]["total"]).all() for each in deup.predictions)
    assert deup.predictions[0]["nmc"]["total"].dtype == torch.float64


@pytest.mark.filterwarnings("ignore:predict returned None if it was on purpose")
@pytest.mark.parametrize("output", ["tensor", "dict", "nothing"])
def test_predictions_are_handed_out_whatever_the_step_returns(tmp_path: Path, output: str) -> None:
    class Lit(LitSmall):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            scores = self(batch[0])
            return {"tensor": scores, "dict": {"scores": scores}, "nothing": None}[output]

    deup, module, data = DEUP(), Lit(), stream(stop_after=1, val_fraction=0.0)
    trainer = fit(tmp_path, module, data, NMC(), deup, strategy="gradient_free")
    outputs: Any = trainer.predict(module, datamodule=data)
    said = [each["uncertainty"] for each in outputs] if output == "dict" else deup.predictions
    assert (deup.predictions == []) == (output == "dict")
    assert sum(len(each["nmc"]["total"]) for each in said) == sum(len(y) for _, y in data.predict_dataloader())
    for each in said:
        assert not each["nmc"]["total"].is_inference()  # so that it may be kept anywhere
        assert each["nmc"]["prediction"].shape == each["nmc"]["epistemic"].shape
