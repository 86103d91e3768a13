"""Reading what a run has learned, without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clkit.errors import ArgumentError
from clkit.files import read_checkpoint
from clkit.methods import KLDA, AnaCP, AnalyticHead, LDAHead, NearestMeanHead
from clkit.methods.heads.base import Head
from clkit.methods.heads.portable import head_of_state
from clkit.methods.heads.readout import LinearReadout
from clkit.schema import EXPORTED, FLOATS, Instance, Numbers, Table, check_format, read_entries, read_state

__all__ = ["HEADS", "head_entries", "load_head", "name_of"]

HEADS: dict[str, type[Head]] = {head.__name__: head for head in (AnaCP, AnalyticHead, KLDA, LDAHead, NearestMeanHead)}


def load_head(path: str | Path, name: str) -> Any:
    """Return the head that a callback had learned when a checkpoint was saved, ready to predict on features.

    Args:
        path: The checkpoint file, or a ``.pt`` file that :func:`clkit.export` wrote.
        name: The callback's ``name``: ``"aef_ocl"``, ``"nmc"``, ``"lda"``, or what it was given.

    Returns:
        The head, of a class of :mod:`clkit.methods` such as :class:`~clkit.methods.LDAHead`; of an exported file,
        which holds no sums, a linear layer with ``forward`` and ``predict`` alone.

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
    entries = head_entries(checkpoint)
    for key, entry in entries.items():
        if name_of(key) == name:
            return head_of_state(entry["head"], f"{path}: the head {name!r}", HEADS)
    raise ArgumentError(f"{path} has no head named {name!r}; it has {sorted(map(name_of, entries)) or 'none'}")


def head_entries(checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the callbacks with a learned head have saved, by their key in the checkpoint."""
    entries = read_entries(checkpoint.get("callbacks", {}), "'callbacks' of the checkpoint")
    return {
        key: entry
        for key, entry in entries.items()
        if isinstance(entry, dict) and isinstance(dict.get(entry, "head"), dict)
    }


def name_of(key: str) -> str:
    """Return the ``name`` of the callback that saved under a key.

    Example:
        >>> name_of("NMC(first)")
        'first'
    """
    return key.partition("(")[2].removesuffix(")")


def _exported_head(exported: dict[str, Any], path: str | Path, name: str) -> LinearReadout:
    check_format({"format": exported[EXPORTED]}, 1, str(path))
    parts: Table = {
        "name": Instance(str),
        "classes": Numbers(("C",), least=0, most=2**31, ids=True, rule=("not empty", lambda ids: len(ids) > 0)),
        "weight": Numbers(("C", "D"), FLOATS),
        "bias": Numbers(("C",), FLOATS),
    }
    saved = read_state(exported.get("head"), parts, str(path))
    if saved["name"] != name:
        raise ArgumentError(f"{path} has no head named {name!r}; it has {[saved['name']]}")
    return LinearReadout(saved["classes"], saved["weight"], saved["bias"])
