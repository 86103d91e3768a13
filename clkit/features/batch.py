"""What a batch is, written once: ``(inputs, targets, …)``, a mapping with the usual keys, or the user's own reader."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from clkit.errors import BatchError
from clkit.features.targets import are_class_ids, check_targets

__all__ = [
    "INPUT_KEYS",
    "TARGET_KEYS",
    "BatchReader",
    "Readings",
    "known_keys",
    "read_batch",
    "read_inputs",
    "sample_size",
    "tensors_in",
]

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
        pair = reader(batch)
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise BatchError(f"a batch_reader must return a pair (inputs, targets), got {type(pair).__name__}")
        inputs, targets = pair
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


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of nested lists, tuples and mappings, in their order."""
    found, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, Mapping | list | tuple):
            waiting += reversed(list(each.values()) if isinstance(each, Mapping) else each)
    return found


def sample_size(inputs: Any) -> tuple[int, int]:
    """Return the number of samples in inputs (B, …), and how many numbers each of them has in their first tensor.

    Example:
        >>> import torch
        >>> sample_size({"image": torch.zeros(2, 3, 8, 8)})
        (2, 192)
    """
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim()), None)
    if first is None:
        raise BatchError(f"the inputs of a batch hold no tensor, got {type(inputs).__name__}; {_ADVICE}")
    return len(first), first[:1].numel()


class Readings:
    """How the parts of a run read its batches, each by its own reader; a reader is asked once a batch.

    A part is whatever may have a ``batch_reader``: the strategy, the module, a callback. A part without one reads as
    the strategy does, or else as the module does, since these say what the run trains on. Where they have none either
    it reads the usual form; and a batch that has not the usual form by the reader of the other callbacks, if they have
    only one.

    Args:
        parts: Returns the strategy and the module, then the callbacks; asked when a batch is read.
    """

    _of_trainer: ClassVar[weakref.WeakKeyDictionary[Any, Readings]] = weakref.WeakKeyDictionary()

    def __init__(self, parts: Callable[[], tuple[Iterable[Any], Iterable[Any]]]) -> None:
        self._parts = parts
        self._batch: Any = None
        self._moment: Hashable = None
        self._memo: dict[Hashable, tuple[Any, Tensor | None]] = {}  # while a batch is in work, by reader

    @classmethod
    def of(cls, trainer: Any) -> Readings:
        """Return those of a trainer's parts."""
        if trainer not in cls._of_trainer:
            alive = weakref.proxy(trainer)  # the values of this dictionary must not keep its keys alive
            cls._of_trainer[trainer] = cls(lambda: ((alive.strategy, alive.strategy.lightning_module), alive.callbacks))
        return cls._of_trainer[trainer]

    def given(self, part: Any) -> BatchReader | None:
        """Return the reader that was given to a part, or to those whose reading it shares."""
        leading, _ = self._parts()
        for each in (part, *leading):
            reader: BatchReader | None = getattr(each, "batch_reader", None)
            if callable(reader):
                return reader
        return None

    def end(self) -> None:
        """Let go of the batch in work."""
        self._batch, self._moment, self._memo = None, None, {}

    def read(
        self,
        part: Any,
        batch: Any,
        *,
        needs_targets: bool = True,
        moment: Hashable = None,
        lent: BatchReader | None = None,
    ) -> tuple[Any, Tensor | None]:
        """Return inputs and targets as a part reads them.

        Args:
            part: Whose reader is asked.
            batch: The batch.
            needs_targets: Whether a batch must have targets; ``None`` is returned for them otherwise.
            moment: Has the batch in work from now on: until :meth:`end`, or until one of another moment.
            lent: A reader of another part, for a part without one.

        Raises:
            BatchError: If the part cannot read the batch, or its targets are no class ids; the message names the part.
        """
        if moment is not None and (batch is not self._batch or moment != self._moment):
            self._batch, self._moment, self._memo = batch, moment, {}
        reader = lent or self.given(part)
        key = None if reader is None else id(reader)
        known = self._memo.get(key) if batch is self._batch else None
        if known is not None and (known[1] is not None or not needs_targets):
            return known
        try:
            pair = (read_batch if needs_targets else read_inputs)(batch, reader)
            ids = pair[1]
            if ids is not None and not (ids.ndim == 1 and ids.dtype == torch.int64) and not are_class_ids(ids):
                if needs_targets:
                    check_targets(ids)
                pair = pair[0], None  # a prediction has no use for them
        except BatchError as error:
            named = BatchError(f"{_name(part)}: {error}")
            lent = None if reader is not None else self._lent(named)
            if lent is None:
                raise named from error
            return self.read(part, batch, needs_targets=needs_targets, lent=lent)
        if batch is self._batch:
            self._memo[key] = pair
        return pair

    def _lent(self, error: BatchError) -> BatchReader | None:
        """Return the one reader of the callbacks, for a part that cannot read the usual form."""
        owners = {each.batch_reader: each for each in self._parts()[1] if callable(getattr(each, "batch_reader", None))}
        if len(owners) > 1:
            names = " and ".join(map(_name, owners.values()))
            raise BatchError(f"{error}; it has no batch_reader, and those of {names} are not the same: pass it one")
        return next(iter(owners), None)


def _name(part: Any) -> str:
    key = getattr(part, "state_key", None)
    return key if isinstance(key, str) and key else type(part).__name__


def _pick(batch: Mapping[Any, Any], keys: tuple[str, ...], what: str) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    seen = sorted(map(str, batch))
    raise BatchError(f"found no {what} in a batch with keys {seen}; expected one of {list(keys)}, or {_ADVICE}")
