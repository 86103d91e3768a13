"""Reading images so that they keep their values: 8 bits stay bytes, more become numbers in [0, 1]."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from clkit.data.sources.base import DAMAGED
from clkit.errors import DataError

__all__ = ["FULL_SCALE", "pil_to_tensor", "read_image"]

FULL_SCALE = 65535  # of an unsigned integer of 16 bits

# formats whose deep grey images Pillow may give as 32-bit integers, though their values end at FULL_SCALE
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


def read_image(file: str | io.BytesIO, described: str) -> torch.Tensor:
    """Return an image file as RGB (3, H, W): uint8, or float32 in [0, 1] where a pixel has more than 8 bits.

    Raises:
        DataError: If it cannot be decoded, or does not say which of its values is white.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = _deep_pixels(image, described)
            if pixels is not None:
                return pixels.expand(3, -1, -1).contiguous()
            return _pixels(image.convert("RGB"))
    except (*DAMAGED, Image.DecompressionBombError) as error:  # the latter before Pillow asks for the memory
        if isinstance(error, DataError):
            raise
        raise DataError(f"{described} cannot be decoded: {error}") from error


def pil_to_tensor(image: Any, described: str) -> torch.Tensor:
    """Return a PIL image: a grey one as (1, H, W), any other as RGB (3, H, W); dtypes and errors of :func:`read_image`.

    Example:
        >>> from PIL import Image
        >>> pil_to_tensor(Image.fromarray(np.array([[0, 13107, 65535]], dtype=np.uint16)), "an X-ray")
        tensor([[[0.0000, 0.2000, 1.0000]]])
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise DataError(f"{described} is a {type(image).__name__}; expected a PIL image, an array or a tensor")
    pixels = _deep_pixels(image, described)
    return _pixels(image.convert("L" if image.mode in ("1", "L") else "RGB")) if pixels is None else pixels


def _deep_pixels(image: Any, described: str) -> torch.Tensor | None:
    """Return an image with more than 8 bits as float32 (1, H, W) in [0, 1], and ``None`` for any other.

    Pillow's own conversion of such an image cuts off all values above 255, which makes it white.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values = np.array(image)
    scale = 1.0
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        scale = float(FULL_SCALE)
    elif image.mode == "I":
        raise DataError(
            f"{described} has integers of 32 bits ({values.min()} to {values.max()}), and nothing says which of them "
            "is white; save it in 8 or 16 bits, or give a Custom source whose inputs are float tensors in [0, 1]"
        )
    low, high = values.min(initial=0) / scale, values.max(initial=0) / scale
    if not (low >= 0 and high <= 1):  # also where one is not a number
        raise DataError(
            f"{described} has values from {low * scale:g} to {high * scale:g}; expected 0 to {scale:g} in an image of "
            f"mode {image.mode!r}. Scale it, or give a Custom source whose inputs are float tensors in [0, 1]"
        )
    return torch.from_numpy((values / scale).astype(np.float32))[None]


def _pixels(image: Any) -> torch.Tensor:
    """Return a PIL image of 8 bits as uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
