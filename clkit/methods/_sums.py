"""The sums behind :class:`FeatureStatistics`: tables with a row per class, the Gram, and how they add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clkit.distributed import gather_rows, world_size
from clkit.errors import BatchError
from clkit.methods._checks import Array, Batch, Ids
from clkit.methods._gram import add_gram_, new_gram

__all__ = ["Sums", "exchange_sums", "raise_for_batch"]

_CENTRE_LIMIT = 1e30  # centres are kept in float32, which ends at 3e38


class Sums:
    """The sums of one share of the data.

    With squares, ``sums`` holds the sum of ``feature - centre``, where the centre of a class is its first row rounded
    to float32: means and squares then keep their digits whatever the offset of the features.
    """

    def __init__(self, width: int, parts: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.ids: Ids = np.empty(0, dtype=np.int64)
        self.tables = {"counts": torch.zeros(0, dtype=torch.int64, device=device)}
        if "squares" in parts:
            self.tables["centres"] = torch.zeros(0, width, dtype=torch.float32, device=device)
        for name, shape in {"sums": (width,), "squares": (width,), "class_grams": (width, width)}.items():
            if name in parts:
                self.tables[name] = torch.zeros(0, *shape, dtype=dtype, device=device)
        self.gram = new_gram(width, dtype, device) if "gram" in parts else None

    @classmethod
    def of(cls, ids: Ids, tables: dict[str, Tensor], gram: Tensor | None = None) -> Sums:
        """Collect existing tensors."""
        sums = object.__new__(cls)
        sums.ids, sums.tables, sums.gram = ids, tables, gram
        return sums

    def to(self, device: torch.device, copy: bool = False) -> Sums:
        """Return the same on ``device``, sharing memory where nothing moves unless ``copy``."""
        gram = self.gram
        if gram is not None and (copy or gram.device != device):
            gram = new_gram(gram.shape[0], gram.dtype, device).copy_(gram)
        return Sums.of(self.ids, {name: table.to(device, copy=copy) for name, table in self.tables.items()}, gram)

    def totals(self) -> Tensor:
        """Return the (k, D) sums of the features themselves."""
        sums = self.tables["sums"]
        if "centres" not in self.tables:
            return sums.clone()
        counts = self.tables["counts"].to(torch.float64)[:, None]
        total = torch.addcmul(sums.to(torch.float64), counts, self.tables["centres"].to(torch.float64))
        return total.to(sums.dtype)

    def means(self) -> Tensor:
        """Return the (k, D) float64 mean features."""
        relative = self.tables["sums"].to(torch.float64) / self.tables["counts"][:, None]
        return relative + self.tables["centres"].to(torch.float64) if "centres" in self.tables else relative

    def deviations(self) -> Tensor:
        """Return the (k, D) float64 standard deviations (Bessel-corrected), 0 for a class of one sample."""
        degrees = (self.tables["counts"] - 1).clamp(min=1)[:, None]
        return (self.tables["squares"].to(torch.float64) / degrees).sqrt()

    def refuse_removal(self, batch: Batch) -> None:
        """Raise a BatchError if the batch has more samples of a class than there are."""
        held = dict(zip(self.ids.tolist(), self.tables["counts"].tolist(), strict=True))
        for class_id, count in zip(batch.ids.tolist(), batch.counts.tolist(), strict=True):
            if count > held.get(class_id, 0):
                raise BatchError(
                    f"cannot subtract {count} samples of class {class_id}: only {held.get(class_id, 0)} were learned; "
                    f"nothing was changed"
                )

    def add(self, rows: Tensor, batch: Batch) -> None:
        """Add the rows of a batch."""
        at = self._include(batch.ids)
        own = self._rows(at, batch.on_host)
        rows = batch.masked(rows)
        if "squares" in self.tables:
            _add_centred(own, batch.array(rows), batch)
        elif "sums" in self.tables:
            own.increase("sums", batch.summed(batch.array(rows)))
        own.increase("counts", batch.masked(batch.counts))
        self._add_grams(at, rows, batch, 1.0)

    def remove(self, rows: Tensor, batch: Batch) -> None:
        """Take rows out; the caller has made sure that they are there."""
        at = np.searchsorted(self.ids, batch.ids)
        own = self._rows(at, batch.on_host)
        if "squares" in self.tables:
            _remove_centred(own, batch.array(rows), batch)
        elif "sums" in self.tables:
            own.put("sums", own["sums"] - batch.summed(batch.array(rows)))
        own.put("counts", own["counts"] - batch.counts)
        self._add_grams(at, rows, batch, -1.0)
        self.drop_empty()
        if self.gram is not None and self.ids.size == 0:
            self.gram.zero_()  # nothing is left, not even rounding

    def merge(self, other: Sums) -> None:
        """Add the sums of another share."""
        own = self._rows(self._include(other.ids))
        before, added = own.double("counts")[:, None], other.tables["counts"][:, None]
        if "sums" in self.tables:
            total = other.tables["sums"].to(torch.float64)
            if "squares" in self.tables:
                origins = other.tables["centres"].to(torch.float64)
                _open_centres(own, before == 0, origins)
                total = total + (origins - own["centres"]) * added
                _merge_squares(own, before, added, total / added, other.tables["squares"].to(torch.float64))
            own.increase("sums", total)
        if "class_grams" in self.tables:
            own.increase("class_grams", other.tables["class_grams"])
        own.increase("counts", other.tables["counts"])
        if self.gram is not None and other.gram is not None:
            self.gram.add_(other.gram)

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
        device = self.tables["counts"].device
        old = torch.from_numpy(np.searchsorted(union, self.ids)).to(device)
        for name, table in self.tables.items():
            grown = table.new_zeros((union.size, *table.shape[1:]))
            self.tables[name] = grown.index_copy_(0, old, table)
        self.ids = union
        return np.searchsorted(union, ids)

    def _rows(self, at: Ids, on_host: bool = False) -> _Rows:
        if on_host:
            return _Rows({name: table.numpy() for name, table in self.tables.items()}, at)
        return _Rows(self.tables, torch.from_numpy(at).to(self.tables["counts"].device))

    def _add_grams(self, at: Ids, rows: Tensor, batch: Batch, weight: float) -> None:
        if self.gram is not None:
            add_gram_(self.gram, rows, weight)
        if "class_grams" in self.tables:
            for position, row in enumerate(at.tolist()):
                add_gram_(self.tables["class_grams"][row], rows[batch.inverse == position], weight)


class _Rows:
    """The rows of some classes in the tables: of the tensors, or of numpy's view of their memory."""

    __slots__ = ("at", "tables")

    def __init__(self, tables: Mapping[str, Array], at: Array) -> None:
        self.tables = tables
        self.at = at

    def __getitem__(self, name: str) -> Array:
        """Return a copy of the rows."""
        return self.tables[name][self.at]

    def double(self, name: str) -> Array:
        """Return the rows in float64."""
        rows = self[name]
        return rows.astype(np.float64, copy=False) if isinstance(rows, np.ndarray) else rows.to(torch.float64)

    def increase(self, name: str, values: Array) -> None:
        """Add to the rows: in the wider of the two dtypes, rounded once."""
        self.put(name, self[name] + values)

    def put(self, name: str, values: Array) -> None:
        """Replace the rows."""
        table = self.tables[name]
        table[self.at] = values if isinstance(table, np.ndarray) else values.to(table.dtype)


def _add_centred(own: _Rows, rows: Array, batch: Batch) -> None:
    """Add to sums and squares, centred at the first row of each class; counts are still those from before."""
    before = own.double("counts")[:, None]
    if batch.finite is not None or not before.all():
        _open_centres(own, before == 0, rows[batch.first])
    relative = batch.masked(rows - own.double("centres")[batch.inverse])
    total = batch.summed(relative)
    means = total / batch.weights
    deviations = batch.masked(relative - means[batch.inverse])
    deviations *= deviations
    spread = batch.summed(deviations)
    _merge_squares(own, before, batch.masked(batch.weights), means, spread)
    own.increase("sums", total)


def _remove_centred(own: _Rows, rows: Array, batch: Batch) -> None:
    """Do the opposite of :func:`_add_centred`; counts are still those from before."""
    before = own.double("counts")[:, None]
    after = before - batch.weights
    relative = rows - own["centres"][batch.inverse]
    total = batch.summed(relative)
    means = total / batch.weights
    deviations = relative - means[batch.inverse]
    rest = own.double("sums") - total
    delta = means - rest / _at_least_one(after)
    squares = own["squares"] - batch.summed(deviations * deviations) - delta * delta * (after * batch.weights / before)
    own.put("squares", squares.clip(0) * (after > 1))
    own.put("sums", rest)


def _open_centres(own: _Rows, fresh: Array, rows: Array) -> None:
    """Give each class without samples its row of ``rows`` for a centre."""
    new = rows.clip(-_CENTRE_LIMIT, _CENTRE_LIMIT)
    own.put("centres", new * fresh + own["centres"] * ~fresh)


def _merge_squares(own: _Rows, before: Array, added: Array, means: Array, spread: Array) -> None:
    """Apply Chan's rule; ``sums`` and ``counts`` are still those from before."""
    delta = own.double("sums") / _at_least_one(before)
    delta -= means
    delta *= delta
    delta *= before * added / _at_least_one(before + added)
    delta += spread
    own.increase("squares", delta)


def _at_least_one(count: Array) -> Array:
    return count + (count == 0)


def raise_for_batch(number: int, rank: int | None = None) -> None:
    """Raise the error of a batch that was masked on its device; 0 is no batch."""
    if number:
        where = "" if rank is None else f" of rank {rank}"
        raise BatchError(
            f"features of batch number {number}{where} were not finite (or above 1e+100 in magnitude); "
            f"that batch was not learned, everything else is unchanged"
        )


def exchange_sums(own: Sums, bad: int, group: Any) -> Sums | None:
    """Return the total of all ranks, with the same bits on every rank, or ``None`` if nobody has anything.

    Args:
        own: The sums of this rank.
        bad: Number of the batch that was masked on this rank, 0 for none.
        group: The process group.

    Raises:
        BatchError: On all ranks, if a batch was masked on any.
    """
    device = _reachable_device(group, own.tables["counts"].device)
    headers = gather_rows(torch.tensor([own.ids.size, bad], device=device), [2] * world_size(group), group=group)
    sizes = [int(header[0]) for header in headers]
    for rank, header in enumerate(headers):
        raise_for_batch(int(header[1]), rank)
    if max(sizes) == 0:
        return None
    own = own.to(device)
    names = [name for name in own.tables if name != "class_grams"]
    rows = {"ids": torch.from_numpy(own.ids).to(device), **{name: own.tables[name] for name in names}}
    gathered = {name: gather_rows(table, sizes, group=group) for name, table in rows.items()}
    total = Sums.of(own.ids[:0], {name: own.tables[name][:0].clone() for name in names})
    for rank in range(len(sizes)):
        tables = {name: gathered[name][rank] for name in names}
        total.merge(Sums.of(gathered["ids"][rank].cpu().numpy(), tables))
    if own.gram is not None:
        total.gram = own.gram.clone()
        dist.all_reduce(total.gram, group=group)
    if "class_grams" in own.tables:
        total.tables["class_grams"] = _reduced_class_grams(own, total.ids, group)
    return total


def _reachable_device(group: Any, own: torch.device) -> torch.device:
    backend = dist.get_backend(group)
    if backend == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else own


def _reduced_class_grams(own: Sums, ids: Ids, group: Any) -> Tensor:
    table = own.tables["class_grams"]
    total = table.new_zeros((ids.size, *table.shape[1:]))
    total[torch.from_numpy(np.searchsorted(ids, own.ids)).to(table.device)] = table
    for one in total:  # class by class: the whole is too large for one message
        dist.all_reduce(one, group=group)
    return total
