"""What a saved head answers to image files: names of classes, scores, and how sure it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clkit.callbacks._exact_edits import features_of
from clkit.data import StreamDataModule
from clkit.data.sources.images import read_image
from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.files import read_checkpoint
from clkit.methods._checks import check_count
from clkit.runs.heads import head_entries, name_of
from clkit.runs.learned import LearnedModel
from clkit.schema import LEARNED

__all__ = ["Answer", "answer_images"]

_ROW = re.compile(r"./(train|test)/\d+$")  # of a source


class Answer(NamedTuple):
    """What one head says of one image.

    Attributes:
        image: The file.
        head: Name of the head.
        best: Names of the classes with the highest scores, and these.
        classes: Names of the classes of its prediction set; ``None`` where there is no such set.
        novelty: How far it is from all that was learned; ``None`` where nothing tells.
        is_new: Whether that is above the threshold of the run, where it has one.
    """

    image: str
    head: str
    best: list[tuple[str, float]]
    classes: list[str] | None = None
    novelty: float | None = None
    is_new: bool | None = None


def answer_images(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    head: str | None = None,
    top: int = 3,
    config: str | Path | None = None,
    device: str = "auto",
) -> list[Answer]:
    """Answer image files with the heads of a file.

    Args:
        path: A file that ``clkit learn`` wrote, or a checkpoint of a run of ``clkit fit`` with head callbacks.
        images: Image files; of a run also rows of a source, such as ``"digits/test/17"``.
        head: Name of the head, by default each.
        top: How many classes of each.
        config: The ``config.yaml`` of a run; looked for beside the checkpoint by default.
        device: Where the network of a file of ``clkit learn`` runs.

    Returns:
        An answer for each head of each image, image by image. Distances are a head's own, or those of the run's DEUP,
        as sets are.

    Raises:
        ArgumentError: If a file or a head is not there.
        ConfigurationError: If the data of a run do not say how images become inputs.
        DataError: If an image cannot be read.
        NotFittedError: If nothing was learned.
        StateError: If the file is damaged or holds no head.
    """
    check_count("top", top)
    for image in images:
        if not Path(image).is_file() and not _ROW.search(str(image)):
            raise ArgumentError(f"{str(image)!r} is no file; give image files after the checkpoint")
    checkpoint = read_checkpoint(path)
    if LEARNED in checkpoint and (rows := [str(image) for image in images if not Path(image).is_file()]):
        raise ArgumentError(f"{rows[0]!r} is no file, and {path} is of no run whose data would have such a row")
    names = {name_of(key): key for key in head_entries(checkpoint)}
    if not names:
        raise StateError(f"{path} holds no learned head")
    if head is not None and head not in names:
        raise ArgumentError(f"head={head!r}: {path} has the heads {sorted(names)}")
    wanted = sorted(names) if head is None else [head]
    if LEARNED not in checkpoint:
        return _of_run(path, images, wanted, top, config)
    model = LearnedModel.of_checkpoint(checkpoint, path, device)
    answers = []
    for image in images:
        inputs = model.preprocessing(read_image(str(image), str(image))[None])
        features = model.features(inputs)
        model.head.predict(features)  # says so where nothing was learned
        distance = getattr(model.head, "distance", None)
        best = _best(model.head(features)[0], model.names, top)
        novelty = None if distance is None else float(distance(features)[0])
        answers.append(Answer(str(image), wanted[0], best, novelty=novelty))
    return answers


def _of_run(
    path: str | Path, images: Sequence[str | Path], heads: list[str], top: int, config: str | Path | None
) -> list[Answer]:
    from clkit.runs.run_images import names_of_labels, stored_image
    from clkit.runs.saved_run import SavedRun  # builds a whole run, which only this way of answering needs

    run = SavedRun(path, config)
    data = run.data
    if not isinstance(data, StreamDataModule):
        raise ConfigurationError(
            f"the data of {run.config} are a {type(data).__name__}, which does not say how images become inputs; use "
            "clkit.load_head and the head's predict"
        )
    data.setup("validate")
    prepare = data.input_preprocessing()
    inputs = torch.cat([prepare(stored_image(data, each, only_images=False, what="")[None]) for each in images])
    module, said = run.answered(inputs)
    names = names_of_labels(data)
    callbacks = {each.name: each for each in run.callbacks.values()}
    if missing := [name for name in heads if name not in callbacks]:
        raise ConfigurationError(f"{run.config} has no callback named {missing[0]!r}, but {sorted(callbacks)}")
    scores = {name: callbacks[name].scores(features_of(module, callbacks[name].layer, inputs)) for name in heads}
    answers = []
    for at, image in enumerate(images):
        for name in heads:
            own: dict[str, Any] = {}
            for deup in said:
                own |= {key: value[at] for key, value in deup.get(name, {}).items()}
            sets, novelty, is_new = (own.get(key) for key in ("set", "novelty", "is_new"))
            answers.append(
                Answer(
                    str(image),
                    name,
                    _best(scores[name][at], names, top),
                    None if sets is None else [names.get(each, str(each)) for each in sets.nonzero()[:, 0].tolist()],
                    None if novelty is None else float(novelty),
                    None if is_new is None else bool(is_new),
                )
            )
    return answers


def _best(scores: Tensor, names: dict[int, str], top: int) -> list[tuple[str, float]]:
    """Return names and scores of the best classes of (C,), the lowest id first where scores are equal."""
    order = torch.argsort(scores, descending=True, stable=True)[:top].tolist()
    return [(names.get(each, str(each)), float(scores[each])) for each in order if scores[each] > -torch.inf]
