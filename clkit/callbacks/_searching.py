"""How queries of each model of a run fare in the galleries that the models before it wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from clkit.arguments import in_short
from clkit.data.loader import Fetcher, cut_batches
from clkit.data.preprocessing import settled_preprocessing
from clkit.data.sources import resolve_source
from clkit.data.sources.base import data_root
from clkit.distributed import share_buffers
from clkit.errors import ArgumentError, ConfigurationError, DataError, StateError
from clkit.features.batch import Readings
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap
from clkit.metrics.compatibility import (
    average_compatibility,
    average_multi_model_accuracy,
    backward_compatibility,
    forward_compatibility,
)
from clkit.metrics.retrieval import identification
from clkit.schema import Many, Numbers, Real, Table, read_state
from clkit.stream._lightning import datamodule_of

__all__ = ["Searching"]

_PARTS = ("train", "test")
_TABLE: Table = {
    "scores": Many(Many(Real(0, 1))),
    "galleries": Many(Numbers(("N", "D"), torch.float16, most=1.01)),  # of unit length, rounded
}


class Searching:
    """Fills the matrix of a run: one row after each experience.

    Args:
        owner: Whose it is, for messages.
        queries: What is searched for: ``"SOURCE/train"``, ``"SOURCE/test"``, or batches that can be read again.
        gallery: What is searched, likewise.

    Raises:
        ArgumentError: If one alone is given, or one is neither.
    """

    def __init__(self, owner: str, queries: str | Iterable[Any] | None, gallery: str | Iterable[Any] | None) -> None:
        self._owner = owner
        self._sides: dict[str, Any] = {"queries": queries, "gallery": gallery}
        given = [name for name, side in self._sides.items() if side is not None]
        self.wanted = len(given) == 2
        if len(given) == 1:
            (missing,) = self._sides.keys() - given
            raise ArgumentError(f"{given[0]} is given and {missing} is not; a search needs both")
        for name in given:
            side = self._sides[name]
            if isinstance(side, str) and (side.rpartition("/")[2] not in _PARTS or "/" not in side[1:]):
                raise ArgumentError(f"{name} must be a source and its part, such as 'npz:cifar10/test', got {side!r}")
            if not isinstance(side, str) and (not hasattr(side, "__iter__") or iter(side) is side):
                raise ArgumentError(
                    f"{name} must be batches that can be read again, a DataLoader, got {in_short(side)}"
                )
        self._scores: list[list[float]] = []
        self._galleries: list[Tensor] = []  # (N, d) float16 of unit length on the CPU, by model

    @property
    def matrix(self) -> Tensor:
        """How queries of model i fare in the gallery of model j, (T, T) float64, ``NaN`` above the diagonal."""
        count = len(self._scores)
        rows = [[*row, *[float("nan")] * (count - len(row))] for row in self._scores]
        return torch.tensor(rows, dtype=torch.float64).reshape(count, count)

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse sources that cannot be read, before anything is learned."""
        for side in self._sides.values():
            if isinstance(side, str):
                self._part(trainer, side)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, part: Any, model: int) -> None:
        """Add the row of a model, number ``model`` from 0 on; a call on all processes, each of which sees all."""
        if not self.wanted or model < len(self._scores):
            return
        if trainer.world_size > 1:
            share_buffers(trainer.strategy.model)
        with FeatureTap(module, part.layer) as tap:
            run = partial(forward, module, tap.network)
            queries, wanted = self._embedded(trainer, module, part, "queries", partial(tap.extract, run=run))
            gallery, owned = self._embedded(trainer, module, part, "gallery", partial(tap.extract, run=run))
        galleries = [*self._galleries, gallery.half()]
        self._scores.append([identification(queries, wanted, each.float(), owned) for each in galleries])
        self._galleries = galleries
        numbers = self.numbers()
        for logger in trainer.loggers:
            logger.log_metrics({f"compatibility/{name}": value for name, value in numbers.items()}, trainer.global_step)
        scores = " ".join(f"{100 * score:.1f}" for score in self._scores[-1])
        told = ", ".join(f"{name.upper()} {value:.3f}" for name, value in numbers.items())
        where = "its own gallery" if model == 0 else f"the galleries of models 1 to {model + 1}"
        rank_zero_info(f"clkit: {self._owner}: model {model + 1} in {where}: {scores} %; {told}")

    def numbers(self) -> dict[str, float]:
        """Return AM, and where there are two models AC, BC and FC."""
        numbers = {"am": average_multi_model_accuracy(self.matrix)}
        if len(self._scores) > 1:
            of = {"ac": average_compatibility, "bc": backward_compatibility, "fc": forward_compatibility}
            numbers |= {name: function(self.matrix) for name, function in of.items()}
        return numbers

    def _embedded(
        self, trainer: pl.Trainer, module: pl.LightningModule, part: Any, name: str, extract: Any
    ) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        for batch in self._batches(trainer, module, self._sides[name]):
            inputs, ids = Readings.of(trainer).read(part, batch)
            moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(inputs))
            with trainer.precision_plugin.forward_context():
                features.append(F.normalize(extract(moved).float(), dim=1).cpu())
            assert ids is not None
            labels.append(ids.cpu())
        if not features:
            raise DataError(f"{self._owner}: {name} gave no batch")
        return torch.cat(features), torch.cat(labels)

    def _batches(self, trainer: pl.Trainer, module: pl.LightningModule, side: Any) -> Iterator[Any]:
        if not isinstance(side, str):
            yield from side
            return
        rows, data = self._part(trainer, side), datamodule_of(trainer)
        fetcher = Fetcher(rows, rows.targets, settled_preprocessing(data.preprocessing, rows, module))
        for at in cut_batches(np.arange(len(rows)), data.eval_batch_size):
            yield fetcher[0, at]

    def _part(self, trainer: pl.Trainer, side: str) -> Any:
        data = datamodule_of(trainer)
        if not hasattr(data, "preprocessing"):
            raise ConfigurationError(
                f"{self._owner}: {side!r} is prepared as a StreamDataModule prepares its images, and there is none; "
                "give queries and gallery as loaders"
            )
        spec, _, name = side.rpartition("/")
        rows = resolve_source(spec).load(data_root(data.root))[name == "test"]
        if not len(rows):
            raise DataError(f"{self._owner}: {spec} has nothing in its {name} part")
        return rows

    # ---- state

    def state(self) -> dict[str, Any]:
        """Return the scores and the galleries, two bytes for each number of a feature."""
        return {"scores": [list(row) for row in self._scores], "galleries": list(self._galleries)}

    def load(self, state: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            StateError: If they are damaged.
        """
        saved = read_state(state, _TABLE, f"{self._owner}: searched")
        scores, galleries = saved["scores"], saved["galleries"]
        if len(galleries) != len(scores) or any(len(row) != at + 1 for at, row in enumerate(scores)):
            raise StateError(f"{self._owner}: {len(galleries)} galleries and {len(scores)} rows of scores do not fit")
        self._scores, self._galleries = scores, galleries
