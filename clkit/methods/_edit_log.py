"""The edits of a network's weights: the weights before them, what each adds, and how any of them is taken back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clkit.errors import ArgumentError, ConfigurationError, EditConflictError, StateError
from clkit.methods._decomposition import Rows
from clkit.methods._edit_arguments import edit_ids
from clkit.methods._state import exact
from clkit.schema import FLOATS, Many, Named, Nested, Numbers, OneOf, Real, Table, Whole, check_format, read_state

__all__ = ["EditLog", "EditRecord", "Factors", "stored_factors"]

_FORMAT = 1
_ANY = Numbers((...,), FLOATS)
_TABLE: Table = {
    "format": OneOf((_FORMAT,)),
    "next_id": Whole(),
    "bank": Named(_ANY),
    "edits": Many(
        Nested(
            {
                "id": Whole(),
                "scale": Real(),
                "committed": OneOf((False, True)),
                "x": Numbers((...,), None, any_value=True),
                "y": Numbers((...,), torch.int64),
                "P": Named(_ANY),
                "Q": Named(_ANY),
                "dense": Named(_ANY),
            }
        )
    ),
}


@dataclass(frozen=True)
class Factors:
    """What an edit adds to a weight, before it is scaled: ``P.T @ Q``, or ``dense`` where that is smaller.

    Attributes:
        P: (N, d_out) on the CPU.
        Q: (N, d_in) on the CPU.
        dense: (d_out, d_in) on the CPU; ``P`` and ``Q`` are ``None`` then.
    """

    P: Tensor | None
    Q: Tensor | None
    dense: Tensor | None = None

    def delta(self) -> Tensor:
        """Return what is added, (d_out, d_in) float64."""
        if self.dense is not None:
            return self.dense.double()
        assert self.P is not None
        assert self.Q is not None
        return self.P.double().T @ self.Q.double()

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is added."""
        return not all(bool(each.any()) for each in (self.P, self.Q, self.dense) if each is not None)

    def shape(self) -> tuple[int, int]:
        """Return (d_out, d_in)."""
        if self.dense is not None:
            return self.dense.shape[0], self.dense.shape[1]
        assert self.P is not None
        assert self.Q is not None
        return self.P.shape[1], self.Q.shape[1]


def stored_factors(rows: Rows, rank: int | None = None) -> Factors:
    """Return factors Q (``inputs``) and P (``gradients``) in the smaller form, on the CPU.

    Args:
        rows: The factors.
        rank: Where given, the product is replaced by the nearest one of this rank.
    """
    Q, P = (half.detach().cpu() for half in rows)
    if rank is not None and rank < min(len(P), P.shape[1], Q.shape[1]):
        P, Q = _truncated(P, Q, rank)
    if len(P) * (P.shape[1] + Q.shape[1]) > P.shape[1] * Q.shape[1]:
        return Factors(None, None, (P.double().T @ Q.double()).to(P.dtype))
    return Factors(P.contiguous(), Q.contiguous())


def _truncated(P: Tensor, Q: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, upper = torch.linalg.qr(P.double().T)
    right, lower = torch.linalg.qr(Q.double().T)
    U, S, V = torch.linalg.svd(upper @ lower.T)
    root = S[:rank].sqrt()
    return ((left @ U[:, :rank]) * root).T.to(P.dtype), ((right @ V[:rank].T) * root).T.to(Q.dtype)


@dataclass
class EditRecord:
    """An edit in the log.

    Attributes:
        id: Its number, from 0; numbers are never given twice.
        x: (B, …) the edited images, on the CPU.
        y: (B,) int64, or (B, C), their labels.
        scale: What the factors are multiplied by.
        committed: Whether it is part of the original weights now, and cannot be taken back.
        factors: What it adds, by layer; none once it is committed.
    """

    id: int
    x: Tensor = field(repr=False)
    y: Tensor
    scale: float = 1.0
    committed: bool = False
    factors: dict[str, Factors] = field(default_factory=dict, repr=False)


class EditLog:
    """Edits of some weights, from which these can be made anew at any time: ``cast(bank + sum of the edits)``.

    The sum is taken in float64 on the CPU, in the order of the log. Taking back an edit sums the others again, so the
    weights are the bits that they would be without it; taking back all of them gives the original bits, on any device.
    Weights are not kept here: each method is given them by name, and writes into them in place.
    """

    def __init__(self) -> None:
        self.records: list[EditRecord] = []
        self._next_id = 0
        self._bank: dict[str, Tensor] = {}  # weights without the edits; in float64 once some are part of them
        self._sums: dict[str, Tensor] = {}  # what is shown now, float64
        self._blocks = 0  # that show something else for a while

    def __len__(self) -> int:
        """Return how many edits are kept."""
        return len(self.records)

    @property
    def is_open(self) -> bool:
        """Whether there are edits that could be taken back."""
        return bool(self._open())

    def original(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight without the edits that could be taken back."""
        return self._bank.get(name, weight)

    def find(self, ids: int | Iterable[int]) -> list[EditRecord]:
        """Return edits that can be taken back, in the order of the log; else raise an ArgumentError."""
        wanted = edit_ids(ids)
        known = {record.id: record for record in self.records}
        for each in wanted:
            if each not in known:
                raise ArgumentError(f"there is no edit {each!r} in the log, which has {sorted(known)}")
            if known[each].committed:
                raise ArgumentError(f"edit {each} was committed: it is part of the weights, and no more told from them")
        return [record for record in self.records if record.id in wanted]

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an EditConflictError where a weight is not what the log says."""
        self._check_outside()
        for name, weight in self._named(weights):
            if name in self._sums and not torch.equal(weight.detach().cpu(), self._sums[name].to(weight.dtype)):
                raise EditConflictError(
                    f"the weight of {name!r} is not what the log of edits says: something else changed it since "
                    "(further training, other weights that were loaded). Load the weights that were saved with the "
                    "log; or take edits back from the weights as they are, no more to the bit (inexact=True, "
                    "--inexact); or have edits go on from these (rebase())"
                )

    def append(
        self,
        weights: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        scale: float,
        deltas: Mapping[str, Tensor] | None = None,
        **entry: Any,
    ) -> EditRecord:
        """Apply an edit, and return its record; ``entry`` are the images and labels.

        Args:
            weights: The weights.
            factors: What the edit adds, before it is scaled.
            scale: What that is multiplied by.
            deltas: The two multiplied out as by :meth:`deltas`, where that is known.
            entry: Images ``x`` and labels ``y``.

        Raises:
            EditConflictError: If a weight is not what the log says; nothing is changed then.
        """
        self.check(weights)
        record = EditRecord(self._next_id, scale=scale, factors=dict(factors), **entry)
        with exact():
            new = {name: weights[name].detach().cpu().clone() for name in factors if name not in self._bank}
            sums = {**self._sums, **{name: value.double() for name, value in new.items()}}
            sums = self._moved(sums, self.deltas(record) if deltas is None else deltas)
        self._bank.update(new)
        self._write(weights, sums)
        self._next_id += 1
        self.records.append(record)
        return record

    def revert(self, weights: Mapping[str, Tensor], ids: int | Iterable[int]) -> None:
        """Take edits back; raises as :meth:`find` and :meth:`check`, and then changes nothing."""
        gone = {record.id for record in self.find(ids)}
        self.check(weights)
        self.records = [record for record in self.records if record.id not in gone]
        self._write(weights, self._added(self._originals(), self._open()))
        self._close()

    def commit(self, weights: Mapping[str, Tensor], ids: int | Iterable[int]) -> None:
        """Make edits part of the original weights; raises as :meth:`revert`."""
        folded = self.find(ids)
        self.check(weights)
        bank = self._added(self._originals(), folded)
        for record in folded:
            record.committed, record.factors = True, {}
        self._bank = bank
        self._write(weights, self._added(self._originals(), self._open()))
        self._close()

    def rebase(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights as they are for the edited ones: the originals become these less the edits."""
        self._check_outside()
        edits = self._added({name: torch.zeros_like(each) for name, each in self._sums.items()}, self._open())
        with exact():
            self._bank = {name: weights[name].detach().cpu().double() - each for name, each in edits.items()}
        self._write(weights, self._added(self._originals(), self._open()))
        self._close()

    @contextmanager
    def rebased(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Take the weights as :meth:`rebase` does: for good if the block adds an edit, else inside of it alone."""
        before = self._bank, self._sums, self._next_id
        live = {name: weights[name].detach().clone() for name in self._bank}
        self.rebase(weights)
        try:
            yield
        finally:
            if self._next_id == before[2]:
                self._bank, self._sums, _ = before
                with exact():
                    for name, value in live.items():
                        weights[name].copy_(value)

    @contextmanager
    def shown(self, weights: Mapping[str, Tensor], edits: Iterable[EditRecord], *, alone: bool) -> Iterator[None]:
        """Have edits in the weights inside the block, and bitwise what was there afterwards, whatever happens.

        Args:
            weights: The weights.
            edits: Of the log or not.
            alone: Whether they are added to the original weights, rather than to those that are there.
        """
        if not self._blocks:
            self.check(weights)
        several = list(edits)
        named = {name for record in several for name in record.factors} | (set(self._bank) if alone else set())
        sums, base = self._sums, dict[str, Tensor]()
        with exact():
            before = {name: weights[name].detach().clone() for name in named}
            for name, live in before.items():
                if alone and name in self._bank:
                    base[name] = self._bank[name].double()
                else:
                    base[name] = sums[name] if name in sums else live.cpu().double()
        self._blocks += 1
        try:
            self._write(weights, {**sums, **self._added(base, several)})
            yield
        finally:
            self._blocks -= 1
            self._sums = sums
            with exact():
                for name, value in before.items():
                    weights[name].copy_(value)

    @contextmanager
    def kept(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Have the log and the weights as they were before the block where it fails."""
        before = list(self.records), self._next_id, self._bank.copy(), self._sums
        try:
            yield
        except BaseException:
            self.records, self._next_id, self._bank, sums = before
            self._write(weights, sums)
            raise

    def deltas(self, record: EditRecord) -> dict[str, Tensor]:
        """Return what an edit adds to each weight, (d_out, d_in) float64."""
        return {name: record.scale * factors.delta() for name, factors in record.factors.items()}

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; the edited weights themselves are saved with the network."""
        edits = []
        for record in self.records:
            entry = {name: getattr(record, name) for name in ("id", "scale", "committed", "x", "y")}
            for name in ("P", "Q", "dense"):
                parts = {layer: getattr(each, name) for layer, each in record.factors.items()}
                entry[name] = {layer: part for layer, part in parts.items() if part is not None}
            edits.append(entry)
        return {"format": _FORMAT, "next_id": self._next_id, "bank": dict(self._bank), "edits": edits}

    def load_state_dict(self, state: Any, weights: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave; the weights themselves come with the network's own state.

        Raises:
            StateError: If it does not fit these weights, or is damaged; nothing is changed then.
        """
        self._check_outside()
        owner = "GradientEditor: the log of edits"
        saved = read_state(check_format(state, _FORMAT, owner), _TABLE, owner)
        bank = {name: value.cpu().clone() for name, value in saved["bank"].items()}
        records = [_record(entry, owner) for entry in saved["edits"]]
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        ids = [record.id for record in records]
        fits = all(shapes.get(name) == tuple(value.shape) for name, value in bank.items())
        fits &= len(set(ids)) == len(ids) and all(each < saved["next_id"] for each in ids)
        for record in records:
            fits &= record.factors.keys() <= bank.keys()
            for name, factors in record.factors.items():
                outputs, *inputs = shapes.get(name, (0, 0))
                fits &= factors.shape() == (outputs, torch.Size(inputs).numel())
        if not fits:
            seen = {name: tuple(value.shape) for name, value in bank.items()}
            raise StateError(f"{owner} has edits of {seen}, and the editor is of {shapes}; or the file is damaged")
        self.records, self._next_id, self._bank = records, saved["next_id"], bank
        self._sums = self._added(self._originals(), self._open())

    # ---- how it is done

    def _check_outside(self) -> None:
        if self._blocks:
            raise ConfigurationError("a block of edited() shows other weights for a while; leave it first")

    def _named(self, weights: Mapping[str, Tensor]) -> Collection[tuple[str, Tensor]]:
        if missing := self._bank.keys() - weights.keys():
            raise ConfigurationError(f"the network has no {sorted(missing)[:5]}, which was edited; use that network")
        return weights.items()

    def _open(self) -> list[EditRecord]:
        return [record for record in self.records if not record.committed]

    def _close(self) -> None:
        """Let go of the originals where no edit is left that could be taken back."""
        if not self._open():
            self._bank, self._sums = {}, {}

    def _originals(self) -> dict[str, Tensor]:
        return {name: value.double() for name, value in self._bank.items()}

    def _added(self, base: Mapping[str, Tensor], records: Iterable[EditRecord]) -> dict[str, Tensor]:
        """Return sums with edits added, one after another."""
        with exact():
            sums = dict(base)
            for record in records:
                sums = self._moved(sums, self.deltas(record))
            return sums

    def _moved(self, sums: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**sums, **{name: sums[name] + delta.view_as(sums[name]) for name, delta in deltas.items()}}

    def _write(self, weights: Mapping[str, Tensor], sums: dict[str, Tensor]) -> None:
        with exact():
            for name, total in sums.items():
                if self._sums.get(name) is not total:
                    weights[name].copy_(total.to(weights[name].dtype))
        self._sums = sums


def _record(entry: dict[str, Any], owner: str) -> EditRecord:
    P, Q, dense = entry["P"], entry["Q"], entry["dense"]
    odd = P.keys() != Q.keys() or bool(P.keys() & dense.keys()) or (entry["committed"] and bool(P or dense))
    odd |= any(each.ndim != 2 or Q[name].ndim != 2 or len(each) != len(Q[name]) for name, each in P.items() if not odd)
    odd |= any(each.ndim != 2 for each in dense.values())
    if odd:
        raise StateError(f"{owner} has an edit {entry['id']} whose factors do not belong together; the file is damaged")
    factors = {name: Factors(each.cpu(), Q[name].cpu()) for name, each in P.items()}
    factors |= {name: Factors(None, None, each.cpu()) for name, each in dense.items()}
    known = {name: entry[name] for name in ("id", "scale", "committed", "x", "y")}
    return EditRecord(factors=factors, **{**known, "x": entry["x"].cpu(), "y": entry["y"].cpu()})
