"""Small runs of replay learning that its tests look at: a network, a stream of unequal parts, and who watches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.methods import Mixing, OnProLosses
from clkit.strategies import ERStrategy, MemorySettings, OnProStrategy, Projection, ReplayStrategy

# 2, 3 and 1 classes; 4, 6 and 2 batches of at most 5, because equal experiences would hide lost ones
SAMPLES = (9, 8, 5, 12, 11, 7)
BATCHES = ((5, 4, 4, 4), (5, 5, 5, 5, 4, 4), (4, 3))


class Net(nn.Module):
    def __init__(self, *, norm: bool = True, dropout: float = 0.0, classes: int = 6, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        logits: Tensor = self.fc(self.drop(rows))
        return logits


class Lit(pl.LightningModule):
    """As in Lightning's tutorials: it trains its own network and has never heard of another part."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = Net(**options)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("the strategy computes the loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)


def lit(kind: Callable[..., Any] = Lit, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**options)


def onpro(kind: Callable[..., Any] = OnProStrategy, **options: Any) -> Any:
    """A small strategy; its settings are told apart by their names, as far as the kind has them."""
    options = {"capacity": 20, "rotation": "none", "replay_batch": 12, **options}
    parts: dict[str, Any] = {}
    if kind is not OnProStrategy:
        del options["rotation"]
    of_onpro = {"losses": OnProLosses, "mixing": Mixing} if kind is OnProStrategy else {}
    for name, settings in {**of_onpro, "memory": MemorySettings}.items():
        known = {each.name for each in fields(settings)}
        given = {key: options.pop(key) for key in list(options) if key in known}
        if given:
            parts[name] = settings(**given)
    if "dim" in options:
        parts["projection"] = Projection(dim=options.pop("dim"))
    return kind(**parts, **options)


def er(**options: Any) -> Any:
    return onpro(ERStrategy, **options)


def images_of(labels: Tensor, seed: int, channels: int = 3, size: int = 4) -> Tensor:
    noise = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(seed))
    noise[:, 0] += labels[:, None, None]
    return noise


def dataset(seed: int = 0, **options: Any) -> TensorDataset:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(SAMPLES)])
    return TensorDataset(images_of(labels, seed, **options), labels)


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=2, classes_per_experience=3)
    return StreamDataModule(Custom(dataset(0), dataset(1)), scenario, **{"batch_size": 5, **options})


def loader(*batches: tuple[Tensor, Tensor]) -> Any:
    given: Any = list(batches)  # a list is a map-style data set
    return DataLoader(given, batch_size=None)


def batch(*labels: int, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(labels, dtype=torch.int64)
    return images_of(ids, seed, **options), ids


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Watch(pl.Callback):
    """What is trained and what is logged, batch by batch."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.labels: list[int] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.images.append(batch[0].clone())
        self.labels += batch[1].tolist()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Offers:
    """What the memory was offered."""

    def __init__(self, strategy: ReplayStrategy) -> None:
        assert strategy.memory is not None
        self.images: list[Tensor] = []
        self.labels: list[int] = []
        self.experiences: list[Any] = []
        self.add = strategy.memory.add
        memory: Any = strategy.memory
        memory.add = self

    def __call__(self, images: Tensor, labels: Tensor, experience: Any, **extras: Tensor) -> None:
        self.images.append(images.clone())
        self.labels += labels.tolist()
        self.experiences.append(experience)
        self.add(images, labels, experience, **extras)
