"""Replay in several processes: whose rows are whose, and how they come together."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clkit.distributed import gather_objects, gather_rows, report_lost_process, world_size
from clkit.methods.replay.buffer import ReservoirBuffer
from clkit.methods.replay.contrast import PrototypeContrast, prototype_contrast
from clkit.methods.replay.selection import even
from clkit.methods.replay.step import Block, StepOutputs, StepViews

__all__ = ["Incoming", "ReplayRanks", "ShardedRanks"]


class Incoming(NamedTuple):
    """The incoming batches of all processes."""

    own: Block  # that of this process
    labels: Tensor  # (n,) of all in rank order, on the host
    offered: Tensor  # (m, …) images that the memory of this process is offered
    offered_labels: Tensor  # (m,) theirs, on the host
    stored: int  # rows in memory, of all processes where each has its own
    spare: Tensor  # (n, …) images of this process, or one of another where it has none


class ReplayRanks:
    """Cuts what one process would do into shares, and puts it together again; alone, all of it is the process's own.

    All processes have the same memory and draw the same sample of it; each takes its share of that.
    """

    rank = 0
    size = 1
    shard, shards = 0, 1
    """Which memory this process has, and how many there are; its draws from the memory are those of this number."""

    def join(self) -> None:
        """Look up how many processes there are and which of them this one is."""
        self.size = world_size()
        self.rank = dist.get_rank() if self.size > 1 else 0

    def incoming(self, images: Tensor, labels: Tensor, memory: ReservoirBuffer | None) -> Incoming:
        """Return the batches of all processes; a call on all of them."""
        stored = 0 if memory is None else memory.size
        if self.size == 1:
            return Incoming(Block.whole(images, labels), labels, images, labels, stored, images)
        own, all_labels, sizes, _ = self._of_all(images, labels, stored)
        offered = _all_rows(images, sizes)
        return Incoming(own, all_labels, offered, all_labels, stored, offered)

    def drawn_here(self, count: int) -> int:
        """Return how many of so many rows over all processes this one draws."""
        return count

    def mine(self, rows: Tensor) -> Tensor:
        """Return this process's share of the rows that it drew: every ``size``-th, where all drew the same."""
        return rows if self.size == self.shards else rows[self.rank :: self.size]

    def share(self, images: Tensor, labels: Tensor, like: Tensor, count: int) -> Block:
        """Return this process's share of ``count`` rows over all, on the device of ``like``, labels on the host."""
        at, total = self._places(len(images), count)
        return Block(self.mine(images).to(like.device), self.mine(labels).cpu(), at, total)

    def offered_rows(self, rows: Tensor) -> Tensor:
        """Return such rows for all images that the memory is offered, of those of the own batch; a call on all."""
        return self._all_rows(rows)

    def class_counts(self, memory: ReservoirBuffer) -> dict[int, int]:
        """Return the rows in memory by class, of all processes where each has its own; a call on all of them."""
        return memory.class_counts()

    def saved(self, memory: ReservoirBuffer) -> list[dict[str, Any]]:
        """Return the states of all memories, at least in the first process, which writes them; a call on all."""
        return [dict(memory.state_dict())]

    def class_means(self, outputs: StepOutputs, own: PrototypeContrast) -> PrototypeContrast:
        """Return the class means over the memory samples of all processes; a call on all of them."""
        if self.size == 1:
            return own
        labels = [label for each in gather_objects(outputs.labels("seen1").tolist(), "their labels") for label in each]
        first, second = (self._all_rows(outputs.embeddings(name).detach()) for name in ("seen1", "seen2"))
        return prototype_contrast(first, second, torch.tensor(labels, dtype=torch.int64))

    def joined(self, outputs: StepOutputs) -> StepOutputs:
        """Return what one process would have for the rows of all, with a graph to the own ones; a call on all."""
        if self.size == 1:
            return outputs
        own = outputs.views
        told = gather_objects((len(own.images), own.rows, own.labels), "the labels of a step")
        sizes = [count for count, _, _ in told]
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        order: list[Tensor] = []
        rows: dict[str, slice] = {}
        end = 0
        for name in own.rows:  # the rows of a block, rank after rank
            places = [
                torch.arange(at[name].start, at[name].stop) + s for (_, at, _), s in zip(told, starts, strict=True)
            ]
            order.extend(places)
            start, end = end, end + sum(map(len, places))
            rows[name] = slice(start, end)
        labels = {name: torch.cat([each[name] for _, _, each in told]) for name in own.labels}
        at = torch.cat(order)
        tensors = (outputs.all_logits, outputs.all_features, outputs.all_embeddings)
        joined = [None if each is None else _GatheredRows.apply(each, sizes)[at] for each in tensors]
        views = StepViews(own.images, own.segments, rows, labels)
        return StepOutputs(views, *joined)  # type: ignore[arg-type]  # only what was None before is None here

    def _all_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in rank order, without a graph; a call on all of them."""
        return rows if self.size == 1 else _all_rows(rows, gather_objects(len(rows), "how many rows they have"))

    def _of_all(self, images: Tensor, labels: Tensor, stored: int) -> tuple[Block, Tensor, list[int], int]:
        """Return the own batch among all, the labels of all, how many each has, and the rows in all memories."""
        told = gather_objects((labels.tolist(), stored), "their labels")
        all_labels = [each for each, _ in told]
        sizes = [len(each) for each in all_labels]
        start = sum(sizes[: self.rank])
        own = Block(images, labels, torch.arange(start, start + len(images)), sum(sizes))
        joined = torch.tensor([c for each in all_labels for c in each]).long()
        return own, joined, sizes, sum(rows for _, rows in told)

    def _places(self, rows: int, count: int) -> tuple[Tensor, int]:
        """Return the positions of the own share of so many drawn rows, and how many positions there are."""
        return torch.arange(rows)[self.rank :: self.size], rows


class ShardedRanks(ReplayRanks):
    """Each process has a memory of its own stream, and draws and mixes its share of each sample from that alone.

    Only the first process is given the states of all memories, to save them.
    """

    def join(self) -> None:
        super().join()
        self.shard, self.shards = self.rank, self.size

    def incoming(self, images: Tensor, labels: Tensor, memory: ReservoirBuffer | None) -> Incoming:
        """Return the labels of all; one image goes around where a process has none, all others stay."""
        own, all_labels, sizes, stored = self._of_all(images, labels, 0 if memory is None else memory.size)
        spare = images
        if 0 in sizes and any(sizes):
            spare = _all_rows(images[:1], [min(size, 1) for size in sizes])
        return Incoming(own, all_labels, images, labels, stored, spare)

    def drawn_here(self, count: int) -> int:
        return even(count, self.size)[self.rank]

    def offered_rows(self, rows: Tensor) -> Tensor:
        return rows

    def class_counts(self, memory: ReservoirBuffer) -> dict[int, int]:
        counts = sum(map(Counter, gather_objects(memory.class_counts(), "what they remember")), Counter[int]())
        return dict(sorted(counts.items()))

    def saved(self, memory: ReservoirBuffer) -> list[dict[str, Any]]:
        state = memory.state_dict()  # by the host: another process may not have the device
        own = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
        return gather_objects(own, "what they remember", first_only=True)

    def _places(self, rows: int, count: int) -> tuple[Tensor, int]:
        """Return the own stretch of them; where the own memory has too few rows some positions are left out."""
        start = sum(even(count, self.size)[: self.rank])
        return torch.arange(start, start + rows), count


def _all_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Return the rows of all processes, which may have different numbers of them."""
    return torch.cat(gather_rows(rows.contiguous(), sizes, "the rows of a step"))


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
