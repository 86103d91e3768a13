"""``clkit learn``: a folder of images becomes a head, alone or in shards, and classes come without the old images."""

from __future__ import annotations

import os
import shlex
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.neighbors import NearestCentroid
from small_runs import quiet_trainer, run_settings

from clkit import load_head, merge_checkpoints
from clkit.callbacks import LDA
from clkit.cli.main import main
from clkit.data import ClassIncremental, Custom, Preprocessing, StreamDataModule
from clkit.errors import ArgumentError, DataError, StateError
from clkit.files import read_checkpoint, write_checkpoint
from clkit.models import TimmClassifier
from clkit.runs.learned import LearnedModel, NewModel
from clkit.runs.learning import Loading, forget_images, learn_images
from clkit.schema import LEARNED

BIRDS = ("crow", "jay", "tit", "wren")
EACH = 6  # images of a class


def draw(folder: Path, classes: tuple[str, ...] = BIRDS, rows: range = range(EACH)) -> None:
    """Images of 20 pixels, alike within a class; a function of class and row alone."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for row in rows:
            draws = np.random.default_rng([BIRDS.index(name), row])
            base = np.random.default_rng(BIRDS.index(name)).integers(0, 200, (20, 20, 3))
            pixels = base + draws.integers(0, 50, (20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{row}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, with all birds, and with two and two of them; nothing in it is changed."""
    folder = tmp_path_factory.mktemp("birds")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), folder / "weights.pth")
    draw(folder / "all")
    draw(folder / "old", ("jay", "wren"))
    draw(folder / "new", ("crow", "tit"))
    return folder


@pytest.fixture
def new(place: Path) -> Callable[..., NewModel]:
    def make(head: str = "lda", **options: Any) -> NewModel:
        kwargs = {"in_chans": 3} if options.pop("other", False) else {}
        return NewModel("test_resnet", place / "weights.pth", head, options, kwargs)

    return make


def by_name(file: Path, key: str = "means") -> dict[str, torch.Tensor]:
    model = LearnedModel.read(file)
    rows = getattr(model.head.statistics, key)
    return {model.names[number]: row for number, row in zip(model.learned_classes, rows, strict=True)}


def assert_same_head(one: Path, other: Path) -> None:
    """Equal up to rounding, whatever ids the classes have; a row too many or too few is far above it.

    The rounding is that of the network in float32, whose kernels depend on the size of a batch on some processors.
    """
    mine, theirs = (LearnedModel.read(file) for file in (one, other))
    assert {mine.names[each] for each in mine.learned_classes} == {
        theirs.names[each] for each in theirs.learned_classes
    }
    for name, mean in by_name(one).items():
        assert torch.allclose(mean, by_name(other)[name], rtol=1e-5, atol=1e-6)
    counts, wanted = by_name(one, "counts"), by_name(other, "counts")
    assert counts == wanted
    for name in ("gram", "scatter"):
        if name in mine.head.statistics.kept:
            sums, others = (getattr(each.head.statistics, name) for each in (mine, theirs))
            assert float((sums - others).abs().max()) <= 1e-4 * float(others.abs().max())


# ---- one folder


@pytest.mark.filterwarnings("ignore:.*within_class_std_dev_")  # of features that no image of a class moves
def test_a_folder_becomes_the_head_that_scikit_learn_fits(place: Path, new: Any, tmp_path: Path) -> None:
    done = learn_images(new("nmc", metric="euclidean"), f"folder:{place}/all", tmp_path / "birds.ckpt")
    assert (done.rows, done.classes, done.samples) == (24, (0, 4), (0, 24))
    network = timm.create_model("test_resnet", num_classes=5)
    network.load_state_dict(torch.load(place / "weights.pth", weights_only=True))
    network.eval()
    config = timm.data.resolve_model_data_config(network)
    files = sorted((place / "all").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    with torch.no_grad():
        inputs = Preprocessing.of_timm(config)(pixels)
        features = network.forward_head(network.forward_features(inputs), pre_logits=True).double().numpy()
    labels = np.repeat(np.arange(4), EACH)
    fitted = NearestCentroid().fit(features, labels)
    head = load_head(tmp_path / "birds.ckpt", "nmc")
    assert np.allclose(head.statistics.means.numpy(), fitted.centroids_, rtol=1e-5, atol=1e-6)
    assert np.array_equal(head.predict(torch.from_numpy(features)).numpy(), fitted.predict(features))
    assert LearnedModel.read(tmp_path / "birds.ckpt").names == dict(enumerate(BIRDS))


def test_weights_of_another_number_of_classes_and_of_none_are_read(place: Path, tmp_path: Path) -> None:
    weights = torch.load(place / "weights.pth", weights_only=True)
    torch.save({name: each for name, each in weights.items() if not name.startswith("fc.")}, tmp_path / "bare.pth")
    learn_images(NewModel("test_resnet", place / "weights.pth"), f"folder:{place}/old", tmp_path / "five.ckpt")
    learn_images(NewModel("test_resnet", tmp_path / "bare.pth"), f"folder:{place}/old", tmp_path / "bare.ckpt")
    assert_same_head(tmp_path / "five.ckpt", tmp_path / "bare.ckpt")


@pytest.mark.parametrize("head", ["lda", "nmc", "aef_ocl"])
def test_classes_are_added_without_the_old_images(head: str, place: Path, new: Any, tmp_path: Path) -> None:
    options = {"balance": "none"} if head == "aef_ocl" else {}
    old, both, joint = (tmp_path / f"{name}.ckpt" for name in ("old", "both", "joint"))
    learn_images(new(head, **options), f"folder:{place}/old", old)
    before = old.read_bytes()
    done = learn_images(old, f"folder:{place}/new", both, test=f"folder:{place}/all")
    assert old.read_bytes() == before
    assert (done.classes, done.samples) == ((2, 4), (12, 24))
    assert LearnedModel.read(both).names == {0: "jay", 1: "wren", 2: "crow", 3: "tit"}
    learn_images(new(head, **options), f"folder:{place}/all", joint)
    assert_same_head(both, joint)
    assert {group: each[0] for group, each in done.accuracy.items()} == {
        "classes known before": 12,
        "new classes": 12,
        "all": 24,
    }
    assert done.accuracy["new classes"][1] is None
    assert done.accuracy["all"][1] == done.accuracy["classes known before"][1]  # of the new ones none was right


def test_a_folder_that_has_grown_is_learned_where_it_is_new(place: Path, new: Any, tmp_path: Path) -> None:
    draw(tmp_path / "birds", rows=range(3))
    learn_images(new(), f"folder:{tmp_path}/birds", tmp_path / "few.ckpt")
    with pytest.raises(DataError, match=r"has no image that .*few\.ckpt does not hold already"):
        learn_images(tmp_path / "few.ckpt", f"folder:{tmp_path}/birds", tmp_path / "same.ckpt")
    draw(tmp_path / "birds", rows=range(3, EACH))
    done = learn_images(tmp_path / "few.ckpt", f"folder:{tmp_path}/birds", tmp_path / "more.ckpt")
    assert (done.rows, done.known) == (12, 12)
    learn_images(new(), f"folder:{place}/all", tmp_path / "joint.ckpt")
    assert_same_head(tmp_path / "more.ckpt", tmp_path / "joint.ckpt")


def test_classes_and_images_are_taken_out_exactly(place: Path, new: Any, tmp_path: Path) -> None:
    whole, less, again = (tmp_path / f"{name}.ckpt" for name in ("whole", "less", "again"))
    learn_images(new(), f"folder:{place}/all", whole)
    done = forget_images(whole, f"folder:{place}/all", less, classes=["tit"])
    assert (done.rows, done.classes, done.samples) == (6, (4, 3), (24, 18))
    shutil.copytree(place / "all", tmp_path / "birds")
    shutil.rmtree(tmp_path / "birds" / "tit")
    learn_images(new(), f"folder:{tmp_path}/birds", tmp_path / "never.ckpt")
    assert_same_head(less, tmp_path / "never.ckpt")
    with pytest.raises(DataError, match=r"tit/0\.png.* and 1 more: not learned by .*less\.ckpt in this class"):
        forget_images(less, f"folder:{place}/all", again, classes=["tit"])
    with pytest.raises(ArgumentError, match="has no class 'owl', but"):
        forget_images(less, f"folder:{place}/all", again, classes=["owl"])
    np.savez(tmp_path / "rows.npz", features=np.zeros((1, 384), dtype=np.float32), targets=np.zeros(1, dtype=np.int64))
    assert main(["forget", str(less), "--samples", str(tmp_path / "rows.npz"), "-o", str(again)]) == 2
    assert not again.exists()
    # one image was under the wrong name: out under that, in under its own
    (tmp_path / "wrong" / "jay").mkdir(parents=True)
    shutil.copy(place / "all" / "jay" / "0.png", tmp_path / "wrong" / "jay")
    forget_images(less, f"folder:{tmp_path}/wrong", less, overwrite=True)
    (tmp_path / "wrong" / "jay").rename(tmp_path / "wrong" / "tit")
    learn_images(less, f"folder:{tmp_path}/wrong", again)
    assert {name: int(count) for name, count in by_name(again, "counts").items()} == {
        "crow": 6,
        "jay": 5,
        "tit": 1,
        "wren": 6,
    }
    assert LearnedModel.read(again).names == dict(enumerate(BIRDS))  # a class that comes back has its id


# ---- shards


@pytest.fixture(scope="module")
def shards(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    files = [folder / f"part{index}.ckpt" for index in range(5)]
    for index, file in enumerate(files):
        start = NewModel("test_resnet", place / "weights.pth")
        learn_images(start, f"folder:{place}/all", file, shard=(index, 5))
    return files


def test_shards_in_any_order_equal_one_run(shards: list[Path], place: Path, new: Any, tmp_path: Path) -> None:
    learn_images(new(), f"folder:{place}/all", tmp_path / "whole.ckpt")
    order = [shards[index] for index in (3, 0, 4, 2, 1)]
    (learned,) = merge_checkpoints(order, tmp_path / "merged.ckpt")
    assert (learned.samples, learned.classes) == (24, 4)
    assert_same_head(tmp_path / "merged.ckpt", tmp_path / "whole.ckpt")
    # branches of a tree, and more learned into what came out
    merge_checkpoints(order[:2], tmp_path / "left.ckpt", partial=True)
    merge_checkpoints(order[2:], tmp_path / "right.ckpt", partial=True)
    merge_checkpoints([tmp_path / "right.ckpt", tmp_path / "left.ckpt"], tmp_path / "tree.ckpt")
    assert_same_head(tmp_path / "tree.ckpt", tmp_path / "whole.ckpt")
    with pytest.raises(DataError, match="does not hold already"):
        learn_images(tmp_path / "tree.ckpt", f"folder:{place}/all", tmp_path / "more.ckpt")


def test_a_shard_twice_and_one_missing_are_refused_by_name(shards: list[Path], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.ckpt"
    shutil.copy(shards[1], tmp_path / "copy.ckpt")
    with pytest.raises(ArgumentError, match=r"copy\.ckpt: shard 1/5 of 'folder:.*/all' is held already; .* twice"):
        merge_checkpoints([*shards, tmp_path / "copy.ckpt"], out)
    with pytest.raises(ArgumentError, match=r"shard 1/5 of 'folder:.*', shard 3/5 of 'folder:.*' are missing"):
        merge_checkpoints([shards[0], shards[2], shards[4]], out)
    assert not out.exists()


def test_parts_of_other_settings_are_refused_by_name(shards: list[Path], place: Path, new: Any, tmp_path: Path) -> None:
    data, part = f"folder:{place}/all", tmp_path / "part.ckpt"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "other.pth")
    odd: list[tuple[NewModel, str]] = [
        (new(shrinkage=0.5), "different shrinkage: 'auto' here, 0.5 there"),
        (new("nmc"), r"LDA\(lda\) is in .*but not in"),
        (NewModel("test_resnet", tmp_path / "other.pth"), r"the networks of .* differ in 'network\."),
        (new(other=True), r"has model_kwargs with in_chans=None, .* with in_chans=3: their features differ"),
    ]
    for start, said in odd:
        learn_images(start, data, part, shard=(1, 5), overwrite=True)
        with pytest.raises(StateError, match=said):
            merge_checkpoints([shards[0], part], tmp_path / "merged.ckpt", partial=True)
    for first, second in (({"gamma": 1.0}, {"gamma": 2.0}), ({"lift": 50}, {"lift": 60}), ({"lift": 50}, {})):
        for index, options in enumerate((first, second)):
            learn_images(new("aef_ocl", **options), data, tmp_path / f"{index}.ckpt", shard=(index, 2), overwrite=True)
        with pytest.raises(
            StateError, match=r"cannot merge heads with different (gamma|expansion_dim): .* here, .* there"
        ):
            merge_checkpoints([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], tmp_path / "merged.ckpt")
    saved = read_checkpoint(shards[1])
    saved[LEARNED]["settings"]["preprocessing"]["size"] = 64
    write_checkpoint(saved, part)
    with pytest.raises(StateError, match=r"preprocessing with size=160, .*part\.ckpt with size=64: their features"):
        merge_checkpoints([shards[0], part], tmp_path / "merged.ckpt", partial=True)
    learn_images(new(), f"folder:{place}/old", part, overwrite=True)
    with pytest.raises(StateError, match=r"the class 0 is 'crow' in .* and 'jay' in .*part\.ckpt; learn the images"):
        merge_checkpoints([shards[0], part], tmp_path / "merged.ckpt", partial=True)
    part.write_bytes(shards[1].read_bytes()[:-1000])
    with pytest.raises(StateError, match=r"part\.ckpt cannot be read as a checkpoint: it is damaged"):
        merge_checkpoints([shards[0], part], tmp_path / "merged.ckpt", partial=True)


def test_shards_of_new_classes_join_a_saved_head(place: Path, new: Any, tmp_path: Path) -> None:
    old, joint = tmp_path / "old.ckpt", tmp_path / "joint.ckpt"
    learn_images(new(), f"folder:{place}/old", old)
    parts = [tmp_path / f"{index}.ckpt" for index in range(2)]
    for index, part in enumerate(parts):
        learn_images(old, f"folder:{place}/new", part, empty=True, shard=(index, 2))
        assert LearnedModel.read(part).samples == 6
    merge_checkpoints([parts[1], old, parts[0]], tmp_path / "all.ckpt")
    learn_images(old, f"folder:{place}/new", joint)
    assert_same_head(tmp_path / "all.ckpt", joint)
    # the same shards with all of the old head in each of them would count that twice
    for index, part in enumerate(parts):
        learn_images(old, f"folder:{place}/new", part, shard=(index, 2), overwrite=True)
    with pytest.raises(ArgumentError, match=r"rows 0 to 11 of 'folder:.*/old' is held already"):
        merge_checkpoints(parts, tmp_path / "twice.ckpt")


def test_rows_with_numbers_are_shared_out_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"f_{part}": rng.normal(size=(40, 8)).astype(np.float32) for part in ("train", "test")}
    np.savez(tmp_path / "made.npz", **arrays, y_train=np.arange(40) % 4 + 7, y_test=np.arange(40) % 4 + 7)
    data, start = f"features:{tmp_path}/made.npz", NewModel("identity", head="aef_ocl", options={"gamma": 1.0})
    parts = [tmp_path / f"{index}.ckpt" for index in range(3)]
    for index, part in enumerate(parts):
        learn_images(start, data, part, shard=(index, 3))
    with pytest.raises(DataError, match="does not hold already"):
        learn_images(parts[0], data, tmp_path / "again.ckpt", shard=(0, 3))
    learn_images(parts[0], data, tmp_path / "rest.ckpt")  # all that the first shard has not
    merge_checkpoints(parts, tmp_path / "merged.ckpt")
    assert_same_head(tmp_path / "rest.ckpt", tmp_path / "merged.ckpt")
    x, y = arrays["f_train"].astype(np.float64), np.eye(11)[np.arange(40) % 4 + 7]
    wanted = np.linalg.solve(x.T @ x + np.eye(8), x.T @ y)
    head = load_head(tmp_path / "merged.ckpt", "aef_ocl")
    assert head.classes.tolist() == [7, 8, 9, 10]
    assert head.options["balance"] == "pfg"
    assert np.allclose(head.weight.numpy(), wanted, rtol=0, atol=1e-12)  # equally many of each: nothing to balance


# ---- what cannot be read


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_image_stops_or_is_left_out(workers: int, place: Path, new: Any, tmp_path: Path) -> None:
    shutil.copytree(place / "all", tmp_path / "birds")
    bad = tmp_path / "birds" / "tit" / "2.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    data, file = f"folder:{tmp_path}/birds", tmp_path / "birds.ckpt"
    stop, skip = (Loading(4, workers, unreadable=what) for what in ("stop", "skip"))  # type: ignore[arg-type]  # literals
    with pytest.raises(
        DataError, match=rf"{bad} cannot be decoded: .*birds\.ckpt holds the 12 images before it; go on"
    ):
        learn_images(new(), data, file, loading=stop)
    assert LearnedModel.read(file).samples == 12
    done = learn_images(new(), data, tmp_path / "skipped.ckpt", loading=skip)
    assert done.rows == 23
    assert [str(bad) in reason for reason in done.unreadable] == [True]
    assert LearnedModel.read(tmp_path / "skipped.ckpt").holds.left_out == ["tit/2.png"]
    bad.write_bytes(whole)
    learn_images(new(), data, tmp_path / "whole.ckpt")
    for part, rest in ((file, 12), (tmp_path / "skipped.ckpt", 1)):
        done = learn_images(part, data, part, overwrite=True, loading=stop)
        assert done.rows == rest
        assert_same_head(part, tmp_path / "whole.ckpt")


def test_a_shard_that_stopped_is_not_taken_for_a_whole_one(place: Path, new: Any, tmp_path: Path) -> None:
    shutil.copytree(place / "all", tmp_path / "birds")
    bad = tmp_path / "birds" / "jay" / "4.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"nothing" * (len(whole) // 7) + b"x" * (len(whole) % 7))  # of the same size
    parts = [tmp_path / f"{index}.ckpt" for index in range(2)]
    with pytest.raises(DataError, match=r"holds the 10 images before it; go on with: .* --shard 0/2"):
        learn_images(new(), f"folder:{tmp_path}/birds", parts[0], shard=(0, 2), loading=Loading(2))
    learn_images(new(), f"folder:{tmp_path}/birds", parts[1], shard=(1, 2))
    with pytest.raises(ArgumentError, match=r"shard 0/2 of 'folder:.*' from row 10 to 11 is missing"):
        merge_checkpoints(parts, tmp_path / "merged.ckpt")
    bad.write_bytes(whole)
    learn_images(parts[0], f"folder:{tmp_path}/birds", parts[0], shard=(0, 2), overwrite=True)
    (learned,) = merge_checkpoints(parts, tmp_path / "merged.ckpt")
    assert learned.samples == 24


def test_the_line_that_goes_on_can_be_pasted(place: Path, new: Any, tmp_path: Path) -> None:
    shutil.copytree(place / "old", tmp_path / "my birds")
    (tmp_path / "my birds" / "wren" / "9.png").write_bytes(b"no image")
    with pytest.raises(DataError) as stopped:
        learn_images(new(), "folder:my birds", tmp_path / "birds 1.ckpt", loading=Loading(4, root=tmp_path))
    line = str(stopped.value).partition("go on with: ")[2]
    (tmp_path / "my birds" / "wren" / "9.png").unlink()
    assert main(shlex.split(line)[1:]) == 0
    assert LearnedModel.read(tmp_path / "birds 1.ckpt").samples == 12


def test_a_merge_names_what_its_parts_left_out_until_it_is_repaired(place: Path, new: Any, tmp_path: Path) -> None:
    shutil.copytree(place / "all", tmp_path / "birds")
    bad = tmp_path / "birds" / "tit" / "2.png"
    whole = bad.read_bytes()
    bad.unlink()
    bad.symlink_to(tmp_path / "nowhere.png")  # what points to nothing is an image that cannot be read
    parts = [tmp_path / f"{index}.ckpt" for index in range(2)]
    for index, part in enumerate(parts):
        learn_images(new(), f"folder:{tmp_path}/birds", part, shard=(index, 2), loading=Loading(unreadable="skip"))
    said = r"images could not be read: tit/2.png; repair them, and what .* can be learned into .*merged.ckpt"
    with pytest.warns(UserWarning, match=said):
        (learned,) = merge_checkpoints(parts, tmp_path / "merged.ckpt")
    assert learned.samples == 23
    bad.unlink()
    bad.write_bytes(whole)
    (tmp_path / "birds").rename(tmp_path / "elsewhere")
    done = learn_images(tmp_path / "merged.ckpt", f"folder:{tmp_path}/elsewhere", tmp_path / "whole.ckpt")
    assert (done.rows, done.known) == (1, 23)
    assert done.model.holds.left_out == []


def test_files_whose_size_says_nothing_are_told_apart_by_their_content(place: Path, new: Any, tmp_path: Path) -> None:
    for camera, row in (("one", 0), ("two", 1), ("again", 0)):
        (tmp_path / camera / "crow").mkdir(parents=True)
        Image.open(place / "all" / "crow" / f"{row}.png").save(tmp_path / camera / "crow" / "0.bmp")
    file = tmp_path / "birds.ckpt"
    learn_images(new("nmc"), f"folder:{tmp_path}/one", file)
    assert learn_images(file, f"folder:{tmp_path}/two", file, overwrite=True).samples == (1, 2)
    with pytest.raises(DataError, match=r"no image that .* does not hold already"):
        learn_images(file, f"folder:{tmp_path}/again", file, overwrite=True)
    forget_images(file, f"folder:{tmp_path}/again", file, overwrite=True)
    learn_images(new("nmc"), f"folder:{tmp_path}/two", tmp_path / "two.ckpt")
    assert_same_head(file, tmp_path / "two.ckpt")
    with pytest.raises(DataError, match=r"again/crow/0.bmp: not learned by .* in this class and as it is now"):
        forget_images(file, f"folder:{tmp_path}/again", file, overwrite=True)
    learn_images(new("nmc"), f"folder:{tmp_path}/one", tmp_path / "one.ckpt")
    (learned,) = merge_checkpoints([tmp_path / "one.ckpt", tmp_path / "two.ckpt"], tmp_path / "both.ckpt")
    assert learned.samples == 2


def test_a_folder_is_one_list_whatever_form_of_unicode_its_names_have(place: Path, new: Any, tmp_path: Path) -> None:
    for index, form in enumerate(("NFD", "NFC")):  # a Mac's, and that of others; they sort on two sides of "f"
        for name, bird in (("é", "jay"), ("f", "wren")):
            shutil.copytree(place / "all" / bird, tmp_path / form / unicodedata.normalize(form, name))
        learn_images(new("nmc"), f"folder:{tmp_path}/{form}", tmp_path / f"{index}.ckpt", shard=(index, 2))
    (learned,) = merge_checkpoints([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], tmp_path / "both.ckpt")
    assert (learned.samples, learned.classes) == (12, 2)
    name = unicodedata.normalize("NFD", "é")
    done = forget_images(tmp_path / "both.ckpt", f"folder:{tmp_path}/NFC", tmp_path / "f.ckpt", classes=name)
    assert done.samples == (12, 6)
    (tmp_path / "NFC" / "é").rename(os.fsdecode(os.fsencode(tmp_path / "NFC") + b"/\xe9"))
    with pytest.raises(DataError, match=r"the name '\\udce9' of a class or an image is no UTF-8; rename it"):
        learn_images(new("nmc"), f"folder:{tmp_path}/NFC", tmp_path / "c.ckpt")


def test_a_training_part_alone_and_classes_of_such_names(place: Path, new: Any, tmp_path: Path) -> None:
    cut, vehicles = tmp_path / "cut", tmp_path / "vehicles"
    shutil.copytree(place / "all", cut / "train")
    shutil.copy(place / "all" / "jay" / "1.png", cut / "train" / "overview.png")
    (cut / "val" / "jay").mkdir(parents=True)
    done = learn_images(new("nmc"), f"folder:{cut}", tmp_path / "a.ckpt")
    assert (done.rows, done.ignored) == (24, "loose images: 1; beside train: val")
    shutil.copytree(place / "old" / "jay", vehicles / "train")
    shutil.copytree(place / "old" / "wren", vehicles / "test")
    done = learn_images(new("nmc"), f"folder:{vehicles}", tmp_path / "b.ckpt")
    assert list(done.model.names.values()) == ["test", "train"]
    shutil.copytree(place / "old" / "wren", vehicles / "tram")
    shutil.copytree(place / "old" / "wren", vehicles / "train" / "steam")
    with pytest.raises(DataError, match="vehicles: train/ holds folders of images, and so it is a part, but tram/ "):
        learn_images(new("nmc"), f"folder:{vehicles}", tmp_path / "c.ckpt")


def test_without_an_image_nothing_is_written(place: Path, new: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "crow").mkdir(parents=True)
    (tmp_path / "broken" / "crow").mkdir(parents=True)
    (tmp_path / "broken" / "crow" / "1.jpg").write_bytes(b"")
    out = tmp_path / "birds.ckpt"
    for data, unreadable, said in (
        ("empty", "stop", r"empty has no folders; expected one a class"),
        ("hollow", "stop", r"crow has no image files"),
        ("nowhere", "stop", r"nothing is at .*nowhere"),
        ("broken", "stop", r"1\.jpg cannot be decoded.*Nothing was learned before it"),
        ("broken", "skip", r"none of the 1 images of .* can be learned; nothing was written"),
    ):
        how: Any = unreadable
        with pytest.raises(DataError, match=said):
            learn_images(new(), f"folder:{tmp_path}/{data}", out, loading=Loading(unreadable=how))
        assert not out.exists()
    with pytest.raises(ArgumentError, match="there is no shard 5/5"):
        learn_images(new(), f"folder:{place}/all", out, shard=(5, 5))
    with pytest.raises(ArgumentError, match="24 rows cannot be cut into 25 shards"):
        learn_images(new(), f"folder:{place}/all", out, shard=(0, 25))


# ---- the commands, and what else reads the file


def said(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    printed = capsys.readouterr()
    return printed.out if status == 0 else printed.err


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The birds in the current folder."""
    for name in ("all", "old", "new"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copy(place / "weights.pth", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_in_two_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ("learn", "--backbone", "test_resnet", "--weights", "weights.pth")
    printed = said(capsys, *begin, "--data", "folder:./old", "-o", "birds.ckpt")
    assert printed.splitlines()[0].startswith("wrote birds.ckpt: LDA(lda) on test_resnet, settings ")
    printed = said(capsys, "learn", "birds.ckpt", "--data", "folder:./new", "--test", "folder:./all", "-o", "more.ckpt")
    table = [line.split() for line in printed.splitlines()[1:]]
    assert table[0] == ["before", "after"]
    assert table[1] == ["classes", "2", "4"]
    assert table[2] == ["images", "learned", "12", "24"]
    assert table[3][:7] == ["right", "of", "12", "test", "images,", "classes", "known"]
    assert len(table) == 6
    assert "new classes" in printed
    printed = said(capsys, "predict", "more.ckpt", "all/tit/3.png", "all/jay/1.png", "--top", "2")
    lines = printed.splitlines()
    model = LearnedModel.read("more.ckpt")
    for line, file in zip(lines, ("all/tit/3.png", "all/jay/1.png"), strict=True):
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None]
        scores = model.head(model.features(model.preprocessing(pixels)))[0]
        first = int(scores.argmax())
        assert line.startswith(f"{file}: {model.names[first]} {float(scores[first]):.4g}, ")
        assert line.endswith(f"; novelty {-float(scores[first]):.4g}")
    assert said(capsys, "forget", "more.ckpt", "--data", "folder:./new", "--classes", "tit", "-o", "less.ckpt")
    assert LearnedModel.read("less.ckpt").samples == 18


def test_what_does_not_count_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open("new/tit/0.png").save("new/tit/0.gif")
    Path("new/tit/more").mkdir()
    Path("all/tit/1.png").write_bytes(b"no image")
    begin = ("learn", "--backbone", "test_resnet", "--weights", "weights.pth", "--data", "folder:./new")
    error = said(capsys, *begin, "--test", "folder:./all", "-o", "birds.ckpt", status=2)
    assert "the test image all/tit/1.png cannot be decoded" in error
    assert not Path("birds.ckpt").exists()
    printed = said(capsys, *begin, "--test", "folder:./all", "--unreadable", "skip", "-o", "birds.ckpt")
    assert "right of 11 test images, new classes" in printed
    assert "in the folder and not read: .gif: 1, sub-folders: 1" in printed
    (unread, unknown) = printed.partition("test images that do not count:\n")[2].splitlines()
    assert "all/tit/1.png cannot be decoded" in unread
    assert unknown.strip() == "12 of 23 are of classes that were not learned: jay, wren"
    Path("new/tit").rename("new/tit, blue")
    said(capsys, *begin, "-o", "comma.ckpt")
    words = ("forget", "comma.ckpt", "--data", "folder:./new", "-o", "less.ckpt", "--classes")
    said(capsys, *words, "tit, blue")
    assert LearnedModel.read("less.ckpt").learned_classes == [0]
    said(capsys, *words, "crow", "--classes", "tit, blue", "--force")
    assert LearnedModel.read("less.ckpt").samples == 0


def test_shards_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ("learn", "--backbone", "test_resnet", "--weights", "weights.pth", "--data", "folder:./all")
    for index in range(2):
        said(capsys, *begin, "--head", "aef_ocl", "--set", "gamma=10", "--shard", f"{index}/2", "-o", f"{index}.ckpt")
    assert (
        "shard 1/2 of 'folder:./all' is missing" in said(capsys, "merge", "0.ckpt", "0.ckpt", "-o", "m.ckpt", status=2)
        or Path("m.ckpt").exists() is False
    )
    assert "24 samples of 4 classes" in said(capsys, "merge", "1.ckpt", "0.ckpt", "-o", "m.ckpt")
    head = load_head("m.ckpt", "aef_ocl")
    assert head.options["gamma"] == 10
    printed = said(capsys, "export", "m.ckpt", "-o", "m.pt")
    assert "with the head 'aef_ocl'" in printed
    assert torch.load("m.pt", weights_only=True)["class_names"] == dict(enumerate(BIRDS))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("learn --data folder:./all -o x.ckpt", "give one of CHECKPOINT, --like, --backbone"),
        ("learn a.ckpt --backbone resnet18 --data folder:./all -o x.ckpt", "got CHECKPOINT and --backbone"),
        ("learn a.ckpt --head nmc --data folder:./all -o x.ckpt", "--head is for a new head; that of a.ckpt stays"),
        ("learn a.ckpt --data folder:./all -o x.ckpt", "a.ckpt' is not a file"),
        ("learn --backbone test_resnt --weights w.pth --data folder:./all -o x.ckpt", "did you mean 'test_resnet'"),
        ("learn --backbone test_resnet --weights w.pth --data folder:./all -o x.ckpt", "'w.pth' is not a file"),
        ("learn --backbone test_resnet --weights weights.pth --data folder:./none -o x.ckpt", "nothing is at none"),
        ("learn --backbone test_resnet --weights weights.pth --data npz -o x.ckpt", "lacks what comes after the colon"),
        ("learn BASE --head ldaa", "head='ldaa' is not known; there are aef_ocl, "),
        ("learn BASE --set gamma", "--set 'gamma' must be NAME=VALUE"),
        ("learn BASE --set gama=1", "has no argument 'gama'"),
        ("learn BASE --head aef_ocl --set gamma=-1", "gamma must be"),
        ("learn BASE --shard 3", "shard='3' must be i/n"),
        ("learn BASE --shard 4/4", "there is no shard 4/4"),
        ("learn BASE --device nowhere", "device='nowhere'"),
        ("forget a.ckpt --data folder:./all --heads lda -o x.ckpt", "--heads and --config are for --samples"),
        ("forget a.ckpt --samples a.npz --classes crow -o x.ckpt", "--classes are those of --data"),
        ("predict a.ckpt all/crow/0.png", "a.ckpt' is not a file"),
        ("predict weights.pth nine.png", "'nine.png' is no file"),
        ("predict weights.pth ../all/train/nine.png", "'../all/train/nine.png' is no file"),
        ("predict weights.pth all/crow/0.png", "weights.pth holds no learned head"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: str, expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "--backbone test_resnet --weights weights.pth --data folder:./old -o x.ckpt"
    error = said(capsys, *words.replace("BASE", base).split(), status=2)
    assert expected in error
    assert error.startswith("clkit: ")
    assert len(error.splitlines()) == 1
    assert not Path("x.ckpt").exists()


def test_lightning_reads_the_file(place: Path, new: Any, tmp_path: Path) -> None:
    learn_images(new(), f"folder:{place}/all", tmp_path / "birds.ckpt")
    files = sorted((place / "all").rglob("*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    data = torch.utils.data.TensorDataset(images, torch.arange(4).repeat_interleave(EACH))
    stream = StreamDataModule(Custom(data, data), ClassIncremental(experiences=2))
    module = TimmClassifier("test_resnet", num_classes=5)
    trainer = quiet_trainer(tmp_path, callbacks=[lda := LDA()])
    (numbers,) = trainer.validate(module, datamodule=stream, ckpt_path=tmp_path / "birds.ckpt", verbose=False)
    assert numbers["lda/accuracy"] == 1.0
    assert int(lda.head.counts.sum()) == 24


CALLBACKS: list[dict[str, Any]] = [
    {"class_path": "NMC"},
    {"class_path": "DEUP", "init_args": {"coverage": 0.9, "false_alarm_rate": 0.05}},
]


@pytest.mark.parametrize("source", ["digits:flat", "digits"])
def test_a_run_answers_with_set_and_novelty(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = run_settings(source, CALLBACKS, preprocessing={"size": None if source == "digits:flat" else 32})
    if source == "digits":  # a network whose number of outputs the data had said
        settings["model"]["init_args"] = {"backbone": "test_resnet", "model_kwargs": {"in_chans": 1}}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "mine.yaml"]) == 0
    file = next(Path("runs").rglob("last.ckpt"))
    printed = said(capsys, "predict", file, f"{source}/test/3", f"{source}/test/4", "--top", "1")
    lines = printed.splitlines()
    assert [f"{source}/test/{row}" in line for line, row in zip(lines, (3, 4), strict=True)] == [True, True]
    for line in lines:
        best, classes, novelty = line.split("; ")
        assert classes.startswith("set {")
        assert best.split()[1] in classes
        assert novelty.startswith("novelty ")
    with pytest.raises(ArgumentError, match="was not written by clkit learn"):
        learn_images(file, "digits:flat", tmp_path / "x.ckpt")
