"""Single-label classification is what clkit is for: two classes in one output work, other tasks are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, LDA, NMC, Lift, StreamEvaluation, ungraft
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import BatchError, ConfigurationError
from clkit.strategies import ERStrategy

Make = Callable[..., Any]

HEADS: dict[str, Callable[..., Any]] = {
    "ridge": lambda **o: AEFOCL(name="head", **o),
    "lift": lambda **o: AEFOCL(0.1, Lift(40), name="head", **o),
    "janson": lambda **o: NMC(name="head", **o),
    "euclidean": lambda **o: NMC("euclidean", name="head", **o),
    "lda": lambda **o: LDA(name="head", **o),
}


class Binary(pl.LightningModule):
    """One output and a binary cross-entropy, as tutorials for two classes have it."""

    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(30, 12), nn.ReLU())
        self.fc: nn.Module = nn.Linear(12, 1, bias=kind != "no bias")
        if kind == "convolution":
            self.body, self.fc = nn.Sequential(*self.body, nn.Unflatten(1, (12, 1, 1))), nn.Conv2d(12, 1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.body(inputs)).flatten(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        hits = (self(batch[0])[:, 0] > 0) == (batch[1] == 1)
        self.log("val_acc", hits.float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def tumours() -> tuple[Tensor, Tensor]:
    inputs, targets = load_breast_cancer(return_X_y=True)
    return torch.tensor(StandardScaler().fit_transform(inputs)).float(), torch.tensor(targets)


def loader(targets: Tensor | None = None, inputs: Tensor | None = None) -> DataLoader[Any]:
    x, y = tumours()
    x, y = x if inputs is None else inputs, y if targets is None else targets
    return DataLoader(TensorDataset(x[: len(y)], y), batch_size=100)


def doubled(module: Any, head: Any, inputs: Tensor) -> Tensor:
    """The second softmax of the head's two scores, in float64 and from its features."""
    with torch.no_grad():
        scores = head.scores(module.body(inputs).flatten(1).double())
    return torch.softmax(scores.double(), dim=1)[:, 1]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ["linear", "no bias", "convolution"])
def test_a_head_of_two_classes_is_exact_in_one_output(make_trainer: Make, name: str, kind: str, tmp_path: Path) -> None:
    module, head = Binary(kind), HEADS[name](graft="fit_end", layer="fc")
    own = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    saving = ModelCheckpoint(str(tmp_path), save_last=True)
    options: dict[str, Any] = {"strategy": "gradient_free", "callbacks": [head, saving], "enable_checkpointing": True}
    make_trainer(**options, max_epochs=1).fit(module.double(), loader(inputs=tumours()[0].double()))
    inputs, targets = tumours()
    inputs = inputs.double()
    with torch.no_grad():
        output = module(inputs)
    assert output.shape == (len(inputs), 1)
    if name == "janson":  # whose read-out ranks as the head does, by other scores
        assert torch.equal((output[:, 0] > 0).long(), head.head.predict(module.body(inputs).flatten(1)))
    else:
        torch.testing.assert_close(torch.sigmoid(output[:, 0]), doubled(module, head, inputs), rtol=0, atol=1e-9)
    assert ((output[:, 0] > 0) == (targets == 1)).double().mean() > 0.85
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(own)
    again = HEADS[name](graft="fit_end", layer="fc")
    fresh = Binary(kind).double()
    trainer = make_trainer(callbacks=[again])
    trainer.validate(fresh, loader(inputs=inputs), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    with torch.no_grad():
        assert torch.equal(fresh(inputs), output)
    ungraft(module)
    assert all(torch.equal(tensor.double(), own[key].double()) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("only", [0, 1])
def test_a_class_that_is_still_to_come_is_never_predicted(make_trainer: Make, only: int) -> None:
    inputs, targets = tumours()
    module, head = Binary(), AEFOCL(graft="fit_end")
    fit = make_trainer(strategy="gradient_free", callbacks=[head], max_epochs=1)
    fit.fit(module, loader(targets[targets == only], inputs[targets == only]))
    with torch.no_grad():
        output = torch.sigmoid(module(inputs))
    assert torch.equal(output, torch.full_like(output, float(only)))
    assert module.training_step((inputs, targets), 0).isfinite()


def test_training_goes_on_behind_a_graft_in_one_output(make_trainer: Make) -> None:
    module, head = Binary(), AEFOCL(graft="fit_end", reset_each_task=True)
    trainer = make_trainer(callbacks=[head], max_epochs=1)
    trainer.fit(module, loader(), loader())
    assert trainer.callback_metrics["val_acc"] == pytest.approx(float(trainer.callback_metrics["aef_ocl/accuracy"]))
    assert trainer.callback_metrics["val_acc"] > 0.9


def test_more_classes_than_one_output_tells_are_refused_before_they_are_learned(make_trainer: Make) -> None:
    says = r"AEFOCL\(aef_ocl\) cannot be grafted: .*'fc' has one output.* class {}; .*graft=\"never\""
    flat = nn.Sequential(nn.Linear(64, 12), nn.ReLU())
    head, module = AEFOCL(graft="fit_end"), Binary()
    module.body = flat
    trainer = make_trainer(strategy="gradient_free", callbacks=[head])
    with pytest.raises(ConfigurationError, match=says.format(9)):  # a stream says how many there are
        trainer.fit(module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)))
    assert trainer.global_step == 0
    targets = torch.arange(200) // 100 * 2  # of plain loaders the second batch shows it
    trainer = make_trainer(strategy="gradient_free", callbacks=[head], max_epochs=1)
    with pytest.raises(ConfigurationError, match=says.format(2)):
        trainer.fit(Binary(), loader(targets))
    assert head.head.counts.tolist() == [100]
    make_trainer(strategy="gradient_free", callbacks=[AEFOCL()], max_epochs=1).fit(Binary(), loader(targets))


# ---- other tasks

ROWS = torch.arange(100)
OTHERS: dict[str, tuple[Tensor, str, str]] = {
    "regression": (torch.linspace(-1, 1, 100), "may be values of a regression", ""),
    "as the binary loss takes them": ((ROWS % 2).float(), "of type float32 are no class ids", "batch[1].long()"),
    "in a column": (ROWS[:, None] % 2, r"of shape \(100, 1\) and type int64", "batch[1].flatten()"),
    "in a column of the binary loss": ((ROWS[:, None] % 2).double(), "float64", "batch[1].flatten().long()"),
    "yes and no": (ROWS % 2 == 1, "of type bool", "batch[1].long()"),
    "multi-label": ((torch.stack([ROWS, ROWS // 2, ROWS // 3], 1) % 2).float(), "several labels a sample", ""),
    "one-hot": (nn.functional.one_hot(ROWS % 3), "or one-hot ones", "batch[1].argmax(1)"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("part", ["head", "evaluation", "gradient_free", "replay"])
def test_other_tasks_are_refused_before_anything_is_trained(make_trainer: Make, kind: str, part: str) -> None:
    targets, says, remedy = OTHERS[kind]
    parts: dict[str, dict[str, Any]] = {
        "head": {"callbacks": [NMC()]},
        "evaluation": {"callbacks": [StreamEvaluation(module=True, files=False, table=False)]},
        "gradient_free": {"strategy": "gradient_free"},
        "replay": {"strategy": ERStrategy(capacity=9)},
    }
    module = Binary()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    trainer = make_trainer(**parts[part], max_epochs=1)
    with pytest.raises(BatchError, match=f"{says}.*single-label classification") as caught:
        trainer.fit(module, loader(targets), loader(targets) if part == "evaluation" else None)
    assert remedy in str(caught.value)
    assert ("batch_reader=lambda" in str(caught.value)) == bool(remedy)  # what cannot be class ids is not made some
    assert trainer.global_step == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind, (_, _, remedy) in OTHERS.items() if remedy])
def test_what_the_message_says_makes_class_ids(make_trainer: Make, kind: str) -> None:
    targets, _, _ = OTHERS[kind]
    with pytest.raises(BatchError) as caught:
        make_trainer(strategy="gradient_free", callbacks=[NMC()], max_epochs=1).fit(Binary(), loader(targets))
    head = NMC(batch_reader=eval(str(caught.value).rpartition("batch_reader=")[2]))  # the code that the message gives
    make_trainer(strategy="gradient_free", callbacks=[head], max_epochs=1).fit(Binary(), loader(targets))
    assert head.head.counts.tolist() == torch.bincount(ROWS % (3 if kind == "one-hot" else 2)).tolist()


def test_a_prediction_has_no_use_for_targets(make_trainer: Make, tmp_path: Path) -> None:
    class Predicting(Binary):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    head, module = AEFOCL(), Predicting()
    make_trainer(strategy="gradient_free", callbacks=[head], max_epochs=1).fit(module, loader())
    evaluation = StreamEvaluation(module=False, table=False)
    trainer = make_trainer(callbacks=[head, evaluation])
    trainer.predict(module, loader(OTHERS["regression"][0]), return_predictions=False)
    (file,) = tmp_path.rglob("predictions.csv")
    header, first = file.read_text().splitlines()[:2]
    assert dict(zip(header.split(","), first.split(","), strict=True)).get("target") in (None, "", "-1")
