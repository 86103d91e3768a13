"""Calling the user's network, with an error that says who called it, and with what, where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clkit.arguments import in_short
from clkit.errors import BatchError, first_line

__all__ = ["call", "shape_of"]


def call(network: nn.Module, inputs: Any, remedy: str = "") -> Any:
    """Return ``network(inputs)``.

    Args:
        network: The user's network.
        inputs: What its ``forward`` is given, as its only argument.
        remedy: What else helps where that fails, beside a ``batch_reader``.

    Raises:
        BatchError: If the forward raises one of Python's own exceptions; others come through as they are.

    Example:
        >>> import torch
        >>> call(nn.Linear(2, 1), torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    try:
        return network(inputs)
    except Exception as error:  # whatever a forward of the user may raise
        if type(error).__module__ != "builtins":  # clkit's, torch's full memory, a class that the user means to catch
            raise
        raise BatchError(
            f"clkit called forward() of {type(network).__name__} with the inputs of the batch, {shape_of(inputs)}, as "
            f"its one argument, and it failed with {type(error).__name__}: {first_line(error)}. If it takes something "
            f"else, pass batch_reader=, a function batch -> (inputs, targets) that gives that{remedy}"
        ) from error


def shape_of(value: Any) -> str:
    """Return in a few words what a value is: types, shapes, data types.

    Example:
        >>> import torch
        >>> shape_of({"image": torch.zeros(2, 3), "size": 4})
        "a dict of 'image': a float32 tensor (2, 3); 'size': 4"
    """
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    parts = [(f"{key!r}: ", each) for key, each in value.items()] if isinstance(value, Mapping) else []
    parts = [("", each) for each in value] if isinstance(value, list | tuple) else parts
    if not parts:
        return in_short(value)
    shown = "; ".join(f"{key}{shape_of(each)}" for key, each in parts[:4]) + ("; …" if len(parts) > 4 else "")
    return f"a {type(value).__name__} of {shown}"
