"""From stored images to what a network takes: resize, crop, scale, normalise. The same for training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import interpolate

from clkit.arguments import check_arguments
from clkit.data.sources.base import SourcePart, first_image
from clkit.errors import ArgumentError, DataError
from clkit.methods._checks import check_count

__all__ = ["Preprocessing", "settled_preprocessing"]

Interpolation = Literal["bicubic", "bilinear", "nearest"]


@dataclass(frozen=True)
class Preprocessing:
    """Deterministic preprocessing of images; features and other ready tensors are left as they are unless asked.

    The short side is resized to ``resize`` (in float32 on the scale of the stored image, with antialiasing, then
    clamped to the image's range), the centre is cropped to ``size``, uint8 becomes [0, 1], the mean is taken off and
    the standard deviation divided out. The long side is rounded down, as torchvision's ``Resize`` does, and so is the
    position of the crop. The range is [0, 1], and wider where a floating-point image has values outside it.

    Args:
        size: Side of the square that comes out, pixels; ``None`` keeps the stored size.
        resize: Length of the short side before the crop, pixels; ``None`` means ``size``.
        interpolation: ``"bicubic"``, ``"bilinear"`` or ``"nearest"``.
        mean: Mean per channel on the scale [0, 1], one value for all channels or one each.
        std: Standard deviation per channel, likewise; > 0.
        channels: How many channels come out: a single stored one is repeated; ``None`` keeps what is stored.

    Raises:
        ArgumentError: For a size or number of channels below 1, a ``resize`` smaller than ``size``, an unknown
            ``interpolation``, or a ``std`` that is not positive.
        DataError: When called, for images of different sizes that are to keep their size, or with another number of
            channels than 1 and ``channels``.

    Shape:
        - input: (B, C, H, W), uint8 in 0…255 or float32 in [0, 1], or a list of (C, H, W) of different sizes
        - output: (B, C, size, size), float32

    Example:
        >>> import torch
        >>> images = torch.zeros((1, 1, 4, 6), dtype=torch.uint8)
        >>> Preprocessing(size=2, mean=0.5, std=0.5)(images)
        tensor([[[[-1., -1.],
                  [-1., -1.]]]])
    """

    size: int | None = None
    resize: int | None = None
    interpolation: Interpolation = "bicubic"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        for name in ("size", "resize", "channels"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.resize is not None and self.size is not None and self.resize < self.size:
            raise ArgumentError(
                f"resize ({self.resize}) must not be smaller than size ({self.size}), which is cut of it"
            )
        if self.std is not None and not bool((np.asarray(self.std, dtype=np.float64) > 0).all()):
            raise ArgumentError(f"std must be positive, got {self.std}")

    @classmethod
    def of_timm(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Return what a network of timm expects by ``timm.data.resolve_model_data_config(network)``."""
        size = int(config["input_size"][-1])
        return cls(
            size=size,
            resize=max(size, math.floor(size / config.get("crop_pct", 1.0))),
            interpolation=config.get("interpolation", "bicubic"),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            channels=int(config["input_size"][0]),
        )

    @classmethod
    def of_module(cls, module: Any, image: Tensor | None = None) -> Preprocessing:
        """Return what a module expects by its ``data_config``; the stored size and [0, 1] where it has none.

        Raises:
            DataError: If the module's data are to be normalised and an ``image`` of them already is.
        """
        config = getattr(module, "data_config", None)
        if config is None and any(hasattr(part, "pretrained_cfg") for part in module.modules()):
            rank_zero_info(
                "clkit: images come at their stored size, in [0, 1]; a pretrained timm network expects its own. Give "
                "the module a property `data_config` (timm.data.resolve_model_data_config(network)), or set "
                "`preprocessing`"
            )
        if config and image is not None and image.is_floating_point() and image.numel():
            low, high = float(image.min()), float(image.max())
            if low < 0 or high > 1:
                raise DataError(
                    f"the first training image is floating point with values from {low:g} to {high:g}, and "
                    "preprocessing='auto' would normalise it once more, by the module's data_config; give images as "
                    "uint8 or in [0, 1], or set preprocessing='unit' to leave them as they are"
                )
        return cls.of_timm(config) if config else cls()

    def __call__(self, images: Tensor | list[Tensor]) -> Tensor:
        """Prepare a batch."""
        if isinstance(images, list):
            _check_scales(images)
            prepared = [self(image[None]) for image in images]
            sizes = {tuple(image.shape[1:]) for image in prepared}
            if len(sizes) > 1:
                raise DataError(
                    f"images of different sizes {sorted(sizes)} cannot form a batch; set a preprocessing `size`"
                )
            return torch.cat(prepared)
        if images.ndim != 4:  # features, or anything else that is ready
            return images
        return self._normalise(self._unit_scale(images))

    def _unit_scale(self, images: Tensor) -> Tensor:
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        images = images.float()
        target = self.resize if self.resize is not None else self.size
        height, width = images.shape[-2:]
        short = min(height, width)
        if target is not None and short != target:
            shape = (height * target // short, width * target // short)  # the long side is cut off, as torchvision does
            lowest, highest = _range(images, scale)
            if self.interpolation == "nearest":
                images = interpolate(images, shape, mode="nearest")
            else:
                images = interpolate(images, shape, mode=self.interpolation, antialias=True, align_corners=False)
            images = images.clamp(lowest, highest)  # bicubic overshoots
        if self.size is not None:
            top, left = ((side - self.size) // 2 for side in images.shape[-2:])
            images = images[..., top : top + self.size, left : left + self.size]
        return images / scale

    def _normalise(self, images: Tensor) -> Tensor:
        if self.channels is not None and images.shape[1] != self.channels:
            if images.shape[1] != 1:
                raise DataError(
                    f"the images have {images.shape[1]} channels, the network takes {self.channels}; build it for "
                    f"{images.shape[1]} (timm: in_chans), or set the channels of the preprocessing"
                )
            images = images.expand(-1, self.channels, -1, -1)
        if self.mean is not None:
            images = images - torch.as_tensor(self.mean, dtype=torch.float32).reshape(-1, 1, 1)
        if self.std is not None:
            images = images / torch.as_tensor(self.std, dtype=torch.float32).reshape(-1, 1, 1)
        return images.contiguous()


def settled_preprocessing(
    chosen: str | Callable[[Any], Tensor], part: SourcePart, module: Any = None
) -> Callable[[Any], Tensor]:
    """Return the function from stored inputs to those of a network; ``"auto"`` asks its module where there is one."""
    if not isinstance(chosen, str):
        return chosen
    image = first_image(part) if chosen == "auto" and module is not None else None
    return Preprocessing() if image is None else Preprocessing.of_module(module, image)


def _range(images: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value that each image may have: what augmentation left outside [0, 1] stays."""
    if scale != 1.0:
        return images.new_tensor(0.0), images.new_tensor(scale)
    extremes = images.flatten(1).aminmax(dim=1)
    shape = (-1, 1, 1, 1)
    return extremes.min.clamp(max=0.0).reshape(shape), extremes.max.clamp(min=1.0).reshape(shape)


def _check_scales(images: list[Tensor]) -> None:
    """Refuse bytes beside floating-point images that are not in [0, 1]: no scale serves both."""
    floats = [image for image in images if image.dtype != torch.uint8]
    if 0 < len(floats) < len(images):
        low, high = min(float(image.min()) for image in floats), max(float(image.max()) for image in floats)
        if low < 0 or high > 1:
            raise DataError(
                f"some images of a batch are uint8 and some floating point with values from {low:g} to {high:g}; give "
                "all of them as uint8, or the latter in [0, 1]"
            )
