"""What a saved topology must look like, checked before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clkit.errors import ArgumentError, StateError
from clkit.methods._connections import unpack
from clkit.methods._sparse_layer import SparseLayer, described, in_few_words
from clkit.schema import (
    FLOATS,
    Instance,
    Many,
    Named,
    Nested,
    Numbers,
    OneOf,
    Real,
    Row,
    Settings,
    Table,
    Whole,
    check_format,
    read_state,
    saved_entry,
)

__all__ = ["FORMAT", "TaskReport", "read_topology", "saved_sub_network", "stand_ins"]

FORMAT = 1


class TaskReport(NamedTuple):
    """What a task takes of the weights; numbers of connections are those of all layers together."""

    task: int
    density: float  # what was asked for
    total: int  # connections that there are
    active: int  # in the task's mask
    nonzero: int  # of these, not 0: one that came with 0, and has had no gradient since, is 0 still
    reused: int  # of these, learned by earlier tasks and read only
    free: int  # in no mask of a task up to this one
    explored: float  # share of all that was active at some time of the task


_REPORT: Table = {
    "task": Whole(),
    "density": Real(least=0, most=1),
    "total": Whole(),
    "active": Whole(),
    "nonzero": Whole(),
    "reused": Whole(),
    "free": Whole(),
    "explored": Real(least=0, most=1),
}


def read_topology(state: Any, layers: Mapping[str, SparseLayer], given: Mapping[str, Any], owner: str) -> Any:
    """Return the entries of a saved topology, or raise a StateError: it must fit these layers and settings."""
    table = {
        "format": OneOf((FORMAT,)),
        "settings": Settings(in_few_words(described(given)), advice="use the settings of the saved run"),
        "task": Whole(least=-1, most=2**31),
        "running": OneOf((False, True)),
        "step": Whole(),
        "steps": Whole(),
        "shown": Whole(optional=True),
        "reports": Many(Row(_REPORT)),
        "layers": Nested({name: Nested(layer.saved_table()) for name, layer in layers.items()}),
    }
    entries = check_format(state, FORMAT, owner)
    if "settings" in entries:
        entries = {**entries, "settings": in_few_words(entries["settings"])}
    saved = read_state(entries, table, owner)
    finished = saved["task"] + (not saved["running"])
    numbers = {len(layer["masks"]) for layer in saved["layers"].values()} | {len(saved["reports"])}
    if numbers != {finished} or (saved["shown"] is not None and saved["shown"] >= finished):
        raise StateError(f"{owner}: the saved state at task {saved['task']} has masks of {numbers}; it is damaged")
    if saved["running"] and saved["steps"] == 0:
        raise StateError(f"{owner}: the saved state has a running task of 0 steps; it is damaged")
    return saved


def stand_ins(state: Any, owner: str) -> dict[str, Tensor]:
    """Return weights in the shapes of a saved topology, to be filled by it and then bound to others."""
    layers = saved_entry(state, "layers", Named(Instance(dict)), owner)
    bank = Numbers((...,), FLOATS, any_value=True)
    banks = {name: saved_entry(layer, "bank", bank, f"{owner}: {name!r}") for name, layer in layers.items()}
    if not banks or not all(each.numel() for each in banks.values()):
        raise StateError(f"{owner}: the saved state has a layer without weights; it is damaged")
    return {name: torch.zeros_like(each, device="cpu") for name, each in banks.items()}


def saved_sub_network(state: Any, task: int, owner: str) -> tuple[dict[str, Tensor], float]:
    """Return the dense weights of a finished task out of a saved topology, and their density, whatever its settings.

    Raises:
        ArgumentError: If the task did not finish.
        StateError: If the state is damaged.
    """
    layers = saved_entry(check_format(state, FORMAT, owner), "layers", Named(Instance(dict)), owner)
    weights: dict[str, Tensor] = {}
    active = total = 0
    for name, layer in layers.items():
        bank = saved_entry(layer, "bank", Numbers((...,), FLOATS), f"{owner}: {name!r}")
        kind = Numbers(((bank.numel() + 7) // 8,), torch.uint8, least=0, most=255)
        bits = saved_entry(layer, "masks", Many(kind), f"{owner}: {name!r}")
        if not 0 <= task < len(bits):
            raise ArgumentError(f"task {task} was not trained to its end; {len(bits)} tasks were, counted from 0")
        mask = unpack(bits[task].cpu(), bank)
        weights[name] = torch.where(mask, bank, 0)
        active, total = active + int(mask.sum()), total + mask.numel()
    return weights, active / max(total, 1)
