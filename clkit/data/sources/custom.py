"""Data sets of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from clkit.arguments import check_arguments
from clkit.data.sources.base import Int64, Source, SourcePart, id_vector, stack_inputs
from clkit.data.sources.images import FULL_SCALE, pil_to_tensor
from clkit.errors import ArgumentError, DataError
from clkit.features.batch import INPUT_KEYS, TARGET_KEYS, known_keys

__all__ = ["Custom"]


@dataclass
class Custom(Source):
    """The user's own map-style data sets.

    An item is ``(input, target)`` (more entries are not read), or a mapping with the keys of an input and a target that
    batches may have, such as ``image`` and ``label``.

    Inputs may be PIL images (grey ones become tensors (1, H, W), others RGB (3, H, W)), or arrays or tensors: uint8 and
    uint16 ones are images (C, H, W), floating-point ones go into the network as float32. Grey images of 16 bits become
    float32 in [0, 1]. Do not normalise or augment in the data set what the stream's transform shall do.

    Targets are read from ``.targets`` or ``.labels`` where one of them holds an integer for each item and the data set
    has no ``target_transform``, else by going through the data set once. Domains are read from ``.domains`` where it
    holds an integer for each item.

    Args:
        train: The training part, with ``__len__`` and ``__getitem__``.
        test: The test part.
        class_names: Names by class id; where not given, read from what the data set has: ``class_to_idx``, ``classes``
            (names in the order of ids), or ``labels`` that map names to ids.
        domain_names: Names by domain id.
        name: What a person calls it.

    Raises:
        ArgumentError: A data set cannot be indexed.
        DataError: Its items have another form, its targets are no integers, there are not as many domains as items, or
            (when it is read) an item has another target than the data set's own list of targets.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.rand(6, 1, 4, 4), torch.tensor([0, 0, 2, 2, 5, 5]))
        >>> train, test = Custom(data, data).load(None)
        >>> train.targets
        array([0, 0, 2, 2, 5, 5])
    """

    train: Any
    test: Any
    class_names: dict[int, str] = field(default_factory=dict)
    domain_names: dict[int, str] = field(default_factory=dict)
    name: str = "custom"

    def __post_init__(self) -> None:
        check_arguments(Custom, vars(self))
        for argument, dataset in (("train", self.train), ("test", self.test)):
            indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
            if not indexed or isinstance(dataset, IterableDataset | Mapping):
                raise ArgumentError(
                    f"{argument} is a {type(dataset).__name__}; a map-style data set is needed, with __len__ and "
                    "__getitem__(row), since a stream is cut by row. Data that can only be iterated learns from a "
                    "DataLoader of its own, one trainer.fit(module, loader) an experience"
                )

    def load(self, root: Path | None) -> tuple[SourcePart, SourcePart]:
        """Open both parts, each item fetched when it is asked for; ``root`` is not used."""
        if not self.class_names:
            self.class_names = class_names_of(self.train)
        return DatasetPart(self.train), DatasetPart(self.test)


def class_names_of(dataset: Any) -> dict[int, str]:
    """Return the names of a data set's classes by id, empty where it has none.

    Example:
        >>> from types import SimpleNamespace
        >>> class_names_of(SimpleNamespace(classes=["cat", "dog"], labels=[0, 1, 1]))
        {0: 'cat', 1: 'dog'}
    """
    classes: Any = getattr(dataset, "classes", None)
    for ids in (getattr(dataset, "class_to_idx", None), classes, getattr(dataset, "labels", None)):
        if isinstance(ids, Mapping):
            names = {id_: str(name) for name, id_ in ids.items() if isinstance(id_, int)}
            if len(names) == len(ids):  # else several names have one id, as synonyms do
                return names
    named = isinstance(classes, Sequence | np.ndarray) and not isinstance(classes, str)
    if not named or any(isinstance(each, int | np.integer) for each in classes):  # such are ids, and no names
        return {}
    return dict(enumerate(map(str, classes)))


class DatasetPart(SourcePart):
    """A map-style torch data set."""

    def __init__(self, dataset: Any, target_attributes: Sequence[str] = ("targets", "labels")) -> None:
        self._dataset = dataset
        self._kind = type(dataset).__name__
        self._source: str | None = None  # the attribute that the targets were read from
        self.targets = self._find_targets(target_attributes)
        self.domains = _integers(getattr(dataset, "domains", None))
        if self.domains is not None and len(self.domains) != len(dataset):
            raise DataError(f"{self._kind} has {len(dataset)} items but {len(self.domains)} domains")

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return stack_inputs([self._input(int(i)) for i in indices])

    def _find_targets(self, attributes: Sequence[str]) -> Int64:
        if getattr(self._dataset, "target_transform", None) is None:
            for attribute in attributes:
                found = _integers(getattr(self._dataset, attribute, None))
                if found is not None and len(found) == len(self._dataset):  # else it is something else, e.g. names
                    self._source = attribute
                    return found
        own = [_plain(self._item(i)[1]) for i in range(len(self._dataset))]
        return id_vector(f"the vector of targets of {self._kind}", own)

    def _item(self, i: int) -> tuple[Any, Any]:
        """Return input and target of an item."""
        item = self._dataset[i]
        if isinstance(item, Mapping):
            keys = known_keys(item)
            if None not in keys:
                return item[keys[0]], item[keys[1]]
            raise DataError(
                f"item {i} of {self._kind} has the keys {sorted(map(str, item))}; expected one of "
                f"{list(INPUT_KEYS)} and one of {list(TARGET_KEYS)}"
            )
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(
                f"item {i} of {self._kind} is a {type(item).__name__}; expected (input, target), or a mapping with "
                "keys such as 'image' and 'label'"
            )
        return item[0], item[1]

    def _input(self, i: int) -> torch.Tensor:
        x, target = self._item(i)
        self._check_target(i, _plain(target))
        described = f"the input of item {i} of {self._kind}"
        if not isinstance(x, torch.Tensor | np.ndarray):
            return pil_to_tensor(x, described)
        if str(x.dtype).removeprefix("torch.") == "uint16":
            return torch.from_numpy((np.asarray(x) / FULL_SCALE).astype(np.float32))
        x = torch.as_tensor(x)
        if x.dtype == torch.uint8:
            return x
        if not x.is_floating_point():
            raise DataError(
                f"{described} has dtype {x.dtype}; expected uint8 or uint16 for an image, or floating point"
            )
        return x.to(torch.float32)

    def _check_target(self, i: int, target: Any) -> None:
        """Refuse an item whose own target is not the one that the data set's attribute gave."""
        if self._source is None or not isinstance(target, int | np.integer):
            return
        if target != self.targets[i]:
            raise DataError(
                f"item {i} of {self._kind} has the target {target}, but {self._kind}.{self._source}[{i}] is "
                f"{self.targets[i]}; pass torch.utils.data.Subset(data, range(len(data))), which hides the attribute, "
                "to learn what the items say"
            )


def _integers(values: Any) -> Int64 | None:
    """Return a vector of integers as int64, and ``None`` for anything else."""
    if isinstance(values, torch.Tensor):
        values = values.cpu().numpy()
    if isinstance(values, list | tuple):
        values = [_plain(value) for value in values]
    try:
        array = np.asarray(values)
    except ValueError:  # rows of unequal length
        return None
    return id_vector("ids", array) if array.ndim == 1 and array.dtype.kind in "iu" else None


def _plain(target: Any) -> Any:
    """Return the number in a tensor or an array of one element, and anything else as it is."""
    if isinstance(target, torch.Tensor):
        return target.item() if target.numel() == 1 else target
    return target.item() if isinstance(target, np.ndarray) and target.size == 1 else target
