"""The global random states of a process as tensors and plain types, for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from clkit.errors import StateError

__all__ = ["capture_random_state", "check_random_state", "restore_random_state"]


def capture_random_state() -> dict[str, Any]:
    """The states of torch, CUDA, Python and NumPy; nothing is drawn.

    Example:
        >>> state = capture_random_state()
        >>> first = torch.rand(1)
        >>> restore_random_state(state)
        >>> bool(torch.rand(1) == first)
        True
    """
    version, words, gauss = random.getstate()
    # the legacy global generator is what users' code draws from when it calls np.random.rand
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Takes up what :func:`capture_random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))  # noqa: NPY002  users' code draws from the legacy generator


def check_random_state(state: dict[str, Any]) -> None:
    """Refuses what :func:`capture_random_state` never gave, by trying it on generators that nobody uses.

    Raises:
        StateError: If it is none; no generator of the process is touched.

    Example:
        >>> check_random_state(capture_random_state())
    """
    try:
        torch.Generator().set_state(state["torch"])
        if not all(isinstance(each, torch.Tensor) and each.dtype == torch.uint8 for each in state["cuda"]):
            raise TypeError("states of CUDA devices must be tensors of bytes")
        random.Random().setstate(_python_state(state))
        np.random.RandomState().set_state(_numpy_state(state))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise StateError(f"the saved random state cannot be taken up ({error}): the file is damaged") from error


def _python_state(state: dict[str, Any]) -> tuple[Any, ...]:
    version, words, gauss = state["python"]
    return version, tuple(words.tolist()), gauss


def _numpy_state(state: dict[str, Any]) -> tuple[Any, ...]:
    name, keys, position, has_gauss, cached = state["numpy"]
    return name, keys.numpy().astype(np.uint32), position, has_gauss, cached
