"""Kept evaluation features: fewer passes, the same bits, and the user's network given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule

EXPERIENCES = 5


class Net(nn.Module):
    """A network with timm's surface that counts the rows that pass its body."""

    def __init__(self, norm: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.fc = nn.Linear(12, 10)
        self.scale = scale
        self.rows = 0

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.rows += len(inputs)
        return self.scale * self.fc(torch.relu(self.norm(self.body(inputs))))


class Lit(pl.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.network = Net(**options)
        self.logged: list[float] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.logged.append(float(nn.functional.cross_entropy(self(batch[0]), batch[1])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run(
    make_trainer: Callable[..., pl.Trainer], keep: int, strategy: str = "gradient_free", **options: Any
) -> tuple[Lit, StreamEvaluation, NMC]:
    torch.manual_seed(0)
    module = Lit(**options)
    evaluation, nmc = StreamEvaluation(table=False, files=False, keep_features=keep, module=True), NMC()
    trainer = make_trainer(strategy=strategy, callbacks=[nmc, evaluation], num_sanity_val_steps=0)
    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=EXPERIENCES), eval_batch_size=16)
    trainer.fit(module, datamodule=stream)
    return module, evaluation, nmc


def test_frozen_network_runs_each_test_sample_once(make_trainer: Callable[..., pl.Trainer]) -> None:
    kept, evaluation, nmc = run(make_trainer, 64)
    plain, plain_evaluation, plain_nmc = run(make_trainer, 0)
    assert evaluation.results == plain_evaluation.results
    assert kept.logged == plain.logged  # the user's own metric sees the same bits
    assert torch.equal(nmc.head.statistics.sums, plain_nmc.head.statistics.sums)
    train, sizes = 899, [177, 184, 179, 181, 177]
    compared = sum(8 * (EXPERIENCES - j) for j in range(EXPERIENCES))  # of first batches of 15 and 16 rows, once more
    assert kept.network.rows == train + sum(sizes) + compared
    assert plain.network.rows == train + sum(size * (EXPERIENCES - j) for j, size in enumerate(sizes))
    assert "forward" not in vars(kept.network)
    assert not kept.network._forward_hooks


@pytest.mark.warns("the backbone still trains")
@pytest.mark.parametrize("norm", [False, True])
def test_training_network_is_asked_anew(make_trainer: Callable[..., pl.Trainer], norm: bool) -> None:
    kept, evaluation, _ = run(make_trainer, 64, strategy="auto", norm=norm)
    plain, plain_evaluation, _ = run(make_trainer, 0, strategy="auto", norm=norm)
    assert evaluation.results == plain_evaluation.results
    assert kept.logged == plain.logged
    assert kept.network.rows == plain.network.rows + 8  # some rows of the first evaluation, before it is known


def test_network_that_does_more_than_its_classifier_is_left_alone(make_trainer: Callable[..., pl.Trainer]) -> None:
    kept, evaluation, _ = run(make_trainer, 64, scale=3.0)
    plain, plain_evaluation, _ = run(make_trainer, 0, scale=3.0)
    assert kept.logged == plain.logged
    assert evaluation.results == plain_evaluation.results
    assert kept.network.rows == plain.network.rows


def test_grafts_answer_with_the_new_classifier(make_trainer: Callable[..., pl.Trainer]) -> None:
    torch.manual_seed(0)
    module, evaluation = Lit(), StreamEvaluation(table=False, files=False)
    trainer = make_trainer(
        strategy="gradient_free", callbacks=[AEFOCL(graft="experience_end"), evaluation], num_sanity_val_steps=0
    )
    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=EXPERIENCES), eval_batch_size=16)
    trainer.fit(module, datamodule=stream)
    results = evaluation.results
    assert results["module"]["accuracy_matrix"] == results["aef_ocl"]["accuracy_matrix"]
    assert evaluation._kept.served > 0


def test_an_error_in_a_step_gives_the_forward_back(make_trainer: Callable[..., pl.Trainer]) -> None:
    class Breaks(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if "forward" in vars(self.network):
                raise RuntimeError("in the middle of a step that kept features answer")

    module = Breaks()
    trainer = make_trainer(
        strategy="gradient_free",
        callbacks=[NMC(), StreamEvaluation(table=False, files=False)],
        num_sanity_val_steps=0,
    )
    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=2), eval_batch_size=16)
    with pytest.raises(RuntimeError, match="kept features"):
        trainer.fit(module, datamodule=stream)
    assert "forward" not in vars(module.network)
    assert not module.network._forward_hooks


def test_the_limit_is_kept() -> None:
    from clkit.features.kept import KeptFeatures
    from clkit.features.tap import FeatureTap

    torch.manual_seed(0)
    module = Lit()
    with FeatureTap(module) as tap:
        kept = KeptFeatures(limit=3 * 8 * 12 * 4)  # three batches of eight rows
        for _ in range(2):
            kept.begin(module, tap)
            for batch in range(5):
                kept.before_batch(0, range(8 * batch, 8 * batch + 8))
                with torch.no_grad():
                    module(torch.ones(8, 64) * batch)
                kept.after_batch()
            kept.end()
    assert kept.served == 3
    assert module.network.rows == 8 * (5 + 2) + 2 * 8  # all, then two that were not kept; and the first one alone


class Changing(Net):
    """Forwards differently by a plain attribute, which no weight or buffer shows."""

    how, stage = "", 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.body(inputs)))
        if self.how == "a little":  # far less than the rounding of a float32 sum, relative to the largest
            hidden = hidden * (1 + 1e-6 * self.stage)
        elif self.how == "some rows":  # two in five
            bright = inputs.sum(1, keepdim=True) > 20
            hidden = torch.where(bright, hidden.roll(self.stage, dims=1), hidden)
        logits = self.fc(hidden)
        return logits.roll(self.stage, dims=1) if self.how == "after the classifier" else logits


class Switch(pl.Callback):
    def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
        pl_module.network.stage = experience.index // 2  # some evaluations see no change


class Prompted(Lit):
    """Changes its inputs by weights outside the network, which a fingerprint of the network does not see."""

    prompt: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs + self.prompt * self.network.stage)


class TwoViews(Lit):
    """Evaluates two views of each batch, so that one forward's features are not those of the other."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for view in (batch[0].roll(1, dims=1), batch[0]):
            self.logged.append(float(nn.functional.cross_entropy(self(view), batch[1])))


@pytest.mark.parametrize(
    "how",
    [
        *[
            pytest.param(how, marks=pytest.mark.warns("were kept differ from fresh ones"))
            for how in ("a little", "some rows", "after the classifier", "before the network")
        ],
        "two views",
    ],
)
def test_every_row_is_measured_with_the_network_of_its_time(make_trainer: Callable[..., pl.Trainer], how: str) -> None:
    def measured(keep: int) -> tuple[Any, ...]:
        torch.manual_seed(0)
        module = {"before the network": Prompted, "two views": TwoViews}.get(how, Lit)()
        module.network = Changing()
        module.network.how, module.prompt = how, torch.full((64,), 1e-3)
        evaluation, nmc = StreamEvaluation(table=False, files=False, keep_features=keep, module=True), NMC()
        shown: list[Any] = []

        class Shown(pl.Callback):
            def on_validation_batch_end(self, *args: Any) -> None:
                features = evaluation.observer.features()
                shown.append((features, nmc.scores(features)))

        callbacks = [nmc, Switch(), evaluation, Shown()]
        trainer = make_trainer(strategy="gradient_free", callbacks=callbacks, num_sanity_val_steps=0)
        stream = StreamDataModule("digits:flat", ClassIncremental(experiences=EXPERIENCES), eval_batch_size=16)
        trainer.fit(module, datamodule=stream)
        assert evaluation._kept.served > 0 or not keep or how in ("after the classifier", "two views")
        return evaluation.results, module.logged, shown

    (results, logged, shown), (own_results, own_logged, own_shown) = measured(64), measured(0)
    assert results == own_results
    assert logged == own_logged
    for now, then in zip(shown, own_shown, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
