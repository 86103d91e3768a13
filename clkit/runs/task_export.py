"""The network of one task of a DST run, out of its checkpoint into a file that needs no clkit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import torch

from clkit._version import __version__
from clkit.callbacks import DST
from clkit.errors import ArgumentError
from clkit.files import atomic_write, check_output, read_checkpoint
from clkit.schema import EXPORTED, read_entries, saved_entry
from clkit.surgery.task_networks import task_of_state

__all__ = ["ExportedTask", "export_task"]

FORMAT = 1
_KEY = DST.__qualname__


class ExportedTask(NamedTuple):
    """What an exported file holds: how many tensors, and the share of weights of masked layers that are no zeros."""

    tensors: int
    density: float
    reading: str


def export_task(path: str | Path, output: str | Path, task: int, *, overwrite: bool = False) -> ExportedTask:
    """Write the network of one task of a checkpoint: dense, with zeros where the task has no connection.

    The file is a dictionary for :func:`torch.load` with ``weights_only=True``, and its ``state_dict`` has the keys of
    the module; where all of them are of one part of it, as ``network.`` in :class:`~clkit.models.TimmClassifier`, those
    of that part, which plain timm loads.

    Args:
        path: The checkpoint file of a run with :class:`~clkit.callbacks.DST`.
        output: The file to write, ``*.pt``.
        task: Index of the task, from 0.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ArgumentError: If ``output`` has another ending or exists, the checkpoint is of no such run, or the task did not
            finish in it.
        StateError: If the checkpoint is damaged.
        WriteError: If the file cannot be written.
    """
    output = Path(output)
    if output.suffix != ".pt":
        raise ArgumentError(f"output={str(output)!r} must end in .pt: the network of a task is written as weights")
    check_output(output, [Path(path)], overwrite)
    entries = read_entries(saved_entry(read_checkpoint(path), "callbacks", dict, str(path)), str(path))
    if _KEY not in entries:
        raise ArgumentError(f"{path} is of no run with DST, so there is no task {task} in it; --head exports a head")
    weights, density = task_of_state(entries[_KEY], task, _KEY)
    weights.pop("task_classes", None)  # of TimmClassifier, beside its network
    parts = {name.partition(".")[0] for name in weights}
    if len(parts) == 1 and all("." in name for name in weights):
        weights = {name.partition(".")[2]: value for name, value in weights.items()}
    content = {EXPORTED: FORMAT, "clkit": __version__, "task": task, "state_dict": weights}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(output) as draft:
        draft.write_bytes(buffer.getvalue())
    return ExportedTask(len(weights), density, f'torch.load("{output.name}", weights_only=True)["state_dict"]')
