"""What a saved editor must look like, checked before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.errors import StateError, few_names
from clkit.files import read_checkpoint
from clkit.methods._edit_log import EditLog
from clkit.methods._editor_network import EditorNetworks
from clkit.schema import (
    FINITE,
    FLOATS,
    Instance,
    Many,
    Named,
    Nested,
    Numbers,
    OneOf,
    Settings,
    Table,
    check_format,
    read_state,
    saved_entry,
)

__all__ = ["described", "editor_settings", "editor_state", "holds_editor", "read_editor", "saved_editor"]

_FORMAT = 1
_OWNER = "GradientEditor"
_ENTRIES = {"layers", "settings", "networks", "log"}
_DEEPEST = 4  # dictionaries inside which an editor may lie in a checkpoint
_SETTINGS: Table = {
    "rank": Instance(int),
    "n_hidden": Instance(int),
    "norm_scope": Instance(str),
    "share": Instance(str),
    "transforms": Instance(str),
}


def editor_state(
    networks: EditorNetworks, settings: Mapping[str, Any], fitted: bool, made_for: Mapping[str, Tensor], log: EditLog
) -> dict[str, Any]:
    """Return the state of an editor as tensors and plain values."""
    return {
        "format": _FORMAT,
        "layers": {name: list(shape) for name, shape in networks.shapes.items()},
        "settings": dict(settings),
        "fitted": fitted,
        "made_for": dict(made_for),
        "networks": {name: value.clone() for name, value in networks.state_dict().items()},
        "log": log.state_dict(),
    }


def editor_settings(state: Any) -> tuple[list[str], dict[str, Any]]:
    """Return layers and settings of a saved editor, of which one like it can be made, or raise a StateError."""
    entries = check_format(state, _FORMAT, _OWNER)
    layers = saved_entry(entries, "layers", Named(Many(Instance(int))), _OWNER)
    return list(layers), saved_entry(entries, "settings", Nested(_SETTINGS), _OWNER)


def described(layers: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Return layers and shapes of an editor in words, first those that the other one does not have so."""
    alike = {name: name in others and others[name] == shape for name, shape in layers.items()}
    names = sorted(layers, key=alike.__getitem__)
    return few_names([f"{in_short(name)} {in_short(layers[name])}" for name in names])


def read_editor(
    state: Any,
    networks: EditorNetworks,
    settings: Mapping[str, Any],
    log: EditLog,
    weights: Mapping[str, Tensor],
) -> tuple[bool, dict[str, Tensor]]:
    """Take up a saved editor, or raise a StateError and change nothing.

    Returns:
        Whether it has its statistics, and what some numbers of the weights were then.
    """
    entries = check_format(state, _FORMAT, _OWNER)
    layers = saved_entry(entries, "layers", Named(Many(Instance(int))), _OWNER)
    own = {name: list(shape) for name, shape in networks.shapes.items()}
    if list(layers.items()) != list(own.items()):
        raise StateError(
            f"{_OWNER}: the saved editor is of the layers {described(layers, own)}, and this one of "
            f"{described(own, layers)}; use the network and the layers of the saved one"
        )
    learned = {name for name, _ in networks.named_parameters()} | {"alpha_start"}  # of any precision
    kinds = {
        name: Numbers(
            tuple(value.shape),
            FLOATS if name in learned else value.dtype,
            most=torch.finfo(value.dtype).max if name in learned else FINITE,
            least=0 if name.rpartition(".")[2] in ("M2", "counts") else None,
        )
        for name, value in networks.state_dict().items()
    }
    table: Table = {
        "format": OneOf((_FORMAT,)),
        "layers": Instance(dict),
        "settings": Settings(settings, advice="use the settings of the saved editor"),
        "fitted": OneOf((False, True)),
        "made_for": Named(Numbers((...,), torch.float32)),
        "networks": Nested(kinds),
        "log": Instance(dict),
    }
    saved = read_state(entries, table, _OWNER)
    log.load_state_dict(saved["log"], weights)
    networks.load_state_dict(saved["networks"])
    return bool(saved["fitted"]), saved["made_for"]


def saved_editor(saved: Any) -> dict[str, Any]:
    """Return the state of an editor: itself, or what lies somewhere in the checkpoint of a run; or the path of either.

    Raises:
        ArgumentError: If there is no such file.
        StateError: If there is no editor in it.
    """
    content = read_checkpoint(saved) if isinstance(saved, str | Path) else saved
    found = _find(content, _DEEPEST)
    if found is None:
        where = saved if isinstance(saved, str | Path) else "what was given"
        raise StateError(
            f"{where} holds no editor: give what editor.state_dict() gave, or a checkpoint of a run with one, "
            'such as one with strategy="editor_training"'
        )
    return found


def holds_editor(content: Any) -> bool:
    """Whether the state of an editor lies somewhere in the checkpoint of a run."""
    return _find(content, _DEEPEST) is not None


def _find(value: Any, depth: int) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    if value.keys() >= _ENTRIES:
        return value
    inside = (_find(each, depth - 1) for each in value.values()) if depth else ()
    return next((each for each in inside if each is not None), None)
