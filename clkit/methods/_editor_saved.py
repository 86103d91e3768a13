"""What a saved editor must look like, checked before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clkit.errors import StateError
from clkit.methods._edit_log import EditLog
from clkit.methods._editor_network import EditorNetworks
from clkit.schema import (
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

__all__ = ["editor_settings", "editor_state", "read_editor"]

_FORMAT = 1
_OWNER = "GradientEditor"
_SETTINGS: Table = {
    "rank": Instance(int),
    "n_hidden": Instance(int),
    "norm_scope": Instance(str),
    "share": Instance(str),
    "transforms": Instance(str),
}


def editor_state(networks: EditorNetworks, settings: Mapping[str, Any], fitted: bool, log: EditLog) -> dict[str, Any]:
    """Return the state of an editor as tensors and plain values."""
    return {
        "format": _FORMAT,
        "layers": {name: list(shape) for name, shape in networks.shapes.items()},
        "settings": dict(settings),
        "fitted": fitted,
        "networks": {name: value.clone() for name, value in networks.state_dict().items()},
        "log": log.state_dict(),
    }


def editor_settings(state: Any) -> tuple[list[str], dict[str, Any]]:
    """Return layers and settings of a saved editor, of which one like it can be made, or raise a StateError."""
    entries = check_format(state, _FORMAT, _OWNER)
    layers = saved_entry(entries, "layers", Named(Many(Instance(int))), _OWNER)
    return list(layers), saved_entry(entries, "settings", Nested(_SETTINGS), _OWNER)


def read_editor(
    state: Any,
    networks: EditorNetworks,
    settings: Mapping[str, Any],
    log: EditLog,
    weights: Mapping[str, Tensor],
) -> bool:
    """Take up a saved editor, or raise a StateError and change nothing; return whether it has its statistics."""
    entries = check_format(state, _FORMAT, _OWNER)
    layers = saved_entry(entries, "layers", Named(Many(Instance(int))), _OWNER)
    own = {name: list(shape) for name, shape in networks.shapes.items()}
    if list(layers.items()) != list(own.items()):
        raise StateError(
            f"{_OWNER}: the saved editor is of the layers {layers}, and this one of {own}; use the network and the "
            "layers of the saved one"
        )
    kinds = {
        name: Numbers(tuple(value.shape), value.dtype, least=0 if name.rpartition(".")[2] in ("M2", "counts") else None)
        for name, value in networks.state_dict().items()
    }
    table: Table = {
        "format": OneOf((_FORMAT,)),
        "layers": Instance(dict),
        "settings": Settings(settings, advice="use the settings of the saved editor"),
        "fitted": OneOf((False, True)),
        "networks": Nested(kinds),
        "log": Instance(dict),
    }
    saved = read_state(entries, table, _OWNER)
    log.load_state_dict(saved["log"], weights)
    networks.load_state_dict(saved["networks"])
    return bool(saved["fitted"])
