r"""Several views of each image: rotated variants, and random flips, grey and crops drawn per image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_choice, check_probability

__all__ = ["VARIANTS", "RandomViews", "Rotation", "rotate_views", "variant_labels"]

Rotation = Literal["rot16", "rot4", "none"]

VARIANTS: dict[str, int] = {"rot16": 16, "rot4": 4, "none": 1}  # of one image

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_TRIES = 10  # crops proposed per image; the first that fits is taken


def rotate_views(images: Tensor, rotation: Rotation = "rot16") -> Tensor:
    r"""Return all rotated variants of a batch, variant-major: rows ``[k·B, (k+1)·B)`` are variant k of all images.

    ``"rot4"`` turns the images by 0, 90, 180, 270 degrees, counter-clockwise. ``"rot16"`` makes four images (as it is;
    left half turned by 180 degrees; each half turned; right half turned), each of them turned by 0, 180, 90, 270
    degrees. ``"none"`` gives the batch itself.

    Args:
        images: (B, c, H, W) of any dtype; square for ``rot4``, square with an even side for ``rot16``.
        rotation: ``"rot16"``, ``"rot4"`` or ``"none"``.

    Raises:
        ArgumentError: If ``rotation`` is none of the three.
        BatchError: If the images cannot be turned so.

    Example:
        >>> rotate_views(torch.arange(4.0).reshape(1, 1, 2, 2), "rot4")[:, 0].tolist()
        [[[0.0, 1.0], [2.0, 3.0]], [[1.0, 3.0], [0.0, 2.0]], [[3.0, 2.0], [1.0, 0.0]], [[2.0, 0.0], [3.0, 1.0]]]

    Source: Y. Wei et al., arXiv 2308.00301; Y. Guo, B. Liu, D. Zhao, ICML 2022.
    """
    check_choice("rotation", rotation, tuple(VARIANTS))
    if rotation == "none":
        return images
    if images.ndim != 4:
        raise BatchError(f"images must have shape (B, c, H, W) for rotation={rotation!r}, got {tuple(images.shape)}")
    height, width = images.shape[2:]
    if height != width:
        raise BatchError(
            f"rotation={rotation!r} needs square images, got {height} x {width}; crop them, or use rotation='none'"
        )
    if rotation == "rot4":
        return torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    if width % 2:
        raise BatchError(
            f"rotation='rot16' turns half images and needs an even side, got {height} x {width}; use rotation='rot4'"
        )
    left, right = images.chunk(2, dim=3)
    left_turned, right_turned = left.flip((2, 3)), right.flip((2, 3))
    halves = [(left, right), (left_turned, right), (left_turned, right_turned), (left, right_turned)]
    upright = torch.cat([torch.cat(pair, dim=3) for pair in halves])
    return torch.cat([torch.rot90(upright, turns, (2, 3)) for turns in (0, 2, 1, 3)])


def variant_labels(labels: Tensor, variants: int, num_classes: int, mixed: Tensor | None = None) -> Tensor:
    r"""Return a class id for each row of :func:`rotate_views`: :math:`y_j + C \cdot k` for variant k of image j.

    Args:
        labels: (n,) integer class ids below ``num_classes``.
        variants: V, rotated variants per image.
        num_classes: C.
        mixed: (n,) bool, images that are mixed from two classes: each of their variants becomes a class of its own,
            with the ids :math:`C V + k n + j` that no image has.

    Returns:
        (V·n,) int64.

    Example:
        >>> variant_labels(torch.tensor([0, 2]), 2, 10, torch.tensor([False, True])).tolist()
        [0, 21, 10, 23]
    """
    blocks = torch.arange(variants, device=labels.device)[:, None]
    ids = labels.long() + num_classes * blocks
    if mixed is not None:
        fresh = torch.arange(ids.numel(), device=labels.device).view_as(ids) + num_classes * variants
        ids = torch.where(mixed, fresh, ids)
    return ids.flatten()


@dataclass(frozen=True)
class RandomViews:
    r"""Random flip, grey and resized crop of a batch on its device, drawn independently for each image.

    In order: horizontal flip; grey (three channels become their luma); a random crop resized to the image's size, by
    bilinear sampling with reflection at the borders. Each image takes 24 numbers from the generator, one image after
    the other, so that how a stream is cut into batches does not change what an image becomes. Gradients pass through.

    Args:
        flip: Probability of a horizontal flip.
        grey: Probability of grey.
        area: Smallest and largest share of the image that a crop covers.
        aspect: Smallest and largest width / height of a crop, uniform on a logarithmic scale. Ten crops are proposed;
            where none fits, the last is cut to the image.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> views = RandomViews(flip=1.0, grey=0.0)
        >>> views(torch.rand(5, 3, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 8, 8])
    """

    per_sample: ClassVar[bool] = True  # a batch may be given whole

    flip: float = 0.5
    grey: float = 0.25
    area: tuple[float, float] = (0.3, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        check_probability("flip", self.flip)
        check_probability("grey", self.grey)
        _check_range("area", self.area, 1.0)
        _check_range("aspect", self.aspect, math.inf)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the random numbers of ``count`` images, (count, 24) float64, to be passed on as ``numbers``."""
        device = "cpu" if generator is None else generator.device
        return torch.rand(count, 4 + 2 * _TRIES, generator=generator, dtype=torch.float64, device=device)

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None, *, numbers: Tensor | None = None
    ) -> Tensor:
        """Return new views of the images, of the same shape, dtype and device.

        Args:
            images: (B, c, H, W), floating point.
            generator: Where the numbers come from; ``None`` for torch's global generator.
            numbers: (B, 24), the numbers themselves, from :meth:`draw`.

        Raises:
            BatchError: If the images are of another form.
        """
        if images.ndim != 4 or not images.dtype.is_floating_point:
            raise BatchError(
                "RandomViews changes images, floating-point numbers of shape (B, c, H, W), and got "
                f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}; for inputs that are no "
                "images give a replay strategy transform=torch.nn.Identity()"
            )
        drawn = self.draw(len(images), generator) if numbers is None else numbers
        # below float32 the sampling points themselves would be rounded by whole pixels
        views = images if images.dtype == torch.float64 else images.float()
        chosen = (drawn[:, :2] < drawn.new_tensor([self.flip, self.grey])).to(images.device)[:, :, None, None, None]
        views = torch.where(chosen[:, 0], views.flip(3), views)
        if images.shape[1] == 3:
            # no product of matrices, which autocast would round
            luma = (views * views.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
            views = torch.where(chosen[:, 1], luma.expand_as(views), views)
        boxes = self._boxes(drawn[:, 2:], *images.shape[2:]).to(views)
        return _resampled(views, boxes).to(images.dtype)

    def _boxes(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """Return (B, 4): centre x, y in [-1, 1] and the share of the width and of the height of each crop."""
        areas = self.area[0] + (self.area[1] - self.area[0]) * drawn[:, 2 : 2 + _TRIES]
        low, high = (math.log(bound * height / width) for bound in self.aspect)  # aspect counts pixels, shares do not
        roots = (0.5 * (low + (high - low) * drawn[:, 2 + _TRIES :])).exp()
        sides = torch.stack([areas.sqrt() * roots, areas.sqrt() / roots], dim=2)
        fits = (sides <= 1).all(dim=2)
        taken = torch.where(fits.any(dim=1), fits.int().argmax(dim=1), _TRIES - 1)
        sides = sides[torch.arange(len(sides), device=sides.device), taken].clamp(max=1)
        return torch.cat([(2 * drawn[:, :2] - 1) * (1 - sides), sides], dim=1)


def _check_range(name: str, bounds: tuple[float, float], limit: float) -> None:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= limit or not math.isfinite(bounds[1]):
        limit_told = f" and at most {limit}" if math.isfinite(limit) else ""
        raise ArgumentError(f"{name} must be two finite numbers above 0{limit_told}, the smaller first, got {bounds!r}")


def _resampled(images: Tensor, boxes: Tensor) -> Tensor:
    """Return the boxes of the images, each stretched to the full size."""

    def points(length: int, axis: int) -> Tensor:
        pixels = (2 * torch.arange(length, device=images.device, dtype=images.dtype) + 1) / length - 1
        return boxes[:, axis, None] + boxes[:, axis + 2, None] * pixels

    height, width = images.shape[2:]
    x = points(width, 0)[:, None, :].expand(-1, height, -1)
    y = points(height, 1)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([x, y], dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
