"""What methods to come stand on: a loss added by a callback, evaluation by experience, a network that changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import quiet_trainer
from torch import Tensor, nn

from clkit.callbacks import NMC, FeatureCallback, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import TapError
from clkit.features.kept import KeptFeatures
from clkit.features.tap import FeatureTap
from clkit.models import TimmClassifier
from clkit.stream.boundaries import backbone_changed

BATCHES = [(torch.randn(6, 5, generator=torch.Generator().manual_seed(i)), torch.arange(6) % 3) for i in range(3)]


class Small(pl.LightningModule):
    def __init__(self, penalty: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.penalty = nn.Linear(5, 4), nn.Linear(4, 3), penalty

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.body(batch[0]).tanh()
        loss = nn.functional.cross_entropy(self.head(features), batch[1])
        return loss + self.penalty * features.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Penalty(FeatureCallback):
    """Adds the squared length of the features to the user's loss."""

    needs_graph = True

    def learn(self, features: Tensor, targets: Tensor) -> None:
        with pytest.raises(RuntimeError):  # of the graph nothing outlives the step
            features.sum().backward()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        loss.add_(0.3 * self.observer.features(graph=True).square().sum())


def fitted(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback) -> dict[str, Tensor]:
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    quiet_trainer(folder, max_epochs=1, callbacks=list(callbacks)).fit(module, loader)
    return dict(module.state_dict())


def test_a_callback_adds_a_loss_on_features_with_their_graph(tmp_path: Path) -> None:
    added = fitted(tmp_path, Small(), Penalty())
    own = fitted(tmp_path, Small(penalty=0.3))
    for name, value in own.items():
        torch.testing.assert_close(added[name], value, rtol=1e-6, atol=1e-7)
    assert not torch.equal(added["body.weight"], fitted(tmp_path, Small())["body.weight"])


def test_features_that_were_not_asked_for_with_a_graph_have_none(tmp_path: Path) -> None:
    class Late(Penalty):
        needs_graph = False

    with pytest.raises(TapError, match="have no graph: the batch was not opened with graph=True"):
        fitted(tmp_path, Small(), Late())


# ---- evaluation by experience


class Gated(TimmClassifier):
    """A network with a gate at its features that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__("identity")
        self.gate = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs * self.gate)


class PerExperience(pl.Callback):
    """Turns the features round for all experiences but one, while a batch of that one is evaluated."""

    def __init__(self, module: Gated) -> None:
        self.module = module
        self.entered: list[int] = []

    @contextmanager
    def activated(self, experience: int) -> Iterator[None]:
        self.entered.append(experience)
        self.module.gate = -1.0 if experience == 1 else 1.0
        yield
        self.module.gate = 1.0


@pytest.mark.parametrize("val_batches", [1.0, 0.0], ids=["validation of Lightning", "own pass"])
def test_each_experience_is_evaluated_as_callbacks_set_it_up(tmp_path: Path, val_batches: float) -> None:
    def rows(switched: bool) -> list[Any]:
        module, evaluation = Gated(), StreamEvaluation(table=False, files=False, figures=False)
        switch = [PerExperience(module)] if switched else []
        trainer = quiet_trainer(
            tmp_path,
            strategy="gradient_free",
            callbacks=[NMC(), *switch, evaluation],
            check_val_every_n_epoch=1 if val_batches else 100,
        )
        data = StreamDataModule("digits:flat", ClassIncremental(experiences=5), batch_size=64)
        trainer.fit(module, datamodule=data)
        for callback in switch:
            assert set(callback.entered) == set(range(5))
        return evaluation.results["nmc"]["accuracy_matrix"][-1]

    plain, switched = rows(False), rows(True)
    assert switched[1] < 0.2 < plain[1]  # pixels of the other sign
    assert switched[:1] + switched[2:] == plain[:1] + plain[2:]


# ---- a network that changes


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x) * self.scale)


def test_kept_features_are_compared_with_fresh_ones_in_each_evaluation() -> None:
    module = pl.LightningModule()
    module.net = Inner().eval()
    rows = {0: range(8), 1: range(8, 16), 2: range(16, 24), 3: range(24, 32)}
    batches = {(k % 2, rows[k]): torch.randn(8, 3) for k in range(4)}
    kept = KeptFeatures(2**20)
    tap = FeatureTap(module)

    def evaluated() -> list[Tensor]:
        outputs = []
        kept.begin(module, tap)
        for (experience, rows), images in batches.items():
            kept.before_batch(experience, rows)
            with torch.no_grad():
                outputs.append(module.net(images))
            kept.after_batch()
        kept.end()
        return outputs

    first = evaluated()
    assert [torch.equal(*pair) for pair in zip(first, evaluated(), strict=True)] == [True] * 4
    assert kept.served == 4
    module.net.scale = 0.5
    with torch.no_grad():
        expected = [module.net(images) for images in batches.values()]
    with pytest.warns(UserWarning, match="kept differ from fresh ones"):
        found = evaluated()
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True] * 4
    assert kept.served == 4
    assert "forward" not in vars(module.net)


def test_an_announced_change_of_the_backbone_reaches_heads_and_evaluation(tmp_path: Path) -> None:
    class Change(pl.Callback):
        def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
            backbone_changed(trainer, "a test scaled its features")

    class Listener(pl.Callback):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_backbone_changed(self, trainer: pl.Trainer, pl_module: Any, reason: str) -> None:
            self.heard.append(reason)

    with pytest.warns(UserWarning, match=r"NMC\(nmc\): the backbone changed: a test scaled its features"):
        fitted(tmp_path, Small(), Change(), NMC(), listener := Listener())
    assert listener.heard == ["a test scaled its features"]
