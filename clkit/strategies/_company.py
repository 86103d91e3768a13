"""What does not go with a strategy of clkit, and why: callbacks of Lightning, and the checkpoints of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim import Optimizer

from clkit.errors import ConfigurationError, StateError
from clkit.schema import STRATEGY

__all__ = [
    "CONFINED",
    "EDITED",
    "FROZEN",
    "IN_CLKIT",
    "UNTRAINED",
    "Misfits",
    "refuse_misfits",
    "refuse_other_optimizers",
]

Misfits = dict[type, str]

IN_CLKIT: Misfits = {
    BatchSizeFinder: (
        "Lightning runs it under no kind of DDP, of which clkit's strategies are one even on a single device; find the "
        'size with a Trainer of strategy="auto", and pass it on'
    ),
}
"""Beside any strategy of clkit, also where nothing is trained."""

_AVERAGE = (
    "the heads learn from the frozen network, and an average would take its place when they are done; average the "
    "weights in a fit of its own before this one"
)

FROZEN: Misfits = {
    LearningRateFinder: (
        'it runs its steps past the warm-up, where no optimizer steps; find the rate with a Trainer of strategy="auto"'
    ),
    StochasticWeightAveraging: _AVERAGE,
    WeightAveraging: _AVERAGE,
    ModelPruning: (
        "it changes the network after each epoch, and heads have learned from it as it was; prune the network before "
        "the fit"
    ),
}
"""Beside a strategy that freezes the network, be it after a warm-up."""

CONFINED: Misfits = {
    BaseFinetuning: (
        "it freezes layers and trains them later, and the strategy's warmup= says what trains; leave one of the two out"
    ),
}
"""Beside a strategy whose warm-up trains a part of the network."""

UNTRAINED: Misfits = {
    BaseFinetuning: (
        "it freezes layers and trains them later, and without warmup_epochs nothing is trained; leave it out"
    ),
    GradientAccumulationScheduler: (
        "there are no gradients to accumulate, and max_steps would count fewer steps than batches; leave it out"
    ),
}
"""Beside a strategy that trains nothing at all."""


EDITED: Misfits = {
    **dict.fromkeys(
        (StochasticWeightAveraging, WeightAveraging, ModelPruning, BaseFinetuning),
        "an editor is trained for the network as it is, which must not change; use it in a fit of its own before this",
    ),
    LearningRateFinder: (
        "the optimizer is that of the editor, which starts as the identity and whose loss says little after a few "
        "steps; set lr= of the strategy"
    ),
}
"""Beside the training of an editor."""


def refuse_misfits(owner: Any, callbacks: Iterable[Any], misfits: Misfits) -> None:
    """Refuse callbacks that cannot work beside a strategy, by name.

    Raises:
        ConfigurationError: If there is one; the message says why, and what to do.
    """
    for callback in callbacks:
        for kind, reason in misfits.items():
            if isinstance(callback, kind):
                raise ConfigurationError(
                    f"{type(callback).__name__} makes no sense beside {type(owner).__name__}: {reason}"
                )


def refuse_other_optimizers(
    name: str, optimizers: Sequence[Optimizer], checkpoint: Mapping[str, Any], extra: str
) -> None:
    """Refuse the optimizers of a checkpoint, most often of another strategy, that train other tensors than a run's.

    Raises:
        StateError: If they do; the message names both strategies, and says what this one has in ``extra``.
    """
    sides = (
        [each.param_groups for each in optimizers],
        [each["param_groups"] for each in checkpoint["optimizer_states"]],
    )
    own, saved = ([[len(group["params"]) for group in groups] for groups in side] for side in sides)
    if own != saved:
        owner = (checkpoint.get(STRATEGY) or {}).get("strategy")
        whose = "no strategy of clkit" if owner is None else f"the strategy {owner!r}"
        raise StateError(
            f"the checkpoint is of {whose}, and its optimizer trains {saved} tensors (of each parameter group); this "
            f"run's strategy is {name}, and trains {own}{extra}. To begin with the weights alone load them into the "
            "module and leave ckpt_path out"
        )
