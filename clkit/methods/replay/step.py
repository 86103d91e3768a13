"""One step of replay learning: the images that go through the network in one call, and what it gave for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.methods.replay.stored import MemoryRows

__all__ = ["Block", "StepBatch", "StepOutputs", "StepViews", "Transform", "arrange", "cross_entropy", "total_loss"]

Transform = Callable[[Tensor, Tensor, int], Tensor]
"""``(images, positions, total) -> views``: ``positions`` of the images among all ``total`` that a step augments."""


class Block(NamedTuple):
    """Images that go through the network as one block.

    Attributes:
        images: (n, …), as they came.
        labels: (n, …) on the host: class ids, or whatever else a loss compares the rows with.
        at: (n,) int64 on the host: the position of each image among those of all processes.
        total: How many images there are in all processes.
        augment: Whether the images are augmented before they go through the network.
    """

    images: Tensor
    labels: Tensor
    at: Tensor
    total: int
    augment: bool = True

    @classmethod
    def whole(cls, images: Tensor, labels: Tensor) -> Block:
        """Return the images of a run of one process."""
        return cls(images, labels, torch.arange(len(images)), len(images))

    @property
    def plain(self) -> Block:
        """The same images, not augmented."""
        return self._replace(augment=False)


class StepBatch(NamedTuple):
    """What a step learns from.

    Attributes:
        new: The incoming batch.
        replay: This process's share of the rows that were retrieved from the memory; none in the first steps.
        wanted: Rows that were asked of the memory, over all processes; 0 where nothing is replayed.
        rows: What this process retrieved, before it was shared out.
        extras: For each name of the strategy's ``extra_names`` the tensors stored with the rows of ``replay``.
    """

    new: Block
    replay: Block
    wanted: int
    rows: MemoryRows
    extras: Mapping[str, Tensor]


@dataclass
class StepViews:
    """All images of a step, in the order in which they go through the network."""

    images: Tensor  # (N, …)
    segments: list[int]  # numbers of rows that belong together for batch normalisation, in order
    rows: dict[str, slice]  # where each block lies
    labels: dict[str, Tensor]  # of each block
    stream: slice | None = None  # where the incoming images themselves lie, if they are among the blocks

    @property
    def all_labels(self) -> Tensor:
        """The class ids (N,) of all images, in their order; -1 for those of no single class, such as mixed ones."""
        found = [self.labels[name] for name in self.rows]
        return torch.cat([each if each.ndim == 1 else torch.full((len(each),), -1) for each in found])


class StepOutputs:
    """What the network gave for the blocks of a step: logits (N, C), features (N, D) and, if any, embeddings (N, p)."""

    def __init__(self, views: StepViews, logits: Tensor, features: Tensor, embeddings: Tensor | None = None) -> None:
        self.views = views
        self.all_logits = logits if logits.dtype == torch.float64 else logits.float()
        self.all_features = features
        self.all_embeddings = embeddings

    def logits(self, *blocks: str) -> Tensor:
        """Return the logits of some blocks, float32 (float64 for a network in float64)."""
        return self._rows(self.all_logits, blocks)

    def features(self, *blocks: str) -> Tensor:
        """Return the features of some blocks, in the dtype of the network."""
        return self._rows(self.all_features, blocks)

    def embeddings(self, *blocks: str) -> Tensor:
        """Return the embeddings of some blocks."""
        assert self.all_embeddings is not None, "the strategy has no projection"
        return self._rows(self.all_embeddings, blocks)

    def labels(self, *blocks: str) -> Tensor:
        """Return the labels of some blocks, on the host."""
        labels = self.views.labels
        return labels[blocks[0]] if len(blocks) == 1 else torch.cat([labels[name] for name in blocks])

    def _rows(self, values: Tensor, blocks: Sequence[str]) -> Tensor:
        at = [self.views.rows[name] for name in blocks]
        if all(one.stop == two.start for one, two in pairwise(at)):  # no copy
            return values[at[0].start : at[-1].stop]
        return torch.cat([values[rows] for rows in at])


def arrange(
    segments: Sequence[Mapping[str, Block]], transform: Transform | None, stream: Tensor | None = None
) -> StepViews:
    """Put the blocks of a step behind one another, and augment what shall be augmented in one call.

    Args:
        segments: Blocks by name; those of one mapping are normalised together.
        transform: Augments images; ``None`` to augment nothing.
        stream: The incoming images, to be found among those that are not augmented.

    Example:
        >>> block = Block.whole(torch.ones(2, 3), torch.tensor([0, 1]))
        >>> views = arrange([{"plain": block.plain}, {"new": block}], lambda images, at, total: 2 * images)
        >>> views.segments, views.rows["new"], views.images[views.rows["new"]].sum().item()
        ([2, 2], slice(2, 4, None), 12.0)
    """
    blocks = {name: block for segment in segments for name, block in segment.items()}
    rows: dict[str, slice] = {}
    end = total = 0
    positions, plain, shown = [], [], None
    for name, block in blocks.items():
        end += len(block.images)
        rows[name] = slice(end - len(block.images), end)
        if block.augment and transform is not None:
            plain.append(block.images)
            positions.append(total + block.at)
            total += block.total
        elif block.images is stream and shown is None:
            shown = rows[name]
    images = [block.images for block in blocks.values()]
    if positions and transform is not None:
        augmented = transform(torch.cat(plain), torch.cat(positions), total)
        views = iter(torch.split(augmented, [len(each) for each in plain]))
        images = [next(views) if block.augment else block.images for block in blocks.values()]
    sizes = [sum(len(block.images) for block in segment.values()) for segment in segments]
    labels = {name: block.labels for name, block in blocks.items()}
    return StepViews(torch.cat(images), [size for size in sizes if size], rows, labels, shown)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits and class ids; 0 with a graph for no rows."""
    return F.cross_entropy(logits, labels.to(logits.device)) if len(labels) else logits.sum()


def total_loss(terms: Mapping[str, tuple[float, Tensor]], outputs: StepOutputs) -> Tensor:
    """Return the weighted sum of the terms, in whose graph every weight of network and projector takes part."""
    total = outputs.all_logits[:0].sum()  # no rows, but a graph: DDP waits for every weight
    if outputs.all_embeddings is not None:
        total = total + outputs.all_embeddings[:0].sum()
    for weight, term in terms.values():
        total = total + (term if weight == 1 else weight * term)
    return total
