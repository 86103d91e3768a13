"""Data that the tests of the methods share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor


class Split(NamedTuple):
    train: Tensor
    train_targets: Tensor
    test: Tensor
    test_targets: Tensor


@pytest.fixture(scope="session")
def digits() -> Split:
    """The digits of scikit-learn, pixels / 16: even indices to learn, odd ones to test."""
    images, targets = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16), torch.from_numpy(targets.astype(np.int64))
    return Split(x[::2], y[::2], x[1::2], y[1::2])


@pytest.fixture(scope="session")
def long_tailed(digits: Split) -> Split:
    """The first 90, 54, 32, 19, 11, 6, 4, 2, 2, 2 training samples of classes 0 to 9."""
    kept = [torch.nonzero(digits.train_targets == c).flatten()[: max(2, int(90 * 0.6**c))] for c in range(10)]
    rows = torch.cat(kept)
    return Split(digits.train[rows], digits.train_targets[rows], digits.test, digits.test_targets)
