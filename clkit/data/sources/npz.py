"""Images and features in ``.npz`` files."""

from __future__ import annotations

import io
import tokenize
import zipfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from clkit.data.sources.base import (
    DAMAGED,
    FloatPart,
    Int64,
    RowRange,
    SelectedRows,
    SlicedSource,
    SourcePart,
    id_vector,
    locate,
    stack_inputs,
)
from clkit.data.sources.images import read_image
from clkit.errors import ArgumentError, DataError

__all__ = ["NpzFeatures", "NpzImages"]


@dataclass
class _NpzSource(SlicedSource):
    """What images and features in an ``.npz`` file have in common."""

    _kind: ClassVar[str]  # the word before the colon of the spec

    name: str
    test_fraction: float = 0.2
    split_seed: int = 0
    train_rows: RowRange | None = None
    test_rows: RowRange | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.test_fraction < 1:
            raise ArgumentError(f"test_fraction={self.test_fraction} must lie strictly between 0 and 1")
        if self.split_seed < 0:
            raise ArgumentError(f"split_seed={self.split_seed} must be at least 0")

    def load(self, root: Path | None) -> tuple[SourcePart, SourcePart]:
        """Read the arrays of both parts into memory, each once."""
        path = locate(self.name, root, self._kind, suffix=".npz")
        with _opened(path) as arrays:
            self.class_names = arrays.names("class_names")
            self.domain_names = arrays.names("domain_names")
            train, test = self._parts(arrays)
        return self._sliced(train, test)

    def _parts(self, arrays: _Arrays) -> tuple[SourcePart, SourcePart]:
        if "y_train" in arrays or "y_test" in arrays:
            return self._part(arrays, "_train"), self._part(arrays, "_test")
        if "y" not in arrays:
            raise arrays.error(f"it has no y_train and y_test, and no y to split; found {arrays.found}")
        whole = self._part(arrays, "")
        train, test = _stratified(whole.targets, self.test_fraction, self.split_seed)
        if not len(test):
            raise arrays.error(f"test_fraction={self.test_fraction} of its {len(whole)} rows leaves no test part")
        return SelectedRows(whole, train), SelectedRows(whole, test)

    @abstractmethod
    def _part(self, arrays: _Arrays, suffix: str) -> SourcePart:
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

    _kind = "npz"

    def _part(self, arrays: _Arrays, suffix: str) -> SourcePart:
        x, jpeg = f"x{suffix}", f"jpeg{suffix}"
        if x in arrays:
            pixels = arrays.read(x)
            if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (1,), (3,)):
                raise arrays.error(
                    f"{x} is {pixels.dtype} of shape {pixels.shape}; expected uint8 of shape (N, H, W), (N, H, W, 1) "
                    "or (N, H, W, 3)"
                )
            pixels = pixels if pixels.ndim == 4 else pixels[..., None]
            return _PixelPart(pixels, *arrays.labels(suffix, len(pixels), x))
        if jpeg not in arrays:
            raise arrays.error(f"it has neither {x} nor {jpeg}; found {arrays.found}")
        data, offsets = arrays.read(jpeg), arrays.integers(f"offsets{suffix}")
        if data.dtype != np.uint8 or data.ndim != 1:
            raise arrays.error(f"{jpeg} is {data.dtype} of shape {data.shape}; expected uint8 bytes of shape (bytes,)")
        if not len(offsets) or offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets) <= 0).any():
            raise arrays.error(f"offsets{suffix} must grow from 0 or more to at most the {len(data)} bytes of {jpeg}")
        return _JpegPart(data, offsets, *arrays.labels(suffix, len(offsets) - 1, f"offsets{suffix} (less one)"))


@dataclass
class NpzFeatures(_NpzSource):
    """Feature vectors in one ``.npz`` file, so that heads train without a backbone (``backbone="identity"``).

    Arrays, arguments and errors are those of :class:`NpzImages`, with ``f`` in place of ``x`` and ``jpeg``: floating
    point (N, D), given as float32 whatever the file's precision.

    Example:
        >>> NpzFeatures("features_cifar100").name
        'features_cifar100'
    """

    _kind = "features"

    def _part(self, arrays: _Arrays, suffix: str) -> SourcePart:
        f = f"f{suffix}"
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


@dataclass(eq=False)
class _PixelPart(SourcePart):
    """Images of one size, (N, H, W, C) in memory."""

    pixels: npt.NDArray[np.uint8]
    targets: Int64
    domains: Int64 | None

    def get_many(self, indices: Int64) -> torch.Tensor:
        return torch.from_numpy(self.pixels[indices]).permute(0, 3, 1, 2).contiguous()


@dataclass(eq=False)
class _JpegPart(SourcePart):
    """Images as the bytes of their files, one after the other."""

    data: npt.NDArray[np.uint8]
    offsets: Int64
    targets: Int64
    domains: Int64 | None

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return stack_inputs([self._decode(int(i)) for i in indices])

    def _decode(self, i: int) -> torch.Tensor:
        # Negative numbers count from the end elsewhere; here they would silently cut the wrong bytes.
        start, stop = self.offsets[:-1][i], self.offsets[1:][i]
        return read_image(io.BytesIO(self.data[start:stop].tobytes()), f"image {i} of the file's JPEG bytes")


class _Arrays:
    """The arrays of an open ``.npz`` file, with errors that name it. Reading one unpacks it anew: read each once."""

    def __init__(self, path: Path, archive: Any) -> None:
        self.path = path
        self._archive = archive
        self.found = ", ".join(sorted(archive.files))

    def __contains__(self, name: str) -> bool:
        return name in self._archive.files

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.path}: {problem}")

    def read(self, name: str) -> npt.NDArray[Any]:
        if name not in self:
            raise self.error(f"it has no {name}; found {self.found}")
        array: npt.NDArray[Any] = self._archive[name]
        if not array.ndim:
            raise self.error(f"{name} is a single value; expected an array")
        return array

    def integers(self, name: str) -> Int64:
        return id_vector(f"{self.path}: {name}", self.read(name))

    def labels(self, suffix: str, rows: int, of: str) -> tuple[Int64, Int64 | None]:
        """Return targets and domains of a part with as many rows as the array called ``of`` has."""
        targets = self.integers(f"y{suffix}")
        domains = self.integers(f"domain{suffix}") if f"domain{suffix}" in self else None
        for name, ids in (("y", targets), ("domain", domains)):
            if ids is not None and len(ids) != rows:
                raise self.error(f"{name}{suffix} has {len(ids)} entries for {rows} rows of {of}")
        if rows and targets.min() < -1:
            raise self.error(f"y{suffix} holds {targets.min()}; ids are 0 or larger, -1 marks a row without a label")
        return targets, domains

    def names(self, name: str) -> dict[int, str]:
        return dict(enumerate(map(str, self.read(name)))) if name in self else {}


@contextmanager
def _opened(path: Path) -> Iterator[_Arrays]:
    """Open a file, and turn what numpy raises where it cannot read it into one named error."""
    try:
        with path.open("rb") as file:  # numpy leaves a file that it opened itself, and cannot read, open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds a single array; expected an .npz file with named arrays")
            with archive:
                yield _Arrays(path, archive)
    except (ArgumentError, DataError):
        raise
    except (*DAMAGED, zipfile.BadZipFile, tokenize.TokenError) as error:
        remedy = "it is damaged, or no .npz file"
        if "Object arrays" in str(error):
            remedy = "it holds Python objects, which are never unpickled; save plain number and string arrays"
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
