"""Gradients that wait for further batches before the optimizer steps, kept in checkpoints.

Lightning's checkpoints have none: one saved between two steps of ``accumulate_grad_batches``, in a validation say,
would lose the batches since the last step.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.distributed import gathered
from clkit.errors import StateError
from clkit.schema import saved_list
from clkit.stream._lightning import accumulates, in_step

__all__ = ["keep_gradients", "lost_gradients", "restore_gradients", "saved_gradients"]

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
