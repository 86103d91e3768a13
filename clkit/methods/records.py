"""What an error predictor learns from: a bounded table of errors that is the same in whatever order they came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import Ids, check_choice, check_count, check_number
from clkit.methods._error_models import ERROR_LIMIT
from clkit.methods._keyed_rows import Keys, keys_of
from clkit.methods._keyed_table import KeyedTable, integers, matrix
from clkit.methods._state import exact
from clkit.schema import Kind, Numbers

__all__ = ["ErrorRecords", "Source", "WeightedRecords", "sample_keys"]

Source: TypeAlias = Literal["prequential", "loo", "gaussian", "novel", "calibration", "validation", "seen"]
_SOURCES = get_args(Source)
_BALANCED: tuple[Source, ...] = ("loo", "gaussian")  # made from rows of which each class has about as many


def sample_keys(seed: int, ids: Tensor) -> Keys:
    """Return the 64-bit key of each sample, which decides what bounded tables keep: the smallest ones.

    Args:
        seed: At least 0.
        ids: (B,) integer ids of samples, at least 0.

    Returns:
        (B,) uint64 numpy array, ``splitmix64(splitmix64(seed) xor id)``; no two ids share a key.

    Raises:
        ArgumentError: If the seed is not allowed.
        BatchError: If the ids are not.

    Example:
        >>> [hex(key) for key in sample_keys(0, torch.tensor([0, 1]))]
        ['0xa706dd2f4d197e6f', '0x8b4fda8c892b50e']

    Source: G. L. Steele Jr., D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", 2014 (the mixer).
    """
    return keys_of(check_count("seed", seed, at_least=0), integers("ids", ids, None))


class WeightedRecords(NamedTuple):
    """Records in the order of their keys, as :meth:`ErrorPredictor.fit` takes them.

    Attributes:
        phi: (N, K) float64.
        error: (N,) float64.
        weight: (N,) float64.
    """

    phi: Tensor
    error: Tensor
    weight: Tensor


class ErrorRecords(KeyedTable):
    """A bounded table of errors that were made on samples not yet learned, by where they come from.

    Of each source it keeps the ``capacity // sources`` records with the smallest :func:`sample_keys`, so that what an
    error predictor is fitted to depends on the set of records only, as in :class:`FeatureMemory`. Features are frozen
    when a record is made.

    ``"prequential"`` records are of batches before they were learned, ``"loo"`` of memory rows left out of the head,
    ``"gaussian"`` of rows drawn from class statistics, ``"novel"`` of rows whose whole class was left out,
    ``"calibration"`` and ``"validation"`` of samples kept out of training, ``"seen"`` of learned ones (their features
    have to say so).

    Args:
        capacity: Most records; K · 8 bytes each, and 56.
        seed: Of the keys, at least 0.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> records = ErrorRecords(100)
        >>> phi, error = torch.rand(3, 2), torch.tensor([0.0, 1.0, float("nan")])
        >>> records.add("prequential", phi, error, ids=torch.arange(3))
        >>> records.add("novel", phi[:1], torch.ones(1), ids=torch.arange(1))
        >>> records.counts, records.rejected
        ({'prequential': 2, 'novel': 1}, 1)
        >>> [round(each, 3) for each in records.training_set(novelty=0.1).weight.tolist()]
        [1.0, 1.0, 0.222]
    """

    _columns: Mapping[str, torch.dtype] = {
        "phi": torch.float64,
        "error": torch.float64,
        "label": torch.int64,
        "experience": torch.int64,
        "step": torch.int64,
    }
    _last_stratum = len(_SOURCES) - 1

    def __init__(self, capacity: int = 4096, seed: int = 0) -> None:
        check_arguments(ErrorRecords, locals())
        super().__init__(capacity, seed, "cpu")

    @property
    def counts(self) -> dict[str, int]:
        """Records of each source that has some."""
        numbers = np.bincount(self._rows.read()[1], minlength=len(_SOURCES)).tolist()
        return {source: number for source, number in zip(_SOURCES, numbers, strict=True) if number}

    def admits(self, source: Source, ids: Tensor) -> Tensor:
        """Return which records may be kept, (B,) bool: the others need no features, since they certainly are not.

        Raises:
            ArgumentError: If there is no such source.
            BatchError: If the ids are no integers from 0.
        """
        names = integers("ids", ids, None)
        return torch.from_numpy(self._rows.admits(names, np.full_like(names, _code(source))))

    def add(
        self,
        source: Source,
        phi: Tensor,
        error: Tensor,
        ids: Tensor,
        labels: Tensor | None = None,
        experience: int = 0,
        step: int = 0,
    ) -> None:
        """Offer records. Those that are not finite, negative or above 1e30 are left out and counted as rejected.

        Args:
            source: Where they come from.
            phi: (B, K) floating-point features.
            error: (B,) losses.
            ids: (B,) ids of the samples, at least 0; a record of a sample replaces its last one of the source.
            labels: (B,) class ids, for ``"loo"`` and ``"gaussian"`` records, whose weights need them.
            experience: In which they were made.
            step: At which they were made.

        Raises:
            ArgumentError: If there is no such source, or labels are missing.
            BatchError: If shapes or dtypes do not fit; nothing is changed then.
        """
        with exact():
            good, names, columns = self._checked(source, phi, error, ids, labels, experience, step)
            self._take(source, good, names, columns)

    def replace(
        self,
        source: Source,
        phi: Tensor,
        error: Tensor,
        ids: Tensor,
        labels: Tensor | None = None,
        experience: int = 0,
        step: int = 0,
    ) -> None:
        """Forget all records of the source and :meth:`add` these, as after the head has changed."""
        with exact():
            good, names, columns = self._checked(source, phi, error, ids, labels, experience, step)
            self._rows.remove(self._rows.read()[1] == _code(source))
            self._take(source, good, names, columns)

    def training_set(
        self, counts: Mapping[int, int] | None = None, *, novelty: float = 0.05, holdout: float = 0.0
    ) -> WeightedRecords:
        r"""Return the records to fit, with their weights.

        A record of a class-balanced source weighs :math:`n_c` / records of class c there, so that classes count as in
        the stream; weights of each source have mean 1. Records of novel classes together weigh :math:`\pi/(1-\pi)` of
        all others together, and 1 each where there are no others.

        Args:
            counts: Samples learned of each class; ``None`` where classes are about as frequent. A class that is not in
                it has no weight.
            novelty: :math:`\pi`, the share of inputs of classes never seen that is to expect, from 0 to below 1; with 0
                there are no such records.
            holdout: Share that is not to be fitted, but is what :meth:`held_out` gives: 0 or 1/n.

        Raises:
            ArgumentError: If an argument is not allowed.
        """
        if not check_number("novelty", novelty, at_least=0) < 1:
            raise ArgumentError(f"novelty must be below 1, got {novelty}")
        with exact():
            _, strata, keys, columns = self._rows.read()
            novel = strata == _code("novel")
            used = (novel & (novelty > 0)) | (~novel & ~_held_out(keys, holdout))
            strata, novel = strata[used], novel[used]
            at = torch.from_numpy(np.flatnonzero(used))
            weight = self._ordinary_weights(strata, columns["label"][at].numpy(), counts)
            if novel.any() and not novel.all():
                share = novelty / (1 - novelty) * weight[~novel].sum() / novel.sum()
                weight[novel] = share
            return WeightedRecords(columns["phi"][at], columns["error"][at], torch.from_numpy(weight))

    def held_out(self, counts: Mapping[int, int] | None = None, *, holdout: float = 0.2) -> WeightedRecords:
        """Return the records that are not fitted, for thresholds: of the ordinary ones every n-th by key.

        Takes and raises what :meth:`training_set` does.
        """
        with exact():
            _, strata, keys, columns = self._rows.read()
            used = (strata != _code("novel")) & _held_out(keys, holdout)
            at = torch.from_numpy(np.flatnonzero(used))
            weight = self._ordinary_weights(strata[used], columns["label"][at].numpy(), counts)
            return WeightedRecords(columns["phi"][at], columns["error"][at], torch.from_numpy(weight))

    @staticmethod
    def _ordinary_weights(strata: Ids, labels: Ids, counts: Mapping[int, int] | None) -> Any:
        weight = np.ones(strata.size)
        for source in _BALANCED if counts is not None else ():
            own = np.flatnonzero(strata == _code(source))
            classes, of, rows = np.unique(labels[own], return_inverse=True, return_counts=True)
            seen = np.array([(counts or {}).get(each, 0) for each in classes.tolist()], dtype=np.float64)
            weight[own] = (seen / rows)[of]
            if seen.sum() > 0:
                weight[own] /= weight[own].mean()
        return weight

    def _checked(
        self,
        source: Source,
        phi: Tensor,
        error: Tensor,
        ids: Tensor,
        labels: Tensor | None,
        experience: int,
        step: int,
    ) -> tuple[Tensor, Ids, dict[str, Tensor]]:
        """Return which records can be used, and the names and columns of all."""
        _code(source)
        check_count("experience", experience, at_least=0)
        check_count("step", step, at_least=0)
        rows = matrix("phi", phi).cpu().double()
        n = len(rows)
        if self.width not in (None, rows.shape[1]):
            raise BatchError(f"phi must have {self.width} features as before, got {rows.shape[1]}; nothing was changed")
        if not isinstance(error, Tensor) or error.shape != (n,) or error.dtype.is_complex:
            seen = tuple(error.shape) if isinstance(error, Tensor) else type(error).__name__
            raise BatchError(f"error must be a tensor of shape ({n},), one loss a record, got {seen}")
        if labels is None and source in _BALANCED:
            raise ArgumentError(f"labels are needed with records of the source {source!r}: weights depend on the class")
        of = np.full(n, -1, dtype=np.int64) if labels is None else integers("labels", labels, n, least=-1)
        losses = error.detach().cpu().double()
        # a feature of 1e100 has a square that can be summed
        good = (rows.abs() < 1e100).all(dim=1) & (losses >= 0) & (losses <= ERROR_LIMIT)
        columns = {
            "phi": rows,
            "error": losses,
            "label": torch.from_numpy(of),
            "experience": torch.full((n,), experience),
            "step": torch.full((n,), step),
        }
        return good, integers("ids", ids, n), columns

    def _take(self, source: Source, good: Tensor, names: Ids, columns: Mapping[str, Tensor]) -> None:
        at = good.nonzero()[:, 0]
        kept = names[at.numpy()]
        self._rows.add(kept, np.full_like(kept, _code(source)), {name: each[at] for name, each in columns.items()})
        self._refused_here += len(good) - len(at)

    def _column_kinds(self) -> dict[str, Kind]:
        return {
            "phi": Numbers(("N", "K"), torch.float64, most=1e100),
            "error": Numbers(("N",), torch.float64, least=0, most=ERROR_LIMIT),
            "label": Numbers(("N",), least=-1),
            "experience": Numbers(("N",), least=0),
            "step": Numbers(("N",), least=0),
        }


def _code(source: Source) -> int:
    return _SOURCES.index(check_choice("source", source, _SOURCES))


def _held_out(keys: Keys, holdout: float) -> Any:
    """Return which records are held out: those whose key is a multiple of n, where the share is 1/n."""
    if check_number("holdout", holdout, at_least=0) == 0:
        return np.zeros(keys.size, dtype=np.bool_)
    n = round(1 / holdout)
    if n < 2 or abs(holdout * n - 1) > 1e-9:
        raise ArgumentError(f"holdout must be 0 or 1/n for a whole number n of at least 2, got {holdout}")
    return keys % np.uint64(n) == 0
