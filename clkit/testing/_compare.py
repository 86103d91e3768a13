"""Comparing what methods have learned: every leaf of a state, bit by bit or within a tolerance."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clkit.callbacks import Predictor, StreamCallback
from clkit.errors import ContractError
from clkit.testing._runs import probe
from clkit.testing.entries import Entry

__all__ = ["bits", "changed", "far", "leaves", "plain", "require", "same", "snapshot"]

PLAIN = (Tensor, int, float, str, bool, type(None))
FOLLOWED = ("format", "batches")  # what every StreamCallback saves of the stream


def require(holds: bool, seen: str, advice: str) -> None:
    """Require what a check is about.

    Raises:
        ContractError: If it does not hold.
    """
    if not holds:
        raise ContractError(f"{seen}; {advice}")


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return every leaf of a nested state under its path."""
    if isinstance(value, Mapping):
        return {key: leaf for name, part in value.items() for key, leaf in leaves(part, f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for i, part in enumerate(value) for key, leaf in leaves(part, f"{path}/{i}").items()}
    return {path or "/": value}


def bits(value: Any) -> Any:
    """Return what is equal for two leaves exactly if they are the same to the last bit (NaN included)."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return str(value.dtype), tuple(value.shape), raw
    return type(value).__name__, repr(value)


def changed(before: Any, after: Any) -> list[str]:
    """Return the paths of leaves that are not the same bits in both."""
    one, two = leaves(before), leaves(after)
    paths = [*one, *(path for path in two if path not in one)]
    return [path for path in paths if path not in one or path not in two or bits(one[path]) != bits(two[path])]


def same(before: Any, after: Any, seen: str, advice: str) -> None:
    """Require the same bits.

    Raises:
        ContractError: Naming the first paths that differ.
    """
    paths = changed(before, after)
    require(not paths, f"{seen} ({_shortened(paths)})", advice)


def plain(state: Any, of: str) -> None:
    """Require tensors and plain values.

    Args:
        state: A nested state.
        of: What the message calls it.

    Raises:
        ContractError: Naming the first leaf that is something else.
    """
    for path, leaf in leaves(state).items():
        require(
            isinstance(leaf, PLAIN),
            f"{of} holds a {type(leaf).__module__}.{type(leaf).__qualname__} at {path}",
            "keep tensors and plain values only: files are loaded with weights_only=True",
        )


def far(expected: Any, found: Any, tolerance: float) -> list[str]:
    """Return the paths of leaves that differ by more than ``tolerance``, relative to the largest value of the leaf."""
    one, two = leaves(expected), leaves(found)
    paths = sorted(one.keys() ^ two.keys())
    for path in one.keys() & two.keys():
        a, b = one[path], two[path]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.is_floating_point():
            a, b = a.double(), b.double()
            known = a.isfinite() & b.isfinite()
            scale = max(float(a[known].abs().max()), 1.0) if known.any() else 1.0
            close = bool((a[known] - b[known]).abs().le(tolerance * scale).all())
            if not close or not torch.equal(a[~known], b[~known]):
                paths.append(path)
        elif bits(a) != bits(b):
            paths.append(path)
    return paths


def snapshot(entry: Entry, callback: Any, *, followed: bool = False) -> dict[str, Any]:
    """Copy what a callback has learned: its state, and its scores where it predicts.

    Args:
        entry: The method.
        callback: One of its objects.
        followed: Whether to keep its place in the stream, too.
    """
    state = dict(copy.deepcopy(callback.state_dict()))
    if isinstance(callback, StreamCallback) and not followed:
        state = {key: value for key, value in state.items() if key not in FOLLOWED}
    state = {key: value for key, value in state.items() if key not in entry.volatile}
    if isinstance(callback, Predictor):
        state["scores(features)"] = callback.scores(probe()).detach().clone()
    return state


def _shortened(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
