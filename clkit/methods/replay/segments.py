r"""BatchNorm that normalises each part of a joint batch by itself, as separate calls of the network would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError, ConfigurationError

__all__ = ["BatchNormSegments"]


class BatchNormSegments:
    r"""Has every BatchNorm of a network normalise each segment of a batch by itself, in one call of the network.

    One call of the network on the concatenation of several batches then gives outputs, gradients, running statistics
    and ``num_batches_tracked`` of separate calls in the order of the segments. Parameters, buffers, hooks and the keys
    of ``state_dict()`` stay the same objects. Rows are the first dimension; a layer that sees k times the rows of the
    batch (patches folded into it, image by image) has segments k times as long. A segment that leaves a layer one value
    per channel has no variance: it is joined to the segment before it, or to the next one where it is the first.

    Left as they are: layers in eval mode, every layer while no :meth:`step` is open, and copies of the network. With
    activation checkpointing keep the step open until ``backward()`` is through, which runs the forward pass again.

    Args:
        network: Holds the layers: torch's ``BatchNorm1d`` to ``3d`` and whatever derives from them, as timm's
            ``BatchNormAct2d``. Normalisation that derives from none of them is not seen.

    Attributes:
        count: Number of layers that were converted.

    Raises:
        ConfigurationError: If a BatchNorm synchronises its statistics over processes, has not seen its first batch
            (``LazyBatchNorm2d``), is compiled by TorchScript, or belongs to another ``BatchNormSegments``.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> incoming, replayed = torch.randn(5, 3), 7 + torch.randn(8, 3)
        >>> segments = BatchNormSegments(network)
        >>> with segments.step([5, 8]):
        ...     features = network(torch.cat([incoming, replayed]))
        >>> torch.allclose(features[:5].mean(0), torch.zeros(4), atol=1e-5)
        True
        >>> segments.close()
        >>> type(network[1]) is nn.BatchNorm1d, int(network[1].num_batches_tracked)
        (True, 2)

    Source: Y. Wei et al., arXiv 2308.00301, whose step calls the network three times.
    """

    def __init__(self, network: nn.Module) -> None:
        check_arguments(BatchNormSegments, locals())
        layers = {}
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm):
                _check_layer(name, module)
                layers[name] = module
            elif isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name:
                raise ConfigurationError(
                    f"layer {name!r} is a {module.original_name} compiled by TorchScript; use it plain"
                )
        self.count = len(layers)
        self._layers = layers
        self._sizes: tuple[int, ...] | None = None
        self._closed = False
        classes = {
            plain: type(f"Segmented{plain.__name__}", (_Segmented, plain), {"plain": plain, "owner": self})
            for plain in {type(layer) for layer in layers.values()}
        }
        # A new module in the layer's place would leave behind whoever holds the layer: hooks, taps, a second parent.
        for layer in layers.values():
            layer.__class__ = classes[type(layer)]

    @contextmanager
    def step(self, sizes: Sequence[int]) -> Iterator[None]:
        """While open, layers in training mode split their rows into segments and update once per segment, in order.

        Args:
            sizes: Rows of each segment in the order of the batch; an empty one is skipped.

        Raises:
            ArgumentError: If a size is no whole number or negative, or there are no rows at all.
            BatchError: In the forward pass, if a layer gets rows that are no whole multiple of the sum of ``sizes``.
            ConfigurationError: After :meth:`close`.
        """
        if self._closed:
            raise ConfigurationError("step() after close(); make a new BatchNormSegments(network)")
        outer, self._sizes = self._sizes, _checked_sizes(sizes)
        try:
            yield
        finally:
            self._sizes = outer

    def close(self) -> None:
        """Give every layer its own class back. Calling it again does nothing."""
        for layer in self._layers.values():
            # a class that somebody else has put on top since then keeps this one as its base, where it does nothing
            if isinstance(layer, _Segmented) and type(layer).__dict__.get("owner") is self:
                layer.__class__ = layer.plain  # type: ignore[assignment]  # mypy allows no change of class
        self._layers, self._sizes, self._closed = {}, None, True

    def _lengths(self, layer: _BatchNorm, shape: torch.Size, sizes: tuple[int, ...]) -> list[int]:
        """Return how many rows the layer normalises together, part by part."""
        rows, total = shape[0], sum(sizes)
        if rows < total or rows % total:
            name = next(name for name, known in self._layers.items() if known is layer)
            raise BatchError(
                f"sizes {list(sizes)} add up to {total} rows, but the batch has {rows} at layer {name!r}; they must be "
                "their sum, or a whole multiple where the network folds patches into the batch"
            )
        scale, values = rows // total, math.prod(shape[1:]) // layer.num_features
        lengths: list[int] = []
        for size in sizes:
            length = scale * size
            if lengths and (length * values == 1 or lengths[-1] * values == 1):
                lengths[-1] += length  # the second case: the very first segment was a single value
            elif size:
                lengths.append(length)
        return lengths


class _Segmented(_BatchNorm):
    """Comes before a layer's own class: calls that class's forward once per segment."""

    plain: ClassVar[type[_BatchNorm]]
    owner: ClassVar[BatchNormSegments]

    def forward(self, input: Tensor) -> Tensor:
        sizes = self.owner._sizes
        if sizes is None or not self.training:
            return super().forward(input)
        lengths = self.owner._lengths(self, input.shape, sizes)
        if len(lengths) == 1:
            return super().forward(input)
        normalize = super().forward
        return torch.cat([normalize(part) for part in torch.split(input, lengths)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what the plain layer says: a copy has nobody to close it."""
        segmented, self.__class__ = type(self), self.plain  # type: ignore[assignment]  # as in `close`
        try:
            # the form of protocol 0, valid in every protocol: in that of the others pickle wants the object's own class
            return self.__reduce_ex__(0)
        finally:
            self.__class__ = segmented


def _check_layer(name: str, layer: nn.Module) -> None:
    kind = type(layer).__name__
    if isinstance(layer, _Segmented):
        raise ConfigurationError(f"layer {name!r} belongs to another BatchNormSegments; close() that one first")
    if isinstance(layer, LazyModuleMixin):
        raise ConfigurationError(
            f"layer {name!r} is a {kind} without parameters yet; run one batch through the network first"
        )
    # other libraries' layers don't derive from torch's SyncBatchNorm; they have its name and its process group
    if hasattr(layer, "process_group") or any("SyncBatchNorm" in base.__name__ for base in type(layer).__mro__):
        raise ConfigurationError(
            f"layer {name!r} is a {kind}, which normalises over all processes at once; use plain BatchNorm "
            "(sync_batchnorm=False), or one joint batch"
        )


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 0:
            raise ArgumentError(f"sizes must be whole numbers of rows, 0 or more, got {list(sizes)!r}")
    if not sum(sizes):
        raise ArgumentError(f"sizes must name at least one row, got {list(sizes)!r}; skip an empty batch")
    return tuple(int(size) for size in sizes)
