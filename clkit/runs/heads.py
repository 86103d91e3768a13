"""Reading what a run has learned, without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clkit.errors import ArgumentError, StateError
from clkit.files import read_checkpoint
from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead
from clkit.methods.heads.base import FORMAT, Head
from clkit.methods.heads.readout import LinearReadout
from clkit.schema import EXPORTED, check_format, check_saved, check_saved_ids, saved_entry

__all__ = ["build_head", "head_entries", "load_head", "name_of"]

HEADS: dict[str, type[Head]] = {head.__name__: head for head in (AnalyticHead, LDAHead, NearestMeanHead)}


def load_head(path: str | Path, name: str) -> Any:
    """The head that a callback had learned when a checkpoint was saved, ready to predict on features.

    Args:
        path: The checkpoint file, or a ``.pt`` file that :func:`clkit.export` wrote.
        name: The callback's ``name``: ``"aef_ocl"``, ``"nmc"``, ``"lda"``, or what it was given.

    Returns:
        The head: an :class:`~clkit.methods.AnalyticHead`, :class:`~clkit.methods.NearestMeanHead` or
        :class:`~clkit.methods.LDAHead`; of an exported file, which holds no sums, a linear layer with ``forward`` and
        ``predict`` alone.

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
    checkpoint = read_checkpoint(path)
    if EXPORTED in checkpoint:
        return _exported_head(checkpoint, path, name)
    named = {name_of(key): entry["head"] for key, entry in head_entries(checkpoint).items()}
    if name not in named:
        raise ArgumentError(f"{path} has no head named {name!r}; it has {sorted(named) or 'none'}")
    return build_head(named[name], f"{path}: the head {name!r}")


def head_entries(checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the callbacks with a learned head have saved, by their key in the checkpoint."""
    entries = checkpoint.get("callbacks", {})
    if not isinstance(entries, dict):
        raise StateError(f"'callbacks' of the checkpoint is a {type(entries).__name__}, not a dictionary")
    return {
        str(key): entry
        for key, entry in entries.items()
        if isinstance(entry, dict) and isinstance(entry.get("head"), dict)
    }


def name_of(key: str) -> str:
    """The ``name`` of the callback that saved under a key.

    Example:
        >>> name_of("NMC(first)")
        'first'
    """
    return key.partition("(")[2].removesuffix(")")


def build_head(state: dict[str, Any], what: str) -> Head:
    """A head out of its saved state.

    Args:
        state: What a head's ``state_dict`` gave.
        what: Begins the message of an error.

    Raises:
        StateError: If it is of a kind or a format that this clkit does not know, or damaged.
    """
    options = dict(saved_entry(state, "_extra_state", dict, what))
    check_format(options, FORMAT, what)
    kind = saved_entry(options, "head", str, what)
    if kind not in HEADS:
        raise StateError(f"{what} is a {kind!r}, this clkit knows {sorted(HEADS)}")
    arguments = {name: value for name, value in options.items() if name not in ("format", "head")}
    try:
        head = HEADS[kind](**arguments)
    except (ArgumentError, TypeError, RuntimeError, MemoryError, OverflowError) as error:  # of absurd size
        reason = str(error).splitlines()[0]
        raise StateError(f"{what}: no {kind} can be made with the saved options {arguments}: {reason}") from error
    head.load_state_dict(state)
    return head


def _exported_head(exported: dict[str, Any], path: str | Path, name: str) -> LinearReadout:
    check_format({"format": exported[EXPORTED]}, 1, str(path))
    saved = saved_entry(exported, "head", dict, str(path))
    if saved_entry(saved, "name", str, str(path)) != name:
        raise ArgumentError(f"{path} has no head named {name!r}; it has {[saved['name']]}")
    ids = check_saved_ids(f"{path}: classes", saved.get("classes"))
    weight = saved_entry(saved, "weight", torch.Tensor, str(path))
    shape = (ids.size, weight.shape[1] if weight.ndim == 2 else -1)
    if not ids.size:
        raise StateError(f"{path}: the head has no classes; the file is damaged")
    return LinearReadout(
        torch.from_numpy(ids),
        check_saved(f"{path}: weight", weight, shape, weight.dtype),
        check_saved(f"{path}: bias", saved.get("bias"), (ids.size,), weight.dtype),
    )
