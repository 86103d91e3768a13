"""DEUP in real runs: which errors it records and of whom, what it says, how a run goes on, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from small_runs import LitSmall, quiet_trainer
from torch.utils.data import TensorDataset

from clkit import FeatureTap
from clkit.callbacks import AEFOCL, DEUP, LDA, NMC, Lift, Records, StreamEvaluation
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError
from clkit.methods import NearestMeanHead
from clkit.strategies import ERStrategy
from clkit.testing._compare import changed

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(samples that val_fraction keeps|network trains, so that|backbone still trains|no prediction sets for)"
)
BY_ARRIVAL = Records(refresh=1, novelty=0.0)


def stream(**options: Any) -> StreamDataModule:
    settings: dict[str, Any] = {"batch_size": 40, "stop_after": 3, "evaluate": "all", **options}
    return StreamDataModule("digits:flat", ClassIncremental(experiences=5), **settings)


class Saver(pl.Callback):
    """Saves after one of the batches, in the middle of the second experience."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == 7:
            trainer.save_checkpoint(self.path)


def only(deup: DEUP) -> Any:
    """What was learned at the only layer that is read."""
    (known,) = deup._watching.layers._known.values()
    return known


def fit(folder: Path, *callbacks: pl.Callback, module: Any = None, data: Any = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    module = LitSmall() if module is None else module
    path = options.pop("ckpt_path", None)
    options.setdefault("strategy", "gradient_free")
    trainer = quiet_trainer(folder, callbacks=list(callbacks), max_epochs=-1, **options)
    trainer.fit(module, datamodule=data or stream(), ckpt_path=path)
    return trainer


# ---- which errors


def test_errors_on_arriving_batches_are_those_of_a_loop_that_predicts_and_then_learns(tmp_path: Path) -> None:
    """In any order of the list; the last experience is compared, to the last sample."""
    module, data = LitSmall(), stream()
    states = []
    for order in ([0, 1], [1, 0]):
        deup = DEUP(sources=["prequential"], features=["confidence", "margin"], records=BY_ARRIVAL)
        parts = [NMC("cosine"), deup]
        fit(tmp_path, *(parts[place] for place in order), module=module, data=data)
        states.append(deup.state_dict())
    assert not changed(*states)

    head, tap = NearestMeanHead(16, metric="cosine"), FeatureTap(module)
    wrong, total = 0, 0
    for epoch in range(3):
        data.trainer.fit_loop.epoch_progress.current.processed = epoch
        for rows in data._batches_of(data.experiences[epoch], epoch):
            x, y = data._workers_of("train").fetcher[epoch, rows]
            features = tap.extract(x).double()
            if epoch == 2:
                wrong += int((head.predict(features) != y).sum())
                total += len(y)
            head.update(features, y)
    tap.close()
    arrived = deup.error_predictor("nmc").arrived
    assert (arrived.wrong, arrived.samples) == (wrong, total)


@pytest.mark.parametrize(
    "make", [NMC, LDA, lambda: AEFOCL(lift=Lift(40), balance="none")], ids=["nmc", "lda", "aef_ocl"]
)
def test_errors_of_left_out_rows_are_those_of_heads_learned_without_them(tmp_path: Path, make: Any) -> None:
    callback, deup = make(), DEUP(records=Records(memory_size=60))
    fit(tmp_path, callback, deup)
    watched = deup.error_predictor(callback.name)
    assert watched.sources == ("loo", "novel")
    assert watched.records.counts == {"loo": 60, "novel": 60}
    known = only(deup)
    saved = watched.records.state_dict()
    errors = dict(zip(saved["ids"][saved["strata"] == 1].tolist(), saved["error"][saved["strata"] == 1], strict=True))
    for place in (0, 17, 42):
        row, label = known.memory.features[place : place + 1].double(), known.memory.labels[place : place + 1]
        other = callback.make_head(row.shape[1])
        other.load_state_dict(callback.head.state_dict())
        other.subtract(row, label)
        assert errors[int(known.memory.ids[place])] == float(other.predict(row) != label)


def relabelled(poison: int | None) -> StreamDataModule:
    """Two Gaussians a class, in four classes; of one sample the label may be another of its experience."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(4).repeat_interleave(40)
    images = torch.randn(160, 64, generator=draw) + 6 * torch.nn.functional.one_hot(targets, 64)
    if poison is not None:
        targets = targets.clone()
        targets[poison] = targets[poison] ^ 1
    parts = TensorDataset(images, targets), TensorDataset(images[::4], targets[::4])
    return StreamDataModule(Custom(*parts), ClassIncremental(experiences=2), batch_size=16, preprocessing=lambda x: x)


@pytest.mark.parametrize("source", ["loo", "prequential"])
def test_no_record_knows_its_own_label(tmp_path: Path, source: Any) -> None:
    saved: list[dict[str, Any]] = []
    poison = None
    for _ in range(2):
        deup = DEUP(sources=[source], records=Records(refresh=1))
        fit(tmp_path, NMC(), deup, data=relabelled(poison))
        saved.append(deup.error_predictor("nmc").records.state_dict())
        if poison is None:  # one whose label was told right
            poison = int(saved[0]["ids"][saved[0]["error"] == 0][0])
    (phi, error), (other, wrong) = ((each["phi"], each["error"]) for each in saved)
    at, there = (int((each["ids"] == poison).nonzero()[0]) for each in saved)
    torch.testing.assert_close(phi[at], other[there], rtol=1e-3, atol=1e-3)  # the trace stays as it is
    assert (error[at], wrong[there]) == (0, 1)


def test_a_network_that_trains_is_judged_by_samples_kept_out_of_training(tmp_path: Path) -> None:
    deup = DEUP(coverage=0.8)
    trainer = fit(
        tmp_path,
        NMC(),
        deup,
        strategy=ERStrategy(capacity=100, transform=torch.nn.Identity()),
        data=stream(val_fraction=0.25),
    )
    module = deup.error_predictor("module")
    assert module.sources == ("calibration", "novel")
    assert "log_maha" in module.names
    trainer.test(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
    report = deup.reports["module"]
    assert abs(report["mean_total"] - report["mean_loss"]) < 0.15
    assert report["coverage"] > 0.7


@pytest.mark.warns("the network trains, so that distances")
def test_a_network_that_trains_without_such_samples_is_judged_by_its_scores(tmp_path: Path) -> None:
    deup = DEUP()
    fit(tmp_path, deup, strategy="auto")
    module = deup.error_predictor("module")
    assert module.sources == ("prequential",)
    assert module.names == ("confidence", "margin", "entropy", "energy")
    assert module.errors.is_fitted


def test_what_is_drawn_from_sums_teaches_without_any_sample(tmp_path: Path) -> None:
    deup = DEUP(records=Records(memory="gaussian"))
    fit(tmp_path, NMC(), deup)
    watched = deup.error_predictor("nmc")
    assert watched.sources == ("gaussian", "novel")
    assert watched.errors.is_fitted
    assert only(deup).memory is None
    assert deup.reports["nmc"]["auroc_error"] > 0.8


def test_where_rows_are_not_known_the_mean_of_the_errors_is_said(tmp_path: Path) -> None:
    deup = DEUP()
    fit(tmp_path, nmc := NMC(), deup)
    watched, known = deup.error_predictor("nmc"), only(deup)
    _, error, weight = watched.records.training_set(
        dict(zip(known.statistics.classes.tolist(), known.statistics.counts.tolist(), strict=True)), novelty=0.05
    )
    features = torch.randn(3, 16)
    total = watched.judge(features, nmc.head(features), None).uncertainty.total
    expected = np.average(error.numpy(), weights=weight.numpy())
    assert total.tolist() == pytest.approx([expected] * 3, rel=1e-12)


def test_where_nothing_is_kept_or_drawn_arriving_batches_teach(tmp_path: Path) -> None:
    deup = DEUP(records=Records(memory="none"))
    fit(tmp_path, NMC(), deup)
    watched = deup.error_predictor("nmc")
    assert watched.sources == ("prequential",)
    assert watched.errors.is_fitted
    assert only(deup).memory is None
    assert deup.reports["nmc"]["auroc_error"] > 0.75


@pytest.mark.warns("has no exact scores of its rows")
def test_a_head_that_learned_other_rows_is_judged_by_arriving_batches(tmp_path: Path) -> None:
    nmc = NMC()
    fit(tmp_path, nmc, data=stream(stop_after=1))
    deup = DEUP()
    with pytest.warns(UserWarning, match="has learned before"):
        fit(tmp_path, nmc, deup)
    assert deup.error_predictor("nmc").sources == ("prequential", "novel")


class Dropping(LitSmall):
    """Frozen, but for the classifier, and with dropout before the features that heads read."""

    def __init__(self) -> None:
        super().__init__()
        head = self.net.head
        for parameter in self.net.parameters():
            parameter.requires_grad_(parameter is head.weight or parameter is head.bias)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: Any) -> Any:
        return self.net(self.drop(x))


@pytest.mark.filterwarnings("ignore:.*(eval-mode forward|no exact scores)")
def test_rows_are_those_that_the_head_learned_beside_a_module_in_training_mode(tmp_path: Path) -> None:
    nmc, deup, module = NMC(forward="eval"), DEUP(), Dropping()
    fit(tmp_path, nmc, deup, module=module, strategy="auto", data=stream(stop_after=2))
    watched, known = deup.error_predictor("nmc"), only(deup)
    assert watched.sources == ("loo", "novel")
    own = torch.nn.functional.normalize(known.memory.features.double())
    labels, means = known.memory.labels, nmc.head.means
    classes = nmc.head.classes
    for label in labels.unique().tolist():  # all rows are kept, so their mean is that of the head
        if int((labels == label).sum()) == int(nmc.head.counts[classes == label]):
            torch.testing.assert_close(own[labels == label].mean(0), means[classes == label][0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*no exact scores")
def test_errors_of_the_module_in_evaluation_mode_are_recorded_where_they_are_asked_for(tmp_path: Path) -> None:
    module = Dropping()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.net.head.bias.requires_grad_(True)
    found = []
    for way in ("shared", "eval"):
        deup = DEUP("module", sources=["prequential"], features=["confidence"], forward=way)
        fit(tmp_path, deup, module=module, strategy="auto", data=stream(stop_after=1), gradient_clip_val=1e-12)
        saved = deup.error_predictor("module").records.state_dict()
        found.append(dict(zip(saved["ids"].tolist(), saved["phi"][:, 0].tolist(), strict=True)))
    with torch.no_grad():
        inputs = stream_inputs(list(found[0]))
        expected = 1 - module.eval()(inputs).double().softmax(1).amax(1)
    by_eval = torch.tensor([found[1][row] for row in found[0]], dtype=torch.float64)
    by_step = torch.tensor([found[0][row] for row in found[0]], dtype=torch.float64)
    torch.testing.assert_close(by_eval, expected, rtol=1e-4, atol=1e-4)
    assert float((by_step - expected).abs().max()) > 0.01


def stream_inputs(rows: list[int]) -> Any:
    data = stream()
    data.setup("fit")
    return data.training_inputs(np.array(rows))


def test_an_evaluation_elsewhere_judges_by_what_was_learned(tmp_path: Path) -> None:
    deup, path = DEUP(), tmp_path / "end.ckpt"
    trainer = fit(tmp_path, AEFOCL(balance="none"), NMC(), deup)
    trainer.save_checkpoint(path)
    again, data = DEUP(), stream()
    elsewhere = quiet_trainer(tmp_path, callbacks=[NMC(), again])  # one of two heads, and another strategy
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        elsewhere.test(LitSmall(), datamodule=data, ckpt_path=path, verbose=False)
    mine, theirs = deup.error_predictor("nmc"), again.error_predictor("nmc")
    assert theirs.names == mine.names
    assert not changed(mine.errors.state_dict(), theirs.errors.state_dict())
    assert abs(again.reports["nmc"]["mean_total"] - again.reports["nmc"]["mean_loss"]) < 0.1


def test_two_of_them_log_and_predict_under_names_of_their_own(tmp_path: Path) -> None:
    class Lit(LitSmall):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"scores": self(batch[0])}

    module, parts = Lit(), [NMC(), DEUP(), DEUP(loss="brier", name="second")]
    trainer = fit(tmp_path, *parts, module=module, data=stream(stop_after=1))
    assert {"deup/nmc/mean_total", "deup/second_nmc/mean_total"} <= trainer.callback_metrics.keys()
    outputs: Any = trainer.predict(module, datamodule=trainer.datamodule)
    assert outputs[0]["uncertainty"].keys() == {"nmc", "second_nmc"}


# ---- what it says


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("said")

    class Lit(LitSmall):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(64, 10))  # type: ignore[assignment]  # another class

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"scores": self(batch[0])}

    class Reports(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            reports.append(dict(deup.reports))

    reports: list[Any] = []
    deup = DEUP(abstain_rate=0.1, coverage=0.9, false_alarm_rate=0.05)
    torch.manual_seed(0)
    module, parts = Lit(), [AEFOCL(lift=Lift(200)), NMC(), deup, StreamEvaluation(table=False), Reports()]
    trainer = fit(folder, *parts, module=module, data=stream(stop_after=4))
    outputs = trainer.predict(module, datamodule=trainer.datamodule)
    return folder, trainer, deup, outputs, reports


def test_uncertainty_falls_when_a_class_is_learned_and_finds_what_is_new(said: Any) -> None:
    *_, deup, _, reports = said
    for name in ("aef_ocl", "nmc"):
        report = reports[-2][name]  # of the third of four stages
        assert report["auroc_future"] > 0.9
        assert report["auroc_error"] > 0.8
        assert abs(report["mean_total"] - report["mean_loss"]) < 0.06
        assert report["abstention_rate"] < 0.25
        assert report["abstention_rate_future"] > 3 * report["abstention_rate"]
        assert report["selective_risk"] < report["mean_loss"]
        assert 0.85 < report["coverage"] <= 1
        assert report["false_alarms"] < 0.15 < 0.5 < report["new_found"]
        table, learned = deup.course(name)
        for column, stage in enumerate(learned.tolist()):
            if 0 < stage < 3:
                assert table[stage - 1, column] > 1.5 * table[stage, column]


def test_each_sample_has_its_numbers_in_files_and_predictions(said: Any) -> None:
    folder, trainer, deup, outputs, _ = said
    path = next(folder.rglob("predictions.csv"))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    columns = ("total", "aleatoric", "epistemic", "abstain", "set_size", "novelty", "is_new")
    assert {f"{name}_{column}" for name in ("aef_ocl", "nmc") for column in columns} <= rows[0].keys()
    given = torch.cat([each["uncertainty"]["nmc"]["total"] for each in outputs])
    order = np.concatenate([batch for _, batch in trainer.predict_dataloaders.batches])
    found = {int(row["row"]): float(row["nmc_total"]) for row in rows}
    assert [found[row] for row in order.tolist()] == pytest.approx(given.tolist(), abs=1e-6)
    first = outputs[0]["uncertainty"]["nmc"]
    assert torch.equal(first["epistemic"], (first["total"] - first["aleatoric"]).clamp(min=0))
    assert first["set"].dtype == torch.bool
    assert deup.predictions == []
    results = json.loads(next(folder.rglob("results.json")).read_text())
    assert "nmc_total" in json.dumps(results)
    assert {path.name for path in folder.rglob("deup_nmc_*.png")} == {
        f"deup_nmc_{what}.png" for what in ("risk_coverage", "error", "spread", "learning")
    }


@pytest.mark.parametrize("output", ["tensor", "list"])
def test_predictions_are_collected_where_the_step_returns_no_dictionary(tmp_path: Path, output: str) -> None:
    class Lit(LitSmall):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            scores = self(batch[0])
            return scores if output == "tensor" else [scores]

    deup, module = DEUP(), Lit()
    trainer = fit(tmp_path, NMC(), deup, module=module, data=stream(stop_after=1))
    trainer.predict(module, datamodule=trainer.datamodule)
    assert deup.predictions[0]["nmc"]["total"].shape == deup.predictions[0]["nmc"]["prediction"].shape
    assert not deup.predictions[0]["nmc"]["total"].is_inference()


def test_inputs_that_are_not_finite_have_no_number_and_are_not_accepted(tmp_path: Path) -> None:
    deup = DEUP(abstain_rate=0.1)
    fit(tmp_path, LDA(), deup)
    watched = deup.error_predictor("lda")
    known = only(deup)
    features = torch.full((2, known.width), torch.nan, dtype=torch.float64)
    features[1] = known.memory.features[0].double()
    scores = torch.tensor([[torch.nan] * 6, [0.0] + [-1.0] * 5], dtype=torch.float64)
    judged = watched.judge(features, scores, known.snapshot())
    assert judged.uncertainty.total.isnan().tolist() == [True, False]
    assert bool(judged.abstain[0])


def test_noise_is_taken_off(tmp_path: Path) -> None:
    nmc, deup = NMC(), DEUP(loss="brier", aleatoric=0.3)
    fit(tmp_path, nmc, deup, data=stream(stop_after=2))
    watched = deup.error_predictor("nmc")
    known = only(deup)
    rows = known.memory.features.double()
    uncertainty = watched.judge(rows, nmc.head(rows), known.snapshot()).uncertainty
    assert bool((uncertainty.aleatoric == 0.3).all())
    assert torch.equal(uncertainty.epistemic, (uncertainty.total - 0.3).clamp(min=0))


# ---- a run that goes on

RUNS: dict[str, Any] = {
    "heads": ({"abstain_rate": 0.1, "coverage": 0.9, "false_alarm_rate": 0.1}, "gradient_free", {}),
    "arriving": ({"sources": ["prequential", "novel"]}, "gradient_free", {}),
    "calibration": ({"coverage": 0.9}, "er", {"val_fraction": 0.2}),
    "scores": ({"risk": 0.5}, "auto", {"epochs_per_experience": 2}),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*(no threshold on|backbone still trains|for several epochs)")
def test_a_run_goes_on_in_the_middle_of_an_experience(tmp_path: Path, name: str) -> None:
    options, strategy, data = RUNS[name]

    def run(folder: Path, *more: pl.Callback, **given: Any) -> Any:
        heads = [] if name == "scores" else [NMC(), LDA()]
        deup = DEUP(**options)
        how = ERStrategy(capacity=50, transform=torch.nn.Identity()) if strategy == "er" else strategy
        fit(folder, *heads, deup, *more, strategy=how, data=stream(**data), **given)
        return deup.state_dict()

    path = tmp_path / "cut.ckpt"
    whole = run(tmp_path / "whole", Saver(path))
    torch.load(path, weights_only=True)
    assert not changed(whole, run(tmp_path / "again", ckpt_path=path))


# ---- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"risk": 0.1, "loss": "nll"}, "risk=0.1 bounds a rate of errors: it needs loss='error'"),
        ({"coverage": 1.0}, "coverage must be between 0 and 1, got 1.0"),
        ({"abstain_rate": -0.1}, "abstain_rate must be between 0 and 1, got -0.1"),
        ({"loss": "squared"}, "loss='squared' is for regression"),
        ({"features": ["log_mahal"]}, "features must be some of log_maha"),
        ({"sources": ["novel"]}, "sources must name one beside 'novel'"),
        ({"sources": ["gaussian"]}, "'gaussian' needs Records"),
        ({"aleatoric": -1.0}, "aleatoric must be"),
        ({"predictor": []}, r"predictor must be 'auto', a name or several, got \[\]"),
        ({"class_conditional": True}, "class_conditional=True is of sets of classes: give their coverage"),
        ({"adaptive": 0.1}, "adaptive=0.1 is of sets of classes: give their coverage"),
        ({"false_alarm_rate": 0.1, "records": Records(memory="gaussian")}, r"it needs Records\(memory='features'\)"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate must be between 0 and 1, got 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_by_the_constructor(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        DEUP(**options)


@pytest.mark.parametrize("options", [{"holdout": 0.3}, {"novelty": 1.0}, {"refresh": 0}, {"memory_size": 0}])
def test_wrong_settings_of_records_are_refused_too(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Records(**options)


def test_what_a_run_cannot_give_is_named_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'calibration' needs samples kept out of training"):
        fit(tmp_path, NMC(), DEUP(sources=["calibration"]))
    with pytest.raises(ConfigurationError, match=r"'entropy'.* are of logits, and nmc gives none"):
        fit(tmp_path, NMC(), DEUP(features=["entropy"]))
    with pytest.raises(ConfigurationError, match="'gmm' has no left-out form, which errors of nmc from"):
        fit(tmp_path, NMC(), DEUP(features=["gmm", "margin"]))


def test_a_predictor_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no predictor 'lda'; this run has module, nmc"):
        fit(tmp_path, NMC(), DEUP("lda"))
    with pytest.raises(ConfigurationError, match="GradientFreeStrategy trains no classifier: add one"):
        fit(tmp_path, DEUP())


def test_two_of_them_tell_their_columns_apart(tmp_path: Path) -> None:
    first, second = DEUP(), DEUP(loss="brier", name="second")
    evaluation = StreamEvaluation(table=False, figures=False)
    fit(tmp_path, NMC(), first, second, evaluation, data=stream(stop_after=1))
    assert {"nmc_total", "second_nmc_total"} <= evaluation._measured.columns.keys()
    assert (np.array([first.reports["nmc"]["mean_loss"], second.reports["nmc"]["mean_loss"]]) >= 0).all()
