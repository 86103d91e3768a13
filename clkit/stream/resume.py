"""The global random states of a process as tensors and plain types, for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from clkit.distributed import gathered
from clkit.errors import StateError
from clkit.schema import saved_list
from clkit.stream._lightning import accumulates, in_step

__all__ = [
    "capture_random_state",
    "check_random_state",
    "keep_gradients",
    "lost_gradients",
    "restore_gradients",
    "restore_random_state",
    "saved_gradients",
]


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


_KEY = "clkit_gradients"


_OWNER = "the gradients of an accumulation"


def keep_gradients(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds the waiting gradients of each process to a checkpoint, once; a call on all processes.

    Inside a step there are none to keep: they may have a part of the batch in work, which comes again.
    """
    if _KEY in checkpoint or trainer.state.fn != "fit" or not accumulates(trainer):
        return
    if in_step(trainer):
        checkpoint[_KEY] = []
        return
    own = {
        name: parameter.grad.detach().cpu()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    checkpoint[_KEY] = gathered(own, "their gradients")


def saved_gradients(checkpoint: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The gradients of each process that a checkpoint holds; none where nothing waited, or could not be kept.

    Raises:
        StateError: If they are no tensors by name.
    """
    if _KEY not in checkpoint:
        return []
    processes: list[dict[str, Tensor]] = saved_list(checkpoint, _KEY, dict, _OWNER)
    for own in processes:
        for name, gradient in own.items():
            if not isinstance(gradient, Tensor):
                raise StateError(f"{_OWNER}: {name!r} in the saved state must be a Tensor: the file is damaged")
    return processes


def lost_gradients(checkpoint: dict[str, Any]) -> bool:
    """Whether gradients waited when a checkpoint was saved and are not in it."""
    return checkpoint.get(_KEY) == []


def restore_gradients(module: pl.LightningModule, own: dict[str, Tensor]) -> None:
    """Has the parameters wait with these gradients.

    Raises:
        StateError: If they do not belong to this module.
    """
    parameters = dict(module.named_parameters())
    for name, gradient in own.items():
        if name not in parameters or parameters[name].shape != gradient.shape:
            raise StateError(f"{_OWNER}: the module has no parameter {name!r} of shape {tuple(gradient.shape)}")
    with torch.no_grad():
        for name, gradient in own.items():
            parameter = parameters[name]
            parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)
