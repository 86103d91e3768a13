"""The samples of a source as one list with a digest: what is learned of it by rows, and known again by names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clkit.data.loader import Fetcher, Rows
from clkit.data.sources import resolve_source
from clkit.data.sources.base import SourcePart, data_root, locate
from clkit.data.sources.folder import ImageFiles, ImageFolder, labelled_images
from clkit.errors import ArgumentError, DataError
from clkit.methods.heads.holdings import Keys, keys_of_names

__all__ = ["Listing", "Reader", "has_parts", "list_samples", "numbered", "parse_shard"]

PARTS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Listing:
    """A list of samples with their classes.

    Attributes:
        spec: What a person calls it.
        part: The samples.
        classes: Names of the classes, sorted as the source numbers them, by the source's ids.
        targets: (N,) ids of the source; -1 is a sample without a label.
        names: What each sample is called, class, file and size; ``None`` where samples have numbers alone.
        digest: Of names, or of targets; equal for equal lists.
    """

    spec: str
    part: SourcePart
    classes: dict[int, str]
    targets: Rows
    names: list[str] | None
    digest: str

    def __len__(self) -> int:
        return len(self.targets)

    def keys(self, rows: Rows | None = None) -> Keys | None:
        """Return the keys of some rows by which they are known in another list, where they have names."""
        if self.names is None:
            return None
        chosen = self.names if rows is None else [self.names[row] for row in rows]
        return keys_of_names(chosen)

    def name(self, row: int) -> str:
        """Return what a person calls a sample."""
        files = getattr(self.part, "files", None)
        return f"row {row} of {self.spec}" if files is None else str(files[row])


def list_samples(spec: str, root: str | Path | None = None, part: str = "train") -> Listing:
    """List the samples of a source; of a folder those in ``train/<class>/``, or in ``<class>/`` where there is no such.

    Args:
        spec: A source by its short form, such as ``"folder:PATH"``.
        root: The data folder, in which names without a slash are looked up.
        part: ``"train"`` or ``"test"``.

    Raises:
        ArgumentError: If there is no such source.
        DataError: If nothing is there, or there is no sample.
    """
    source = resolve_source(spec)
    if isinstance(source, ImageFolder):
        folder = locate(source.path, data_root(root), "folder")
        if not folder.is_dir():
            raise DataError(f"{spec}: {folder} is no folder; give one with a folder of images for each class")
        return _of_folder(spec, folder / part if _is_cut(folder) else folder)
    samples = source.load(data_root(root))[part == "test"]
    if not len(samples):
        raise DataError(f"{spec} has no samples in its {part} part")
    known = np.unique(samples.targets[samples.targets >= 0]).tolist()
    classes = {number: source.class_names.get(number, str(number)) for number in known}
    if len(set(classes.values())) < len(classes):
        raise DataError(
            f"{spec}: two classes have one name, by which they are told apart here: {sorted(classes.values())}"
        )
    digest = hashlib.blake2b(samples.targets.tobytes(), digest_size=16, key=part.encode()).hexdigest()
    return Listing(spec, samples, classes, samples.targets, None, digest)


def has_parts(spec: str, root: str | Path | None = None) -> bool:
    """Return whether a source is a folder with a training and a test part."""
    source = resolve_source(spec)
    return isinstance(source, ImageFolder) and _is_cut(locate(source.path, data_root(root), "folder"))


def _is_cut(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in PARTS)


def _of_folder(spec: str, folder: Path) -> Listing:
    found = labelled_images(folder)
    classes = sorted({name for _, name, _ in found})
    ids = {name: number for number, name in enumerate(classes)}
    files = [file for _, _, file in found]
    targets = np.array([ids[name] for _, name, _ in found], dtype=np.int64)
    names = [f"{name}/{Path(file).name}/{Path(file).stat().st_size}" for _, name, file in found]
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    return Listing(spec, ImageFiles(files, targets), dict(enumerate(classes)), targets, names, digest)


def parse_shard(text: str) -> tuple[int, int]:
    """Return ``(i, n)`` of ``"i/n"``.

    Raises:
        ArgumentError: If it is of another form.

    Example:
        >>> parse_shard("3/64")
        (3, 64)
    """
    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal() and int(of)):
        raise ArgumentError(f"shard={text!r} must be i/n, of n shards with the numbers 0 to n-1: 0/64, say")
    return int(index), int(of)


class Reader(Fetcher):
    """Reads batches of rows, and says which rows could not be read rather than raising for all of them.

    A batch is ``(inputs, rows, unreadable)``: the inputs of the rows that could be read, their numbers (B,), and what
    is wrong with each of the others.
    """

    def __getitem__(self, key: tuple[int, Rows]) -> tuple[Any, ...]:
        """Return a batch."""
        rows = key[1]
        unreadable: list[str] = []
        try:
            return self.preprocess(self.part.get_many(rows)), torch.from_numpy(rows), unreadable
        except DataError as error:
            if len(rows) == 1:
                return torch.empty(0), torch.from_numpy(rows[:0]), [str(error)]
        parts = [self[(0, rows[at : at + 1])] for at in range(len(rows))]
        for _, _, said in parts:
            unreadable += said
        good = [(inputs, row) for inputs, row, _ in parts if len(row)]
        if not good:
            return torch.empty(0), torch.from_numpy(rows[:0]), unreadable
        inputs, numbers = (torch.cat(each) for each in zip(*good, strict=True))
        return inputs, numbers, unreadable


def numbered(classes: Sequence[str], names: dict[int, str], wanted: dict[str, int]) -> dict[str, int]:
    """Return an id for each class by its name: the one that it has, else the one that is wanted if free, else the next.

    Example:
        >>> numbered(["crow", "jay"], {0: "tit", 1: "jay"}, {"crow": 0, "jay": 1})
        {'crow': 2, 'jay': 1}
    """
    ids = {name: number for number, name in names.items()}
    taken = set(names)
    for name in classes:
        if name not in ids:
            number = wanted.get(name, 0)
            ids[name] = number if number not in taken else max(taken) + 1
            taken.add(ids[name])
    return {name: ids[name] for name in classes}
