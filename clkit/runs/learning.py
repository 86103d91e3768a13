"""Learning a folder of images into a file, more into it, some out of it again, and asking it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clkit.data.loader import Rows, Workers, cut_batches
from clkit.errors import ArgumentError, BatchError, DataError, few_names
from clkit.files import check_output
from clkit.methods import shard_bounds
from clkit.runs.learned import LearnedModel, NewModel
from clkit.runs.listing import Listing, Reader, composed, has_parts, list_samples, numbered

__all__ = ["Learned", "Loading", "forget_images", "learn_images"]


@dataclass(frozen=True)
class Loading:
    """How images are read.

    Attributes:
        batch_size: Images that the network sees at a time.
        num_workers: Processes that read; 0 reads in this one.
        root: The data folder; that of ``CLKIT_DATA`` by default.
        device: Where the network runs: ``"auto"`` is a GPU where there is one.
        unreadable: Whether to ``"stop"`` at an image that cannot be read, or to ``"skip"`` it and say so.
    """

    batch_size: int = 64
    num_workers: int = 0
    root: str | Path | None = None
    device: str = "auto"
    unreadable: Literal["stop", "skip"] = "stop"


@dataclass
class Learned:
    """What became of :func:`learn_images` or :func:`forget_images`.

    Attributes:
        model: As it is now.
        rows: How many images were learned, or forgotten.
        known: How many were left out since the head holds them already.
        unreadable: What is wrong with each image that was left out for that.
        ignored: What lies in the folder and is no sample, in words.
        untested: Why test images do not count, in words.
        classes: How many classes the head had before, and has now.
        samples: Likewise of images.
        accuracy: By group of classes, how many test images there are, and how many are right before and after;
            ``None`` where the head could not know them.
    """

    model: LearnedModel
    rows: int = 0
    known: int = 0
    unreadable: list[str] = field(default_factory=list)
    ignored: str = ""
    untested: list[str] = field(default_factory=list)
    classes: tuple[int, int] = (0, 0)
    samples: tuple[int, int] = (0, 0)
    accuracy: dict[str, tuple[int, int | None, int | None]] = field(default_factory=dict)


def learn_images(
    start: NewModel | str | Path,
    data: str,
    output: str | Path,
    *,
    empty: bool = False,
    shard: tuple[int, int] | None = None,
    test: str | None = None,
    loading: Loading = Loading(),
    overwrite: bool = False,
) -> Learned:
    """Learn images into a head on a frozen network and write a file that holds network, head and what it has learned.

    Each image is learned once, in one pass, and the head is then the one of all images at once, up to the rounding of
    float64. Classes are told apart by their names: those that the file knows keep their ids, new ones get the next.
    Images that the head holds already are left out, so the same folder may be given again when it has grown. They are
    known by class, file name and size, where files are not compressed by their content too, and rows of other sources
    by their numbers.

    Args:
        start: A :class:`NewModel`, or the file to go on from.
        data: A source by its short form; of a folder its ``<class>/*.jpg``, or ``train/<class>/*.jpg``.
        output: The file to write, whole or not at all; its folder must exist.
        empty: Whether only network, settings and ids of ``start`` are taken, and nothing that it has learned.
        shard: ``(i, n)``: only the i-th of n parts of the list, from 0. :func:`clkit.merge_checkpoints` adds them up.
        test: A source of test images, which are answered before and after; by default the ``test`` part of a folder
            that has one, but for shards.
        loading: How images are read.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ArgumentError: If a file is not there or ``output`` exists, there is no such shard, or an option is not known.
        DataError: If nothing is there to learn; or an image cannot be read and ``loading`` says to stop: what was
            learned before it is in ``output`` then, and the same command, from that file, goes on.
        StateError: If a file is damaged, or of weights that do not fit.
        WriteError: If the file cannot be written.
    """
    inputs = [] if isinstance(start, NewModel) else [Path(start)]
    check_output(output, inputs, overwrite)
    listing = list_samples(data, loading.root)
    bounds = (0, len(listing)) if shard is None else shard_bounds(len(listing), *shard)
    model = _opened(start, loading.device)
    if empty:
        model.emptied()
    ids = _numbered(listing, model)
    rows, known = _new_rows(listing, model, np.arange(*bounds))
    if not len(rows):
        raise DataError(f"{data} has no image that {start} does not hold already; nothing was written")
    done = Learned(model, known=known, classes=(len(model.learned_classes), 0), samples=(model.samples, 0))
    done.ignored = listing.ignored
    if test is None and shard is None and has_parts(data, loading.root):
        test = data
    seen = None if test is None else _test_features(done, test, loading)
    before = _answers(model, seen)
    old = set(model.learned_classes)
    stopped: str | None = None
    upto = bounds[1]
    learned: list[Rows] = []
    for batch, (images, good, unreadable) in _read(model, listing, rows, loading):
        if unreadable and loading.unreadable == "stop":
            stopped, upto = unreadable[0], int(batch[0])
            break
        done.unreadable += unreadable
        if len(good):
            learned.append(good.numpy())
            model.learn(model.features(images), ids[good])
    taken = np.concatenate([rows[:0], *learned])
    done.rows = int((ids.numpy()[taken] >= 0).sum())
    if not done.rows and stopped is None:
        raise DataError(f"none of the {len(rows)} images of {data} can be learned; nothing was written")
    if done.rows:
        left_out = [listing.place(row) for row in np.setdiff1d(rows[rows < upto], taken).tolist()]
        _hold(model, listing, (bounds[0], upto), shard, taken, left_out)
        model.write(output)
    if stopped is not None:
        raise DataError(_stop_message(stopped, data, output, done.rows, shard, loading))
    done.classes = (done.classes[0], len(model.learned_classes))
    done.samples = (done.samples[0], model.samples)
    if seen is not None:
        _compare(done, seen, before, old)
    return done


def forget_images(
    path: str | Path,
    data: str,
    output: str | Path,
    *,
    classes: Sequence[str] | None = None,
    loading: Loading = Loading(),
    overwrite: bool = False,
) -> Learned:
    """Take images out of a file that :func:`learn_images` wrote: the head becomes the one that never saw them.

    The network computes the features of the images again, so they must be there, under the names and in the classes
    that they were learned with. A class is deleted by giving all its images.

    Args:
        path: The file.
        data: A source by its short form, of the images to take out.
        output: The file to write.
        classes: Names of classes of ``data``, or several in one text with commas between; all by default.
        loading: How images are read; all must be readable.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ArgumentError: If a file is not there, ``output`` exists, or there is no such class.
        DataError: If an image was never learned, in this class and as it is now, or cannot be read. Nothing is written.
    """
    check_output(output, [Path(path)], overwrite)
    listing = list_samples(data, loading.root)
    model = LearnedModel.read(path, loading.device)
    ids = _numbered(listing, model)
    rows = np.arange(len(listing))
    if classes is not None:
        classes = [composed(each) for each in ([classes] if isinstance(classes, str) else classes)]
        there = {name: number for number, name in listing.classes.items()}
        given = [name for text in classes for name in ([text] if text in there else text.split(","))]
        chosen = [name if name in there else name.strip() for name in given]
        if unknown := [name for name in chosen if name not in there]:
            raise ArgumentError(f"{data} has no class {unknown[0]!r}, but {sorted(there)[:20]}")
        rows = rows[np.isin(listing.targets, [there[name] for name in chosen])]
    keys = listing.keys(rows)
    if keys is None:
        raise ArgumentError(f"{data} holds no image files, whose names say which samples they are; give a folder")
    if len(strange := rows[~np.isin(keys, model.holds.keys)]):
        named = few_names([listing.name(row) for row in strange.tolist()])
        raise DataError(f"{named}: not learned by {path} in this class and as it is now; nothing was written")
    done = Learned(model, classes=(len(model.learned_classes), 0), samples=(model.samples, 0))
    for _, (images, good, unreadable) in _read(model, listing, rows, loading):
        if unreadable:
            raise DataError(f"{unreadable[0]}; nothing was written")
        try:
            model.head.subtract(model.features(images), ids[good].to(model.device))
        except BatchError as error:
            raise DataError(f"{path}: {error}") from error
    model.holds.forget(keys)
    model.write(output)
    done.rows = len(rows)
    done.classes = (done.classes[0], len(model.learned_classes))
    done.samples = (done.samples[0], model.samples)
    return done


def _opened(start: NewModel | str | Path, device: str) -> LearnedModel:
    return LearnedModel.new(start, device) if isinstance(start, NewModel) else LearnedModel.read(start, device)


def _numbered(listing: Listing, model: LearnedModel) -> Tensor:
    """Return the ids (N,) of the rows as the head has them; names of new classes join those of the model."""
    wanted = {name: number for number, name in listing.classes.items()}
    ids = numbered(list(listing.classes.values()), model.names, wanted)
    model.names |= {number: name for name, number in ids.items()}
    table = np.full(max([*listing.classes, 0]) + 2, -1, dtype=np.int64)  # the last place is that of -1
    for number, name in listing.classes.items():
        table[number] = ids[name]
    return torch.from_numpy(table[listing.targets])


def _new_rows(listing: Listing, model: LearnedModel, rows: Rows) -> tuple[Rows, int]:
    """Return the rows that the head does not hold yet, and how many it holds."""
    keys = listing.keys(rows)
    if keys is not None:
        new = rows[~np.isin(keys, model.holds.keys)]
    else:
        new = rows
        for start, stop in model.holds.held(listing.digest):
            new = new[(new < start) | (new >= stop)]
    return new, len(rows) - len(new)


def _hold(
    model: LearnedModel,
    listing: Listing,
    bounds: tuple[int, int],
    shard: tuple[int, int] | None,
    learned: Rows,
    left_out: list[str],
) -> None:
    """Note the rows that were seen to; some of them may have been held before."""
    new = [bounds]
    for start, stop in model.holds.held(listing.digest):
        new = [
            part
            for first, last in new
            for part in ((first, min(last, start)), (max(first, stop), last))
            if part[0] < part[1]
        ]
    cut = 1 if shard is None else shard[1]
    keys = listing.keys(learned)
    model.holds.repaired([listing.place(row) for row in learned.tolist()] + left_out)
    model.holds.add(listing.spec, len(listing), new, cut=cut, digest=listing.digest, keys=keys, left_out=left_out)


def _read(model: LearnedModel, listing: Listing, rows: Rows, loading: Loading) -> Iterator[tuple[Rows, Any]]:
    """Yield the rows of each batch and what the reader gave, and show on a terminal how far it is."""
    from rich.console import Console
    from rich.progress import track

    reader = Reader(listing.part, listing.targets, model.preprocessing)
    workers = Workers(reader, loading.num_workers)
    batches = cut_batches(rows, loading.batch_size)
    try:
        loaded = zip(batches, workers.batches([(0, batch) for batch in batches]), strict=True)
        console = Console(stderr=True)
        hidden = not sys.stderr.isatty()
        yield from track(loaded, listing.spec, len(batches), console=console, transient=True, disable=hidden)
    finally:
        workers.close()


def _stop_message(
    reason: str, data: str, output: str | Path, rows: int, shard: tuple[int, int] | None, loading: Loading
) -> str:
    reason += "; repair or remove it, or leave such images out: --unreadable skip"
    if not rows:
        return f"{reason}. Nothing was learned before it, and nothing was written"
    words = ["clkit", "learn", str(output), "--data", data, "-o", str(output), "--force"]
    words += [] if shard is None else ["--shard", f"{shard[0]}/{shard[1]}"]
    words += [] if loading.root is None else ["--root", str(loading.root)]
    return f"{reason}. {output} holds the {rows} images before it; go on with: {shlex.join(words)}"


# ---- before and after


def _test_features(done: Learned, test: str, loading: Loading) -> tuple[Tensor, list[str]]:
    """Return features (T, D) of the test images and the names of their classes."""
    model, listing = done.model, list_samples(test, loading.root, "test")
    features, names = [], []
    for _, (images, good, unreadable) in _read(model, listing, np.arange(len(listing)), loading):
        if unreadable and loading.unreadable == "stop":
            raise DataError(
                f"the test image {unreadable[0]}; repair or remove it, or leave such images out: --unreadable skip. "
                "Nothing was learned, and nothing was written"
            )
        done.untested += unreadable
        if len(good):
            features.append(model.features(images).cpu())
            names += [listing.classes.get(int(listing.targets[row]), "") for row in good.tolist()]
    if not names:
        raise DataError(f"none of the test images of {listing.spec} can be read")
    return torch.cat(features), names


def _answers(model: LearnedModel, seen: tuple[Tensor, list[str]] | None) -> Tensor | None:
    if seen is None or not model.samples:
        return None
    return torch.cat([model.head.predict(rows.to(model.device)).cpu() for rows in torch.split(seen[0], 4096)])


def _compare(done: Learned, seen: tuple[Tensor, list[str]], before: Tensor | None, old: set[int]) -> None:
    """Note by group of classes how many test images are right, and which ones are of classes that nobody learned."""
    model = done.model
    new = set(model.learned_classes) - old
    known = {model.names[number]: number for number in old | new}
    ids, after = torch.tensor([known.get(name, -1) for name in seen[1]]), _answers(model, seen)
    for group, classes in (("classes known before", old), ("new classes", new), ("all", old | new)):
        chosen = torch.isin(ids, torch.tensor(sorted(classes), dtype=torch.int64))
        number = int(chosen.sum())
        if number and (group != "all" or len(done.accuracy) == 2):
            counts = [None if each is None else int((each == ids)[chosen].sum()) for each in (before, after)]
            done.accuracy[group] = (number, None if group == "new classes" else counts[0], counts[1])
    if strange := sorted({name for name in seen[1] if name not in known}):
        number = sum(name not in known for name in seen[1])
        done.untested.append(f"{number} of {len(ids)} are of classes that were not learned: {few_names(strange)}")
