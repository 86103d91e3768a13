"""Reading what a run has learned, without a trainer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from clkit.errors import ArgumentError, StateError
from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead
from clkit.methods.head import Head

__all__ = ["load_head", "read_checkpoint"]

HEADS: dict[str, type[Head]] = {head.__name__: head for head in (AnalyticHead, LDAHead, NearestMeanHead)}

# what torch.load raises for damaged bytes, found by flipping them
DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AssertionError, TypeError)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint file without executing anything in it.

    Args:
        path: A file that Lightning wrote.

    Raises:
        ArgumentError: If there is no such file.
        StateError: If it is damaged, or holds objects other than tensors and plain values.
    """
    if not Path(path).is_file():
        raise ArgumentError(f"path={str(path)!r} is not a file; give the path of a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise StateError(f"{path} cannot be read as a checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise StateError(f"{path} holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def load_head(path: str | Path, name: str) -> Any:
    """The head that a callback had learned when a checkpoint was saved, ready to predict on features.

    Args:
        path: The checkpoint file.
        name: The callback's ``name``: ``"aef_ocl"``, ``"nmc"``, ``"lda"``, or what it was given.

    Returns:
        The head: an :class:`~clkit.methods.AnalyticHead`, :class:`~clkit.methods.NearestMeanHead` or
        :class:`~clkit.methods.LDAHead`.

    Raises:
        ArgumentError: If there is no such file, or no head of that name in it; the message lists those there are.
        StateError: If the file is damaged or from a newer format.

    Example:
        >>> import tempfile, torch
        >>> from clkit.methods import NearestMeanHead
        >>> head = NearestMeanHead(2)
        >>> head.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([4, 9]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"callbacks": {"NMC(nmc)": {"head": dict(head.state_dict())}}}, f"{folder}/run.ckpt")
        ...     load_head(f"{folder}/run.ckpt", "nmc").predict(torch.tensor([[0.2, 3.0]]))
        tensor([9])
    """
    entries = read_checkpoint(path).get("callbacks", {})
    states = {
        str(key).partition("(")[2].removesuffix(")"): entry["head"]
        for key, entry in entries.items()
        if isinstance(entry, dict) and entry.get("head") is not None
    }
    if name not in states:
        raise ArgumentError(f"{path} has no head named {name!r}; it has {sorted(states) or 'none'}")
    state = states[name]
    options = dict(state["_extra_state"])
    kind = options.pop("head")
    options.pop("format")  # checked by the head when it loads
    if kind not in HEADS:
        raise StateError(f"{path}: the head {name!r} is a {kind!r}, this clkit knows {sorted(HEADS)}")
    head = HEADS[kind](**options)
    head.load_state_dict(state)
    return head
