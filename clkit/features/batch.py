"""What a batch is, written once: ``(inputs, targets, …)``, a mapping with the usual keys, or the user's own reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clkit.errors import BatchError

__all__ = ["INPUT_KEYS", "TARGET_KEYS", "BatchReader", "known_keys", "read_batch", "read_inputs"]

BatchReader = Callable[[Any], tuple[Any, Tensor]]

# the first that is there counts, so the exact names stand before those that may mean something else
INPUT_KEYS = ("pixel_values", "image", "img", "inputs", "x")
TARGET_KEYS = ("label", "labels", "target", "targets", "y")
_ADVICE = "pass `batch_reader=`, a function batch -> (inputs, targets)"


def read_batch(batch: Any, reader: BatchReader | None = None) -> tuple[Any, Tensor]:
    """Find inputs and targets in a batch.

    Args:
        batch: ``(inputs, targets)`` or ``(inputs, targets, …)``, or a mapping with one of ``pixel_values``, ``image``,
            ``img``, ``inputs``, ``x`` and one of ``label``, ``labels``, ``target``, ``targets``, ``y``. Of several the
            first in this order is taken.
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
        raise BatchError(f"a batch must be (inputs, targets, …) or a mapping, got {type(batch).__name__}; {_ADVICE}")
    if not isinstance(targets, Tensor):
        raise BatchError(f"the targets of a batch must be a tensor, got {type(targets).__name__}; {_ADVICE}")
    return inputs, targets


def read_inputs(batch: Any, reader: BatchReader | None = None) -> tuple[Any, Tensor | None]:
    """Find inputs, and targets (B,) or ``None``, in what :func:`read_batch` reads or in inputs alone (a tensor).

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


def known_keys(mapping: Mapping[Any, Any]) -> tuple[Any, Any]:
    """Return the keys under which a mapping has inputs and targets, ``None`` where it has none.

    Example:
        >>> known_keys({"img": 0, "fine_label": 1})
        ('img', None)
    """
    found = [next((key for key in keys if key in mapping), None) for keys in (INPUT_KEYS, TARGET_KEYS)]
    return found[0], found[1]


def _pick(batch: Mapping[Any, Any], keys: tuple[str, ...], what: str) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    seen = sorted(map(str, batch))
    raise BatchError(f"found no {what} in a batch with keys {seen}; expected one of {list(keys)}, or {_ADVICE}")
