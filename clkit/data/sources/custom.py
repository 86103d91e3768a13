"""Data sets of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clkit.data.sources.base import Int64, Source, SourcePart, id_vector, stack_inputs
from clkit.data.sources.images import FULL_SCALE, pil_to_tensor
from clkit.errors import ArgumentError, DataError

__all__ = ["Custom"]


@dataclass
class Custom(Source):
    """The user's own map-style data sets, which return ``(input, target)`` (more entries are not read).

    Inputs may be PIL images (grey ones become tensors (1, H, W), others RGB (3, H, W)), or arrays or tensors: uint8 and
    uint16 ones are images (C, H, W), floating-point ones go into the network as float32. Grey images of 16 bits become
    float32 in [0, 1]. Do not normalise or augment in the data set what the stream's transform shall do.

    Targets are read from ``.targets`` or ``.labels`` where the data set has one of them and no ``target_transform``,
    else by going through the data set once. Domains are read from ``.domains`` where it has them.

    Args:
        train: The training part, with ``__len__`` and ``__getitem__``.
        test: The test part.
        class_names: Names by class id; read from ``train.classes`` where not given.
        domain_names: Names by domain id.
        name: What a person calls it.

    Raises:
        ArgumentError: A data set cannot be indexed.
        DataError: Its items are not ``(input, target)``, its targets are no integers, or there are not as many targets
            (or domains) as items.

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
        for argument, dataset in (("train", self.train), ("test", self.test)):
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise ArgumentError(
                    f"{argument} is a {type(dataset).__name__}; a map-style data set is needed, with __len__ and "
                    "__getitem__"
                )

    def load(self, root: Path | None) -> tuple[SourcePart, SourcePart]:
        """Open both parts, each item fetched when it is asked for; ``root`` is not used."""
        if not self.class_names:
            self.class_names = dict(enumerate(map(str, getattr(self.train, "classes", ()))))
        return DatasetPart(self.train), DatasetPart(self.test)


class DatasetPart(SourcePart):
    """A map-style torch data set."""

    def __init__(self, dataset: Any, target_attributes: Sequence[str] = ("targets", "labels")) -> None:
        self._dataset = dataset
        self.targets = self._vector("targets", self._find_targets(target_attributes))
        domains = getattr(dataset, "domains", None)
        self.domains = None if domains is None else self._vector("domains", domains)

    def get_many(self, indices: Int64) -> torch.Tensor | list[torch.Tensor]:
        return stack_inputs([self._input(int(i)) for i in indices])

    def _find_targets(self, attributes: Sequence[str]) -> Any:
        if getattr(self._dataset, "target_transform", None) is None:
            for attribute in attributes:
                if (found := getattr(self._dataset, attribute, None)) is not None:
                    return found
        return [self._item(i)[1] for i in range(len(self._dataset))]

    def _item(self, i: int) -> Sequence[Any]:
        item = self._dataset[i]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(
                f"item {i} of {type(self._dataset).__name__} is a {type(item).__name__}; expected (input, target)"
            )
        return item

    def _input(self, i: int) -> torch.Tensor:
        x = self._item(i)[0]
        if not isinstance(x, torch.Tensor | np.ndarray):
            return pil_to_tensor(x, f"the input of item {i} of {type(self._dataset).__name__}")
        if str(x.dtype).removeprefix("torch.") == "uint16":
            return torch.from_numpy((np.asarray(x) / FULL_SCALE).astype(np.float32))
        x = torch.as_tensor(x)
        if x.dtype == torch.uint8:
            return x
        if not x.is_floating_point():
            raise DataError(
                f"the input of item {i} of {type(self._dataset).__name__} has dtype {x.dtype}; expected uint8 or "
                "uint16 for an image, or floating point"
            )
        return x.to(torch.float32)

    def _vector(self, what: str, values: Any) -> Int64:
        kind = type(self._dataset).__name__
        if isinstance(values, list | tuple):
            values = [
                value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in values
            ]
        ids = id_vector(f"the vector of {what} of {kind}", values)
        if len(ids) != len(self._dataset):
            raise DataError(f"{kind} has {len(self._dataset)} items but {len(ids)} {what}")
        return ids
