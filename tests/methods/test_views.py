"""Rotated and random views: against pixel loops, and with randomness that belongs to the caller."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods import RandomViews, rotate_views

COUNTING = torch.arange(16.0).reshape(1, 1, 4, 4)
NOTHING = {"flip": 0.0, "grey": 0.0, "area": (1.0, 1.0), "aspect": (1.0, 1.0)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- rotated variants


def half_turned(image: np.ndarray, columns: slice) -> np.ndarray:
    turned = image.copy()
    turned[:, columns] = image[:, columns][::-1, ::-1]
    return turned


def test_all_sixteen_follow_the_definition_and_are_variant_major() -> None:
    images = torch.rand(3, 2, 6, 6, generator=seeded())
    views = rotate_views(images, "rot16").numpy()
    left, right = slice(0, 3), slice(3, 6)
    for j, image in enumerate(images.numpy()):
        for channel, plane in enumerate(image):
            both = half_turned(half_turned(plane, left), right)
            upright = [plane, half_turned(plane, left), both, half_turned(plane, right)]
            expected = [np.rot90(p, turns) for turns in (0, 2, 1, 3) for p in upright]
            for k in range(16):
                assert np.array_equal(views[k * 3 + j, channel], expected[k])


def test_sixteen_are_distinct_and_four_are_turns() -> None:
    assert len({tuple(view.flatten().tolist()) for view in rotate_views(COUNTING)}) == 16
    turns = [np.rot90(COUNTING[0, 0].numpy(), k) for k in range(4)]
    assert np.array_equal(rotate_views(COUNTING, "rot4")[:, 0].numpy(), np.stack(turns))


def test_none_is_the_batch_itself_of_any_shape() -> None:
    features = torch.rand(3, 7)
    assert rotate_views(features, "none") is features


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
def test_variants_keep_the_dtype(dtype: torch.dtype) -> None:
    assert rotate_views(COUNTING.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("shape", "rotation", "match"),
    [
        ((1, 3, 5, 5), "rot16", "even side, got 5 x 5.*rot4"),
        ((1, 3, 4, 6), "rot16", "square images, got 4 x 6.*none"),
        ((1, 3, 4, 6), "rot4", "square images, got 4 x 6.*none"),
        ((3, 4), "rot4", "shape"),
    ],
)
def test_images_that_cannot_be_turned(shape: tuple[int, ...], rotation: str, match: str) -> None:
    with pytest.raises(BatchError, match=match):
        rotate_views(torch.zeros(shape), rotation)


def test_odd_squares_turn_by_quarters_and_names_are_checked() -> None:
    assert rotate_views(torch.zeros(2, 1, 5, 5), "rot4").shape == (8, 1, 5, 5)
    with pytest.raises(ArgumentError, match="rotation must be one of"):
        rotate_views(COUNTING, "rot8")


# -- random views


def reflected(i: int, length: int) -> int:
    """Index of a pixel that lies at most one image beyond the border, mirrored at the border's outer edge."""
    return -i - 1 if i < 0 else 2 * length - 1 - i if i >= length else i


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = abs(1 - dy - (y - top)) * abs(1 - dx - (x - left))
        total += weight * plane[reflected(top + dy, plane.shape[0]), reflected(left + dx, plane.shape[1])]
    return total


def one_view(image: np.ndarray, drawn: np.ndarray, views: RandomViews) -> np.ndarray:
    """The definition for one image, pixel by pixel, from its 24 numbers."""
    channels, height, width = image.shape
    if drawn[0] < views.flip:
        image = image[:, :, ::-1]
    if drawn[1] < views.grey and channels == 3:
        image = np.stack([0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]] * 3)
    for a, r in zip(drawn[4:14], drawn[14:24], strict=True):
        pixels = (views.area[0] + (views.area[1] - views.area[0]) * a) * height * width
        logs = [math.log(bound) for bound in views.aspect]
        aspect = math.exp(logs[0] + (logs[1] - logs[0]) * r)
        w, h = math.sqrt(pixels * aspect), math.sqrt(pixels / aspect)
        if w <= width and h <= height:
            break
    w, h = min(w, width), min(h, height)
    left, top = drawn[2] * (width - w), drawn[3] * (height - h)
    out = np.empty_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                y, x = top + (i + 0.5) / height * h - 0.5, left + (j + 0.5) / width * w - 0.5
                out[c, i, j] = bilinear(image[c], y, x)
    return out


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (5, 3, 6, 10), (4, 1, 7, 5)])
def test_views_are_the_definition_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, dtype=torch.float64, generator=seeded(1))
    views = RandomViews(grey=0.5)
    drawn = torch.rand(shape[0], 24, dtype=torch.float64, generator=seeded(2)).numpy()
    expected = np.stack([one_view(x, d, views) for x, d in zip(images.numpy(), drawn, strict=True)])
    assert np.allclose(views(images, seeded(2)).numpy(), expected, atol=1e-12)


def test_a_crop_that_never_fits_is_cut_to_the_image() -> None:
    images = torch.rand(3, 1, 6, 6, dtype=torch.float64, generator=seeded())
    views = RandomViews(flip=0, grey=0, area=(0.6, 0.9), aspect=(2.0, 2.0))
    drawn = torch.rand(3, 24, dtype=torch.float64, generator=seeded(3)).numpy()
    expected = np.stack([one_view(x, d, views) for x, d in zip(images.numpy(), drawn, strict=True)])
    assert np.allclose(views(images, seeded(3)).numpy(), expected, atol=1e-12)


def test_nothing_to_do_changes_nothing_and_flips_are_exact() -> None:
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=seeded())
    assert torch.allclose(RandomViews(**NOTHING)(images, seeded()), images, atol=1e-13)
    flipped = RandomViews(**{**NOTHING, "flip": 1.0})(images, seeded())
    assert torch.allclose(flipped, images.flip(3), atol=1e-13)


def test_grey_has_equal_channels_and_one_channel_is_left_alone() -> None:
    images = torch.rand(4, 3, 8, 8, generator=seeded())
    grey = RandomViews(**{**NOTHING, "grey": 1.0})(images, seeded())
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])
    for channels in (1, 4):
        other = torch.rand(4, channels, 8, 8, generator=seeded())
        plain = RandomViews(**NOTHING)(other, seeded())
        assert torch.equal(RandomViews(**{**NOTHING, "grey": 1.0})(other, seeded()), plain)


def test_each_image_gets_draws_of_its_own_at_the_stated_rates() -> None:
    row = torch.arange(8.0).expand(1, 3, 8, 8)
    images = row.expand(4000, 3, 8, 8)
    flipped = RandomViews(**{**NOTHING, "flip": 0.3})(images, seeded())[:, 0, 0, 0] > 3
    assert abs(float(flipped.float().mean()) - 0.3) < 0.03
    colours = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(4000, 3, 2, 2)
    grey = RandomViews(**{**NOTHING, "grey": 0.25})(colours, seeded())[:, 1, 0, 0] > 0.1
    assert abs(float(grey.float().mean()) - 0.25) < 0.03


def test_crops_cover_the_stated_area_and_stay_inside() -> None:
    ramp = torch.arange(64, dtype=torch.float64).expand(2000, 1, 64, 64)  # pixel value = column
    views = RandomViews(flip=0.0)(ramp, seeded())
    shares = (views[:, 0, 0, -1] - views[:, 0, 0, 0]) / 63  # width of the crop
    upright = RandomViews(flip=0.0)(ramp.transpose(2, 3), seeded())
    areas = shares * (upright[:, 0, -1, 0] - upright[:, 0, 0, 0]) / 63
    assert 0.28 < float(areas.min()) < 0.33
    assert 0.92 < float(areas.max()) < 1.01
    assert views.min() >= 0
    assert views.max() <= 63


def test_batches_of_any_size_give_the_same_views() -> None:
    images = torch.rand(11, 3, 6, 6, generator=seeded())
    whole, generator = RandomViews()(images, seeded(4)), seeded(4)
    parts = [RandomViews()(part, generator) for part in images.split([1, 3, 2, 5])]
    assert torch.equal(torch.cat(parts), whole)


def test_global_random_states_stay_and_the_generator_decides() -> None:
    images = torch.rand(6, 3, 6, 6, generator=seeded())
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002  the global one
    first = RandomViews()(images, seeded(1))
    rotate_views(images)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002  the global one
    assert torch.equal(first, RandomViews()(images, seeded(1)))
    assert not torch.equal(first, RandomViews()(images, seeded(2)))
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_without_a_generator_the_global_one_is_used() -> None:
    images = torch.rand(6, 3, 6, 6, generator=seeded())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drawn = RandomViews()(images)
    assert torch.equal(drawn, RandomViews()(images, seeded(5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    images = torch.rand(6, 3, 8, 8, generator=seeded()).to(dtype)
    exact: Tensor = RandomViews()(images.double(), seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        views = RandomViews()(images, seeded(1))
    assert views.dtype == dtype
    assert float((views.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps


def test_gradients_pass_and_an_empty_batch_stays_empty() -> None:
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: RandomViews(grey=0.5)(x, seeded(3)), images)
    assert RandomViews()(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4)])
def test_other_batches_are_refused(images: Tensor) -> None:
    with pytest.raises(BatchError, match="floating-point"):
        RandomViews()(images)


@pytest.mark.parametrize(
    "options",
    [
        {"flip": 1.5},
        {"grey": -0.1},
        {"flip": True},
        {"area": (0.0, 1.0)},
        {"area": (0.5, 0.3)},
        {"area": (0.5, 1.2)},
        {"aspect": (1.0, math.inf)},
        {"aspect": (0.5, math.nan)},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        RandomViews(**options)
