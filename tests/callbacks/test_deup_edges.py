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


# ---- what must not be said


@pytest.mark.filterwarnings("ignore:.*batch size")
def test_samples_of_a_class_that_nobody_knows_do_not_widen_the_sets(tmp_path: Path) -> None:
    """Each class comes once, in one batch: no set could have held it, and sets of all classes would be no help."""
    deup = DEUP(coverage=0.8, adaptive=0.1)
    one_each = [batches([label] * 20, seed=label) for label in range(4)]
    trainer = quiet_trainer(tmp_path, callbacks=[NMC(), deup], strategy="gradient_free", max_epochs=1)
    for fits, train in enumerate(one_each, start=1):
        trainer.fit_loop.max_epochs = fits
        trainer.fit(Lit(), train)
    sets = deup.error_predictor("nmc").sets
    assert sets is not None
    assert sets.alpha == pytest.approx(0.2, abs=1e-12)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(Lit(), one_each[0])  # of a class that is known by now
    assert abs(sets.alpha - 0.2) > 0.05


@pytest.mark.filterwarnings("ignore:.*(batch size|is left out|no prediction sets for)")
def test_another_head_beside_what_was_learned_is_told_apart(tmp_path: Path) -> None:
    """It lacks columns for classes that came before it, and sets of the first head hold for nothing."""
    deup = DEUP(coverage=0.8)
    fit(tmp_path, batches(*([0, 1, 2, 3] * 5 for _ in range(4))), NMC(), deup)
    first = deup.error_predictor("nmc").sets
    assert first is not None
    assert first.samples == 80
    with pytest.warns(UserWarning, match="it has learned 40 rows where 120 came: others"):
        fit(tmp_path, batches(*([0, 1] * 5 for _ in range(4))), NMC(), deup, val=batches([0, 1]))
    watched = deup.error_predictor("nmc")
    assert watched.sources == ("prequential", "novel")
    assert watched.sets is not None
    assert not watched.sets.samples
    assert "set_size" not in deup.reports["nmc"]


@pytest.mark.filterwarnings("ignore:.*(batch size|network trains, so that distances.*scores alone|trains, so what)")
def test_no_novelty_is_measured_among_features_of_different_networks(tmp_path: Path) -> None:
    deup = DEUP("module", false_alarm_rate=0.1)
    with pytest.warns(UserWarning, match="different networks: it gets no novelty"):
        trainer = fit(tmp_path, batches(*([0, 1] * 5 for _ in range(8))), deup, strategy="auto")
    trainer.predict(trainer.lightning_module, batches([0, 1]))
    assert {"novelty", "is_new"}.isdisjoint(deup.predictions[0]["module"])
    other = DEUP("module", false_alarm_rate=0.1)
    other.load_state_dict(deup.state_dict())
    quiet_trainer(tmp_path, callbacks=[other]).predict(Lit(), batches([0, 1]))
    assert {"novelty", "is_new"}.isdisjoint(other.predictions[0]["module"])


@pytest.mark.filterwarnings("ignore:.*batch size")
def test_too_few_records_for_a_rate_are_said(tmp_path: Path) -> None:
    deup = DEUP(abstain_rate=0.01)  # 99 records, of which nothing is fitted to a fifth
    with pytest.warns(UserWarning, match="too few errors of nmc are recorded yet for abstain_rate=0.01"):
        fit(tmp_path, batches(*([0, 1, 2] * 5 for _ in range(8))), NMC(), deup)
    assert deup.error_predictor("nmc").errors.is_fitted
    assert deup.error_predictor("nmc").abstains_above == float("inf")


@pytest.mark.filterwarnings("ignore:.*(batch size|could not be measured)")
def test_noise_that_is_none_is_refused_by_its_value(tmp_path: Path) -> None:
    deup = DEUP(aleatoric=lambda x: torch.full((len(x),), -0.5))
    with pytest.raises(BatchError, match=r"aleatoric must return numbers of at least 0, got -0\.5"):
        fit(tmp_path, batches([0, 1, 2]), NMC(), deup, val=batches([0, 1]))
