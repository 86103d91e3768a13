"""DSimplex keeps models comparable: ten Gaussian blobs, and searches of one model in another's gallery."""

from __future__ import annotations

import copy
from itertools import permutations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from clkit.callbacks import DSimplex, StreamCallback
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.metrics.compatibility import average_multi_model_accuracy
from clkit.strategies import ERStrategy, MemorySettings
from clkit.stream.boundaries import backbone_changed
from clkit.surgery.copies import bare_copy

K, CLASSES, WIDTH = 32, 10, 32
NOISE = 1.0


def blobs(seed: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Rows of the same ten classes, drawn anew for each seed."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    noise = torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + NOISE * noise, labels


class MLP(nn.Sequential):
    """Two hidden layers, of which the second is the features."""

    def __init__(self, seed: int, hidden: int = 64) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def get_classifier(self) -> nn.Module:  # as timm's networks have it, so that all of it can be replaced
        return self[-1]


class Lit(pl.LightningModule):
    def __init__(self, net: nn.Module, decay: float = 0.0) -> None:
        super().__init__()
        self.net, self.decay = net, decay

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=self.decay)


class Kept(StreamCallback):
    """The model after each task."""

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Any] = []

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Any) -> None:
        self.models.append(bare_copy(pl_module))


def trained(
    folder: Path,
    net: nn.Module,
    *callbacks: Any,
    classes: int = CLASSES,
    tasks: int = 1,
    decay: float = 0.0,
    seed: int = 0,
) -> list[Any]:
    """Trains a network in one pass, with a replay of 20 rows a class where there are tasks; gives its models."""
    x, y = blobs(seed, 500)
    part = TensorDataset(x[y < classes], y[y < classes])
    kept = Kept()
    memory = MemorySettings(policy="class_balanced")
    replay = ERStrategy(20 * classes, replay_batch=32, transform=nn.Identity(), memory=memory, seed=seed)
    options = {} if tasks == 1 else {"strategy": replay}
    trainer = quiet_trainer(folder, callbacks=[*callbacks, kept], max_epochs=-1, **options)
    stream = StreamDataModule(
        Custom(part, part),
        ClassIncremental(experiences=tasks),
        batch_size=32,
        preprocessing="unit",
        seed=seed,
    )
    torch.manual_seed(seed)
    trainer.fit(Lit(net, decay), datamodule=stream)
    return kept.models


def embed(model: Any, rows: Tensor) -> Tensor:
    """Unit features in float64: of the simplex head, or what goes into a learnable classifier."""
    *body, head = model.net
    with torch.no_grad():
        inputs = nn.Sequential(*body)(rows)
        inputs = head.head.junction(inputs) if hasattr(head, "head") else inputs
    return F.normalize(inputs.double(), dim=1)


def found(query_model: Any, gallery_model: Any, classes: range = range(CLASSES)) -> float:
    """The share of fresh queries whose nearest class mean in the gallery is that of their class, in plain words."""
    (queries, wanted), (gallery, owned) = blobs(1001, 100), blobs(1002, 50)
    asked, kept = embed(query_model, queries), embed(gallery_model, gallery)
    means = torch.stack([F.normalize(kept[owned == each].mean(0), dim=0) for each in classes])
    among = torch.isin(wanted, torch.tensor(classes))
    answers = (asked[among] @ means.T).argmax(1) + classes.start
    return float((answers == wanted[among]).double().mean())


def matrix(models: list[Any]) -> list[list[float]]:
    return [[found(q, g) if j <= i else float("nan") for j, g in enumerate(models)] for i, q in enumerate(models)]


@pytest.mark.parametrize(
    ("vertices", "decay"),
    [
        (K, 0.0),
        pytest.param(10, 0.0, marks=pytest.mark.slow),
        pytest.param(128, 0.0, marks=pytest.mark.slow),
        # far more vertices than classes: only decay takes away what the junction holds for the others at the start
        pytest.param(512, 0.02, marks=pytest.mark.slow),
    ],
)
def test_networks_that_never_met_search_each_others_galleries(tmp_path: Path, vertices: int, decay: float) -> None:
    one, two = (trained(tmp_path, MLP(s), DSimplex(vertices), decay=decay, seed=s)[0] for s in (0, 1))
    for queries, gallery in permutations((one, two)):
        assert found(queries, gallery) >= 0.95
        assert found(queries, queries) >= 0.97


def test_with_a_classifier_that_is_learned_they_do_not(tmp_path: Path) -> None:
    one, two = (trained(tmp_path, MLP(s), seed=s)[0] for s in (0, 1))
    for queries, gallery in permutations((one, two)):
        assert found(queries, gallery) <= 0.3
        assert found(queries, queries) >= 0.97


def test_classes_that_neither_has_seen_are_found_about_as_well_as_by_one_model_alone(tmp_path: Path) -> None:
    one, two = (trained(tmp_path, MLP(s), DSimplex(K), classes=6, seed=s)[0] for s in (0, 1))
    unseen = range(6, 10)
    alone = found(one, one, unseen)
    assert alone >= 0.5  # by chance 0.25
    assert found(two, one, unseen) == pytest.approx(alone, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_alignment_keeps_old_galleries_better_than_the_cross_entropy_alone(tmp_path: Path, seed: int) -> None:
    aligned, plain = (
        average_multi_model_accuracy(
            matrix(trained(tmp_path, MLP(seed), DSimplex(K, alignment=how), tasks=5, seed=seed))
        )
        for how in ("hoc", None)
    )
    assert aligned > plain


class Replaced(StreamCallback):
    """Another network from the third task on, as DSimplex puts one in, for a classifier that is learned."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def on_experience_start(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
        if experience.index == 2:
            pl_module.net = self.net
            trainer.strategy.setup_optimizers(trainer)
            backbone_changed(trainer, "another model takes its place")


def test_a_gallery_survives_a_better_network_of_another_architecture(tmp_path: Path) -> None:
    better = trained(tmp_path, MLP(7, hidden=96), DSimplex(K), seed=7)[0].net.requires_grad_(True)
    assert tuple(better[0].weight.shape) == (96, WIDTH)
    simplex = DSimplex(K, alignment="hoc", replacements={2: lambda: copy.deepcopy(better)}, folder=tmp_path)
    fixed = trained(tmp_path, MLP(0), simplex, tasks=5)
    other = trained(tmp_path, MLP(7, hidden=96), seed=7)[0].net.requires_grad_(True)
    learned = trained(tmp_path, MLP(0), Replaced(other), tasks=5)
    known = range(4)  # classes in the gallery of the second model, the last before the replacement
    for later in range(2, 5):
        assert found(fixed[later], fixed[1], known) >= 0.65
        assert found(learned[later], learned[1], known) <= 0.4  # by chance 0.25
        assert found(learned[later], learned[later], known) >= 0.9
