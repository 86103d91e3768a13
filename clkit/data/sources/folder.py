"""A folder of images, one sub-folder a class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clkit.data.sources.base import Int64, RowRange, SlicedSource, SourcePart, listing, locate, stack_inputs
from clkit.data.sources.images import read_image
from clkit.errors import DataError, few_names

__all__ = ["ImageFiles", "ImageFolder", "has_images", "labelled_images", "unread_files"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass
class ImageFolder(SlicedSource):
    """Image files in ``path/train/<class>/`` and ``path/test/<class>/``, decoded to RGB when asked for.

    Pixels of 8 bits are uint8. Grey ones of 16 bits become float32, divided by 65,535; floating-point ones must lie in
    [0, 1]; 32-bit integers are refused, since nothing says which of them is white. (Colour images of 16 bits are read
    in 8.)

    Classes are numbered by the sorted names of their folders (of both parts together), and files are listed in sorted
    order, so the rows are the same on every machine. With ``domains=True`` the folders are
    ``path/train/<domain>/<class>/``, and domains are numbered by their sorted names too. Folders and files whose name
    starts with a dot are left out.

    Args:
        path: The folder; a name without a slash is looked up in the data folder.
        domains: There is a level of domains above the classes.
        numeric_ids: Class folders are called by numbers, which are the ids: SODA10M's ``1`` to ``6`` stay 1 to 6.
        train_rows: Take only the training rows ``[start, stop, step]``, as a slice.
        test_rows: The same for the test part.

    Raises:
        DataError: A folder is missing or has no images, or a class folder is no number where ``numeric_ids`` says so;
            when read, an image that cannot be decoded, or whose values have no known range; its file is named.

    Example:
        >>> ImageFolder("objects", numeric_ids=True).name
        'objects'
    """

    path: str
    domains: bool = False
    numeric_ids: bool = False
    train_rows: RowRange | None = None
    test_rows: RowRange | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = Path(self.path).name

    def load(self, root: Path | None) -> tuple[SourcePart, SourcePart]:
        """List both parts; images are read later."""
        folder = locate(self.path, root, "folder")
        if not folder.is_dir():
            raise DataError(f"folder:{self.path}: there is no folder {folder}")
        listings = [labelled_images(folder / part, self.domains) for part in ("train", "test")]
        class_ids = self._number({row[1] for rows in listings for row in rows}, folder)
        domain_ids = {name: i for i, name in enumerate(sorted({row[0] for rows in listings for row in rows}))}
        self.class_names = {i: name for name, i in class_ids.items()}
        self.domain_names = {i: name for name, i in domain_ids.items()} if self.domains else {}
        train, test = (
            ImageFiles(
                [row[2] for row in rows],
                np.array([class_ids[row[1]] for row in rows], dtype=np.int64),
                np.array([domain_ids[row[0]] for row in rows], dtype=np.int64) if self.domains else None,
            )
            for rows in listings
        )
        return self._sliced(train, test)

    def _number(self, names: set[str], folder: Path) -> dict[str, int]:
        if not self.numeric_ids:
            return {name: i for i, name in enumerate(sorted(names))}
        wrong = sorted(name for name in names if not (name.isascii() and name.isdigit()))
        if wrong:
            raise DataError(f"{folder}: numeric_ids=True, but these class folders are not called by numbers: {wrong}")
        ids = {name: int(name) for name in sorted(names)}
        if len(set(ids.values())) < len(ids):
            raise DataError(f"{folder}: two class folders have the same number: {sorted(names)}")
        return ids


def labelled_images(folder: Path, domains: bool = False) -> list[tuple[str, str, str]]:
    """Return (domain, class, file) of each image in ``folder/<class>/``, sorted; the domain is "" where there are none.

    Args:
        folder: The folder.
        domains: Whether there is a level of domains above the classes.

    Raises:
        DataError: If the folder is not there, has no folders, or one of them has no images.
    """
    groups = [(domain.name, domain) for domain in _folders(folder)] if domains else [("", folder)]
    rows = []
    for domain, parent in groups:
        for class_folder in _folders(parent):
            files = [file for file in listing(class_folder) if _is_image(file)]
            if not files:
                levels = "<domain>/<class>" if domains else "<class>"
                raise DataError(
                    f"{class_folder} has no image files; the images must lie in {folder.name}/{levels}/"
                    f"{' (domains=True)' if domains else ''} and end in one of {sorted(IMAGE_SUFFIXES)}"
                )
            rows += [(domain, class_folder.name, str(file)) for file in files]
    return rows


def has_images(folder: Path) -> bool:
    """Return whether image files lie directly in a folder."""
    return any(_is_image(file) for file in listing(folder))


def unread_files(folder: Path) -> str:
    """Return in words what a folder of classes holds beside the images that are read; nothing where that is all."""
    others = Counter(
        "sub-folders" if file.is_dir() else file.suffix.lower() or "without an ending"
        for class_folder in _folders(folder)
        for file in listing(class_folder)
        if not _is_image(file)
    )
    others["loose images"] = sum(map(_is_image, listing(folder)))
    return few_names([f"{name}: {count}" for name, count in sorted(others.items()) if count])


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


@dataclass(eq=False)
class ImageFiles(SourcePart):
    """Image files, one a row."""

    files: list[str]
    targets: Int64
    domains: Int64 | None = None

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        """Read images (B, 3, H, W), or a list where sizes differ; an error names the file."""
        return stack_inputs([read_image(self.files[i], self.files[i]) for i in indices])


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        raise DataError(
            f"there is no folder {parent}; an image folder has train/ and test/, each with a folder a class"
        )
    found = [entry for entry in listing(parent) if entry.is_dir()]
    if not found:
        raise DataError(f"{parent} has no folders; expected one a class (or a domain, with domains=True)")
    return found
