"""A gallery of images in a file, as the model of a run sees them, and what another model finds in it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clkit.callbacks._previous_model import digest_of
from clkit.data import StreamDataModule
from clkit.data.loader import Fetcher, Rows, Workers, cut_batches
from clkit.data.preprocessing import settled_preprocessing
from clkit.data.sources import resolve_source
from clkit.data.sources.base import SourcePart, data_root, first_image
from clkit.errors import ArgumentError, ConfigurationError, DataError
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap, path_of
from clkit.files import check_output, read_checkpoint
from clkit.methods import FeatureBank, Neighbours
from clkit.runs.saved_run import SavedRun
from clkit.surgery.fixed_classifier import simplex_classifier_of

__all__ = ["Embedded", "Found", "embed_images", "search_images", "stored_images"]

PartName = Literal["train", "test"]

_ROWS = 4096  # compared with all vertices at a time


class Embedded(NamedTuple):
    """What :func:`embed_images` wrote: the bank, the id of the model, and how many rows are its new ones."""

    bank: FeatureBank
    model: str
    rows: int


class Found(NamedTuple):
    """What :func:`search_images` found.

    Attributes:
        bank: The gallery.
        model: Id of the model of the queries.
        names: Those of the Q queries, as those of the gallery's rows: source, part and row number.
        labels: (Q,) int64, -1 where there is none.
        neighbours: Scores, rows and labels (Q, k).
        class_names: Names by class id; may be empty.
        root: The data folder in which sources are looked up.
        apart: The vertices of labels that have one of their own in the gallery, and another among the queries.
    """

    bank: FeatureBank
    model: str
    names: list[str]
    labels: Tensor
    neighbours: Neighbours
    class_names: dict[int, str]
    root: str | Path | None
    apart: dict[int, tuple[int, int]]

    @property
    def counted(self) -> Tensor:
        """The queries (Q,) that have a label, and rows with this label in the gallery."""
        return (self.labels >= 0) & torch.isin(self.labels, self.bank.labels)

    def recall(self, k: int) -> float:
        """Return the share of the counted queries with a row of their label among the first k; NaN without any."""
        right = (self.neighbours.labels[:, :k] == self.labels[:, None]).any(dim=1)
        return float(right[self.counted].double().mean())


def embed_images(
    path: str | Path,
    output: str | Path,
    sources: Sequence[str],
    *,
    part: PartName = "train",
    half: bool = False,
    add: bool = False,
    root: str | Path | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Embedded:
    """Write the features of images into a :class:`~clkit.methods.FeatureBank`, as the model of a checkpoint sees them.

    A row is named by its source, part and number, ``digits/train/17``, and has the label of the source. The id of the
    model is the name of the checkpoint's file and the beginning of its SHA-256.

    Args:
        path: The checkpoint file of a run of ``clkit fit`` whose network has a simplex head.
        output: The file of the bank, written whole or not at all.
        sources: Sources by their short forms, such as ``"npz:cifar100"``.
        part: Which part of each.
        half: Whether a new bank stores features in float16.
        add: Whether the rows are added to the bank that ``output`` holds.
        root: The data folder; that of the run by default.
        config: The run's ``config.yaml``; looked for beside the checkpoint by default.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ArgumentError: If a file is not there, ``output`` exists, a source is not known, or the bank has these rows by
            this model already.
        ConfigurationError: If the network has no simplex head, or the run's data do not say how images are prepared.
        DataError: If the images are not there.
        SignatureError: If the bank is of models with other vertices.
        StateError: If a file is damaged.
        WriteError: If the bank cannot be written.
    """
    if add and not Path(output).is_file():
        raise ArgumentError(f"output={str(output)!r}: there is no bank to add to; leave --add out to begin one")
    check_output(output, [Path(path)], overwrite or add)
    bank = FeatureBank.load(output) if add else None
    if bank is not None and half and bank.storage != "float16":
        raise ArgumentError(f"the bank {output} stores float32 and goes on so; leave --half out")
    images, model = _images(sources, part), _Model(path)
    there = set() if bank is None else _names_by(bank, model.id)
    for each in images:
        if each.name(0) in there:
            raise ArgumentError(
                f"the bank {output} has the {part} part of {each.spec} by this model already ({model.id}); embed other "
                "images, or with another model"
            )
    model.load(config)
    for each in images:
        each.load(model.root(root))
    if bank is None:
        bank = FeatureBank(model.width, model.signature, storage="float16" if half else "float32")
    for each in images:
        for rows, features in model.features(each):
            labels = torch.from_numpy(each.rows.targets[rows])
            names = [each.name(int(row)) for row in rows]
            bank.add(features, labels, names=names, model=model.id, signature=model.signature)
    bank.save(output)
    return Embedded(bank, model.id, sum(len(each.rows) for each in images))


def search_images(
    bank: str | Path,
    path: str | Path,
    sources: Sequence[str],
    *,
    part: PartName = "test",
    k: int = 5,
    root: str | Path | None = None,
    config: str | Path | None = None,
) -> Found:
    """Return the rows of a bank that are nearest to images, as the model of a checkpoint sees these.

    Args:
        bank: The file of the bank.
        path: The checkpoint file, of the model that wrote the bank or of a later one.
        sources: As for :func:`embed_images`, like those below.
        part: Which part of each.
        k: How many rows for each image.
        root: The data folder.
        config: The run's ``config.yaml``.

    Raises:
        ArgumentError: If a file is not there, a source is not known, or k is above the number of rows.
        NotFittedError: If the bank is empty.
        SignatureError: If the bank is of models with other vertices. Otherwise as :func:`embed_images`.
    """
    gallery = FeatureBank.load(bank)
    gallery.search(torch.zeros(1, gallery.width), k, signature=gallery.signature)  # refuses what it must, now
    images, model = _images(sources, part), _Model(path)
    model.load(config)
    for each in images:
        each.load(model.root(root))
    names: list[str] = []
    labels: list[Tensor] = []
    found: list[Neighbours] = []
    vertices: list[Tensor] = []
    for each in images:
        for rows, features in model.features(each):
            names += [each.name(int(row)) for row in rows]
            labels.append(torch.from_numpy(each.rows.targets[rows]))
            found.append(gallery.search(features, k, signature=model.signature))
            vertices.append(model.head.logits(features.cpu()).argmax(dim=1))
    neighbours = Neighbours(*(torch.cat(column) for column in zip(*found, strict=True)))
    class_names = {label: name for each in reversed(images) for label, name in each.class_names.items()}
    theirs = _own_vertices(torch.cat(labels), torch.cat(vertices))
    stored = (model.head.logits(rows).argmax(dim=1) for rows in torch.split(gallery.features.cpu(), _ROWS))
    ours = _own_vertices(gallery.labels.cpu(), torch.cat(list(stored)))
    apart = {label: (ours[label], theirs[label]) for label in ours if theirs.get(label, ours[label]) != ours[label]}
    return Found(gallery, model.id, names, torch.cat(labels), neighbours, class_names, model.root(root), apart)


def _own_vertices(labels: Tensor, vertices: Tensor) -> dict[int, int]:
    """Return the vertex to which most rows of a label are nearest, for labels that share it with no other.

    A class that a model has not learned lies at the vertices of others, and has none of its own.
    """
    most: dict[int, int] = {}
    for label in torch.unique(labels[labels >= 0]).tolist():
        counts = vertices[labels == label].bincount()
        if 2 * int(counts.max()) > int(counts.sum()):
            most[label] = int(counts.argmax())
    taken = list(most.values())
    return {label: vertex for label, vertex in most.items() if taken.count(vertex) == 1}


def stored_images(names: Sequence[str], root: str | Path | None = None, *, only_images: bool = True) -> list[Tensor]:
    """Return the images (C, H, W), uint8 or in [0, 1], of rows that :func:`embed_images` has named so.

    Args:
        names: Of rows.
        root: The data folder.
        only_images: Whether rows that are vectors (D,) are refused.

    Raises:
        DataError: If one is not there any more, or is no image.
        ArgumentError: If a name is of another kind.
    """
    parts: dict[str, SourcePart] = {}
    images = []
    for name in names:
        place, _, row = name.rpartition("/")
        spec, _, part = place.rpartition("/")
        if part not in ("train", "test") or not row.isdecimal():
            raise ArgumentError(f"the row {name!r} does not say by source/part/number where its image is")
        if place not in parts:
            parts[place] = resolve_source(spec).load(data_root(root))[part == "test"]
        if int(row) >= len(parts[place]):
            last = len(parts[place]) - 1
            raise DataError(f"{spec} has rows 0 to {last} in its {part} part, and no row {row}")
        if only_images and first_image(parts[place]) is None:
            raise DataError(f"{spec} holds vectors, which cannot be drawn; leave --picture out")
        images.append(parts[place].get_many(np.array([int(row)]))[0])
    return images


class _Images:
    """A part of a source."""

    rows: SourcePart

    def __init__(self, spec: str, part: PartName) -> None:
        self.spec, self.part, self._source = spec, part, resolve_source(spec)

    def name(self, row: int) -> str:
        return f"{self.spec}/{self.part}/{row}"

    def load(self, root: str | Path | None) -> None:
        """Open the files."""
        self.rows = self._source.load(data_root(root))[self.part == "test"]
        self.class_names = self._source.class_names
        if not len(self.rows):
            raise DataError(f"{self.spec} has no images in its {self.part} part; give the other one with --part")


def _images(sources: Sequence[str], part: PartName) -> list[_Images]:
    if twice := [spec for spec in dict.fromkeys(sources) if sources.count(spec) > 1]:
        raise ArgumentError(f"the source {twice[0]!r} is given twice; give each once")
    return [_Images(spec, part) for spec in sources]


def _names_by(bank: FeatureBank, model: str) -> set[str]:
    if model not in bank.models:
        return set()
    writers = bank.model_of(torch.arange(len(bank)))
    return {name for name, writer in zip(bank.names, writers, strict=True) if writer == model}


class _Model:
    """The network of a checkpoint with its simplex head."""

    def __init__(self, path: str | Path) -> None:
        read_checkpoint(path)  # says what is wrong with the file before anything is built
        self.path = Path(path)
        self.id = f"{self.path.name} {digest_of(self.path)[:12]}"

    def root(self, given: str | Path | None) -> str | Path | None:
        """Return the data folder: the one that is given, or that of the run."""
        return self._data.root if given is None else given

    def load(self, config: str | Path | None) -> None:
        """Build the network and take its weights up."""
        run = SavedRun(self.path, config)
        if not isinstance(run.data, StreamDataModule):
            raise ConfigurationError(
                f"the data of {run.config} are a {type(run.data).__name__}, which does not say how stored images "
                "become inputs; put features into a clkit.methods.FeatureBank in Python"
            )
        self._data = run.data
        module, self._device = run.restored()
        place = simplex_classifier_of(module)
        if place is None:
            raise ConfigurationError(
                f"the network of {self.path} has no simplex head, so that its features are comparable with those of no "
                "other model; train it with the callback DSimplex (clkit recipes d_simplex)"
            )
        self.head = copy.deepcopy(place.head).cpu()
        self.signature, self.width = self.head.signature(), self.head.dim
        self._module = module.to(self._device)
        self._tap = FeatureTap(module, ".".join(filter(None, (path_of(module, place), place.feature_layer))))

    def features(self, images: _Images) -> Iterator[tuple[Rows, Tensor]]:
        """Yield row numbers (b,) and features (b, d) batch by batch, and show how far it is."""
        # without the run's train_transform: rows are seen as an evaluation sees them
        prepare = settled_preprocessing(self._data.preprocessing, images.rows, self._module)
        workers = Workers(Fetcher(images.rows, images.rows.targets, prepare), self._data.num_workers)
        batches = cut_batches(np.arange(len(images.rows)), self._data.eval_batch_size)
        run = partial(forward, self._module, self._tap.network)
        try:
            loaded = workers.batches([(0, rows) for rows in batches])
            for rows, (inputs, _) in _shown(zip(batches, loaded, strict=True), len(batches), images):
                yield rows, self._tap.extract(inputs.to(self._device), run)
        finally:
            workers.close()


def _shown(batches: Any, total: int, images: _Images) -> Any:
    """Pass batches on and show a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    if not sys.stderr.isatty():  # rich of 2023 writes an empty line even for a bar that is switched off
        return batches
    what = f"{images.spec}, {images.part} part"
    return track(batches, what, total, console=Console(stderr=True), transient=True)
