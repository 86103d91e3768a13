"""What masks that move cannot stand beside, said by name before a run begins: optimizers, strategies, callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from clkit.errors import ConfigurationError
from clkit.methods._sparse_layer import ELEMENTWISE
from clkit.stream._lightning import callbacks_of

__all__ = ["check_neighbours", "optimizer_of"]

_NOT_ELEMENTWISE = {
    "Rprop": "keeps a step size of each weight that must not become 0",
    "LBFGS": "keeps a history of all weights together",
    "Adafactor": "keeps sums over rows and columns of a weight",
    "Muon": "mixes all elements of a weight",
    "Shampoo": "mixes all elements of a weight",
    "SOAP": "mixes all elements of a weight",
    "ASGD": "averages weights over the run, across changes of the masks",
}


def check_neighbours(owner: str, trainer: pl.Trainer) -> None:
    """Refuse strategies and callbacks of a trainer that masks cannot stand beside.

    Raises:
        ConfigurationError: Naming the one and what to do.
    """
    strategy: Any = trainer.strategy
    kind = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigurationError(
            f'{owner} cannot mask weights under {kind}, which splits them over processes; use strategy="ddp" or a '
            "single device"
        )
    if trainer.state.fn != "fit":
        return
    warm: int = getattr(strategy, "warmup_epochs", 0)
    if warm or not getattr(strategy, "trains_module", True):
        raise ConfigurationError(
            f"{owner} trains a sub-network for each experience, and {kind} does not train the network in all of them; "
            'use strategy="auto" or "ddp", or a strategy that trains it'
        )
    for other in callbacks_of(trainer):
        name = type(other).__name__
        if isinstance(other, ModelPruning):
            raise ConfigurationError(
                f"{owner} and {name} would both mask weights; leave {name} out: load_into(module, task, "
                f"form='prune') of {owner} gives the form of torch.nn.utils.prune afterwards"
            )
        if (when := getattr(other, "graft_when", "never")) != "never":
            raise ConfigurationError(
                f"{owner} keeps a classifier for each task, and {name} with graft={when!r} would put its one head in "
                "the place of the last one only, so that a row of the accuracy matrix would mix both; set "
                'graft="never": the head is evaluated beside the module all the same'
            )
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            raise ConfigurationError(
                f"{name} averages weights over the steps, and an average across changes of the masks is denser than "
                f"each of them and no longer that of one task; leave {name} or {owner} out"
            )


def optimizer_of(owner: str, trainer: pl.Trainer, weights: Mapping[str, Tensor]) -> Optimizer:
    """Return the one optimizer that trains masked weights.

    Raises:
        ConfigurationError: If there is none or more than one, or its state is not one of single elements.
    """
    masked = {id(weight) for weight in weights.values()}
    training = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(parameter) in masked for group in optimizer.param_groups for parameter in group["params"])
    ]
    if len(training) != 1:
        raise ConfigurationError(
            f"{owner} masks {len(masked)} weights, and {len(training) or 'none'} of the module's optimizers "
            f"{'train' if training else 'trains'} any of them; it needs exactly one (the head may have another)"
        )
    optimizer = training[0]
    kind, names = type(optimizer).__name__, [each.__name__ for each in type(optimizer).__mro__]
    for name in names:
        if name in _NOT_ELEMENTWISE:
            raise ConfigurationError(
                f"{owner} cannot train with {kind}, which {_NOT_ELEMENTWISE[name]}: what it remembers of masked "
                f"weights cannot be cleared element by element; use one of {', '.join(sorted(ELEMENTWISE))}"
            )
    if not ELEMENTWISE & set(names):
        rank_zero_warn(
            f"{owner} does not know the optimizer {kind}: masks and earlier tasks hold, but where its state is not one "
            "of single elements with 0 for nothing, training may be worse than it could be"
        )
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scales and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ConfigurationError(
            f"{owner} cannot train with a fused {kind} and precision='16-mixed': it scales gradients back inside its "
            "step, and does not say which steps it leaves out; use fused=False or precision='bf16-mixed'"
        )
    return optimizer
