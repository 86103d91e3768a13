"""Preprocessing against torchvision, PIL and the rule written out."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from clkit.data import Preprocessing
from clkit.errors import ArgumentError, DataError


def pictures(count: int = 2, channels: int = 3, height: int = 20, width: int = 31) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(20, 31, 12), (31, 20, 12), (9, 14, 16), (16, 16, 16), (17, 16, 16)]
)
def test_the_published_rule_for_photos(height: int, width: int, size: int) -> None:
    """Short side by bicubic antialias on 0…255, clamp, centre crop, x / 127.5 - 1."""
    images = pictures(height=height, width=width)
    short = min(height, width)
    shape = (height * size // short, width * size // short)
    resized = torch.nn.functional.interpolate(
        images.float(), shape, mode="bicubic", antialias=True, align_corners=False
    )
    resized = resized.clamp(0, 255) if short != size else images.float()
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    expected = resized[:, :, top : top + size, left : left + size] / 127.5 - 1
    got = Preprocessing(size=size, mean=0.5, std=0.5)(images)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-6)


@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    resize=st.integers(8, 30),
    cut=st.integers(0, 7),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
@settings(max_examples=30, deadline=None)
def test_it_is_torchvisions_resize_and_centre_crop(
    height: int, width: int, resize: int, cut: int, interpolation: str
) -> None:
    images = pictures(1, 3, height, width)
    mode = v2.InterpolationMode(interpolation)
    resized = v2.Resize(resize, interpolation=mode, antialias=True)(images.float() / 255).clamp(0, 1)
    # an odd margin cannot be split: torchvision then rounds to an even position, the library down
    margins = [side - resize + cut for side in resized.shape[-2:]]
    whole = v2.functional.crop(
        resized, 0, 0, *(side - margin % 2 for side, margin in zip(resized.shape[-2:], margins, strict=True))
    )
    got = Preprocessing(size=resize - cut, resize=resize, interpolation=interpolation)(images)
    assert torch.allclose(got, v2.CenterCrop(resize - cut)(whole), atol=1e-6)


def test_it_is_close_to_what_pil_does() -> None:
    images = pictures(1, 3, 40, 60)
    photo = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    expected = np.asarray(photo.resize((30, 20), Image.Resampling.BICUBIC)).astype(np.float32)[:, 5:25] / 255
    got = Preprocessing(size=20)(images)[0].permute(1, 2, 0).numpy()
    assert np.abs(got - expected).max() < 2.5 / 255  # PIL rounds to whole numbers, twice


def test_pixels_and_floats_come_out_alike() -> None:
    images = pictures()
    prepare = Preprocessing(size=8, resize=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert torch.allclose(prepare(images), prepare(images.float() / 255), atol=1e-5)
    assert images.dtype == torch.uint8  # the caller's images are theirs


def test_values_stay_in_range_where_bicubic_overshoots() -> None:
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    for images in (edge, edge.float() / 255):
        got = Preprocessing(size=16)(images)
        assert 0 <= float(got.min()) <= float(got.max()) <= 1


def test_values_outside_the_unit_range_are_not_cut_off() -> None:
    images = torch.linspace(-2, 3, 2 * 48).reshape(2, 3, 4, 4)  # normalised in the data set, or augmented by noise
    got = Preprocessing(size=8, interpolation="bilinear")(images)
    expected = torch.nn.functional.interpolate(images, (8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(got, expected, atol=1e-6)
    bicubic = Preprocessing(size=16)(images)
    for one, image in zip(bicubic, images, strict=True):  # in each image's own range, whatever else is in the batch
        assert torch.equal(one, Preprocessing(size=16)(image[None])[0])
        assert min(0.0, float(image.min())) <= float(one.min()) <= float(one.max()) <= max(1.0, float(image.max()))
    assert float(bicubic.min()) < -1.9


def test_images_that_are_normalised_already_are_not_normalised_again() -> None:
    class Module(torch.nn.Module):
        data_config: ClassVar[dict[str, Any]] = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    for image in (torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 200.0)):
        with pytest.raises(DataError, match=r"first training image is .* values from .* preprocessing='unit'"):
            Preprocessing.of_module(Module(), image)
    for image in (torch.ones(3, 8, 8), torch.full((3, 8, 8), 200, dtype=torch.uint8)):
        assert Preprocessing.of_module(Module(), image) == Preprocessing.of_timm(Module.data_config)


def test_bytes_beside_numbers_of_another_scale_are_refused() -> None:
    image = pictures(1, 3, 8, 8)[0]
    assert torch.allclose(Preprocessing()([image, image / 255])[0], image / 255)
    with pytest.raises(DataError, match=r"some images of a batch are uint8 and some floating point .* 0 to 2"):
        Preprocessing()([image, image.new_zeros((3, 8, 8)).float(), torch.full((3, 8, 8), 2.0)])


def test_mean_and_std_by_hand() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    got = Preprocessing(mean=(0.0, 0.1, 0.5), std=(1.0, 0.1, 0.25))(images)
    assert got.flatten().tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_one_channel_becomes_as_many_as_the_network_takes() -> None:
    grey = pictures(channels=1)
    got = Preprocessing(size=8, channels=3)(grey)
    assert got.shape == (2, 3, 8, 8)
    assert torch.equal(got[:, 0], got[:, 2])
    assert torch.equal(Preprocessing(size=8, channels=1)(grey), Preprocessing(size=8)(grey))
    with pytest.raises(DataError, match="3 channels, the network takes 1"):
        Preprocessing(channels=1)(pictures())


def test_a_list_of_sizes_is_as_good_as_one_by_one() -> None:
    images = [pictures(1, 3, 20, 31)[0], pictures(1, 3, 40, 12)[0], pictures(1, 1, 9, 9)[0]]
    prepare = Preprocessing(size=8, channels=3)
    got = prepare(images)
    assert got.shape == (3, 3, 8, 8)
    for row, image in zip(got, images, strict=True):
        assert torch.equal(row, prepare(image[None])[0])
    with pytest.raises(DataError, match=r"different sizes .* set a preprocessing `size`"):
        Preprocessing()(images[:2])


def test_features_and_other_ready_tensors_pass() -> None:
    features = torch.randn(4, 7)
    assert Preprocessing(size=8, mean=0.5, std=0.5)(features) is features


def test_nothing_asked_keeps_the_size_and_scales_to_one() -> None:
    images = pictures()
    assert torch.equal(Preprocessing()(images), images.float() / 255)
    floats = torch.rand(2, 1, 8, 8)
    assert torch.equal(Preprocessing()(floats), floats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"resize": -3}, "resize must be an integer of at least 1, got -3"),
        ({"channels": 0}, "channels must be an integer of at least 1"),
        ({"size": 8, "resize": 4}, r"resize \(4\) must not be smaller than size \(8\)"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"interpolation": "lanczos"}, "interpolation must be one of 'bicubic', 'bilinear', 'nearest', got 'lanczos'"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Preprocessing(**options)
