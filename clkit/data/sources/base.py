"""What a source of data is, and where its files are found."""

from __future__ import annotations

import os
import struct
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, DataError, did_you_mean

__all__ = ["Source", "SourcePart", "data_root", "first_image"]

Int64 = npt.NDArray[np.int64]

RowRange = list[int | None]

DATA_VARIABLE = "CLKIT_DATA"

# what decoders raise for damaged bytes, found by flipping them; a wrong length can ask for any memory
_BUILT_IN = EOFError, IndexError, MemoryError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError
DAMAGED = (*_BUILT_IN, struct.error, zlib.error)


class SourcePart(ABC):
    """One part, training or test, of a source; it can be pickled, so that loader workers may hold it.

    Attributes:
        targets: (N,) int64 class ids as the user numbers them; -1 is a row without a label.
        domains: (N,) int64 domain ids, or ``None``.
    """

    targets: Int64
    domains: Int64 | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        """Return the inputs of rows (B,), in the order asked for; a row may be asked for twice.

        They are uint8 images (B, C, H, W) with values 0..255, or float32 ones with values in [0, 1]; or a list of
        images (C, H, W) where sizes or dtypes differ; or float32 (B, ...) that goes into the network as it is.
        """


def first_image(part: SourcePart) -> torch.Tensor | None:
    """Return the first image (C, H, W) of a part; ``None`` where the inputs are vectors rather than images."""
    first: Any = part.get_many(np.zeros(1, dtype=np.int64))
    return first[0] if isinstance(first, list) or (isinstance(first, torch.Tensor) and first.ndim == 4) else None


class Source(ABC):
    """Where samples come from. Constructor arguments are plain values, so a source can stand in a YAML file.

    To write a new one, subclass, set the three attributes and implement :meth:`load`.

    Attributes:
        name: What a person calls it.
        class_names: Names by class id; may be empty. Complete after :meth:`load`.
        domain_names: Names by domain id; may be empty. Complete after :meth:`load`.
    """

    name: str
    class_names: dict[int, str]
    domain_names: dict[int, str]

    @abstractmethod
    def load(self, root: Path | None) -> tuple[SourcePart, SourcePart]:
        """Open the training and the test part; names are looked up in the data folder ``root``, where there is one.

        Raises:
            DataError: The data is not there or malformed.
        """


@dataclass
class NamedSource(Source):
    """A source with names that are empty until it is loaded."""

    class_names: dict[int, str] = field(init=False, repr=False, compare=False, default_factory=dict)
    domain_names: dict[int, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))


class SlicedSource(NamedSource):
    """A source of which ``train_rows`` and ``test_rows``, each ``[start, stop, step]`` or ``None``, take a part."""

    train_rows: RowRange | None
    test_rows: RowRange | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for rows in (self.train_rows, self.test_rows):
            if rows is None:
                continue
            whole = len(rows) == 3 and all(entry is None or isinstance(entry, int) for entry in rows)
            if not whole or (rows[2] is not None and rows[2] < 1):
                raise ArgumentError(
                    f"train_rows or test_rows is {rows!r}; expected [start, stop, step], each an integer or null, with "
                    "a step of at least 1"
                )

    def _sliced(self, train: SourcePart, test: SourcePart) -> tuple[SourcePart, SourcePart]:
        def selected(part: SourcePart, argument: str) -> SourcePart:
            rows: RowRange | None = getattr(self, argument)
            if rows is None:
                return part
            chosen = np.arange(len(part))[slice(*rows)]
            if not len(chosen):
                raise DataError(f"{argument}={rows} selects none of {len(part)} rows")
            return SelectedRows(part, chosen)

        return selected(train, "train_rows"), selected(test, "test_rows")


def data_root(explicit: str | Path | None = None) -> Path | None:
    """Return the folder ``explicit`` (``~`` is home), or that of the environment variable ``CLKIT_DATA``, or ``None``.

    Raises:
        DataError: The folder is not there; the message names the setting it came from.

    Example:
        >>> str(data_root(".."))
        '..'
    """
    setting, value = "data.root", explicit
    if explicit is None:
        setting, value = f"the environment variable {DATA_VARIABLE}", os.environ.get(DATA_VARIABLE) or None
    if value is None:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{setting} is {str(value)!r}, which is not a folder; set it to the folder that holds your data"
        )
    return folder


@dataclass(eq=False)
class FloatPart(SourcePart):
    """Arrays that go into the network as they are."""

    inputs: npt.NDArray[Any]
    targets: Int64
    domains: Int64 | None = None

    def get_many(self, indices: Int64) -> torch.Tensor:
        return torch.from_numpy(self.inputs[indices].astype(np.float32, copy=False))


class SelectedRows(SourcePart):
    """Some rows of another part."""

    def __init__(self, part: SourcePart, rows: Int64) -> None:
        self._part = part
        self._rows = rows
        self.targets = part.targets[rows]
        self.domains = None if part.domains is None else part.domains[rows]

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return self._part.get_many(self._rows[indices])


def locate(name: str, root: Path | None, kind: str, suffix: str = "") -> Path:
    """Return the file or folder that a spec names."""
    if "/" in name or os.sep in name:
        places = [Path(name).expanduser()]
    elif root is None:
        raise DataError(f"{no_root(f'{kind}:{name}')}; or write a path with a slash, e.g. {kind}:./{name}")
    else:
        places = [root / name]
    if suffix and not name.endswith(suffix):
        places.append(places[0].with_name(places[0].name + suffix))
    for place in places:
        if place.exists():
            return place
    parent = places[0].parent
    there = [entry.name.removesuffix(suffix) for entry in listing(parent)] if parent.is_dir() else []
    hint = did_you_mean(name.removesuffix(suffix), there)
    raise DataError(f"{kind}:{name}: nothing is at {' or '.join(map(str, places))}{hint}")


def no_root(spec: str) -> str:
    """Return what to say where a name is to be looked up and there is no data folder."""
    return (
        f"{spec} is looked up in the data folder, and none is set; set data.root or the environment variable "
        f"{DATA_VARIABLE}"
    )


def listing(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name; hidden files are left out."""
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)


def id_vector(what: str, values: Any) -> Int64:
    """Return ids, one for each row, as int64."""
    try:
        ids = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{what} is no vector of integers: {error}") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        cure = "; convert whole numbers to int64" if ids.ndim == 1 and ids.dtype.kind == "f" else ""
        raise DataError(
            f"{what} is {ids.dtype} of shape {ids.shape}; expected integers of shape (N,), one for each row{cure}"
        )
    if ids.size and int(ids.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{what} holds {ids.max()}, which is too large for a 64-bit integer with a sign")
    return ids.astype(np.int64)


def stack_inputs(items: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """Return one tensor where shapes and dtypes agree, else a list, which only images (C, H, W) may be."""
    shapes, dtypes = {tuple(item.shape) for item in items}, {item.dtype for item in items}
    if len(shapes) == len(dtypes) == 1:
        return torch.stack(items)
    if any(item.ndim != 3 for item in items):
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise DataError(
            f"the inputs of a batch are {kinds} of shapes {sorted(shapes)}; make them equal (only images (C, H, W) may "
            "differ)"
        )
    return items
