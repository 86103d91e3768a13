"""The sums behind :class:`FeatureStatistics`: tables with a row per class, the Gram, and how they add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clkit.distributed import exchange_device, gather_rows, world_size
from clkit.errors import BatchError
from clkit.methods._checks import SMALL, Array, Batch, Ids
from clkit.methods._gram import add_gram_, new_gram

__all__ = ["Sums", "exchange_sums", "masked_batch_error"]

_CENTRE_LIMIT = 1e30  # centres are kept in float32, which ends at 3e38


@dataclass
class Sums:
    """The sums of one share of the data; row i of each table belongs to class ``ids[i]``.

    With squares or scatter, ``sums`` holds the sum of ``feature - centre``, where the centre of a class is its first
    row rounded to float32, and ``scatter`` the products of these differences, of all classes together: means, squares
    and scatter then keep their digits whatever the offset of the features.
    """

    ids: Ids
    tables: dict[str, Tensor]
    gram: Tensor | None = None
    scatter: Tensor | None = None

    @classmethod
    def empty(cls, width: int, kept: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> Sums:
        """Return sums of nothing."""
        tables = {"counts": torch.zeros(0, dtype=torch.int64, device=device)}
        if "squares" in kept or "scatter" in kept:
            tables["centres"] = torch.zeros(0, width, dtype=torch.float32, device=device)
        for name, shape in {"sums": (width,), "squares": (width,), "class_grams": (width, width)}.items():
            if name in kept:
                tables[name] = torch.zeros(0, *shape, dtype=dtype, device=device)
        grams = [new_gram(width, dtype, device) if name in kept else None for name in ("gram", "scatter")]
        return cls(np.empty(0, dtype=np.int64), tables, *grams)

    def to(self, device: torch.device, copy: bool = False) -> Sums:
        """Return the same on ``device``, sharing memory where nothing moves unless ``copy``."""
        tables = {name: table.to(device, copy=copy) for name, table in self.tables.items()}
        grams = [
            new_gram(len(gram), gram.dtype, device).copy_(gram)
            if gram is not None and (copy or gram.device != device)
            else gram
            for gram in (self.gram, self.scatter)
        ]
        return Sums(self.ids, tables, *grams)

    def add(self, rows: Tensor, batch: Batch) -> None:
        """Add the rows of a batch."""
        rows = rows if batch.finite is None else torch.where(batch.finite, rows, 0.0)
        positions = self._include(batch.ids)
        tables, at = self._arrays(positions, batch)
        values = rows.numpy() if batch.on_host else rows
        if "centres" in tables:
            relative = _relative_to_centres(tables, at, values, batch)
            if self.scatter is not None:
                add_gram_(self.scatter, relative if isinstance(relative, Tensor) else torch.from_numpy(relative), 1.0)
            _add_centred(tables, at, relative, batch)
        elif "sums" in tables:
            tables["sums"][at] += _summed(values, batch)
        tables["counts"][at] += batch.counts
        self._add_grams(positions, rows, batch, 1.0)

    def remove(self, rows: Tensor, batch: Batch) -> None:
        """Take rows out; the caller has made sure that they are there."""
        positions = np.searchsorted(self.ids, batch.ids)
        tables, at = self._arrays(positions, batch)
        values = rows.numpy() if batch.on_host else rows
        if "centres" in tables:
            relative = values - _double(tables["centres"][at])[batch.inverse]
            if self.scatter is not None:
                add_gram_(self.scatter, relative if isinstance(relative, Tensor) else torch.from_numpy(relative), -1.0)
            _remove_centred(tables, at, relative, batch)
        elif "sums" in tables:
            tables["sums"][at] -= _summed(values, batch)
        tables["counts"][at] -= batch.counts
        self._add_grams(positions, rows, batch, -1.0)
        self.drop_empty()
        for gram in (self.gram, self.scatter):
            if gram is not None and self.ids.size == 0:
                gram.zero_()  # nothing is left, not even rounding

    def merge(self, other: Sums) -> None:
        """Add the sums of another share."""
        positions = self._include(other.ids)
        own, at = self.tables, torch.from_numpy(positions).to(self.tables["counts"].device)
        before, added = _double(own["counts"][at])[:, None], other.tables["counts"][:, None]
        if "sums" in own:
            total = _double(other.tables["sums"])
            if "centres" in own:
                origins = _double(other.tables["centres"])
                _open_centres(own, at, before == 0, origins)
                moves = origins - own["centres"][at]
                if self.scatter is not None and other.scatter is not None:
                    self.scatter.add_(other.scatter_around(moves))
                total = total + moves * added
                if "squares" in own:
                    _merge_squares(own, at, before, added, total / added, _double(other.tables["squares"]))
            own["sums"][at] += total
        if "class_grams" in own:
            own["class_grams"][at] += other.tables["class_grams"]
        own["counts"][at] += other.tables["counts"]
        if self.gram is not None and other.gram is not None:
            self.gram.add_(other.gram)

    def scatter_around(self, moves: Tensor) -> Tensor:
        """Return the scatter as it is around other centres, which lie at the present ones less ``moves`` (k, D)."""
        assert self.scatter is not None
        if not bool(moves.any()):
            return self.scatter
        half: Tensor = moves.T @ (_double(self.tables["sums"]) + self.tables["counts"][:, None] * moves / 2)
        return half.add_(half.T.clone()).add_(self.scatter)

    def drop_empty(self) -> None:
        """Remove classes without samples."""
        kept = self.tables["counts"] > 0
        if not bool(kept.all()):
            self.tables = {name: table[kept] for name, table in self.tables.items()}
            self.ids = self.ids[kept.cpu().numpy()]

    def _include(self, ids: Ids) -> Ids:
        """Return the positions of ``ids``, after opening a row of zeros for each new one."""
        at = np.searchsorted(self.ids, ids)
        # none is new: the usual case by far
        if ids.size == 0 or (at[-1] < self.ids.size and (self.ids[at] == ids).all()):
            return at
        union = np.union1d(self.ids, ids)
        old = torch.from_numpy(np.searchsorted(union, self.ids)).to(self.tables["counts"].device)
        for name, table in self.tables.items():
            grown = table.new_zeros((union.size, *table.shape[1:]))
            self.tables[name] = grown.index_copy_(0, old, table)
        self.ids = union
        return np.searchsorted(union, ids)

    def _arrays(self, positions: Ids, batch: Batch) -> tuple[dict[str, Array], Array]:
        """Return tables and positions as the arrays of the batch are: tensors, or numpy's view of their memory."""
        if batch.on_host:
            return {name: table.numpy() for name, table in self.tables.items()}, positions
        return self.tables, torch.from_numpy(positions).to(self.tables["counts"].device)

    def _add_grams(self, positions: Ids, rows: Tensor, batch: Batch, weight: float) -> None:
        if self.gram is not None:
            add_gram_(self.gram, rows, weight)
        if "class_grams" in self.tables:
            for position, row in enumerate(positions.tolist()):
                add_gram_(self.tables["class_grams"][row], rows[batch.inverse == position], weight)


# In what follows, ``at`` are the positions of the classes of a batch in the tables. ``table[at] += values`` adds in
# the wider of the two dtypes and rounds once, with numpy as with torch.


def _double(rows: Array) -> Array:
    return rows.astype(np.float64, copy=False) if isinstance(rows, np.ndarray) else rows.to(torch.float64)


def _summed(rows: Array, batch: Batch) -> Array:
    """Return the (u, D) sums of the rows (n, D) of each class; the order of adding, and so every bit, is fixed."""
    if not batch.on_host or (batch.one_hot is not None and rows.size <= SMALL):
        return batch.one_hot @ rows
    total = torch.zeros(batch.ids.size, rows.shape[1], dtype=torch.float64)
    return total.index_add_(0, torch.from_numpy(batch.inverse), torch.from_numpy(rows)).numpy()


def _relative_to_centres(tables: dict[str, Array], at: Array, rows: Array, batch: Batch) -> Array:
    """Return the rows less the centre of their class, its first row; zeros if the batch turned out not to be finite."""
    before = tables["counts"][at][:, None]
    if batch.finite is not None or not before.all():
        _open_centres(tables, at, before == 0, rows[batch.first])
    relative = rows - tables["centres"][at][batch.inverse]  # in float64, as the rows are
    return relative if batch.finite is None else torch.where(batch.finite, relative, 0.0)


def _add_centred(tables: dict[str, Array], at: Array, relative: Array, batch: Batch) -> None:
    """Add to sums and squares, and use up the rows; counts are still those from before."""
    total = _summed(relative, batch)
    if "squares" in tables:
        before = tables["counts"][at][:, None]
        means = total / batch.weights
        relative -= means[batch.inverse]
        relative *= relative
        added = batch.weights if batch.finite is None else batch.weights * batch.finite
        _merge_squares(tables, at, before, added, means, _summed(relative, batch))
    tables["sums"][at] += total


def _remove_centred(tables: dict[str, Array], at: Array, relative: Array, batch: Batch) -> None:
    """Do the opposite of :func:`_add_centred`; counts are still those from before."""
    before = _double(tables["counts"][at])[:, None]
    after = before - batch.weights
    total = _summed(relative, batch)
    if "squares" not in tables:
        tables["sums"][at] -= total
        return
    means = total / batch.weights
    relative -= means[batch.inverse]
    sums, squares = tables["sums"][at], tables["squares"][at]
    rest = _double(sums) - total
    delta = means - rest / (after + (after == 0))
    left = squares - _summed(relative * relative, batch) - delta * delta * (after * batch.weights / before)
    sums[:], squares[:] = rest, left.clip(0) * (after > 1)  # rounds where sums are float32
    tables["sums"][at], tables["squares"][at] = sums, squares


def _open_centres(tables: dict[str, Array], at: Array, fresh: Array, rows: Array) -> None:
    """Give each class without samples, whose centre is zero, its row of ``rows`` for a centre."""
    tables["centres"][at] += rows.clip(-_CENTRE_LIMIT, _CENTRE_LIMIT) * fresh


def _merge_squares(
    tables: dict[str, Array], at: Array, before: Array, added: Array, means: Array, spread: Array
) -> None:
    """Apply Chan's rule; ``sums`` and ``counts`` are still those from before."""
    together = before + added
    delta = _double(tables["sums"][at]) / (before + (before == 0))
    delta -= means
    delta *= delta
    delta *= before * added / (together + (together == 0))
    delta += spread
    tables["squares"][at] += delta


def masked_batch_error(number: int, rank: int | None = None) -> BatchError:
    """Return the error of a batch that was masked on its device."""
    where = "" if rank is None else f" of rank {rank}"
    return BatchError(
        f"features of batch number {number}{where} were not finite (or above 1e+100 in magnitude); "
        f"that batch was not learned, everything else is unchanged"
    )


def exchange_sums(own: Sums, bad: int, group: Any) -> Sums | None:
    """Return the total of all ranks, with the same bits on every rank, or ``None`` if nobody has anything.

    ``bad`` is the number of the batch that was masked on this rank, 0 for none: its error is raised on all ranks.
    """
    device = exchange_device(own.tables["counts"].device, group)
    headers = gather_rows(torch.tensor([own.ids.size, bad], device=device), [2] * world_size(group), group=group)
    sizes = [int(header[0]) for header in headers]
    for rank, header in enumerate(headers):
        if number := int(header[1]):
            raise masked_batch_error(number, rank)
    if max(sizes) == 0:
        return None
    own = own.to(device)
    grams = own.tables.pop("class_grams", None)
    tables = (torch.from_numpy(own.ids).to(device), *own.tables.values())
    total = Sums(own.ids[:0], {name: table[:0].clone() for name, table in own.tables.items()})
    for ids, *rows in zip(*[gather_rows(table, sizes, group=group) for table in tables], strict=True):
        total.merge(Sums(ids.cpu().numpy(), dict(zip(own.tables, rows, strict=True))))
    if own.gram is not None:
        total.gram = own.gram.clone()
        dist.all_reduce(total.gram, group=group)
    if own.scatter is not None:
        at = torch.from_numpy(np.searchsorted(total.ids, own.ids)).to(device)
        moves = _double(own.tables["centres"]) - total.tables["centres"][at]
        total.scatter = own.scatter_around(moves).to(own.scatter.dtype, copy=True).contiguous()
        dist.all_reduce(total.scatter, group=group)
    if grams is not None:
        total.tables["class_grams"] = grams.new_zeros((total.ids.size, *grams.shape[1:]))
        total.tables["class_grams"][torch.from_numpy(np.searchsorted(total.ids, own.ids)).to(device)] = grams
        for one in total.tables["class_grams"]:  # class by class: the whole is too large for one message
            dist.all_reduce(one, group=group)
    return total
