"""Replay in several processes: whose rows are whose, and how they come together."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clkit.distributed import gather_objects, report_lost_process
from clkit.methods.onpro import MixedBatch, PrototypeContrast, prototype_contrast
from clkit.methods.replay.buffer import MemoryRows, ReservoirBuffer
from clkit.methods.replay.rule import Part, StepOutputs, StepViews
from clkit.methods.replay.shares import even

__all__ = ["Incoming", "ReplayRanks", "ShardedRanks"]


class Incoming(NamedTuple):
    """The incoming batches of all processes.

    Attributes:
        part: The process's own.
        labels: (n,) of all in rank order, on the host.
        offered: (m, …) images that the memory of this process is offered.
        offered_labels: (m,) theirs, on the host.
        stored: Rows in memory, of all processes where each has its own.
        spare: (1, …) an image of this process, or of another where it has none.
    """

    part: Part
    labels: Tensor
    offered: Tensor
    offered_labels: Tensor
    stored: int
    spare: Tensor


class ReplayRanks:
    """Cuts what one process would do into shares, and puts it together again; alone, all of it is the process's own.

    All processes have the same memory and draw the same sample of it; each takes its share of that.
    """

    @property
    def rank(self) -> int:
        """The number of this process."""
        return dist.get_rank() if _several() else 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size() if _several() else 1

    @property
    def shards(self) -> int:
        """How many memories there are, each with rows of its own."""
        return 1

    @property
    def shard(self) -> int:
        """Which of them this process has; its draws from the memory are those of this number."""
        return 0

    def incoming(self, images: Tensor, labels: Tensor, memory: ReservoirBuffer | None) -> Incoming:
        """The batches of all processes; a call on all of them."""
        stored = 0 if memory is None else memory.size
        if self.size == 1:
            return Incoming(Part.whole(images, labels), labels, images, labels, stored, images[:1])
        part, all_labels, sizes, _ = self._parts(images, labels, stored)
        offered = _all_rows(images, sizes)
        return Incoming(part, all_labels, offered, all_labels, stored, offered[:1])

    def sample(self, memory: ReservoirBuffer, wanted: int, generator: torch.Generator, like: Tensor) -> MemoryRows:
        """A sample of the memory, of ``wanted`` rows over all processes; images of the kind of ``like``."""
        return memory.sample(wanted, generator)

    def drawn_here(self, wanted: int) -> int:
        """How many of so many rows over all processes this one draws."""
        return wanted

    def mine(self, rows: Tensor) -> Tensor:
        """This process's share of the rows that it drew: every ``size``-th, since all drew the same."""
        return rows[self.rank :: self.size]

    def share(self, images: Tensor, labels: Tensor, like: Tensor, wanted: int) -> Part:
        """This process's share of a sample, on the device of ``like``; ``wanted`` as it was given to :meth:`sample`."""
        return Part(self.mine(images).to(like.device), self.mine(labels), *self._places(len(images), wanted))

    def share_mixed(self, mixed: MixedBatch, like: Tensor, wanted: int) -> tuple[MixedBatch, tuple[Tensor, int]]:
        """The same of a replay batch; its labels are on the host."""
        images, first, second, share = (self.mine(each) for each in mixed)
        own = MixedBatch(images.to(like.device), first.cpu(), second.cpu(), share.cpu())
        return own, self._places(len(mixed.images), wanted)

    def offered_rows(self, rows: Tensor) -> Tensor:
        """Rows that belong to the own batch, for the images that the memory is offered; a call on all processes."""
        return self.all_rows(rows)

    def class_counts(self, memory: ReservoirBuffer) -> dict[int, int]:
        """Rows in memory by class, of all processes where each has its own; a call on all of them."""
        return memory.class_counts()

    def saved(self, memory: ReservoirBuffer) -> list[dict[str, Any]]:
        """The states of all memories, at least in the first process, which writes them; a call on all of them."""
        return [dict(memory.state_dict())]

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes in rank order, without a graph; a call on all of them."""
        if self.size == 1:
            return rows
        return _all_rows(rows, gather_objects(len(rows), "how many rows they have"))

    def prototypes(self, views: StepViews, embeddings: Tensor, own: PrototypeContrast) -> PrototypeContrast:
        """The class means over the memory samples of all processes; a call on all of them."""
        if self.size == 1:
            return own
        labels = [label for each in gather_objects(views.labels["seen"].tolist(), "their labels") for label in each]
        first, second = (self.all_rows(embeddings[views.rows[name]].detach()) for name in ("seen1", "seen2"))
        return prototype_contrast(first, second, torch.tensor(labels, dtype=torch.int64))

    def joined(self, views: StepViews, outputs: StepOutputs) -> tuple[StepViews, StepOutputs]:
        """What one process would have for the rows of all, with a graph to the own ones; a call on all processes."""
        if self.size == 1:
            return views, outputs
        told = gather_objects((len(views.images), views.rows, views.labels), "the labels of a step")
        sizes = [rows for rows, _, _ in told]
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        order: list[Tensor] = []
        rows: dict[str, slice | Tensor] = {}
        for name in views.rows:  # the rows of a block, rank after rank
            places = [torch.arange(sizes[r])[told[r][1][name]] + starts[r] for r in range(len(sizes))]
            start = sum(len(each) for each in order)
            if name.startswith("upright"):
                rows[name] = self._upright(rows[f"new{name[-1]}"], told, name)
                continue
            order.extend(places)
            rows[name] = slice(start, start + sum(len(each) for each in places))
        labels = {name: torch.cat([each[2][name] for each in told]) for name in views.labels}
        at = torch.cat(order)
        joined = StepViews(views.images, views.segments, rows, labels, views.first)
        logits, features = (_gathered_rows(each, sizes)[at] for each in outputs[:2])
        embeddings = outputs.embeddings
        return joined, StepOutputs(
            logits, features, None if embeddings is None else _gathered_rows(embeddings, sizes)[at]
        )

    def _parts(self, images: Tensor, labels: Tensor, stored: int) -> tuple[Part, Tensor, list[int], int]:
        """The own batch among all of them, the labels of all, how many each has, and the rows in all memories."""
        told = gather_objects((labels.tolist(), stored), "their labels")
        all_labels = [each for each, _ in told]
        sizes = [len(each) for each in all_labels]
        start = sum(sizes[: self.rank])
        part = Part(images, labels, torch.arange(start, start + len(images)), sum(sizes))
        joined = torch.tensor([c for each in all_labels for c in each]).long()
        return part, joined, sizes, sum(rows for _, rows in told)

    def _places(self, rows: int, wanted: int) -> tuple[Tensor, int]:
        """The positions of the own share of a sample of so many rows, and how many positions there are."""
        return torch.arange(self.rank, rows, self.size), rows

    @staticmethod
    def _upright(block: slice | Tensor, told: list[Any], name: str) -> Tensor:
        """The unrotated rows of each process's part of a block."""
        assert isinstance(block, slice)
        start, places = block.start, []
        for _, rows, _ in told:
            whole, upright = rows[f"new{name[-1]}"], rows[name]
            places.append(torch.arange(upright.stop - upright.start) + start)
            start += whole.stop - whole.start
        return torch.cat(places)


class ShardedRanks(ReplayRanks):
    """Each process has a memory of its own stream, and draws and mixes its share of each sample from that alone."""

    @property
    def shards(self) -> int:
        """As many as processes."""
        return self.size

    @property
    def shard(self) -> int:
        """That of the rank."""
        return self.rank

    def incoming(self, images: Tensor, labels: Tensor, memory: ReservoirBuffer | None) -> Incoming:
        """The batches of all processes; one image goes around where a process has none, all others stay."""
        part, all_labels, sizes, stored = self._parts(images, labels, 0 if memory is None else memory.size)
        spare = images[:1]
        if 0 in sizes and any(sizes):
            spare = _all_rows(images[:1], [min(size, 1) for size in sizes])[:1]
        return Incoming(part, all_labels, images, labels, stored, spare)

    def sample(self, memory: ReservoirBuffer, wanted: int, generator: torch.Generator, like: Tensor) -> MemoryRows:
        """The own share of it; no rows where the own stream had none."""
        if memory.size:
            return memory.sample(self.drawn_here(wanted), generator)
        none = torch.empty(0, dtype=torch.int64)
        return MemoryRows(like[:0], none, none, none, none, {})

    def drawn_here(self, wanted: int) -> int:
        """An even share."""
        return even(wanted, self.size)[self.rank]

    def mine(self, rows: Tensor) -> Tensor:
        """All of them: nobody else drew them."""
        return rows

    def offered_rows(self, rows: Tensor) -> Tensor:
        """The own ones."""
        return rows

    def class_counts(self, memory: ReservoirBuffer) -> dict[int, int]:
        """Summed over all memories."""
        counts = sum(map(Counter, gather_objects(memory.class_counts(), "what they remember")), Counter[int]())
        return dict(sorted(counts.items()))

    def saved(self, memory: ReservoirBuffer) -> list[dict[str, Any]]:
        """In rank order, in the first process; the others get none."""
        state = memory.state_dict()  # by the host: another process may not have the device
        own = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
        return gather_objects(own, "what they remember", first_only=True)

    def _places(self, rows: int, wanted: int) -> tuple[Tensor, int]:
        """Each process has its stretch of them; where its memory has too few rows some are left out."""
        start = sum(even(wanted, self.size)[: self.rank])
        return torch.arange(start, start + rows), wanted


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Rows of all processes, which may have different numbers of them."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    with report_lost_process("the rows of a step"):
        dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _gathered_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    together_rows: Tensor = _GatheredRows.apply(rows, sizes)
    return together_rows


class _GatheredRows(torch.autograd.Function):
    """Rows of all processes with a graph: the loss of each is of all rows, so gradients are summed over processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _all_rows(rows.detach(), sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        with report_lost_process("the gradients of a step"):
            dist.all_reduce(summed)
        start = sum(ctx.sizes[: dist.get_rank()])
        return summed[start : start + ctx.sizes[dist.get_rank()]], None
