"""A head together with the rows that it has learned, as it travels between machines."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from clkit.arguments import check_arguments, in_short
from clkit.errors import ArgumentError, StateError
from clkit.files import read_bytes
from clkit.methods.heads.base import Head
from clkit.methods.heads.holdings import Holdings, check_complete
from clkit.methods.heads.portable import MergeTree, head_of_state, kinds_of
from clkit.schema import Instance, Table, Whole, read_state

__all__ = ["HeadPart"]


@dataclass
class HeadPart:
    """A head that knows which rows it has learned: what a worker sends, and what is merged exactly once.

    Args:
        head: What was learned.
        holds: Of which rows.

    Raises:
        ArgumentError: If the head has learned more rows than ``holds`` says.

    Example:
        >>> from clkit.methods import NearestMeanHead, shard_bounds
        >>> def learn(index: int) -> bytes:  # on any machine
        ...     head = NearestMeanHead(1)
        ...     start, stop = shard_bounds(10, index, 2)
        ...     head.update(torch.arange(start, stop)[:, None] + 1.0, torch.zeros(stop - start).long())
        ...     return HeadPart(head, Holdings.shard("numbers", 10, index, 2)).to_bytes()
        >>> HeadPart.merge_all(HeadPart.from_bytes(learn(index)) for index in (1, 0)).head.counts
        tensor([10])
        >>> HeadPart.merge_all([HeadPart.from_bytes(learn(1))])
        Traceback (most recent call last):
        clkit.errors.ArgumentError: shard 0/2 of 'numbers' is missing; give the part that holds it, or partial=True
    """

    head: Head
    holds: Holdings

    def __post_init__(self) -> None:
        check_arguments(HeadPart, vars(self))
        learned = int(self.head.counts.sum())
        if learned > self.holds.rows:
            raise ArgumentError(
                f"holds={self.holds.rows} rows, and the head has learned {learned}; note all rows that it has learned"
            )

    def to_bytes(self) -> bytes:
        """Return both as bytes, as :meth:`Head.to_bytes` does."""
        buffer = io.BytesIO()
        torch.save({"format": 1, "head": dict(self.head.state_dict()), "holds": self.holds.state_dict()}, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> HeadPart:
        """Return the part of :meth:`to_bytes`.

        Raises:
            StateError: If the bytes are damaged, cut off or of something else.
        """
        table: Table = {"format": Whole(1, 1), "head": Instance(dict), "holds": Instance(dict)}
        saved = read_state(read_bytes(data, "the bytes of a part"), table, "the bytes of a part")
        head = head_of_state(saved["head"], "the head of the part", kinds_of(Head))
        try:
            return cls(head, Holdings.of_state(saved["holds"], "the rows of the part"))
        except ArgumentError as error:
            raise StateError(f"the bytes of a part: {error}") from error

    @classmethod
    def merge_all(cls, parts: Iterable[HeadPart], *, partial: bool = False) -> HeadPart:
        """Return one part of all given ones, merged as :meth:`Head.merge_all` does.

        Args:
            parts: At least one; the heads of those that the iterable makes one by one are let go of as it goes on.
            partial: Whether rows may be missing.

        Raises:
            ArgumentError: If a row is held twice, one is missing, or heads differ; the message names it.
        """
        tree, holds = MergeTree(), Holdings()
        for number, part in enumerate(parts):
            if not isinstance(part, HeadPart):
                raise ArgumentError(f"part {number} is {in_short(part)}; give HeadPart.from_bytes(…) of what was sent")
            try:
                holds.merge(part.holds)
                tree.add(part.head)
            except ArgumentError as error:
                raise ArgumentError(f"part {number}: {error}") from error
        total = tree.total()
        check_complete(holds, partial)
        return cls(total, holds)
