"""The samples of a source as one list with a digest: what is learned of it by rows, and known again by names."""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clkit.data.loader import Fetcher, Rows
from clkit.data.sources import resolve_source
from clkit.data.sources.base import SourcePart, data_root, listing, locate
from clkit.data.sources.folder import ImageFiles, ImageFolder, has_images, labelled_images, unread_files
from clkit.errors import ArgumentError, DataError, few_names
from clkit.methods.heads.holdings import Keys, keys_of_names

__all__ = ["Listing", "Reader", "composed", "has_parts", "list_samples", "numbered", "parse_shard"]

PARTS = ("train", "test")

_UNPACKED = (".bmp", ".pgm", ".ppm", ".tif", ".tiff")  # images of one size are files of one size


@dataclass(frozen=True, eq=False)
class Listing:
    """A list of samples with their classes.

    Attributes:
        spec: What a person calls it.
        part: The samples.
        classes: Names of the classes, sorted as the source numbers them, by the source's ids.
        targets: (N,) ids of the source; -1 is a sample without a label.
        names: What each sample is called, class, file and size, and a sum of its bytes where files are not compressed;
            ``None`` where samples have numbers alone.
        digest: Of names, or of targets; equal for equal lists.
        ignored: What lies in a folder beside the samples, in words.
    """

    spec: str
    part: SourcePart
    classes: dict[int, str]
    targets: Rows
    names: list[str] | None
    digest: str
    ignored: str = ""

    def __len__(self) -> int:
        return len(self.targets)

    def keys(self, rows: Rows | None = None) -> Keys | None:
        """Return the keys of some rows by which they are known in another list, where they have names."""
        if self.names is None:
            return None
        chosen = self.names if rows is None else [self.names[row] for row in rows]
        return keys_of_names(chosen)

    def place(self, row: int) -> str:
        """Return class and file of a sample, which are the same wherever its folder lies."""
        return self.name(row) if self.names is None else "/".join(self.names[row].split("/")[:2])

    def name(self, row: int) -> str:
        """Return what a person calls a sample."""
        files = getattr(self.part, "files", None)
        return f"row {row} of {self.spec}" if files is None else str(files[row])


def list_samples(spec: str, root: str | Path | None = None, part: str = "train") -> Listing:
    """List the samples of a source; of a folder those in ``train/<class>/``, or in ``<class>/`` where there is no such.

    Names of classes and files are compared as Unicode's NFC, so that folders from other systems have the same ones.

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
        if not _is_cut(folder):
            return _of_folder(spec, folder)
        beside = [each.name for each in listing(folder) if each.is_dir() and each.name not in PARTS]
        return _of_folder(spec, folder / part, beside)
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
    if not isinstance(source, ImageFolder):
        return False
    folder = locate(source.path, data_root(root), "folder")
    return _is_cut(folder) and (folder / "test").is_dir()


def _is_cut(folder: Path) -> bool:
    """Whether ``train/`` in a folder is a part, with folders of images, and no class."""
    part = folder / "train"
    if not part.is_dir() or not any(has_images(each) for each in listing(part) if each.is_dir()):
        return False
    others = (each for each in listing(folder) if each.is_dir() and each.name not in PARTS)
    if classes := [each.name for each in others if has_images(each)]:
        raise DataError(
            f"{folder}: train/ holds folders of images, and so it is a part, but {classes[0]}/ holds images and is a "
            f"class; give {part}, or move the folders of train/ out of it"
        )
    return True


def _of_folder(spec: str, folder: Path, beside: Sequence[str] = ()) -> Listing:
    found = sorted((composed(name), composed(Path(file).name), file) for _, name, file in labelled_images(folder))
    classes = sorted({name for name, _, _ in found})
    ids = {name: number for number, name in enumerate(classes)}
    files = [file for _, _, file in found]
    targets = np.array([ids[name] for name, _, _ in found], dtype=np.int64)
    names = [f"{name}/{title}/{_told_apart_by(Path(file))}" for name, title, file in found]
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    said = "; ".join(
        filter(None, (unread_files(folder), f"beside {folder.name}: {few_names(beside)}" if beside else ""))
    )
    return Listing(spec, ImageFiles(files, targets), dict(enumerate(classes)), targets, names, digest, said)


def composed(name: str) -> str:
    """Return a name in Unicode's NFC.

    Raises:
        DataError: If it is no UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name {name!a} of a class or an image is no UTF-8; rename it") from None
    return unicodedata.normalize("NFC", name)


def _told_apart_by(file: Path) -> str:
    """Return the size of a file, and a sum of its bytes where the size follows from the image's."""
    try:
        size = str(file.stat().st_size)
        return f"{size}/{zlib.crc32(file.read_bytes())}" if file.suffix.lower() in _UNPACKED else size
    except OSError:  # a link to nothing: an image that cannot be read
        return "-1"


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
