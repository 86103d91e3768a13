"""Images and features in ``.npz`` files."""

from __future__ import annotations

import io
import struct
import tokenize
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clkit.data.sources.base import (
    FloatPart,
    Int64,
    NamedSource,
    Part,
    PixelPart,
    RowRange,
    SelectedRows,
    check_rows,
    locate,
    read_image,
    select_rows,
    stack_inputs,
)
from clkit.errors import ArgumentError, DataError

__all__ = ["NpzFeatures", "NpzImages"]


@dataclass
class _NpzSource(NamedSource):
    """What images and features in an ``.npz`` file have in common."""

    name: str
    test_fraction: float = 0.2
    split_seed: int = 0
    train_rows: RowRange | None = None
    test_rows: RowRange | None = None

    def __post_init__(self) -> None:
        check_rows(self.train_rows, self.test_rows)
        if not 0 < self.test_fraction < 1:
            raise ArgumentError(f"test_fraction={self.test_fraction} must lie strictly between 0 and 1")
        if self.split_seed < 0:
            raise ArgumentError(f"split_seed={self.split_seed} must be at least 0")

    def load(self, root: Path | None) -> tuple[Part, Part]:
        """Read the arrays of both parts into memory, each once."""
        path = locate(self.name, root, self._kind(), suffix=".npz")
        with _readable(path), _open_npz(path) as archive:
            arrays = _Arrays(path, archive)
            self.class_names = arrays.names("class_names")
            self.domain_names = arrays.names("domain_names")
            train, test = self._parts(arrays)
        return select_rows(self, train, test)

    def _parts(self, arrays: _Arrays) -> tuple[Part, Part]:
        if "y_train" in arrays or "y_test" in arrays:
            return self._part(arrays, "_train"), self._part(arrays, "_test")
        if "y" not in arrays:
            raise arrays.error(
                "it has no y_train and y_test, and no y to split; found " + ", ".join(arrays.names_found)
            )
        whole = self._part(arrays, "")
        train, test = _stratified(whole.targets, self.test_fraction, self.split_seed)
        if not len(test):
            raise arrays.error(f"test_fraction={self.test_fraction} of its {len(whole)} rows leaves no test part")
        return SelectedRows(whole, train), SelectedRows(whole, test)

    @abstractmethod
    def _kind(self) -> str:
        """Return the word before the colon of the spec."""

    @abstractmethod
    def _part(self, arrays: _Arrays, suffix: str) -> Part:
        """Return the arrays whose names end in the suffix as a part."""


@dataclass
class NpzImages(_NpzSource):
    """Images in one ``.npz`` file.

    Arrays, for each of the suffixes ``_train`` and ``_test``, or with no suffix for a file that is to be split here:

    * ``x``: uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3); or
    * ``jpeg`` and ``offsets``: the bytes of N image files one after the other, uint8, and where each starts, (N + 1,)
      integers; image i is ``jpeg[offsets[i]:offsets[i + 1]]``, decoded to RGB when asked for;
    * ``y``: (N,) integer class ids, -1 for no label;
    * ``domain``: (N,) integer domain ids, optional.

    ``class_names`` and ``domain_names``, string arrays indexed by id, are optional. Other arrays are not read. An
    unsplit file is split by a seeded draw in which of a class with n rows ``floor(n * test_fraction + 0.5)``, but never
    all, become test rows. Where no class has a row to spare (one photo a class), the share is drawn from all rows.

    Args:
        name: The file, with or without ``.npz``; a name without a slash is looked up in the data folder.
        test_fraction: Share of the rows of an unsplit file that are tested on.
        split_seed: Of that draw.
        train_rows: Take only the training rows ``[start, stop, step]``, as a slice.
        test_rows: The same for the test part.

    Raises:
        DataError: The file is missing, damaged, holds Python objects, or its arrays do not fit together.

    Example:
        >>> NpzImages("cifar100_subset", train_rows=[None, None, 2]).name  # every other training image
        'cifar100_subset'
    """

    def _kind(self) -> str:
        return "npz"

    def _part(self, arrays: _Arrays, suffix: str) -> Part:
        x, jpeg = f"x{suffix}", f"jpeg{suffix}"
        if x in arrays:
            pixels = arrays.read(x)
            if (
                pixels.dtype != np.uint8
                or pixels.ndim not in (3, 4)
                or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3))
            ):
                raise arrays.error(
                    f"{x} is {pixels.dtype} of shape {pixels.shape}; expected uint8 of shape (N, H, W), (N, H, W, 1) "
                    "or (N, H, W, 3)"
                )
            return PixelPart(pixels, *arrays.labels(suffix, len(pixels), x))
        if jpeg not in arrays:
            raise arrays.error(f"it has neither {x} nor {jpeg}; found {', '.join(arrays.names_found)}")
        data, offsets = arrays.read(jpeg), arrays.integers(f"offsets{suffix}")
        if data.dtype != np.uint8 or data.ndim != 1:
            raise arrays.error(f"{jpeg} is {data.dtype} of shape {data.shape}; expected uint8 bytes of shape (bytes,)")
        if not len(offsets) or offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets) <= 0).any():
            raise arrays.error(f"offsets{suffix} must grow from 0 or more to at most the {len(data)} bytes of {jpeg}")
        return _JpegPart(data, offsets, *arrays.labels(suffix, len(offsets) - 1, f"offsets{suffix} (less one)"))


@dataclass
class NpzFeatures(_NpzSource):
    """Feature vectors in one ``.npz`` file, so that heads train without a backbone (``backbone="identity"``).

    The arrays of :class:`NpzImages`, with ``f`` in place of ``x`` and ``jpeg``: floating point (N, D), given as
    float32 whatever the file's precision.

    Args:
        name: The file, with or without ``.npz``; a name without a slash is looked up in the data folder.
        test_fraction: Share of the rows of an unsplit file that are tested on.
        split_seed: Of that draw.
        train_rows: Take only the training rows ``[start, stop, step]``, as a slice.
        test_rows: The same for the test part.

    Raises:
        DataError: The file is missing, damaged, holds Python objects, or its arrays do not fit together.

    Example:
        >>> NpzFeatures("features_cifar100").name
        'features_cifar100'
    """

    def _kind(self) -> str:
        return "features"

    def _part(self, arrays: _Arrays, suffix: str) -> Part:
        f = f"f{suffix}"
        if f not in arrays:
            raise arrays.error(f"it has no {f}; found {', '.join(arrays.names_found)}")
        features = arrays.read(f)
        if features.dtype.kind != "f" or features.ndim < 2:
            raise arrays.error(f"{f} is {features.dtype} of shape {features.shape}; expected floating point (N, D)")
        bad = _not_float32(features)
        if bad:
            raise arrays.error(
                f"{f} has values that are not finite (or beyond float32) in {len(bad)} of {len(features)} rows, the "
                f"first is row {bad[0]}; compute these features again, or leave the rows out"
            )
        return FloatPart(features, *arrays.labels(suffix, len(features), f))


class _JpegPart(Part):
    """Images as the bytes of their files, one after the other."""

    def __init__(self, data: npt.NDArray[np.uint8], offsets: Int64, targets: Int64, domains: Int64 | None) -> None:
        self._data = data
        self._offsets = offsets
        self.targets = targets
        self.domains = domains

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return stack_inputs([self._decode(int(i)) for i in indices])

    def _decode(self, i: int) -> torch.Tensor:
        # Negative numbers count from the end elsewhere; here they would silently cut the wrong bytes.
        start, stop = self._offsets[:-1][i], self._offsets[1:][i]
        return read_image(io.BytesIO(self._data[start:stop].tobytes()), f"image {i} of the file's JPEG bytes")


class _Arrays:
    """The arrays of an open ``.npz`` file, with errors that name it. Reading one unpacks it anew: read each once."""

    def __init__(self, path: Path, archive: Any) -> None:
        self.path = path
        self._archive = archive
        self.names_found: list[str] = sorted(archive.files)

    def __contains__(self, name: str) -> bool:
        return name in self.names_found

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.path}: {problem}")

    def read(self, name: str) -> npt.NDArray[Any]:
        if name not in self:
            raise self.error(f"it has no {name}; found {', '.join(self.names_found)}")
        array: npt.NDArray[Any] = self._archive[name]
        if not array.ndim:
            raise self.error(f"{name} is a single value; expected an array")
        return array

    def integers(self, name: str) -> Int64:
        array = self.read(name)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise self.error(f"{name} is {array.dtype} of shape {array.shape}; expected integers of shape (N,)")
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise self.error(f"{name} holds {array.max()}, which is too large for a 64-bit integer with a sign")
        return array.astype(np.int64)

    def labels(self, suffix: str, rows: int, of: str) -> tuple[Int64, Int64 | None]:
        """Return targets and domains of a part with as many rows as the array called ``of`` has."""
        targets = self.integers(f"y{suffix}")
        domains = self.integers(f"domain{suffix}") if f"domain{suffix}" in self else None
        for name, ids in (("y", targets), ("domain", domains)):
            if ids is not None and len(ids) != rows:
                raise self.error(f"{name}{suffix} has {len(ids)} entries for {rows} rows of {of}")
        if rows and targets.min() < -1:
            raise self.error(
                f"y{suffix} holds {targets.min()}; ids are 0 or larger, and -1 marks a row without a label"
            )
        return targets, domains

    def names(self, name: str) -> dict[int, str]:
        return dict(enumerate(map(str, self.read(name)))) if name in self else {}


def _open_npz(path: Path) -> Any:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path} holds a single array; expected an .npz file with named arrays")
    return archive


# what numpy and zipfile raise for damaged bytes, found by flipping them; a wrong length can ask for any memory
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    EOFError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what numpy raises on a file that it cannot read into one named error."""
    try:
        yield
    except (ArgumentError, DataError):
        raise
    except _DAMAGED as error:
        objects = "Object arrays" in str(error)
        remedy = (
            "it holds Python objects, which are never unpickled; save plain number and string arrays"
            if objects
            else "it is damaged, or no .npz file"
        )
        raise DataError(f"{path} cannot be read: {remedy} ({error})") from error


def _stratified(targets: Int64, fraction: float, seed: int) -> tuple[Int64, Int64]:
    """Return the rows of the training and the test part, drawn class by class, both in stored order."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(targets == c) for c in np.unique(targets)]
    if not any(_test_count(group, fraction) for group in groups):
        groups = [np.arange(len(targets))]
    tested = np.zeros(len(targets), dtype=bool)
    for group in groups:
        tested[rng.permutation(group)[: _test_count(group, fraction)]] = True
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def _test_count(group: Int64, fraction: float) -> int:
    """Return how many of a group's rows are tested on: the rounded share, but never all."""
    return min(int(len(group) * fraction + 0.5), len(group) - 1)


def _not_float32(rows: npt.NDArray[Any], size: int = 4096) -> list[int]:
    """Return the numbers of the rows (N, ...) that have a value which is no finite float32."""
    bad: list[int] = []
    for start in range(0, len(rows), size):  # in parts: a mask of all would double the memory
        with np.errstate(over="ignore"):
            finite = np.isfinite(rows[start : start + size].astype(np.float32, copy=False))
        bad += (start + np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))).tolist()
    return bad
