"""A copy of the user's module that drags nothing of a run along."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

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
        copied = copy.deepcopy(module, {id(each): each for each in _command_line_of(module)})
    finally:
        for part, trainer in zip(parts, trainers, strict=True):
            part.trainer = trainer
        for parameter, gradient in gradients:
            parameter.grad = gradient
    copied.eval().requires_grad_(False)
    return copied


def _command_line_of(module: pl.LightningModule) -> Iterator[Any]:
    """Yield what jsonargparse left in a module that a command line made, which holds the whole run.

    It is in the functions that make an optimizer and its schedule, which a copy can share.
    """
    for part in module.modules():
        values = list(vars(part).values())
        values += [inner for each in values if isinstance(each, dict) for inner in each.values()]  # hyperparameters
        for each in values:
            if isinstance(each, partial):
                held = (*each.args, *each.keywords.values())
                yield from (value for value in held if type(value).__module__.startswith("jsonargparse"))
