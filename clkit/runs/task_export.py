"""The network of one task of a DST run, out of its checkpoint into a file that needs no clkit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clkit._version import __version__
from clkit.callbacks import DST
from clkit.errors import ArgumentError
from clkit.files import atomic_write, check_output, read_checkpoint
from clkit.models.timm_classifier import timm_code
from clkit.schema import EXPORTED, read_entries, saved_entry
from clkit.surgery.task_networks import task_of_state

__all__ = ["ExportedTask", "export_task", "saved_tasks"]

FORMAT = 1
_KEY = DST.__qualname__


class ExportedTask(NamedTuple):
    """What an exported file holds, and how somebody who has no clkit reads it."""

    tensors: int
    density: float  # share of the connections of masked layers that the task has
    nonzero: float  # share of them that is not 0
    classes: list[int]  # outputs of the network for the classes of the task; empty where they are not known
    code: list[str]  # lines of Python that make the network and load the file
    reading: str


def export_task(path: str | Path, output: str | Path, task: int, *, overwrite: bool = False) -> ExportedTask:
    """Write the network of one task of a checkpoint: dense, with zeros where the task has no connection.

    The file is a dictionary for :func:`torch.load` with ``weights_only=True``:

    * ``state_dict`` has the keys of the module, or those of ``part`` where all of them are of one part of it, as
      ``network`` in :class:`~clkit.models.TimmClassifier`, which plain timm loads.
    * ``network`` is the module's class, and ``timm`` says how :func:`timm.create_model` makes the network (``None`` for
      a network of your own). ``code`` are the lines that make it and load the file.
    * ``classes`` are the outputs that the task trained, ``class_ids`` the classes that they stand for as the user
      numbers them, and ``class_names`` their names by output. Other outputs mean nothing.
    * ``preprocessing`` is how inputs were prepared, where that can be written down.

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
    weights, density, nonzero, about = task_of_state(entries[_KEY], task, _KEY)
    weights.pop("task_classes", None)  # of TimmClassifier, beside its network
    parts = {name.partition(".")[0] for name in weights}
    part = parts.pop() if len(parts) == 1 and all("." in name for name in weights) else ""
    weights = {name.removeprefix(f"{part}."): value for name, value in weights.items()} if part else weights
    reading = f'torch.load("{output.name}", weights_only=True)["state_dict"]'
    code = [*_making(about, part, weights), f"network.load_state_dict({reading})", "network.eval()"]
    names = {column: name for column, name in zip(about["classes"], about["class_names"], strict=False) if name}
    content = {
        EXPORTED: FORMAT,
        "clkit": __version__,
        "task": task,
        **about,
        "class_names": names,
        "part": part,
        "code": code,
        "state_dict": weights,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(output) as draft:
        draft.write_bytes(buffer.getvalue())
    return ExportedTask(len(weights), density, nonzero, about["classes"], code, reading)


def saved_tasks(checkpoint: dict[str, Any]) -> int:
    """Return how many tasks of a run with DST a checkpoint holds, 0 of any other run."""
    state = checkpoint.get("callbacks", {}).get(_KEY)
    return 0 if state is None else len(saved_entry(state, "about", list, _KEY))


def _making(about: dict[str, Any], part: str, weights: dict[str, Tensor]) -> list[str]:
    """Return the lines that make the network, as far as they are known."""
    timm = about["timm"]
    if timm is None:
        what = f"the part {part!r} of a {about['network']}" if part else f"a {about['network']}"
        return ["import torch", f"network = ...  # {what}, made as for the run"]
    lines = timm_code(timm, weights.get("conv1.weight"))
    if timm["objects"]:
        lines[0] += f"  # and {', '.join(timm['objects'])} as in the run"
    return ["import timm", "import torch", *lines]
