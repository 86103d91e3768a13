"""What edits of a run must know of the parts beside them: who decides, what grows stale, and what stays untouched."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from clkit.callbacks._recording import module_predicts
from clkit.callbacks.deup import DEUP
from clkit.callbacks.head import HeadCallback
from clkit.errors import ConfigurationError, NotFittedError
from clkit.features.tap import path_of
from clkit.methods import GradientEditor
from clkit.stream._lightning import callbacks_of

__all__ = [
    "check_averaging",
    "check_strategy",
    "deciding_head",
    "edited_weights",
    "grafted_layers",
    "paths_in",
    "stale_parts",
    "tasks_of",
]


def check_strategy(owner: str, trainer: pl.Trainer) -> None:
    """Refuse strategies under which no process has the weights whole."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigurationError(
            f"{owner} cannot edit weights under {type(trainer.strategy).__name__}, which splits them over processes; "
            'use strategy="ddp" or a single device, or edit the saved model in one process'
        )


def check_averaging(owner: str, trainer: pl.Trainer, *, fits: bool) -> None:
    """Refuse an edit of weights of which another callback keeps an average.

    ``WeightAveraging`` keeps it after the fit, too: evaluations and checkpoints of its trainer have the average, and
    would have nothing of an edit.
    """
    for other in callbacks_of(trainer):
        name, why, where = type(other).__name__, "an edit of them would be in a part of the average alone", ""
        if isinstance(other, WeightAveraging):
            why = "evaluations and checkpoints of its trainer have the average, in which an edit would not be"
            where = f", in a trainer without {name}"
        elif not (fits and isinstance(other, StochasticWeightAveraging)):
            continue
        raise ConfigurationError(
            f"{name} averages the weights of this fit: {why}; edit when the fit is over and the average is in the "
            f'network{where} ({owner} with when="manual"), or pass target="live" to edit the weights that train'
        )


def deciding_head(owner: str, trainer: pl.Trainer, route: str, wanted: str | None) -> HeadCallback | None:
    """Return the head whose sums take an edit; ``None`` where the network shall be edited.

    Args:
        owner: Who asks, for messages.
        trainer: Of the run.
        route: ``"auto"``, ``"exact"`` or ``"editor"``.
        wanted: The name of a head.

    Raises:
        ConfigurationError: If there is no such head, or several decide.
    """
    heads = [each for each in callbacks_of(trainer) if isinstance(each, HeadCallback)]
    if wanted is not None and wanted not in [each.name for each in heads]:
        raise ConfigurationError(
            f"{owner}: there is no head {wanted!r}; this run has {', '.join(each.name for each in heads) or 'none'}"
        )
    learned = [each for each in heads if _has_learned(each) and wanted in (None, each.name)]
    if route == "editor":
        return None
    grafted = [each for each in learned if each.grafted]
    if grafted:
        learned = grafted
    elif route == "auto" and wanted is None and module_predicts("auto", trainer, (), grafted=False):
        return None
    if not learned:
        if route == "exact" or wanted is not None:
            raise ConfigurationError(
                f"{owner} with route={route!r} counts the image in the sums of a head, and no head of this run has "
                'learned anything; fit one, or use route="editor"'
            )
        return None
    if len(learned) > 1:
        raise ConfigurationError(
            f"{owner}: several heads decide, {', '.join(each.name for each in learned)}; name the one to correct "
            "(head=…)"
        )
    head = learned[0]
    if getattr(head.head, "solver", None) == "recursive":
        raise ConfigurationError(
            f'{owner}: {head.state_key} has solver="recursive", which cannot take samples out again, so an edit could '
            'not be taken back; use solver="gram"'
        )
    return head


def stale_parts(trainer: pl.Trainer) -> tuple[list[str], list[str]]:
    """Return the heads that have learned features of the network, and the predictors of errors that were fitted."""
    heads = [each.state_key for each in callbacks_of(trainer) if isinstance(each, HeadCallback) and _has_learned(each)]
    fitted = [each.state_key for each in callbacks_of(trainer) if isinstance(each, DEUP) and each.is_fitted]
    return heads, fitted


def tasks_of(trainer: pl.Trainer | None) -> Any:
    """Return the callback that keeps a network for each task and has tasks by now, or ``None``."""
    found: list[Any] = [] if trainer is None else [each for each in callbacks_of(trainer) if hasattr(each, "editable")]
    return found[0] if found and (found[0].tasks or found[0].reports) else None


def paths_in(module: nn.Module, editor: GradientEditor) -> dict[str, str]:
    """Return the dotted paths of the edited layers in a module, by their names in the editor."""
    start = path_of(module, editor.model)
    return {name: ".".join(filter(None, (start, name))) for name in editor.layers}


def edited_weights(module: pl.LightningModule, editor: GradientEditor) -> dict[str, Tensor]:
    """Return the weights of a module that an editor edits, by the layers' names in the editor."""
    return {name: module.get_parameter(f"{path}.weight") for name, path in paths_in(module, editor).items()}


def grafted_layers(trainer: pl.Trainer) -> list[str]:
    """Return the callbacks whose head stands in the classifier's place."""
    heads = [each for each in callbacks_of(trainer) if isinstance(each, HeadCallback)]
    return [each.state_key for each in heads if each.grafted]


def _has_learned(callback: HeadCallback) -> bool:
    try:
        return bool(callback.head.classes.numel())
    except NotFittedError:
        return False
