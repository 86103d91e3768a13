"""Sources: where samples come from.

A source has a training and a test part. A part knows its targets (and domains) as arrays, so a scenario can cut a
stream without reading an input, and gives inputs by row number, many at a time.

============================  =========================================================================================
spec                          source
============================  =========================================================================================
``digits``                    :class:`Digits`: 8 x 8 grey images that ship with scikit-learn; ``digits:flat``,
                              ``digits:shifts`` and ``digits:flat,shifts`` set its options
``torchvision:NAME``          :class:`Torchvision`: any labelled image set of ``torchvision.datasets``
``folder:PATH``               :class:`ImageFolder`: image files, one folder a class
``npz:NAME``                  :class:`NpzImages`: pixels or JPEG bytes in one ``.npz`` file
``features:NAME``             :class:`NpzFeatures`: vectors in one ``.npz`` file
============================  =========================================================================================

The user's own data sets come in by :class:`Custom`, which has no spec. A name without a slash is looked up in the data
folder, a path with a slash is taken as it is. See :func:`resolve_source` and :func:`data_root`.
"""

from __future__ import annotations

import difflib
import io
import os
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clkit.errors import ArgumentError, DataError

__all__ = [
    "Custom",
    "Digits",
    "ImageFolder",
    "NpzFeatures",
    "NpzImages",
    "Part",
    "Source",
    "Torchvision",
    "data_root",
    "resolve_source",
]

Int64 = npt.NDArray[np.int64]
RowRange = list[int | None]
Inputs = torch.Tensor | list[torch.Tensor]

DATA_VARIABLE = "CLKIT_DATA"
LARGEST = int(np.iinfo(np.int64).max)
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class Part(ABC):
    """One part, training or test, of a source.

    Parts can be pickled, so loader workers may hold them.

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
        """The inputs of some rows, in the order asked for.

        Args:
            indices: (B,) row numbers; a row may be asked for twice.

        Returns:
            uint8 images (B, C, H, W) with values 0..255; or, where their sizes differ, a list of uint8 (C, H, W); or
            float32 (B, ...) that goes into the network as it is.
        """


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
    def load(self, root: Path | None) -> tuple[Part, Part]:
        """Open the data: the training and the test part.

        Args:
            root: The data folder in which names are looked up, or ``None`` where there is none.

        Raises:
            DataError: The data is not there or malformed.
        """


@dataclass
class _NamedSource(Source):
    """A source with names that are empty until it is loaded."""

    class_names: dict[int, str] = field(init=False, repr=False, compare=False, default_factory=dict)
    domain_names: dict[int, str] = field(init=False, repr=False, compare=False, default_factory=dict)


@dataclass
class Digits(_NamedSource):
    """Handwritten digits, 8 x 8 grey: 1797 images of ten classes that ship with scikit-learn. Needs no files.

    The embedded data set of every example. Pixels are divided by 16. Training rows are the even indices of
    ``sklearn.datasets.load_digits()`` (899), test rows the odd ones (898).

    Args:
        flat: Vectors (64,) in place of images (1, 8, 8), for networks without convolutions.
        shifts: Training rows also moved by one pixel, what comes in filled with 0: all originals, then all moved up,
            down, left and right, 4495 rows. The test part stays as it is.

    Example:
        >>> train, test = Digits(flat=True, shifts=True).load(None)
        >>> len(train), len(test), train.get_many(np.array([0, 1])).shape
        (4495, 898, torch.Size([2, 64]))
    """

    name = "digits"

    flat: bool = False
    shifts: bool = False

    def load(self, root: Path | None) -> tuple[Part, Part]:
        """Both parts as float32 in [0, 1]; ``root`` is not used."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = (bunch.images / 16).astype(np.float32)
        targets = bunch.target.astype(np.int64)
        self.class_names = {c: str(c) for c in range(10)}
        train, train_targets = images[::2], targets[::2]
        if self.shifts:
            moved = [_shift(train, down, right) for down, right in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))]
            train, train_targets = np.concatenate(moved), np.tile(train_targets, len(moved))
        shape = (-1, 64) if self.flat else (-1, 1, 8, 8)
        return (
            _FloatPart(train.reshape(shape), train_targets),
            _FloatPart(images[1::2].reshape(shape), targets[1::2]),
        )


@dataclass
class Torchvision(_NamedSource):
    """A labelled image set of ``torchvision.datasets``, by the name of its class, from the data folder.

    Args:
        name: The class's name, e.g. ``"CIFAR10"``.
        download: Let torchvision fetch what is not there.
        options: More keyword arguments of the class, e.g. ``{"split": "balanced"}`` for EMNIST.
        train_split: ``split=`` of the training part, for classes with such an argument.
        test_split: ``split=`` of the test part, for classes with such an argument; e.g. ``"val"`` for ImageNet.
        train_rows: Take only the training rows ``[start, stop, step]``, as a slice.
        test_rows: The same for the test part.

    Raises:
        ArgumentError: No class has this name, it takes neither ``train`` nor ``split``, or it refuses an option.
        DataError: The files are not in the data folder, or there is no data folder.

    Example:
        >>> source = Torchvision("CIFAR10", train_rows=[None, None, 10])  # every tenth training image
        >>> source.name
        'CIFAR10'
    """

    name: str
    download: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    test_split: str = "test"
    train_rows: RowRange | None = None
    test_rows: RowRange | None = None

    def __post_init__(self) -> None:
        _check_rows(self.train_rows, self.test_rows)

    def load(self, root: Path | None) -> tuple[Part, Part]:
        """Both parts, each image decoded when it is asked for."""
        kind = _torchvision_class(self.name)
        if root is None:
            raise DataError(_no_root(f"torchvision:{self.name}"))
        datasets = [self._open(kind, root, training) for training in (True, False)]
        self.class_names = dict(enumerate(map(str, getattr(datasets[0], "classes", ()))))
        train, test = (_DatasetPart(dataset, ("targets", "labels", "_labels")) for dataset in datasets)
        return _select(train, self.train_rows, "train_rows"), _select(test, self.test_rows, "test_rows")

    def _open(self, kind: Any, root: Path, training: bool) -> Any:
        arguments = dict(self.options)
        accepted = _accepted_arguments(kind)
        if "train" in accepted:
            arguments["train"] = training
        elif "split" in accepted:
            arguments["split"] = self.train_split if training else self.test_split
        else:
            raise ArgumentError(
                f"torchvision.datasets.{self.name} takes neither train= nor split=, so it has no test part; split it "
                "yourself and pass the two data sets to Custom(train, test)"
            )
        if self.download:
            arguments["download"] = True
        try:
            return kind(root=str(root), **arguments)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"torchvision.datasets.{self.name} refuses {arguments}: {error}. See options, train_split, test_split "
                "and download"
            ) from error
        except (RuntimeError, OSError, ImportError) as error:
            remedy = (
                "the download failed; check the network, or copy the files there by hand"
                if self.download
                else "pass download=True, copy the files there by hand, or point the data folder elsewhere "
                f"(data.root or the environment variable {DATA_VARIABLE})"
            )
            raise DataError(f"torchvision.datasets.{self.name} found no data in {root}: {error}. {remedy}") from error


@dataclass
class ImageFolder(_NamedSource):
    """Image files in ``path/train/<class>/`` and ``path/test/<class>/``, decoded to RGB when asked for.

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
        DataError: A folder is missing or has no images, or a class folder is no number where ``numeric_ids`` says so.

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
        _check_rows(self.train_rows, self.test_rows)
        self.name = Path(self.path).name

    def load(self, root: Path | None) -> tuple[Part, Part]:
        """List both parts; images are read later."""
        folder = _locate(self.path, root, "folder")
        if not folder.is_dir():
            raise DataError(f"folder:{self.path}: there is no folder {folder}")
        listings = [self._list(folder / part) for part in ("train", "test")]
        class_ids = self._number({row[1] for rows in listings for row in rows}, folder)
        domain_ids = {name: i for i, name in enumerate(sorted({row[0] for rows in listings for row in rows}))}
        self.class_names = {i: name for name, i in class_ids.items()}
        self.domain_names = {i: name for name, i in domain_ids.items()} if self.domains else {}
        train, test = (
            _FilePart(
                [row[2] for row in rows],
                np.array([class_ids[row[1]] for row in rows], dtype=np.int64),
                np.array([domain_ids[row[0]] for row in rows], dtype=np.int64) if self.domains else None,
            )
            for rows in listings
        )
        return _select(train, self.train_rows, "train_rows"), _select(test, self.test_rows, "test_rows")

    def _list(self, folder: Path) -> list[tuple[str, str, str]]:
        """(domain, class, file) of each image of a part; the domain is "" where there are none."""
        groups = [(domain.name, domain) for domain in _folders(folder)] if self.domains else [("", folder)]
        rows = []
        for domain, parent in groups:
            for class_folder in _folders(parent):
                files = [file for file in _listing(class_folder) if file.suffix.lower() in IMAGE_SUFFIXES]
                if not files:
                    levels = "<domain>/<class>" if self.domains else "<class>"
                    raise DataError(
                        f"{class_folder} has no image files; the images must lie in {folder.name}/{levels}/ "
                        f"(domains={self.domains}) and end in one of {sorted(IMAGE_SUFFIXES)}"
                    )
                rows += [(domain, class_folder.name, str(file)) for file in files]
        return rows

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


@dataclass
class _NpzSource(_NamedSource):
    """What images and features in an ``.npz`` file have in common."""

    name: str
    test_fraction: float = 0.2
    split_seed: int = 0
    train_rows: RowRange | None = None
    test_rows: RowRange | None = None

    def __post_init__(self) -> None:
        _check_rows(self.train_rows, self.test_rows)
        if not 0 < self.test_fraction < 1:
            raise ArgumentError(f"test_fraction={self.test_fraction} must lie strictly between 0 and 1")
        if self.split_seed < 0:
            raise ArgumentError(f"split_seed={self.split_seed} must be at least 0")

    def load(self, root: Path | None) -> tuple[Part, Part]:
        """Read the arrays of both parts into memory, each once."""
        path = _locate(self.name, root, self._kind(), suffix=".npz")
        with _readable(path), _open_npz(path) as archive:
            arrays = _Arrays(path, archive)
            self.class_names = arrays.names("class_names")
            self.domain_names = arrays.names("domain_names")
            train, test = self._parts(arrays)
        return _select(train, self.train_rows, "train_rows"), _select(test, self.test_rows, "test_rows")

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
        return _Rows(whole, train), _Rows(whole, test)

    @abstractmethod
    def _kind(self) -> str:
        """The word before the colon of the spec."""

    @abstractmethod
    def _part(self, arrays: _Arrays, suffix: str) -> Part:
        """The arrays whose names end in the suffix, as a part."""


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
            return _PixelPart(pixels, *arrays.labels(suffix, len(pixels), x))
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
        return _FloatPart(features, *arrays.labels(suffix, len(features), f))


@dataclass
class Custom(Source):
    """The user's own map-style data sets, which return ``(input, target)`` (more entries are not read).

    Inputs may be PIL images (they become uint8 tensors: grey ones (1, H, W), others RGB (3, H, W)), or arrays or
    tensors: uint8 ones are images (C, H, W), floating-point ones go into the network as float32. Do not normalise or
    augment in the data set what the stream's transform shall do.

    Targets are read from ``.targets`` or ``.labels`` where the data set has one of them and no ``target_transform``,
    else by going through the data set once. Domains are read from ``.domains`` where it has them.

    Args:
        train: The training part, with ``__len__`` and ``__getitem__``.
        test: The test part.
        class_names: Names by class id; read from ``train.classes`` where not given.
        domain_names: Names by domain id.
        name: What a person calls it.

    Raises:
        ArgumentError: A data set cannot be indexed.
        DataError: Its items are not ``(input, target)``, its targets are no integers, or there are not as many targets
            (or domains) as items.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.rand(6, 1, 4, 4), torch.tensor([0, 0, 2, 2, 5, 5]))
        >>> train, test = Custom(data, data).load(None)
        >>> train.targets
        array([0, 0, 2, 2, 5, 5])
    """

    train: Any
    test: Any
    class_names: dict[int, str] = field(default_factory=dict)
    domain_names: dict[int, str] = field(default_factory=dict)
    name: str = "custom"

    def __post_init__(self) -> None:
        for argument, dataset in (("train", self.train), ("test", self.test)):
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise ArgumentError(
                    f"{argument} is a {type(dataset).__name__}; a map-style data set is needed, with __len__ and "
                    "__getitem__"
                )

    def load(self, root: Path | None) -> tuple[Part, Part]:
        """Both parts, each item fetched when it is asked for; ``root`` is not used."""
        if not self.class_names:
            self.class_names = dict(enumerate(map(str, getattr(self.train, "classes", ()))))
        return _DatasetPart(self.train), _DatasetPart(self.test)


def resolve_source(spec: str | Source) -> Source:
    """A source from its spec, e.g. ``"digits:flat"`` or ``"npz:cifar100_subset"``; a source is returned as it is.

    Args:
        spec: See the table at the top of this module.

    Raises:
        ArgumentError: The spec is not known; the message lists what is allowed and the nearest match.

    Example:
        >>> resolve_source("digits:flat,shifts")
        Digits(flat=True, shifts=True)
    """
    if isinstance(spec, Source):
        return spec
    if not isinstance(spec, str):
        raise ArgumentError(f"source={spec!r} must be a spec (one of {', '.join(_SPECS)}) or a Source")
    kind, colon, rest = spec.partition(":")
    if kind == "digits":
        return Digits(**dict.fromkeys(_digits_options(spec, rest, bool(colon)), True))
    if kind == "custom":
        raise ArgumentError("source='custom' has no spec; pass Custom(train, test) with your data sets")
    if kind not in _NAMED_KINDS:
        raise _unknown(f"source={spec!r} is not known", kind, ["digits", *_NAMED_KINDS], _SPECS)
    if not rest:
        raise ArgumentError(f"source={spec!r} lacks what comes after the colon; write one of {', '.join(_SPECS)}")
    return _NAMED_KINDS[kind](rest)


def data_root(explicit: str | Path | None = None) -> Path | None:
    """The data folder: ``explicit``, else the environment variable ``CLKIT_DATA``, else ``None``.

    Args:
        explicit: A folder; ``~`` is the home folder.

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


_NAMED_KINDS: dict[str, Callable[[str], Source]] = {
    "torchvision": Torchvision,
    "folder": ImageFolder,
    "npz": NpzImages,
    "features": NpzFeatures,
}
_SPECS = (
    "'digits'",
    "'digits:flat'",
    "'digits:shifts'",
    "'digits:flat,shifts'",
    "'torchvision:NAME'",
    "'folder:PATH'",
    "'npz:NAME'",
    "'features:NAME'",
)
_DIGITS_OPTIONS = ("flat", "shifts")


def _digits_options(spec: str, rest: str, colon: bool) -> list[str]:
    options = [option.strip() for option in rest.split(",")] if colon else []
    for option in options:
        if option not in _DIGITS_OPTIONS:
            raise _unknown(f"source={spec!r} has the unknown option {option!r}", option, _DIGITS_OPTIONS, _SPECS[:4])
    return options


def _unknown(problem: str, seen: str, known: Sequence[str], shown: Sequence[str]) -> ArgumentError:
    near = difflib.get_close_matches(seen, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ArgumentError(f"{problem}; allowed: {', '.join(shown)}.{hint}")


class _FloatPart(Part):
    """Arrays that go into the network as they are."""

    def __init__(self, inputs: npt.NDArray[Any], targets: Int64, domains: Int64 | None = None) -> None:
        self._inputs = inputs
        self.targets = targets
        self.domains = domains

    def get_many(self, indices: Int64) -> torch.Tensor:
        return torch.from_numpy(self._inputs[indices].astype(np.float32, copy=False))


class _PixelPart(Part):
    """Images of one size, (N, H, W) or (N, H, W, C) in memory."""

    def __init__(self, pixels: npt.NDArray[np.uint8], targets: Int64, domains: Int64 | None) -> None:
        self._pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        self.targets = targets
        self.domains = domains

    def get_many(self, indices: Int64) -> torch.Tensor:
        return torch.from_numpy(self._pixels[indices]).permute(0, 3, 1, 2).contiguous()


class _JpegPart(Part):
    """Images as the bytes of their files, one after the other."""

    def __init__(self, data: npt.NDArray[np.uint8], offsets: Int64, targets: Int64, domains: Int64 | None) -> None:
        self._data = data
        self._offsets = offsets
        self.targets = targets
        self.domains = domains

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return _stack([self._decode(int(i)) for i in indices])

    def _decode(self, i: int) -> torch.Tensor:
        # Negative numbers count from the end elsewhere; here they would silently cut the wrong bytes.
        start, stop = self._offsets[:-1][i], self._offsets[1:][i]
        return _read_image(io.BytesIO(self._data[start:stop].tobytes()), f"image {i} of the file's JPEG bytes")


class _FilePart(Part):
    """Image files."""

    def __init__(self, files: list[str], targets: Int64, domains: Int64 | None) -> None:
        self._files = files
        self.targets = targets
        self.domains = domains

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return _stack([_read_image(self._files[i], self._files[i]) for i in indices])


class _DatasetPart(Part):
    """A map-style torch data set."""

    def __init__(self, dataset: Any, target_attributes: Sequence[str] = ("targets", "labels")) -> None:
        self._dataset = dataset
        self.targets = self._vector("targets", self._find_targets(target_attributes))
        domains = getattr(dataset, "domains", None)
        self.domains = None if domains is None else self._vector("domains", domains)

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return _stack([self._input(int(i)) for i in indices])

    def _find_targets(self, attributes: Sequence[str]) -> Any:
        if getattr(self._dataset, "target_transform", None) is None:
            for attribute in attributes:
                if (found := getattr(self._dataset, attribute, None)) is not None:
                    return found
        return [self._item(i)[1] for i in range(len(self._dataset))]

    def _item(self, i: int) -> Sequence[Any]:
        item = self._dataset[i]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(
                f"item {i} of {type(self._dataset).__name__} is a {type(item).__name__}; expected (input, target)"
            )
        return item

    def _input(self, i: int) -> torch.Tensor:
        x = self._item(i)[0]
        if not isinstance(x, torch.Tensor | np.ndarray):
            return _pil_to_tensor(x, f"the input of item {i} of {type(self._dataset).__name__}")
        x = torch.as_tensor(x)
        if x.dtype == torch.uint8:
            return x
        if not x.is_floating_point():
            raise DataError(
                f"the input of item {i} of {type(self._dataset).__name__} has dtype {x.dtype}; expected uint8 for an "
                "image, or floating point"
            )
        return x.to(torch.float32)

    def _vector(self, what: str, values: Any) -> Int64:
        kind = type(self._dataset).__name__
        if isinstance(values, list | tuple):
            values = [
                value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in values
            ]
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise DataError(f"the {what} of {kind} are no vector of integers: {error}") from error
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise DataError(
                f"the {what} of {kind} are {array.dtype} of shape {array.shape}; expected one integer for each item"
            )
        if len(array) != len(self._dataset):
            raise DataError(f"{kind} has {len(self._dataset)} items but {len(array)} {what}")
        return array.astype(np.int64)


class _Rows(Part):
    """Some rows of another part."""

    def __init__(self, part: Part, rows: Int64) -> None:
        self._part = part
        self._rows = rows
        self.targets = part.targets[rows]
        self.domains = None if part.domains is None else part.domains[rows]

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return self._part.get_many(self._rows[indices])


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
        if array.size and int(array.max()) > LARGEST:
            raise self.error(f"{name} holds {array.max()}, which is too large for a 64-bit integer with a sign")
        return array.astype(np.int64)

    def labels(self, suffix: str, rows: int, of: str) -> tuple[Int64, Int64 | None]:
        """Targets and domains of a part with that many rows, which the array called ``of`` says."""
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


def _locate(name: str, root: Path | None, kind: str, suffix: str = "") -> Path:
    """The file or folder that a spec names."""
    if "/" in name or os.sep in name:
        places = [Path(name).expanduser()]
    elif root is None:
        raise DataError(_no_root(f"{kind}:{name}") + f"; or write a path with a slash, e.g. {kind}:./{name}")
    else:
        places = [root / name]
    if suffix and not name.endswith(suffix):
        places.append(places[0].with_name(places[0].name + suffix))
    for place in places:
        if place.exists():
            return place
    parent = places[0].parent
    there = [entry.name.removesuffix(suffix) for entry in _listing(parent)] if parent.is_dir() else []
    near = difflib.get_close_matches(name.removesuffix(suffix), there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"{kind}:{name}: nothing is at {' or '.join(map(str, places))}{hint}")


def _no_root(spec: str) -> str:
    return (
        f"{spec} is looked up in the data folder, and none is set; set data.root or the environment variable "
        f"{DATA_VARIABLE}"
    )


def _listing(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        raise DataError(
            f"there is no folder {parent}; an image folder has train/ and test/, each with a folder a class"
        )
    found = [entry for entry in _listing(parent) if entry.is_dir()]
    if not found:
        raise DataError(f"{parent} has no folders; expected one a class (or a domain, with domains=True)")
    return found


def _torchvision_class(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"torchvision:{name} needs the package torchvision, which is not installed") from error
    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see the documentation of torchvision.datasets for the names."
        raise ArgumentError(f"torchvision.datasets has no {name!r}; {hint}")
    return getattr(datasets, name)


def _accepted_arguments(kind: Any) -> set[str]:
    """The argument names of a class's constructor and of those that it may hand keywords on to."""
    import inspect

    return {
        argument
        for base in kind.__mro__
        if "__init__" in vars(base) and base is not object
        for argument in inspect.signature(base.__init__).parameters
    }


def _check_rows(*ranges: RowRange | None) -> None:
    for rows in ranges:
        if rows is None:
            continue
        whole = len(rows) == 3 and all(entry is None or isinstance(entry, int) for entry in rows)
        if not whole or (rows[2] is not None and rows[2] < 1):
            raise ArgumentError(
                f"train_rows or test_rows is {rows!r}; expected [start, stop, step], each an integer or null, with a "
                "step of at least 1"
            )


def _select(part: Part, rows: RowRange | None, argument: str) -> Part:
    if rows is None:
        return part
    chosen = np.arange(len(part))[slice(*rows)]
    if not len(chosen):
        raise DataError(f"{argument}={rows} selects none of {len(part)} rows")
    return _Rows(part, chosen)


def _stratified(targets: Int64, fraction: float, seed: int) -> tuple[Int64, Int64]:
    """Rows of the training and the test part, drawn class by class, both in stored order."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(targets == c) for c in np.unique(targets)]
    if not any(_test_count(group, fraction) for group in groups):
        groups = [np.arange(len(targets))]
    tested = np.zeros(len(targets), dtype=bool)
    for group in groups:
        tested[rng.permutation(group)[: _test_count(group, fraction)]] = True
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def _test_count(group: Int64, fraction: float) -> int:
    """How many of a group's rows are tested on: the rounded share, but never all."""
    return min(int(len(group) * fraction + 0.5), len(group) - 1)


def _not_float32(rows: npt.NDArray[Any], size: int = 4096) -> list[int]:
    """Numbers of the rows (N, ...) that have a value which is no finite float32."""
    bad: list[int] = []
    for start in range(0, len(rows), size):  # in parts: a mask of all would double the memory
        with np.errstate(over="ignore"):
            finite = np.isfinite(rows[start : start + size].astype(np.float32, copy=False))
        bad += (start + np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))).tolist()
    return bad


def _shift(images: npt.NDArray[np.float32], down: int, right: int) -> npt.NDArray[np.float32]:
    """Move (N, 8, 8) images by up to one pixel and fill what comes in with 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - down : 9 - down, 1 - right : 9 - right]


def _stack(items: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """One tensor where shapes agree, else a list, which only images may be."""
    if len({item.dtype for item in items}) > 1:
        raise DataError("some inputs of a batch are uint8 images and some are floating point; expected one kind")
    if len({item.shape for item in items}) == 1:
        return torch.stack(items)
    if any(item.dtype != torch.uint8 for item in items):
        shapes = sorted({tuple(item.shape) for item in items})
        raise DataError(f"floating-point inputs of a batch have different shapes {shapes}; make them equal")
    return items


def _read_image(file: str | io.BytesIO, described: str) -> torch.Tensor:
    from PIL import Image

    # found by flipping bytes; an image of absurd size is refused by Pillow before it asks for the memory
    damaged = (OSError, EOFError, IndexError, MemoryError, OverflowError, SyntaxError, TypeError, ValueError)
    try:
        with Image.open(file) as image:
            return _pixels(image.convert("RGB"))
    except (*damaged, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise DataError(f"{described} cannot be decoded: {error}") from error


def _pil_to_tensor(image: Any, described: str) -> torch.Tensor:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise DataError(f"{described} is a {type(image).__name__}; expected a PIL image, an array or a tensor")
    return _pixels(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _pixels(image: Any) -> torch.Tensor:
    """A PIL image as uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
