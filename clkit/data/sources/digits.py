"""The handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clkit.data.sources.base import FloatPart, NamedSource, SourcePart

__all__ = ["Digits"]


@dataclass
class Digits(NamedSource):
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

    def load(self, root: Path | None) -> tuple[SourcePart, SourcePart]:
        """Read both parts as float32 in [0, 1]; ``root`` is not used."""
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
        test = FloatPart(images[1::2].reshape(shape), targets[1::2])
        return FloatPart(train.reshape(shape), train_targets), test


def _shift(images: npt.NDArray[np.float32], down: int, right: int) -> npt.NDArray[np.float32]:
    """Move (N, 8, 8) images by up to one pixel and fill what comes in with 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - down : 9 - down, 1 - right : 9 - right]
