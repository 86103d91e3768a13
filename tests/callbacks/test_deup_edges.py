"""DEUP on what a stream may hold at worst, and mistakes of public code that it must not make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import LitSmall, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from clkit.callbacks import AEFOCL, DEUP, LDA, NMC, Records
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import BatchError
from clkit.testing._compare import changed

HEADS = ("aef_ocl", "nmc", "lda")


def batches(*labels: list[int], seed: int = 0) -> DataLoader[Any]:
    """A loader of given batches of digits-like rows, one list of labels each."""
    draw = torch.Generator().manual_seed(seed)
    rows = [
        (torch.rand(len(each), 64, generator=draw) + torch.tensor(each)[:, None] % 7, torch.tensor(each))
        for each in labels
    ]
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset, and its items are batches


class Lit(LitSmall):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0] if isinstance(batch, (list, tuple)) else batch)


def fit(folder: Path, train: Any, *callbacks: pl.Callback, val: Any = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    options = {"strategy": "gradient_free", "max_epochs": 1, **options}
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **options)
    trainer.fit(Lit(), train, val)
    return trainer


def heads() -> list[Any]:
    return [AEFOCL(balance="none"), NMC(), LDA(shrinkage=0.1)]


@pytest.mark.filterwarnings("ignore:.*(is left out|batch size|without a label)")
def test_single_rows_rows_without_a_label_and_a_class_of_one_row(tmp_path: Path) -> None:
    """Each labelled row is learned once; those of a validation, of its sanity check too, are in nothing."""
    deup = DEUP()
    train = batches([0], [0, -1, 1], [-1], *([0, 1, 2] for _ in range(20)), [3])
    fit(tmp_path, train, *heads(), deup, val=batches([0, 1, 2, 3, 9], [-1], [0]), num_sanity_val_steps=2)
    labelled = 3 + 60 + 1
    for name in HEADS:
        watched = deup.error_predictor(name)
        assert watched.sources == ("loo", "novel")
        assert watched.records.counts == {"loo": labelled, "novel": labelled}
        assert watched.arrived.samples == labelled - 1  # of the first row there was nobody to ask
        saved = watched.records.state_dict()
        (alone,) = saved["error"][(saved["label"] == 3) & (saved["strata"] == 1)].tolist()
        assert alone == 1  # without its only row a class is not known
        report = deup.reports[name]
        assert 0 <= report["mean_total"] <= 1
        assert report["auroc_future"] >= 0  # of the row of class 9, the other ones with a label being known


@pytest.mark.filterwarnings("ignore:.*(is left out|batch size)")
def test_one_class_and_equal_errors_give_that_error_everywhere(tmp_path: Path) -> None:
    deup = DEUP(abstain_rate=0.1, coverage=0.9)
    trainer = fit(tmp_path, batches(*([4] * 10 for _ in range(8))), NMC(), deup)
    watched = deup.error_predictor("nmc")
    assert watched.records.counts == {"loo": 80}  # nothing is left where the only class is left out
    assert watched.errors.is_fitted
    trainer.predict(trainer.lightning_module, batches([4, 4, 1]))
    said = deup.predictions[0]["nmc"]
    assert said["total"].tolist() == [0, 0, 0]
    assert not bool(said["abstain"].any())
    assert said["set"][:, 4].all()
    assert int(said["set"].sum()) == 3


@pytest.mark.filterwarnings("ignore:.*(network trains, so that|batch size)")
def test_before_anything_is_known_everything_may_be_wrong(tmp_path: Path) -> None:
    """Of the module, which can be asked before it was trained; inputs to predict have no labels."""
    deup = DEUP("module", abstain_rate=0.1)
    module = Lit()
    trainer = quiet_trainer(tmp_path, callbacks=[deup], max_epochs=1)
    trainer.predict(module, DataLoader(torch.rand(5, 64), batch_size=3))
    total = torch.cat([each["module"]["total"] for each in deup.predictions])
    assert total.tolist() == [1.0] * 5
    assert torch.cat([each["module"]["epistemic"] for each in deup.predictions]).tolist() == [1.0] * 5
    assert not deup.error_predictor("module").errors.is_fitted


@pytest.mark.filterwarnings("ignore:.*(is left out|batch size)")
def test_a_batch_that_is_not_finite_is_refused_and_recorded_nowhere(tmp_path: Path) -> None:
    deup, good = DEUP(records=Records(refresh=1)), batches([0, 1, 2], [0, 1, 2])
    bad = [*good.dataset, (torch.full((2, 64), torch.inf), torch.tensor([0, 1]))]  # type: ignore[misc]  # as above
    with pytest.raises(BatchError, match="not finite"):
        fit(tmp_path, DataLoader(bad, batch_size=None), deup, NMC())  # type: ignore[arg-type]  # as above
    (known,) = deup._watching.layers._known.values()
    assert known.rows_seen == 6
    assert deup.error_predictor("nmc").arrived.samples == 3  # of the first batch there was nobody to ask


class Noisy:
    """A random transform of training samples."""

    def __call__(self, sample: Tensor) -> Tensor:
        return sample + torch.randn(64)


def stream(**options: Any) -> StreamDataModule:
    settings: dict[str, Any] = {"batch_size": 40, "stop_after": 1, "val_fraction": 0.3, **options}
    return StreamDataModule("digits:flat", ClassIncremental(experiences=5), **settings)


@pytest.mark.filterwarnings("ignore:.*(samples that val_fraction keeps|backbone still trains|heads pay one)")
def test_collecting_errors_moves_no_statistics_of_the_network_and_augments_nothing(tmp_path: Path) -> None:
    """Weights and running statistics are those of a run without; samples kept out are read as they are."""
    found, deup = [], DEUP()
    for watching in ([], [deup]):
        torch.manual_seed(0)
        module = LitSmall(norm=True, dropout=0.2)
        data = stream(train_transform=Noisy())
        quiet_trainer(tmp_path, callbacks=[LDA(forward="shared"), *watching]).fit(module, datamodule=data)
        found.append({name: value.clone() for name, value in module.state_dict().items()})
    assert not changed(*found)
    known = deup._watching.layers._reread["module"]
    assert known.memory is not None
    plain, net = stream(), module.eval().net
    plain.setup("fit")
    inputs = plain.training_inputs(known.memory.ids.numpy())
    with torch.no_grad():
        expected = torch.relu(net.norm(net.hidden(inputs)))
    torch.testing.assert_close(known.memory.features, expected, rtol=1e-5, atol=1e-5)
