from __future__ import annotations

import gc
import gzip
import io
import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from clkit.data.preprocessing import Preprocessing
from clkit.data.sources import resolve_source
from clkit.data.sources.base import Source, SourcePart, data_root
from clkit.data.sources.custom import Custom
from clkit.data.sources.digits import Digits
from clkit.data.sources.folder import ImageFolder
from clkit.data.sources.npz import NpzFeatures, NpzImages
from clkit.data.sources.torchvision import Torchvision
from clkit.errors import ArgumentError, DataError
from clkit.runs.forgetting import read_samples

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def jpeg_arrays(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    files = [encoded(image) for image in images]
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    return np.frombuffer(b"".join(files), dtype=np.uint8), offsets


def write(root: Path, name: str, **arrays: Any) -> Path:
    path = root / f"{name}.npz"
    np.savez(path, **arrays)
    return path


def through_pickle(part: SourcePart) -> SourcePart:
    again: SourcePart = pickle.loads(pickle.dumps(part))
    return again


def as_tensor(inputs: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    assert isinstance(inputs, torch.Tensor)
    return inputs


# Digits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_digits_are_even_and_odd_indices(flat: bool) -> None:
    source = Digits(flat=flat)
    train, test = source.load(None)
    data, target = load_digits(return_X_y=True)
    shape = (64,) if flat else (1, 8, 8)
    assert (len(train), len(test)) == (899, 898)
    for part, start in ((train, 0), (test, 1)):
        x = as_tensor(part.get_many(np.arange(len(part))))
        assert x.dtype == torch.float32
        assert x.shape == (len(part), *shape)
        np.testing.assert_array_equal(x.reshape(len(part), 64).numpy() * 16, data[start::2])
        np.testing.assert_array_equal(part.targets, target[start::2])
        assert part.targets.dtype == np.int64
        assert part.domains is None
    assert source.class_names[7] == "7"


def test_digits_shifts_are_one_pixel_each_way() -> None:
    train, test = Digits(shifts=True).load(None)
    assert (len(train), len(test)) == (4495, 898)
    blocks = as_tensor(train.get_many(np.arange(4495))).reshape(5, 899, 8, 8).numpy()
    original = load_digits().images[::2] / 16
    np.testing.assert_array_equal(blocks[0], original)
    for block, (axis, step) in zip(blocks[1:], ((1, -1), (1, 1), (2, -1), (2, 1)), strict=True):
        expected = np.roll(original, step, axis=axis)
        edge: list[Any] = [slice(None)] * 3
        edge[axis] = -1 if step == -1 else 0
        expected[tuple(edge)] = 0
        np.testing.assert_array_equal(block, expected)
    np.testing.assert_array_equal(train.targets.reshape(5, 899), np.tile(load_digits().target[::2], (5, 1)))


# npz -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "channels"), [((28, 20), 1), ((8, 6, 1), 1), ((8, 6, 3), 3)])
def test_npz_pixels(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    x_train, x_test = pixels(6, *shape), pixels(3, *shape)
    y_train, y_test = np.array([7, 3, 3, 9, 7, 7], dtype=np.uint8), np.array([3, 9, 7], dtype=np.uint16)
    names = np.array([f"class {i}" for i in range(10)])
    write(tmp_path, "tiny", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, class_names=names)
    source = NpzImages("tiny")
    train, test = source.load(tmp_path)
    batch = as_tensor(through_pickle(train).get_many(np.array([4, 0, 4])))
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, channels, *shape[:2])
    expected = x_train.reshape(6, *shape[:2], channels).transpose(0, 3, 1, 2)[[4, 0, 4]]
    np.testing.assert_array_equal(batch.numpy(), expected)
    assert train.targets.dtype == np.int64
    assert train.targets.tolist() == [7, 3, 3, 9, 7, 7]
    assert test.targets.tolist() == [3, 9, 7]
    assert train.domains is None
    assert source.class_names[9] == "class 9"


def test_npz_jpeg_equals_pil_and_reads_each_array_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [pixels(16, 20, 3), pixels(12, 9, 3), pixels(16, 20, 3)]
    data, offsets = jpeg_arrays(images)
    gray_data, gray_offsets = jpeg_arrays([pixels(10, 10)])
    write(
        tmp_path,
        "photos",
        jpeg_train=data,
        offsets_train=offsets,
        y_train=np.array([0, 1, 0]),
        domain_train=np.array([2, 2, 0], dtype=np.uint8),
        jpeg_test=gray_data,
        offsets_test=gray_offsets,
        y_test=np.array([1]),
        domain_test=np.array([0]),
        domain_names=np.array(["photo", "art", "sketch"]),
        file_train=np.array(["a", "b", "c"]),
    )
    opened: list[str] = []
    read = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda archive, key: (opened.append(key), read(archive, key))[1]
    )
    source = NpzImages("photos")
    train, test = source.load(tmp_path)
    assert len(opened) == len(set(opened))
    assert "file_train" not in opened
    opened.clear()

    uneven = through_pickle(train).get_many(np.array([1, 0]))
    assert isinstance(uneven, list)
    even = as_tensor(train.get_many(np.array([2, 0])))
    for got, i in (*zip(uneven, (1, 0), strict=True), *zip(even, (2, 0), strict=True)):
        with Image.open(io.BytesIO(encoded(images[i]))) as image:
            np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
    last = train.get_many(np.array([-1]))
    assert torch.equal(last[0], even[0])
    assert as_tensor(test.get_many(np.array([0]))).shape == (1, 3, 10, 10)
    assert opened == []
    assert train.domains is not None
    assert train.domains.tolist() == [2, 2, 0]
    assert source.domain_names == {0: "photo", 1: "art", 2: "sketch"}


def test_npz_features_are_float32(tmp_path: Path) -> None:
    f_train, f_test = RNG.normal(size=(5, 4)).astype(np.float16), RNG.normal(size=(2, 4))
    write(
        tmp_path, "feats", f_train=f_train, y_train=np.array([1, 1, -1, 6, 6]), f_test=f_test, y_test=np.array([6, 1])
    )
    train, test = NpzFeatures("feats").load(tmp_path)
    x = as_tensor(through_pickle(train).get_many(np.array([3, 1])))
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), f_train[[3, 1]].astype(np.float32))
    np.testing.assert_array_equal(as_tensor(test.get_many(np.array([0]))).numpy(), f_test[:1].astype(np.float32))
    assert train.targets.tolist() == [1, 1, -1, 6, 6]


def test_npz_row_ranges(tmp_path: Path) -> None:
    f = np.arange(10, dtype=np.float32)[:, None]
    arrays = {"f_train": f, "y_train": np.arange(10), "f_test": f, "y_test": np.arange(10)}
    write(tmp_path, "rows", **arrays, domain_train=np.arange(10) % 3)
    source = NpzFeatures("rows", train_rows=[None, None, 2], test_rows=[1, 4, None])
    train, test = source.load(tmp_path)
    assert train.targets.tolist() == [0, 2, 4, 6, 8]
    assert train.domains is not None
    assert train.domains.tolist() == [0, 2, 1, 0, 2]
    assert as_tensor(through_pickle(train).get_many(np.array([4, 1]))).flatten().tolist() == [8, 2]
    assert test.targets.tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"train_rows=\[20, None, None\] selects none of 10 rows"):
        NpzFeatures("rows", train_rows=[20, None, None]).load(tmp_path)


@pytest.mark.parametrize("rows", [[None, None, 0], [1, 2], [None, None, -1], [0.5, None, None]])
@pytest.mark.parametrize("make", [NpzImages, NpzFeatures, ImageFolder, Torchvision])
def test_row_ranges_are_checked(make: Callable[..., Source], rows: list[Any]) -> None:
    with pytest.raises(ArgumentError, match="test_rows"):
        make("CIFAR10", test_rows=rows)


def test_unsplit_npz_is_split_by_class(tmp_path: Path) -> None:
    y = np.repeat([0, 1, 2, 5], [10, 7, 1, 2])
    write(tmp_path, "whole", f=np.arange(20, dtype=np.float32)[:, None], y=y, domain=y % 2)

    def split(seed: int, fraction: float = 0.3) -> tuple[list[float], list[float], SourcePart]:
        train, test = NpzFeatures("whole", test_fraction=fraction, split_seed=seed).load(tmp_path)
        rows = [as_tensor(part.get_many(np.arange(len(part)))).flatten().tolist() for part in (train, test)]
        return rows[0], rows[1], test

    train_rows, test_rows, test = split(0)
    assert sorted(train_rows + test_rows) == list(range(20))
    assert train_rows == sorted(train_rows)
    # 0.3 of 10, 7, 1 and 2 rows, rounded half up, never all of a class.
    assert np.bincount(test.targets, minlength=6).tolist() == [3, 2, 0, 0, 0, 1]
    assert test.domains is not None
    np.testing.assert_array_equal(test.domains, test.targets % 2)
    assert split(0)[:2] == (train_rows, test_rows)
    assert split(1)[1] != test_rows
    assert np.bincount(split(0, 0.96)[2].targets, minlength=6).tolist() == [9, 6, 0, 0, 0, 1]


def test_unsplit_npz_with_one_image_a_class(tmp_path: Path) -> None:
    data, offsets = jpeg_arrays([pixels(4, 4, 3) for _ in range(10)])
    write(tmp_path, "single", jpeg=data, offsets=offsets, y=np.arange(10, dtype=np.uint16))
    train, test = NpzImages("single").load(tmp_path)
    assert (len(train), len(test)) == (8, 2)
    assert sorted([*train.targets, *test.targets]) == list(range(10))
    write(tmp_path, "one", f=np.zeros((1, 2)), y=np.array([0]))
    with pytest.raises(DataError, match="leaves no test part"):
        NpzFeatures("one").load(tmp_path)


X, Y, F = pixels(3, 4, 4, 3), np.array([0, 1, 1]), np.zeros((3, 2))
JPEG, OFFSETS = jpeg_arrays(list(X))


@pytest.mark.parametrize(
    ("kind", "arrays", "match"),
    [
        (NpzImages, {"x": X}, "no y_train and y_test, and no y to split; found x"),
        (
            NpzImages,
            {"x_train": X, "y_train": Y, "jpeg_clutter": JPEG},
            "neither x_test nor jpeg_test; found jpeg_clutter",
        ),
        (NpzImages, {"f_train": F, "y_train": Y}, "neither x_train nor jpeg_train; found f_train, y_train"),
        (NpzFeatures, {"x_train": X, "y_train": Y}, "no f_train; found x_train"),
        (NpzImages, {"x": X.astype(np.float32), "y": Y}, r"x is float32 of shape \(3, 4, 4, 3\); expected uint8"),
        (NpzImages, {"x": X.transpose(0, 3, 1, 2), "y": Y}, r"shape \(3, 3, 4, 4\); expected"),
        (NpzImages, {"x": X[:2], "y": Y}, "y has 3 entries for 2 rows of x"),
        (NpzImages, {"x": X, "y": Y / 2}, "y is float64 .* expected integers"),
        (NpzImages, {"x": X, "y": Y - 2}, "y holds -2"),
        (NpzImages, {"x": X, "y": np.array(3)}, "y is a single value"),
        (NpzImages, {"x": X, "y": Y, "domain": Y[:1]}, "domain has 1 entries for 3 rows"),
        (NpzImages, {"jpeg": JPEG, "y": Y}, "it has no offsets; found jpeg, y"),
        (NpzImages, {"jpeg": JPEG, "offsets": OFFSETS[:-1], "y": Y}, "y has 3 entries for 2 rows"),
        (NpzImages, {"jpeg": JPEG, "offsets": OFFSETS + 1, "y": Y}, "offsets must grow"),
        (NpzImages, {"jpeg": JPEG, "offsets": OFFSETS[[0, 2, 1, 3]], "y": Y}, "offsets must grow"),
        (NpzImages, {"jpeg": JPEG, "offsets": OFFSETS - 1, "y": Y}, "offsets must grow"),
        (NpzImages, {"jpeg": JPEG.astype(np.int32), "offsets": OFFSETS, "y": Y}, "jpeg is int32"),
        (NpzFeatures, {"f": F.astype(int), "y": Y}, "f is int64 .* expected floating point"),
        (NpzFeatures, {"f": F[:, 0], "y": Y}, r"f is float64 of shape \(3,\)"),
        (NpzImages, {"x": X, "y": np.array([0, 1, None])}, "holds Python objects, which are never unpickled"),
    ],
)
def test_malformed_npz(tmp_path: Path, kind: type, arrays: dict[str, np.ndarray], match: str) -> None:
    path = write(tmp_path, "bad", **arrays)
    with pytest.raises(DataError, match=match) as caught:
        kind("bad").load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off", pickle.dumps({"f": 1})])
@pytest.mark.filterwarnings("ignore:unclosed file")  # which NumPy leaves open
def test_damaged_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz cannot be read: it is damaged, or no \.npz file"):
        NpzImages("bad").load(tmp_path)


@pytest.mark.parametrize("read", [lambda path: NpzImages(str(path)).load(None), read_samples])
def test_a_file_that_cannot_be_read_is_closed(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    whole = tmp_path / "whole.npz"
    np.savez(whole, ids=np.arange(1000))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:500])
    gc.collect()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match="cannot be read"):
            read(cut)
        gc.collect()
    assert [warning for warning in said if issubclass(warning.category, ResourceWarning)] == []


def test_single_array_file(tmp_path: Path) -> None:
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, X)
    with pytest.raises(DataError, match="holds a single array"):
        NpzImages("array").load(tmp_path)


@pytest.mark.parametrize("arguments", [{"test_fraction": 0.0}, {"test_fraction": 1.0}, {"split_seed": -1}])
def test_npz_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        NpzImages("x", **arguments)


def test_names_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "cifar_subset", x=X, y=np.zeros(3, dtype=int))
    for name, root in (
        ("cifar_subset", tmp_path),
        ("cifar_subset.npz", tmp_path),
        (str(path), None),
        (str(path.with_suffix("")), None),
    ):
        train, test = NpzImages(name).load(root)
        assert len(train) + len(test) == 3
    monkeypatch.chdir(tmp_path)
    assert len(NpzImages("./cifar_subset").load(None)[0]) == 2
    with pytest.raises(
        DataError, match=r"npz:cifar_subst: nothing is at .*cifar_subst\.npz, did you mean 'cifar_subset'"
    ):
        NpzImages("cifar_subst").load(tmp_path)
    with pytest.raises(DataError, match=r"npz:cifar_subset .* data\.root or the environment variable CLKIT_DATA"):
        NpzImages("cifar_subset").load(None)


# Image folder --------------------------------------------------------------------------------------------------------


def draw_folder(root: Path, *names: str) -> dict[str, np.ndarray]:
    images = {name: pixels(5, 7, 3) for name in names}
    for name, image in images.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return images


def test_image_folder(tmp_path: Path) -> None:
    images = draw_folder(
        tmp_path / "pets",
        "train/dog/b.png",
        "train/dog/a.PNG",
        "train/cat/z.png",
        "test/emu/1.png",
        "test/cat/2.png",
    )
    (tmp_path / "pets/train/dog/notes.txt").write_text("not an image")
    (tmp_path / "pets/train/.cache").mkdir()
    source = ImageFolder("pets")
    train, test = source.load(tmp_path)
    assert source.name == "pets"
    assert source.class_names == {0: "cat", 1: "dog", 2: "emu"}
    assert train.targets.tolist() == [0, 1, 1]
    assert test.targets.tolist() == [0, 2]
    assert train.domains is None
    got = as_tensor(through_pickle(train).get_many(np.array([2, 0, 1])))
    expected = np.stack([images[f"train/{n}"] for n in ("dog/b.png", "cat/z.png", "dog/a.PNG")]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_image_folder_keeps_numeric_ids_in_domains(tmp_path: Path) -> None:
    draw_folder(tmp_path, *(f"train/{d}/{c}/0.png" for d in ("night", "day") for c in (6, 1, 3)), "test/dusk/06/0.png")
    source = ImageFolder(f"{tmp_path}/", domains=True, numeric_ids=True, train_rows=[1, None, None])
    with pytest.raises(DataError, match="two class folders have the same number"):
        source.load(None)
    (tmp_path / "test/dusk/06").rename(tmp_path / "test/dusk/6")
    train, test = source.load(None)
    assert source.class_names == {1: "1", 3: "3", 6: "6"}
    assert source.domain_names == {0: "day", 1: "dusk", 2: "night"}
    assert train.targets.tolist() == [3, 6, 1, 3, 6]
    assert train.domains is not None
    assert train.domains.tolist() == [0, 0, 2, 2, 2]
    assert test.targets.tolist() == [6]
    draw_folder(tmp_path / "other", "train/day/0.png", "test/night/0.png")
    with pytest.raises(DataError, match=r"not called by numbers: \['day', 'night'\]"):
        ImageFolder(f"{tmp_path}/other", numeric_ids=True).load(None)


def test_image_folder_decodes_to_rgb(tmp_path: Path) -> None:
    for name, mode in (("a.png", "L"), ("b.png", "P"), ("c.png", "RGBA")):
        file = tmp_path / "train/x" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(4, 4, 3)).convert(mode).save(file)
    draw_folder(tmp_path, "test/x/0.png")
    train, _ = ImageFolder(str(tmp_path)).load(None)
    assert as_tensor(train.get_many(np.arange(3))).shape == (3, 3, 4, 4)


def test_deep_images_keep_their_values(tmp_path: Path) -> None:
    """Values of 16 bits and in floating point come out as value / range, whoever reads them; nothing is cut off."""
    grey = np.array([[0, 1, 3000, 43000], [12, 256, 65534, 65535]], dtype=np.uint16)
    expected = grey.astype(np.float64) / 65535
    unit = Image.fromarray(expected.astype(np.float32))
    (tmp_path / "train/x").mkdir(parents=True)
    Image.fromarray(grey).save(tmp_path / "train/x/0.png")
    Image.fromarray(grey).save(tmp_path / "train/x/1.tif")
    (tmp_path / "train/x/2.pgm").write_bytes(b"P5 4 2 65535\n" + grey.astype(">u2").tobytes())
    unit.save(tmp_path / "train/x/3.tiff")
    shallow = pixels(2, 4)
    Image.fromarray(shallow).save(tmp_path / "train/x/4.png")  # 8 bits beside them
    draw_folder(tmp_path, "test/x/0.png")
    train, _ = ImageFolder(f"{tmp_path}/").load(None)
    images = train.get_many(np.arange(4))
    assert isinstance(images, torch.Tensor)
    assert images.dtype == torch.float32
    for image in images:
        np.testing.assert_allclose(image.numpy(), np.stack([expected] * 3), rtol=1e-6, atol=0)
    both = Preprocessing()(train.get_many(np.array([4, 0])))
    np.testing.assert_allclose(both[0, 0].numpy(), shallow / 255, rtol=1e-6)
    np.testing.assert_allclose(both[1, 0].numpy(), expected, rtol=1e-6)

    given = [Image.open(tmp_path / "train/x" / name) for name in ("0.png", "1.tif", "2.pgm", "3.tiff")]
    given += [unit, Image.fromarray(grey.astype(">u2")), grey[None], torch.from_numpy(grey)[None]]
    custom, _ = parts_of(Items([(image, 0) for image in given]))
    for image in as_tensor(custom.get_many(np.arange(len(given)))):
        np.testing.assert_allclose(image.numpy(), expected[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (
            np.array([[0, 70000]], dtype=np.int32),
            r"integers of 32 bits \(0 to 70000\), and nothing says which .* white",
        ),
        (np.array([[-1, 5]], dtype=np.int32), r"integers of 32 bits \(-1 to 5\)"),
        (np.array([[0.0, 255.0]], dtype=np.float32), r"values from 0 to 255; expected 0 to 1 in an image of mode 'F'"),
        (np.array([[-0.5, 1.0]], dtype=np.float32), r"values from -0.5 to 1;"),
        (np.array([[np.nan, 1.0]], dtype=np.float32), r"values from nan to nan"),
    ],
)
def test_images_without_a_known_range_are_refused_by_name(tmp_path: Path, image: np.ndarray, match: str) -> None:
    draw_folder(tmp_path, "test/x/0.png", "train/x/0.png")
    Image.fromarray(image).save(tmp_path / "train/x/1.tiff")
    train, _ = ImageFolder(f"{tmp_path}/").load(None)
    with pytest.raises(DataError, match=rf"train/x/1\.tiff has .*{match}"):
        train.get_many(np.array([1]))
    custom, _ = parts_of(Items([(Image.fromarray(image), 0)]))
    with pytest.raises(DataError, match=f"the input of item 0 of Items has .*{match}"):
        custom.get_many(np.array([0]))


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder:pets: nothing is at"):
        ImageFolder("pets").load(tmp_path)
    with pytest.raises(DataError, match=r"folder:pets .* write a path with a slash, e\.g\. folder:\./pets"):
        ImageFolder("pets").load(None)
    (tmp_path / "pets").mkdir()
    with pytest.raises(DataError, match=r"there is no folder .*train; an image folder has train/ and test/"):
        ImageFolder("pets").load(tmp_path)
    (tmp_path / "pets/train").mkdir()
    with pytest.raises(DataError, match="train has no folders"):
        ImageFolder("pets").load(tmp_path)
    draw_folder(tmp_path / "pets", "train/day/cat/0.png", "test/day/cat/0.png")
    with pytest.raises(DataError, match=r"day has no image files; .* train/<class>/ and end in one of"):
        ImageFolder("pets").load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="folder:file: there is no folder"):
        ImageFolder("file").load(tmp_path)
    train, _ = ImageFolder("pets", domains=True).load(tmp_path)
    (tmp_path / "pets/train/day/cat/0.png").write_text("broken")
    with pytest.raises(DataError, match=r"cat/0\.png cannot be decoded"):
        train.get_many(np.array([0]))


# torchvision ---------------------------------------------------------------------------------------------------------


def write_mnist(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """A tiny MNIST in the files' own format, for torchvision's own reader."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    images, targets = pixels(6, 28, 28), np.array([5, 0, 4, 1, 9, 2], dtype=np.uint8)
    for prefix, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        x, y = images[rows], targets[rows]
        header = struct.pack(">IIII", 0x803, len(x), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(y)) + y.tobytes())
        (raw / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header))
    return images, targets


def test_torchvision_reads_with_torchvisions_own_class(tmp_path: Path) -> None:
    images, targets = write_mnist(tmp_path)
    source = Torchvision("MNIST", train_rows=[1, None, 2])
    train, test = source.load(tmp_path)
    assert train.targets.tolist() == [0, 1]
    assert test.targets.tolist() == targets[4:].tolist()
    np.testing.assert_array_equal(as_tensor(through_pickle(train).get_many(np.array([1]))).numpy(), images[[[3]]])
    np.testing.assert_array_equal(as_tensor(test.get_many(np.array([1, 0]))).numpy(), images[[5, 4]][:, None])
    assert source.class_names[3] == "3 - three"


class Splits:
    """What torchvision's classes with a ``split`` look like from outside."""

    seen: list[dict[str, Any]]
    classes = ("cat", "dog")

    def __init__(self, root: str, split: str = "train", download: bool = False, shade: int = 0) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {{'train', 'val'}}.")
        type(self).seen.append({"root": root, "split": split, "download": download, "shade": shade})
        self._labels = [0, 1, 1] if split == "train" else [1]
        self.image = Image.new("L" if shade else "RGB", (4, 4))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.image, self._labels[i]


class NoTest:
    def __init__(self, root: str) -> None:
        raise AssertionError("is not to be built")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[Splits]:
    from torchvision import datasets

    Splits.seen = []
    for fake in (Splits, NoTest):
        monkeypatch.setattr(datasets, fake.__name__, fake, raising=False)
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, "Splits", "NoTest"))
    return Splits


def test_torchvision_splits_options_and_download(tmp_path: Path, fakes: type[Splits]) -> None:
    source = Torchvision("Splits", download=True, options={"shade": 3}, test_split="val")
    train, test = source.load(tmp_path)
    common = {"root": str(tmp_path), "download": True, "shade": 3}
    assert fakes.seen == [{**common, "split": "train"}, {**common, "split": "val"}]
    assert (train.targets.tolist(), test.targets.tolist()) == ([0, 1, 1], [1])
    assert as_tensor(train.get_many(np.array([0, 2]))).shape == (2, 1, 4, 4)
    assert source.class_names == {0: "cat", 1: "dog"}
    with pytest.raises(ArgumentError, match=r"Splits refuses .*'test'.* Valid values .*test_split"):
        Torchvision("Splits").load(tmp_path)
    with pytest.raises(ArgumentError, match=r"Splits refuses .*colour"):
        Torchvision("Splits", options={"colour": 1}).load(tmp_path)
    with pytest.raises(ArgumentError, match=r"NoTest takes neither train= nor split=.*Custom"):
        Torchvision("NoTest").load(tmp_path)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "SVHN", "Flowers102", "FGVCAircraft"])
def test_torchvision_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        DataError, match=rf"{name} found no data in .*download=True, copy the files there.*CLKIT_DATA"
    ) as e:
        Torchvision(name).load(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_torchvision_failed_download(tmp_path: Path, fakes: type[Splits], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Splits, root: str, split: str = "", download: bool = False) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(fakes, "__init__", fail)
    with pytest.raises(DataError, match=r"no route to host.* the download failed; check the network"):
        Torchvision("Splits", download=True).load(tmp_path)


def test_torchvision_names(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no 'CIFAR1O', did you mean 'CIFAR10'"):
        Torchvision("CIFAR1O").load(tmp_path)
    with pytest.raises(ArgumentError, match="no 'os'"):
        Torchvision("os").load(tmp_path)
    with pytest.raises(DataError, match=r"torchvision:CIFAR10 .* data\.root or the environment variable CLKIT_DATA"):
        Torchvision("CIFAR10").load(None)


# Custom --------------------------------------------------------------------------------------------------------------


class Items:
    """A map-style data set over a list of items that counts how often it is asked."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.asked = 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        self.asked += 1
        return self.items[i]


def parts_of(dataset: Any) -> tuple[SourcePart, SourcePart]:
    return Custom(dataset, dataset).load(None)


def test_custom_reads_targets_from_attributes_or_once() -> None:
    x = torch.rand(3, 2)
    items = [(x[0], 4), (x[1], torch.tensor(9)), (x[2], np.int64(4))]
    for attributes in ({"targets": [4, 9, 4]}, {"labels": np.array([4, 9, 4])}, {"targets": torch.tensor([4, 9, 4])}):
        dataset = Items(items, **attributes)
        assert parts_of(dataset)[0].targets.tolist() == [4, 9, 4]
        assert dataset.asked == 0
    dataset = Items(items)
    train, _ = Custom(dataset, Items(items)).load(None)
    assert train.targets.tolist() == [4, 9, 4]
    assert train.targets.dtype == np.int64
    assert dataset.asked == 3
    transformed = Items(items, targets=[0, 0, 0], target_transform=lambda target: target)
    assert parts_of(transformed)[0].targets.tolist() == [4, 9, 4]


NAMES = {"paper": 0, "glass": 1, "plastic": 2}


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": NAMES},
        {"labels": list(NAMES)},
        {"labels": ["paper", "glass", "plastic"] * 2},  # one for each item, but no ids
        {"targets": [0, 1, 2]},  # the ids of the classes
        {"targets": None, "labels": torch.eye(3)[[0, 1, 2, 0, 1, 2]]},
        {"targets": [[0], [0, 1]]},
        {"targets": len},
        {"labels": 3},
        {"domains": ["indoors", "outdoors"]},
        {"targets": list(NAMES), "labels": [0, 1, 2, 0, 1, 2]},
    ],
)
@pytest.mark.parametrize("form", [tuple, dict])
def test_what_the_items_say_counts_where_an_attribute_is_something_else(
    attributes: dict[str, Any], form: Callable[[Any], Any]
) -> None:
    items = [form({"img": torch.full((1,), float(i)), "targets": i % 3, "file": "a.png"}.items()) for i in range(6)]
    if form is tuple:
        items = [tuple(value for _, value in item) for item in items]
    train, _ = parts_of(Items(items, **attributes))
    assert train.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert train.domains is None
    assert as_tensor(train.get_many(np.array([4, 1]))).tolist() == [[4.0], [1.0]]


def test_an_item_with_another_target_than_the_attribute_is_refused_by_name() -> None:
    dataset = Items([(torch.zeros(1), i % 3) for i in range(6)], labels=[0, 1, 2, 0, 1, 1])
    train, _ = parts_of(dataset)
    train.get_many(np.arange(5))
    with pytest.raises(DataError, match=r"item 5 of Items has the target 2, but Items\.labels\[5\] is 1; .*Subset"):
        train.get_many(np.array([5]))
    hidden, _ = parts_of(torch.utils.data.Subset(dataset, range(6)))  # what the message advises
    assert hidden.targets.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("attributes", "names"),
    [
        ({"classes": ["cat", "dog"]}, {0: "cat", 1: "dog"}),
        ({"classes": np.array(["cat", "dog"])}, {0: "cat", 1: "dog"}),
        ({"classes": {"cat": 7, "dog": 2}}, {7: "cat", 2: "dog"}),
        ({"labels": {"cat": 7, "dog": 2}}, {7: "cat", 2: "dog"}),
        ({"classes": ["dog", "cat"], "class_to_idx": {"cat": 0, "dog": 1}}, {0: "cat", 1: "dog"}),
        ({"classes": [("tench", "fish"), ("cock",)], "class_to_idx": {"tench": 0, "fish": 0, "cock": 1}}, None),
        ({"classes": [2, 7]}, {}),
        ({"classes": 10}, {}),
        ({"classes": None}, {}),
    ],
)
def test_names_of_classes(attributes: dict[str, Any], names: dict[int, str] | None) -> None:
    source = Custom(Items([(torch.zeros(1), 0)], **attributes), Items([]))
    source.load(None)
    assert source.class_names == ({0: "('tench', 'fish')", 1: "('cock',)"} if names is None else names)


def test_custom_inputs() -> None:
    rgb, grey = pixels(4, 6, 3), pixels(4, 6)
    cases: list[tuple[Any, torch.Tensor]] = [
        (Image.fromarray(rgb), torch.from_numpy(rgb.transpose(2, 0, 1).copy())),
        (Image.fromarray(grey), torch.from_numpy(grey)[None]),
        (torch.full((1, 2), 0.1, dtype=torch.float64), torch.full((1, 2), 0.1)),
        (np.float16([0.5, 2.0]), torch.tensor([0.5, 2.0])),
        (torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2), torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)),
    ]
    for given, expected in cases:
        train, _ = parts_of(Items([(given, 0), (given, 1, "more")]))
        got = as_tensor(train.get_many(np.array([1, 0])))
        assert got.dtype == expected.dtype
        assert torch.equal(got, torch.stack([expected, expected]))
    palette = Image.fromarray(rgb).convert("P")
    assert as_tensor(parts_of(Items([(palette, 0)]))[0].get_many(np.array([0]))).shape == (1, 3, 4, 6)


def test_custom_sizes_that_differ() -> None:
    images = [torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, 4, 2, dtype=torch.uint8)]
    train, _ = parts_of(Items([(image, 0) for image in images]))
    batch = train.get_many(np.array([1, 0]))
    assert isinstance(batch, list)
    assert [x.shape for x in batch] == [(3, 4, 2), (3, 2, 2)]
    mixed, _ = parts_of(Items([(images[0], 0), (images[0].float(), 0)]))
    assert isinstance(mixed.get_many(np.array([0, 1])), list)
    vectors = [torch.zeros(2), torch.zeros(3), torch.zeros(3, dtype=torch.uint8)]
    train, _ = parts_of(Items([(vector, 0) for vector in vectors]))
    with pytest.raises(DataError, match=r"are float32 of shapes \[\(2,\), \(3,\)\]; make them equal"):
        train.get_many(np.array([0, 1]))
    with pytest.raises(DataError, match=r"are float32, uint8 of shapes \[\(3,\)\]"):
        train.get_many(np.array([1, 2]))


def test_custom_names_and_domains() -> None:
    dataset = Items([(torch.zeros(1), 0), (torch.zeros(1), 1)], domains=[3, 3], classes=["cat", "dog"])
    source = Custom(dataset, dataset, domain_names={3: "night"}, name="mine")
    train, _ = source.load(None)
    assert train.domains is not None
    assert train.domains.tolist() == [3, 3]
    assert (source.name, source.class_names, source.domain_names) == ("mine", {0: "cat", 1: "dog"}, {3: "night"})
    named = Custom(dataset, dataset, class_names={1: "wolf"})
    named.load(None)
    assert named.class_names == {1: "wolf"}


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (Items([torch.zeros(1)]), r"item 0 of Items is a Tensor; expected \(input, target\)"),
        (Items([(torch.zeros(1),)]), "item 0 of Items is a tuple"),
        (Items([(torch.zeros(1), 0.5)]), "targets of Items is float64 .* convert whole numbers to int64"),
        (Items([(torch.zeros(1), torch.tensor([0, 1]))]), "targets of Items is"),
        (
            Items([({"image": 0}, 0), {"image": 0}], domains=[0, 0]),
            r"item 1 of Items has the keys \['image'\]",
        ),
        (Items([{"image": 0, "label": "cat"}]), "targets of Items is <U3"),
        (Items([(0, 0)], domains=[0, 1]), "Items has 1 items but 2 domains"),
        (Items([(0, [0]), (0, [0, 1])]), "targets of Items is no vector"),
    ],
)
def test_custom_data_that_is_refused(dataset: Items, match: str) -> None:
    with pytest.raises(DataError, match=match):
        parts_of(dataset)


def test_custom_inputs_that_are_refused() -> None:
    for given, match in (
        (torch.zeros(2, dtype=torch.int64), "dtype torch.int64"),
        ("text", "is a str; expected a PIL"),
    ):
        train, _ = parts_of(Items([(given, 0)]))
        with pytest.raises(DataError, match=match):
            train.get_many(np.array([0]))
    with pytest.raises(ArgumentError, match="test is a generator; a map-style data set is needed"):
        Custom(Items([]), (x for x in ()))

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Any:
            return iter(())

    for dataset in (Endless(), {"train": Items([]), "test": Items([])}):
        with pytest.raises(ArgumentError, match=r"train is a (Endless|dict); .* be iterated learns from a DataLoader"):
            Custom(dataset, Items([]))


# Specs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("digits", Digits()),
        ("digits:flat", Digits(flat=True)),
        ("digits:shifts,flat", Digits(flat=True, shifts=True)),
        ("torchvision:CIFAR10", Torchvision("CIFAR10")),
        ("folder:/data/pets", ImageFolder("/data/pets")),
        ("folder:C:/pets", ImageFolder("C:/pets")),
        ("npz:cifar100_subset", NpzImages("cifar100_subset")),
        ("features:gtsrb", NpzFeatures("gtsrb")),
    ],
)
def test_specs(spec: str, source: Source) -> None:
    resolved = resolve_source(spec)
    assert resolved == source
    assert type(resolved) is type(source)
    assert resolve_source(source) is source
    arguments = {k: v for k, v in asdict(source).items() if k not in ("class_names", "domain_names")}
    if not isinstance(source, ImageFolder):
        assert type(source)(**arguments) == source
    assert pickle.loads(pickle.dumps(source)) == source


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("digit", "'digit' is not known; allowed: 'digits', .*'features:NAME', did you mean 'digits'"),
        ("torchvison:CIFAR10", "did you mean 'torchvision'"),
        ("imagenet", "'imagenet' is not known; allowed: "),
        ("", "'' is not known"),
        ("digits:flt", "unknown option 'flt'; allowed: .*'digits:flat'.* did you mean 'flat'"),
        ("digits:", "unknown option ''"),
        ("npz:", "'npz:' lacks what comes after the colon"),
        ("folder", "'folder' lacks"),
        ("custom", r"pass Custom\(train, test\)"),
        (7, "source=7 must be a spec"),
    ],
)
def test_unknown_specs(spec: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        resolve_source(spec)


def test_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    assert data_root() is None
    monkeypatch.setenv("CLKIT_DATA", "")
    assert data_root(None) is None
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    assert data_root() == tmp_path
    inner = tmp_path / "inner"
    inner.mkdir()
    assert data_root(str(inner)) == inner
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root("~/inner") == inner
    with pytest.raises(DataError, match=r"data\.root is '.*missing', which is not a folder"):
        data_root(str(tmp_path / "missing"))
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"the environment variable CLKIT_DATA is '.*gone'"):
        data_root()
