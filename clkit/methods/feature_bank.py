"""A gallery of features to search: which model they are of, what they show, and the nearest ones to a query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.arguments import check_arguments, in_short
from clkit.errors import ArgumentError, BatchError, ConfigurationError, NotFittedError, SignatureError, StateError
from clkit.files import read_checkpoint, write_checkpoint
from clkit.methods._checks import check_count, check_device, check_finite, check_width
from clkit.methods._state import exact
from clkit.methods.replay.contrast import wide
from clkit.methods.replay.rows import check_labels
from clkit.schema import Instance, Many, Numbers, OneOf, check_format, read_state, saved_entry

__all__ = ["FeatureBank", "Neighbours"]

_SHORTEST = 1e-12  # length up to which a feature has no direction
_QUERIES, _ROWS = 1024, 16384  # compared at a time: 64 MiB of cosines
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Neighbours(NamedTuple):
    """What a search finds, nearest first; equal scores come in any order.

    Attributes:
        scores: (Q, k) float32 cosines.
        rows: (Q, k) int64, numbers of rows in the bank in the order in which they were added.
        labels: (Q, k) int64, their labels.
    """

    scores: Tensor
    rows: Tensor
    labels: Tensor


class FeatureBank:
    """Features of a gallery that models with the same prototypes search, whichever of them wrote a row.

    Each row has the id of its model beside its label and its name, so that a gallery that several models wrote can be
    looked through. Rows are kept at unit length: d numbers of 4 bytes, or of 2 with ``storage="float16"``, which moves
    cosines by less than 1e-3.

    Args:
        width: d, of a feature.
        signature: Of the prototypes that all models share, as :meth:`SimplexHead.signature` gives it; any other text
            where the models share something else.
        storage: ``"float32"`` or ``"float16"``.
        device: Where the rows are kept and searched.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> bank = FeatureBank(width=2, signature="axis-simplex-v1/3")
        >>> names = ["a.png", "b.png"]
        >>> rows, labels = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([5, 9])
        >>> bank.add(rows, labels, names=names, model="phi_1", signature="axis-simplex-v1/3")
        >>> found = bank.search(torch.tensor([[1.0, 2.0]]), k=1, signature="axis-simplex-v1/3")
        >>> found.labels.tolist(), [bank.names[row] for row in found.rows[0]], bank.models
        ([[9]], ['b.png'], {'phi_1': 2})
    """

    _format = 1

    def __init__(
        self,
        width: int,
        signature: str,
        *,
        storage: Literal["float32", "float16"] = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        check_arguments(FeatureBank, locals())
        self.width = check_count("width", width)
        if not signature:
            raise ArgumentError("signature must say what the models share, got an empty string")
        self.signature, self.storage = signature, storage
        device = check_device(device)
        self._names: list[str] = []
        self._models: list[str] = []
        self._features = torch.empty(0, width, dtype=_DTYPES[storage], device=device)  # with room for more rows
        self._labels = torch.empty(0, dtype=torch.int64, device=device)
        self._model_of = torch.empty(0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._names)

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._features.device

    @property
    def features(self) -> Tensor:
        """The rows, (N, d) of unit length, as they are stored; a view that the next :meth:`add` may leave behind."""
        return self._features[: len(self)]

    @property
    def labels(self) -> Tensor:
        """Their labels, (N,) int64, -1 where none was given; a view."""
        return self._labels[: len(self)]

    @property
    def names(self) -> list[str]:
        """Their names, empty where none was given; the list itself, to be read only."""
        return self._names

    @property
    def models(self) -> dict[str, int]:
        """How many rows each model wrote, by its id in the order of first use."""
        counts = self._model_of[: len(self)].bincount(minlength=len(self._models))
        return dict(zip(self._models, counts.tolist(), strict=True))

    def model_of(self, rows: Tensor) -> list[str]:
        """Return the id of the model of each of some rows (m,)."""
        return [self._models[at] for at in self._model_of[: len(self)][rows.to(self.device)].tolist()]

    def add(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        model: str,
        signature: str,
        names: Sequence[str] | None = None,
    ) -> None:
        """Append rows.

        Args:
            features: (n, d) floating-point features of any length and device.
            labels: (n,) integers, such as class ids; -1 for none.
            model: Id of the model that they are of, such as a path or a task's number.
            signature: Of that model's prototypes.
            names: n strings, such as the files of the images.

        Raises:
            SignatureError: If the model has other prototypes. In each case nothing is changed.
            BatchError: If shapes, dtypes or numbers do not fit, or values are not finite.
            ArgumentError: If the model's id is empty.
        """
        self._check(features, signature, "features")
        if not isinstance(model, str) or not model:
            raise ArgumentError(f"model must be the id of the model that wrote the features, got {in_short(model)}")
        n = len(features)
        given = [""] * n if names is None else list(names)
        if len(given) != n or not all(isinstance(each, str) for each in given):
            raise BatchError(f"names must be {n} strings, one a row, got {len(given)} entries of {in_short(names)}")
        if labels is None:
            labels = torch.full((n,), -1)
        check_labels("labels", labels, n)
        with exact():
            rows = F.normalize(wide(features), dim=1, eps=_SHORTEST)
            models = self._models if model in self._models else [*self._models, model]
            columns = (rows, labels, torch.full((n,), models.index(model)))
            stored = (self._features, self._labels, self._model_of)
            grown = [_grown(column, len(self) + n) for column in stored]
            for column, new in zip(grown, columns, strict=True):
                column[len(self) : len(self) + n] = new
        self._features, self._labels, self._model_of = grown
        self._models = models
        self._names.extend(given)

    def search(
        self, queries: Tensor, k: int = 1, *, signature: str, backend: Literal["torch", "faiss"] = "torch"
    ) -> Neighbours:
        """Return the k nearest rows of each query by the cosine, from the whole bank.

        Args:
            queries: (Q, d) floating-point features of any length and device.
            k: From 1 to the number of rows.
            signature: Of the prototypes of the model that the queries are of.
            backend: ``"faiss"`` lets that library search, where it is installed, for whoever has a faster build of it.

        Raises:
            NotFittedError: If the bank is empty.
            SignatureError: If the model has other prototypes.
            BatchError: If the queries have another width, or values are not finite.
            ArgumentError: If k is not allowed.
            ConfigurationError: If faiss is asked for and not installed.
        """
        if not len(self):
            raise NotFittedError("the bank is empty, so there is nothing to search: add features first")
        self._check(queries, signature, "queries")
        if check_count("k", k) > len(self):
            raise ArgumentError(f"k must be at most {len(self)}, the number of rows in the bank, got {k}")
        if backend not in ("torch", "faiss"):
            raise ArgumentError(f"backend must be 'torch' or 'faiss', got {in_short(backend)}")
        with exact(), torch.autocast(self.device.type, enabled=False):
            rows = F.normalize(queries.to(self.device).float(), dim=1, eps=_SHORTEST)
            if backend == "faiss":
                scores, found = _search_by_faiss(rows, self.features, k)
            else:
                parts = [_nearest(part, self.features, k) for part in torch.split(rows, _QUERIES)]
                scores, found = (torch.cat(each) for each in zip(*parts, strict=True))
            return Neighbours(scores, found, self._labels[found])

    def save(self, path: str | Path) -> None:
        """Write the bank to a file, whole or not at all: one of that name is replaced only by a complete one.

        Raises:
            WriteError: If it cannot be written; the file from before is unchanged.
        """
        n = len(self)
        whole = n == len(self._features)
        features, labels, model_of = (
            each if whole else each[:n].clone()  # of a view the room for more rows would be saved too
            for each in (self._features, self._labels, self._model_of)
        )
        state = {
            "format": self._format,
            "signature": self.signature,
            "storage": self.storage,
            "models": self._models,
            "names": self._names,
            "features": features,
            "labels": labels,
            "model_of": model_of,
        }
        write_checkpoint(state, path)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> FeatureBank:
        """Return the bank in a file that :meth:`save` wrote; nothing in it is executed.

        Raises:
            ArgumentError: If there is no such file.
            StateError: If it is damaged or of another kind.
        """
        owner = f"{cls.__name__} in {path}"
        state = check_format(read_checkpoint(path), cls._format, owner)
        storage = saved_entry(state, "storage", OneOf(tuple(_DTYPES)), owner)
        table = {
            "format": OneOf((cls._format,)),
            "signature": Instance(str),
            "storage": OneOf((storage,)),
            "models": Many(Instance(str)),
            "names": Many(Instance(str)),
            "features": Numbers(("N", "D"), _DTYPES[storage], most=1.01),  # of unit length, rounded
            "labels": Numbers(("N",), least=-(2**63), most=2**63 - 1),
            "model_of": Numbers(("N",), least=0),
        }
        saved = read_state(state, table, owner)
        n, width = saved["features"].shape
        models, model_of = saved["models"], saved["model_of"]
        fits = len(saved["names"]) == n and len(set(models)) == len(models) and width > 0 and saved["signature"]
        if not fits or (n and int(model_of.max()) >= len(models)):
            raise StateError(
                f"{owner}: {n} rows of width {width} have {len(saved['names'])} names and are of {len(models)} models; "
                "the file is damaged"
            )
        bank = cls(width, saved["signature"], storage=storage, device=device)
        bank._names, bank._models = saved["names"], models
        bank._features, bank._labels, bank._model_of = (
            each.to(bank.device) for each in (saved["features"], saved["labels"], model_of)
        )
        return bank

    def _check(self, features: Tensor, signature: str, name: str) -> None:
        if signature != self.signature:
            raise SignatureError(
                f"the bank has features for the prototypes {self.signature!r}, and the {name} are of a model with "
                f"{in_short(signature)}: their cosines would mean nothing. Keep a bank for each signature"
            )
        check_width(name, features, self.width)
        check_finite(features)


def _grown(column: Tensor, needed: int) -> Tensor:
    """Return a column with room for so many rows, itself if it has."""
    if needed <= len(column):
        return column
    larger = column.new_empty(max(needed, len(column) * 3 // 2), *column.shape[1:])
    larger[: len(column)] = column
    return larger


def _nearest(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest cosines of each query, and their rows; a few gallery rows at a time."""
    scores = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(gallery), _ROWS):
        cosines = queries @ gallery[start : start + _ROWS].float().T
        best, at = cosines.topk(min(k, cosines.shape[1]), dim=1)
        scores, rows = torch.cat([scores, best], dim=1), torch.cat([rows, at + start], dim=1)
        if start:
            scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows.gather(1, order)
    return scores, rows


def _search_by_faiss(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ImportError as error:
        raise ConfigurationError(
            "backend='faiss' needs the package faiss, which is not installed; backend='torch' finds the same rows"
        ) from error
    sides = (np.ascontiguousarray(each.float().cpu().numpy()) for each in (queries, gallery))
    scores, rows = faiss.knn(*sides, k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores).to(queries.device), torch.from_numpy(rows).to(queries.device)
