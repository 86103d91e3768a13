"""How the data of a replay memory is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_number
from clkit.methods.replay.rows import RowLayout

__all__ = ["RowCodec"]

_UINT8_TOLERANCE = 1e-3  # in steps of 1/255; float32 arithmetic is within 1e-4 of a whole step


class RowCodec:
    """How ``data`` is written to memory and read from it."""

    def __init__(self, storage: str, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> None:
        if storage != "uint8" and not (mean is None and std is None):
            raise ArgumentError(f"mean and std are for storage='uint8', got storage={storage!r}")
        self.storage = storage
        means, stds = _channel_values("mean", mean, 0.0), _channel_values("std", std, 1.0)
        channels = max(len(means), len(stds))
        if {len(means), len(stds)} - {1, channels}:
            raise ArgumentError(f"mean and std must have as many channels, got {len(means)} and {len(stds)}")
        if min(stds) <= 0:
            raise ArgumentError(f"std must be positive, got {std!r}")
        self.mean = means * (channels // len(means))
        self.std = stds * (channels // len(stds))

    def stored_dtype(self, layout: RowLayout) -> torch.dtype:
        """The dtype in memory of such rows.

        Raises:
            BatchError: If they cannot be stored so.
        """
        dtype, shape = layout.dtypes["data"], layout.shapes["data"]
        if self.storage == "same":
            return dtype
        if self.storage == "float16":
            if not dtype.is_floating_point:
                raise BatchError(f"storage='float16' is for floating-point data, got {dtype}; use storage='same'")
            return torch.float16
        plain = (self.mean, self.std) == ((0.0,), (1.0,))
        if not dtype.is_floating_point and (dtype != torch.uint8 or not plain):
            given = "" if plain else " with mean and std"
            raise BatchError(
                f"storage='uint8' is for uint8 data, or floating-point images (with mean and std if they are "
                f"normalised), got {dtype}{given}"
            )
        if len(self.mean) > 1 and (not shape or shape[0] != len(self.mean)):
            raise BatchError(f"mean and std have {len(self.mean)} channels, a row of data has shape {shape}")
        return torch.uint8

    def normalised(self) -> Tensor:
        """(2, channels) float64: mean and std, for the saved state."""
        return torch.tensor([self.mean, self.std], dtype=torch.float64, device="cpu")

    def encode(self, data: Tensor, *, check: bool) -> Tensor:
        """``data`` as stored.

        Args:
            data: (B, …) rows.
            check: Whether to look at the values, which waits for the device.

        Raises:
            BatchError: With ``check``, if the storage would lose something.
        """
        if self.storage == "same" or data.dtype == torch.uint8:
            return data
        if self.storage == "float16":
            half = data.to(torch.float16)
            if check and bool((data.isfinite() & ~half.isfinite()).any()):
                raise BatchError(f"data up to {float(data.abs().max()):.3g} does not fit storage='float16' (65504)")
            return half
        mean, std = self._constants(data)
        steps = (data * std + mean) * 255
        whole = steps.round().clamp(0, 255)
        if check:
            error = float((steps - whole).abs().max()) if steps.numel() else 0.0
            if not error <= _UINT8_TOLERANCE:
                raise BatchError(
                    f"storage='uint8' would lose up to {error / 255:.3g} of a value in [0, 1]: the images are no "
                    f"multiples of 1/255 there; give the mean and std by which they were normalised, or use "
                    f"storage='same' or 'float16'"
                )
        return whole.to(torch.uint8)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows in the dtype that they came in."""
        if stored.dtype != torch.uint8 or dtype == torch.uint8:
            return stored.to(dtype)
        images = stored.to(dtype).div_(255)
        mean, std = self._constants(images)
        return images.sub_(mean).div_(std)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 2)) if len(self.mean) > 1 else ()
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device).reshape(shape)
            for values in (self.mean, self.std)
        )
        return mean, std


def _channel_values(name: str, values: float | Sequence[float] | None, otherwise: float) -> tuple[float, ...]:
    if values is None:
        return (otherwise,)
    numbers = (values,) if isinstance(values, int | float) else tuple(values)
    if not numbers:
        raise ArgumentError(f"{name} must be a number, or one per channel, got {values!r}")
    return tuple(check_number(name, number) for number in numbers)
