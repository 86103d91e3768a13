"""What a batch is, written once: ``(inputs, targets, …)``, a mapping with the usual keys, or the user's own reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clkit.errors import BatchError

__all__ = ["BatchReader", "read_batch", "read_inputs"]

BatchReader = Callable[[Any], tuple[Any, Tensor]]

INPUT_KEYS = ("image", "inputs", "x")
TARGET_KEYS = ("label", "labels", "target", "y")


def read_batch(batch: Any, reader: BatchReader | None = None) -> tuple[Any, Tensor]:
    """Find inputs and targets in a batch.

    Args:
        batch: ``(inputs, targets)`` or ``(inputs, targets, …)``, or a mapping with one of ``image``, ``inputs``, ``x``
            and one of ``label``, ``labels``, ``target``, ``y``.
        reader: A function ``batch -> (inputs, targets)`` for anything else. It is asked first when given.

    Returns:
        The inputs as they are, and the targets, an integer tensor (B,).

    Raises:
        BatchError: If the batch has another form; the message says what was seen.

    Example:
        >>> import torch
        >>> x, y = read_batch({"image": torch.zeros(2, 3), "label": torch.tensor([4, 7])})
        >>> x.shape, y.tolist()
        (torch.Size([2, 3]), [4, 7])
    """
    if reader is not None:
        inputs, targets = reader(batch)
    elif isinstance(batch, Mapping):
        inputs, targets = _pick(batch, INPUT_KEYS, "inputs"), _pick(batch, TARGET_KEYS, "targets")
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= 2:
        inputs, targets = batch[0], batch[1]
    else:
        raise BatchError(
            f"a batch must be (inputs, targets, …) or a mapping, got {type(batch).__name__}; "
            "pass `batch_reader=`, a function batch -> (inputs, targets)"
        )
    if not isinstance(targets, Tensor):
        raise BatchError(
            f"the targets of a batch must be a tensor, got {type(targets).__name__}; "
            "pass `batch_reader=`, a function batch -> (inputs, targets)"
        )
    return inputs, targets


def read_inputs(batch: Any, reader: BatchReader | None = None) -> tuple[Any, Tensor | None]:
    """Find inputs, and targets where there are any: prediction needs none.

    Args:
        batch: What :func:`read_batch` reads, or inputs alone (a tensor).
        reader: The user's own reader, if any.

    Returns:
        The inputs, and the targets (B,) or ``None``.

    Example:
        >>> import torch
        >>> read_inputs(torch.zeros(2, 3))[1] is None
        True
    """
    if reader is None:
        if isinstance(batch, Tensor):
            return batch, None
        if isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS):
            return _pick(batch, INPUT_KEYS, "inputs"), None
        if isinstance(batch, Sequence) and len(batch) == 1:
            return batch[0], None
    return read_batch(batch, reader)


def _pick(batch: Mapping[Any, Any], keys: tuple[str, ...], what: str) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    raise BatchError(
        f"found no {what} in a batch with keys {sorted(map(str, batch))}; expected one of {list(keys)}, "
        "or pass `batch_reader=`, a function batch -> (inputs, targets)"
    )
