"""Replay in several processes: whose rows are whose, and how they come together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clkit.methods.onpro import MixedBatch, PrototypeContrast, prototype_contrast
from clkit.methods.replay_step import Part, StepOutputs, StepViews
from clkit.processes import gathered, together

__all__ = ["Incoming", "ReplayRanks"]


class Incoming(NamedTuple):
    """The incoming batches of all processes.

    Attributes:
        part: The process's own.
        images: (n, …) of all, in rank order.
        labels: (n,) of all, on the host.
    """

    part: Part
    images: Tensor
    labels: Tensor


class ReplayRanks:
    """Cuts what one process would do into shares, and puts it together again; alone, all of it is the process's own."""

    @property
    def rank(self) -> int:
        """The number of this process."""
        return dist.get_rank() if _several() else 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size() if _several() else 1

    def incoming(self, images: Tensor, labels: Tensor) -> Incoming:
        """The batches of all processes; a call on all of them."""
        if self.size == 1:
            return Incoming(Part.whole(images, labels), images, labels)
        all_labels = gathered(labels.tolist(), "their labels")
        sizes = [len(each) for each in all_labels]
        start = sum(sizes[: self.rank])
        part = Part(images, labels, torch.arange(start, start + len(images)), sum(sizes))
        return Incoming(part, _all_rows(images, sizes), torch.tensor([c for each in all_labels for c in each]).long())

    def mine(self, rows: Tensor) -> Tensor:
        """This process's share of rows that all processes have alike: every ``size``-th."""
        return rows[self.rank :: self.size]

    def share(self, images: Tensor, labels: Tensor, like: Tensor) -> Part:
        """This process's share of a sample that all have alike, on the device of ``like``."""
        return Part(self.mine(images).to(like.device), self.mine(labels), *self._places(len(images)))

    def share_mixed(self, mixed: MixedBatch, like: Tensor) -> tuple[MixedBatch, tuple[Tensor, int]]:
        """The same of a replay batch; its labels are on the host."""
        images, first, second, share = (self.mine(each) for each in mixed)
        own = MixedBatch(images.to(like.device), first.cpu(), second.cpu(), share.cpu())
        return own, self._places(len(mixed.images))

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes in rank order, without a graph; a call on all of them."""
        if self.size == 1:
            return rows
        return _all_rows(rows, gathered(len(rows), "how many rows they have"))

    def prototypes(self, views: StepViews, embeddings: Tensor, own: PrototypeContrast) -> PrototypeContrast:
        """The class means over the memory samples of all processes; a call on all of them."""
        if self.size == 1:
            return own
        labels = [label for each in gathered(views.labels["seen"].tolist(), "their labels") for label in each]
        first, second = (self.all_rows(embeddings[views.rows[name]].detach()) for name in ("seen1", "seen2"))
        return prototype_contrast(first, second, torch.tensor(labels, dtype=torch.int64))

    def joined(self, views: StepViews, outputs: StepOutputs) -> tuple[StepViews, StepOutputs]:
        """What one process would have for the rows of all, with a graph to the own ones; a call on all processes."""
        if self.size == 1:
            return views, outputs
        told = gathered((len(views.images), views.rows, views.labels), "the labels of a step")
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

    def _places(self, total: int) -> tuple[Tensor, int]:
        return torch.arange(self.rank, total, self.size), total

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


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Rows of all processes, which may have different numbers of them."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    with together("the rows of a step"):
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
        with together("the gradients of a step"):
            dist.all_reduce(summed)
        start = sum(ctx.sizes[: dist.get_rank()])
        return summed[start : start + ctx.sizes[dist.get_rank()]], None
