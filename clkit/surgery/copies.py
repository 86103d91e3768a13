"""A copy of the user's module that drags nothing of a run along."""

from __future__ import annotations

import copy

import lightning.pytorch as pl

__all__ = ["bare_copy", "trainer_of"]


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the trainer that a module is attached to, if there is one."""
    try:
        return module.trainer
    except RuntimeError:  # it has none
        return None


def bare_copy(module: pl.LightningModule) -> pl.LightningModule:
    """Return a copy that has no trainer, and no gradients, in evaluation mode."""
    parts = [part for part in module.modules() if isinstance(part, pl.LightningModule)]
    trainers = [trainer_of(part) for part in parts]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for part in parts:
        part.trainer = None
    for parameter, _ in gradients:
        parameter.grad = None  # as large as the weights, and of no use in a copy
    try:
        copied = copy.deepcopy(module)
    finally:
        for part, trainer in zip(parts, trainers, strict=True):
            part.trainer = trainer
        for parameter, gradient in gradients:
            parameter.grad = gradient
    copied.eval().requires_grad_(False)
    return copied
