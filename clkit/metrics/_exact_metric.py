"""What all metrics share: states and values that no cast may touch, in the shape that they are computed in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["ExactMetric"]


class ExactMetric(Metric):
    """A metric of int64 counts and float64 sums, whose values are float64."""

    is_differentiable: bool | None = False

    _dimensions: int  # of what `compute` returns

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Change nothing: counts are int64, and values are float64 (float32 on devices that have no float64)."""
        return self

    def _wrap_compute(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        squeezed = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def in_shape(*args: Any, **kwargs: Any) -> Tensor:
            # torchmetrics makes a scalar of every value with one element, also of a table after the first stage.
            value: Tensor = squeezed(*args, **kwargs)
            return value if value.ndim else value.reshape((1,) * self._dimensions)

        return in_shape

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        module = super()._apply(*args, **kwargs)
        self._computed = None  # casts leave the counts alone, but not a value kept from the last `compute`
        return module

    def _value(self, value: float | Tensor) -> Tensor:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.as_tensor(value, dtype=dtype, device=self.device)
