"""Image files as a run sees its own, and the names that it has for classes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clkit.data import StreamDataModule
from clkit.data.sources.images import read_image
from clkit.errors import ArgumentError, DataError
from clkit.runs.embedding import stored_images

__all__ = ["names_of_labels", "stored_image"]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey image


def names_of_labels(data: StreamDataModule) -> dict[int, str]:
    """Return the names of the classes of a stream, by label as batches have them; may be empty."""
    names, ids = data.class_names, data.original_ids
    return {
        each if ids is None else ids.index(each): name for each, name in names.items() if ids is None or each in ids
    }


def stored_image(data: StreamDataModule, image: str | Path, *, only_images: bool, what: str = "--image ") -> Tensor:
    """Return an image (C, H, W) of a file, or of a row of a source, with as many channels as those of a stream.

    Args:
        data: The stream, set up.
        image: The file, or ``source/part/number``.
        only_images: Whether rows that are vectors (D,) are refused.
        what: What stands before its name in a message.

    Raises:
        ArgumentError: If it is neither.
        DataError: If it cannot be read.
    """
    what += repr(str(image))
    if not Path(image).is_file():
        if str(image).count("/") < 2:
            raise ArgumentError(f"{what} is no file, and no row of a source such as digits/test/17")
        try:
            return stored_images([str(image)], data.root, only_images=only_images)[0]
        except (ArgumentError, DataError) as error:
            raise type(error)(f"{what}: {error}") from error
    found = read_image(str(image), what)
    usual = data.first_image()
    if usual is not None and len(usual) == 1:
        grey = (found.float() * torch.tensor(_LUMA).view(3, 1, 1)).sum(dim=0, keepdim=True)
        found = grey.round().to(found.dtype) if found.dtype == torch.uint8 else grey
    return found
