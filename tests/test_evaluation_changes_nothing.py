"""Whoever evaluates at every opportunity learns the same, bit for bit, as who never evaluates."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, LDA, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.testing._compare import changed

Make = Callable[..., Any]

# heads stand on a network that trains, go on with a stream that they know, and meet a row of zeros behind ReLU
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(the backbone still trains|it has learned before):UserWarning",
    "ignore:.*feature vectors of a batch are zero:UserWarning",
)

NEVER: dict[str, Any] = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
ALWAYS: dict[str, Any] = {"val_check_interval": 1, "num_sanity_val_steps": -1}


class Net(pl.LightningModule):
    """Batch statistics, dropout, momentum and a schedule: all that an evaluation might disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.classify = nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.body(inputs))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=4)
    return StreamDataModule("digits:flat", scenario, batch_size=128, **options)


def tasks() -> list[dict[str, Any]]:
    """A user's own loaders, one pair a task; each has a generator of its own, as `iter` draws from it."""
    images, targets = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(targets)
    pairs = []
    for low, high in ((0, 4), (4, 8), (8, 10)):
        parts = []
        for offset in (0, 1):
            own = (y[offset::2] >= low) & (y[offset::2] < high)
            data = TensorDataset(x[offset::2][own], y[offset::2][own])
            parts.append(
                DataLoader(data, batch_size=128, shuffle=offset == 0, generator=torch.Generator().manual_seed(low))
            )
        pairs.append({"train_dataloaders": parts[0], "val_dataloaders": parts[1]})
    return pairs


def learners(graft: str) -> list[Any]:
    """With a graft one head takes the module's classifier: by copying, or by layers of its own."""
    if graft == "copied":
        return [AEFOCL(balance="none", graft="experience_end"), LDA()]
    if graft == "replaced":
        return [NMC(graft="experience_end"), LDA()]
    return [AEFOCL(), NMC(), LDA(), NMC(name="shared", forward="shared")]


def state(value: Any) -> Any:
    """A copy in which every tensor is one of ordinary memory."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: state(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [state(part) for part in value]
    return value


class End(pl.Callback):
    """Everything that training goes on from, while the run still holds it."""

    state: dict[str, Any]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, AEFOCL | NMC | LDA)]
        self.state = state(
            {
                "module": pl_module.state_dict(),
                "modes": {name: part.training for name, part in pl_module.named_modules()},
                "gradients": {name: parameter.requires_grad for name, parameter in pl_module.named_parameters()},
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "heads": {callback.state_key: callback.state_dict() for callback in callbacks},
                "random": [torch.get_rng_state(), random.getstate(), *map(np.asarray, np.random.get_state()[1:2])],  # noqa: NPY002
                "steps": trainer.global_step,
                "epochs": trainer.current_epoch,
            }
        )
        self.state["random"][2] = self.state["random"][2].tolist()


def everywhere(trainer: pl.Trainer, make_trainer: Make, module: Net, callbacks: list[Any], **data: Any) -> None:
    """Validation, test and prediction, by the trainer that fits and by one of its own."""
    loader = {"dataloaders": data["val_dataloaders"]} if "val_dataloaders" in data else data
    for evaluating in (trainer, make_trainer(callbacks=callbacks)):
        evaluating.validate(module, **loader, verbose=False)
        evaluating.test(module, **loader, verbose=False)
        evaluating.predict(module, **loader)


def run(
    make_trainer: Make, strategy: str, kind: str, graft: str, evaluate: bool, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    pl.seed_everything(5, verbose=False)
    module, end = Net(), End()
    heads = learners(graft)
    callbacks: list[Any] = [*heads, StreamEvaluation(table=False, files=False)]
    options = {**(ALWAYS if evaluate else NEVER), **(extra or {})}
    trainer = make_trainer(strategy=strategy, callbacks=[*callbacks, end], max_epochs=1, **options)
    parts = [{"datamodule": stream(stop_after=2)}, {"datamodule": stream()}] if kind == "stream" else tasks()
    for index, data in enumerate(parts):
        trainer.fit_loop.max_epochs = -1 if kind == "stream" else index + 1
        trainer.fit(module, **data)
        if evaluate:
            everywhere(trainer, make_trainer, module, callbacks, **data)
    return end.state


UNWATCHED: dict[tuple[str, str, str], dict[str, Any]] = {}


def unwatched(make_trainer: Make, *case: str) -> dict[str, Any]:
    """The end of the run that never evaluates, which several tests compare with."""
    if case not in UNWATCHED:
        UNWATCHED[case] = run(make_trainer, *case, evaluate=False)
    return UNWATCHED[case]


@pytest.mark.parametrize(
    ("strategy", "kind", "graft"),
    [
        ("auto", "stream", "no graft"),
        ("gradient_free", "stream", "no graft"),
        ("auto", "stream", "copied"),
        ("gradient_free", "stream", "replaced"),
        ("auto", "loaders", "no graft"),
        pytest.param("gradient_free", "stream", "copied", marks=pytest.mark.slow),
        pytest.param("auto", "stream", "replaced", marks=pytest.mark.slow),
        pytest.param("auto", "loaders", "copied", marks=pytest.mark.slow),
        pytest.param("gradient_free", "loaders", "replaced", marks=pytest.mark.slow),
    ],
)
def test_evaluating_at_every_opportunity_changes_no_bit(
    make_trainer: Make, strategy: str, kind: str, graft: str
) -> None:
    never = unwatched(make_trainer, strategy, kind, graft)
    always = run(make_trainer, strategy, kind, graft, evaluate=True)
    assert changed(always, never) == []
    assert never["epochs"] == 3
    assert all(sum(head["head"]["statistics.counts"]) == 899 for head in never["heads"].values())


@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        ("auto", {"inference_mode": False}),
        ("gradient_free", {"check_val_every_n_epoch": 1000, "val_check_interval": 1.0}),  # our own passes alone
        ("auto", {"check_val_every_n_epoch": None, "val_check_interval": 2}),
    ],
    ids=["without inference mode", "own passes", "across epochs"],
)
def test_however_it_is_evaluated(make_trainer: Make, strategy: str, extra: dict[str, Any]) -> None:
    never = unwatched(make_trainer, strategy, "stream", "no graft")
    always = run(make_trainer, strategy, "stream", "no graft", evaluate=True, extra=extra)
    assert changed(always, never) == []


def test_measuring_the_untrained_network_changes_no_bit(make_trainer: Make) -> None:
    """Future experiences are evaluated too, so a pass comes before the first batch."""
    ends = []
    for evaluate, options in (("seen", NEVER), ("all", ALWAYS)):
        pl.seed_everything(5, verbose=False)
        end, evaluation = End(), StreamEvaluation(table=False, files=False)
        make_trainer(callbacks=[*learners("no graft"), evaluation, end], **options).fit(
            Net(), datamodule=stream(evaluate=evaluate)
        )
        ends.append(end.state)
    assert evaluation.results["module"]["forward_transfer"] is not None
    assert changed(*ends) == []


@pytest.mark.parametrize("graft", ["copied", "replaced"])
@pytest.mark.parametrize("strategy", ["auto", "gradient_free"])
def test_what_an_evaluation_restored_can_be_trained_on(
    make_trainer: Make, tmp_path: Path, strategy: str, graft: str
) -> None:
    """Heads and grafts that a validation in inference mode put in place, then a fit that goes on or resumes."""
    path = str(tmp_path / "two.ckpt")
    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(strategy=strategy, callbacks=learners(graft), **NEVER)
    trainer.fit(Net(), datamodule=stream(stop_after=2))
    trainer.save_checkpoint(path)

    ends = []
    for evaluate in (False, True):
        pl.seed_everything(6, verbose=False)
        module, heads, end = Net(), learners(graft), End()
        if evaluate:
            for verb in ("validate", "test"):
                getattr(make_trainer(callbacks=heads), verb)(module, datamodule=stream(), ckpt_path=path, verbose=False)
            assert heads[0].grafted
        make_trainer(strategy=strategy, callbacks=[*heads, end], **(ALWAYS if evaluate else NEVER)).fit(
            module, datamodule=stream(), ckpt_path=path
        )
        ends.append(end.state)
        make_trainer(strategy=strategy, callbacks=heads).fit(module, datamodule=stream())  # and on without a file
    assert changed(*ends) == []


@pytest.mark.parametrize("graft", ["copied", "replaced"])
@pytest.mark.parametrize("when", ["experience_end", "fit_end"])
def test_a_grafted_module_can_be_evaluated_from_its_own_file(
    make_trainer: Make, tmp_path: Path, graft: str, when: str
) -> None:
    head = (AEFOCL(balance="none", graft=when), NMC(graft=when))[graft == "replaced"]
    module = Net()
    trainer = make_trainer(strategy="gradient_free", callbacks=[head], **NEVER)
    trainer.fit(module, datamodule=stream())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    own = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"][head.state_key]["graft"]["own"]
    counts = head.head.counts.tolist()
    (first,) = trainer.test(module, datamodule=stream(), verbose=False)
    for _ in range(2):
        (again,) = trainer.test(module, datamodule=stream(), ckpt_path=str(tmp_path / "run.ckpt"), verbose=False)
        assert again == first
    assert head.grafted
    assert head.head.counts.tolist() == counts
    head.ungraft(module)
    torch.manual_seed(0)
    if own:
        assert torch.equal(module.classify.weight, own["weight"])
    assert type(module.classify) is nn.Linear


def test_a_head_that_was_solved_in_inference_mode_can_be_differentiated(make_trainer: Make) -> None:
    module, head = Net(), NMC()
    trainer = make_trainer(strategy="gradient_free", callbacks=[head], **NEVER)
    trainer.fit(module, datamodule=stream())
    make_trainer(callbacks=[head]).validate(module, datamodule=stream(), verbose=False)
    features = torch.rand(3, 16, requires_grad=True)
    head.head(features).sum().backward()
    assert features.grad is not None
