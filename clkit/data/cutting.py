"""A source cut into the experiences of a stream: which rows are learned, validated and tested on in each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clkit.data.loader import Rows
from clkit.data.scenarios import Labels, Scenario, Split
from clkit.data.sources.base import Source, SourcePart
from clkit.errors import DataError
from clkit.stream.experience import Experience

__all__ = ["CutStream", "PartName", "cut_stream"]

PartName = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class CutStream:
    """The experiences of a stream and their rows."""

    train: SourcePart
    test: SourcePart
    classes: list[int]  # the user's ids of all classes of the whole stream, in the order in which they arrive
    experiences: list[Experience]  # those that are learned, which may be the first ones only
    splits: list[Split]  # the rows of each, without those that are cut off for validation
    validation: list[Rows]  # the rows of the training part that are cut off of each; empty where none are

    def part(self, name: PartName) -> SourcePart:
        """Return the part of the source that the rows of a name belong to."""
        return self.test if name == "test" else self.train

    def rows(self, name: PartName) -> list[Rows]:
        """Return the rows of each experience."""
        return self.validation if name == "validation" else [getattr(split, name) for split in self.splits]

    def targets(self, name: PartName, relabel: bool) -> Rows:
        """Return the class ids of a part, where asked renumbered 0, 1, … in the order in which they arrive."""
        targets = self.part(name).targets
        if not relabel:
            return targets
        # by search: a table of all ids up to the largest could be longer than the memory
        numbers = np.argsort(self.classes)
        ids = np.asarray(self.classes)[numbers]
        places = np.minimum(np.searchsorted(ids, targets), len(ids) - 1)
        relabelled: Rows = np.where(ids[places] == targets, numbers[places], -1)
        return relabelled

    def tasks(self, name: PartName) -> Rows:
        """Return the experience of each row of a part, -1 where a row is in none."""
        tasks = np.full(len(self.part(name)), -1, dtype=np.int64)
        for index, rows in enumerate(self.rows(name)):
            tasks[rows] = index
        return tasks


def cut_stream(
    source: Source,
    parts: tuple[SourcePart, SourcePart],
    scenario: Scenario,
    stop_after: int | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> CutStream:
    """Cut a source into a stream; arguments as :class:`~clkit.data.StreamDataModule` has them.

    Raises:
        DataError: If the source cannot be cut so.
    """
    train, test = parts
    names = source.domain_names
    splits = scenario.split(Labels(train.targets, train.domains, names), Labels(test.targets, test.domains, names))
    classes = list(dict.fromkeys(label for split in splits for label in split.classes))
    if stop_after is not None and stop_after > len(splits):
        raise DataError(f"stop_after={stop_after}, but the stream has {len(splits)} experiences; leave stop_after out")
    splits = splits[:stop_after]
    if not classes:
        raise DataError("the training part has no labelled row; a stream needs class ids of 0 or more")
    validation: list[Rows] = []
    if val_fraction:
        generator = np.random.default_rng(seed)
        validation = [_held_out(split, train.targets, val_fraction, generator) for split in splits]
        splits = [
            replace(split, train=np.setdiff1d(split.train, rows))
            for split, rows in zip(splits, validation, strict=True)
        ]
    experiences = [
        Experience(
            index=index,
            name=split.name,
            classes=split.classes,
            train_samples=len(split.train),
            eval_samples=len(validation[index] if val_fraction else split.test),
        )
        for index, split in enumerate(splits)
    ]
    return CutStream(train, test, classes, experiences, splits, validation)


def _held_out(split: Split, targets: Rows, fraction: float, generator: np.random.Generator) -> Rows:
    """Draw the validation rows of an experience, the same share of each class, but never all of its rows."""
    held_out: list[Rows] = []
    for label in np.unique(targets[split.train]):
        rows = split.train[targets[split.train] == label]
        count = round(fraction * len(rows)) if label >= 0 else 0
        if len(rows) > 1:
            held_out.append(generator.permutation(rows)[: min(count, len(rows) - 1)])
    found = np.sort(np.concatenate(held_out)) if held_out else np.empty(0, dtype=np.int64)
    if not len(found):
        raise DataError(
            f"val_fraction={fraction} leaves no validation sample in experience {split.name!r} with "
            f"{len(split.train)} training samples; raise it, or set it to 0"
        )
    return found
