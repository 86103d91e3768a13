"""The bank of gallery features: searching, what is refused, and files that are whole or not there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clkit.errors import (
    ArgumentError,
    BatchError,
    ConfigurationError,
    NotFittedError,
    SignatureError,
    StateError,
    WriteError,
)
from clkit.methods import FeatureBank, SimplexHead, feature_bank

NAN = float("nan")
D, SIGNATURE = 5, SimplexHead(6).signature()


def rows(number: int, seed: int = 0, width: int = D) -> Tensor:
    return 3 * torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def filled(number: int = 50, **options: Any) -> FeatureBank:
    bank = FeatureBank(D, SIGNATURE, **options)
    half = number // 2
    labels = torch.arange(number) % 7
    names = [f"{row}.png" for row in range(half)]
    bank.add(rows(number)[:half], labels[:half], names=names, model="phi_1", signature=SIGNATURE)
    bank.add(rows(number)[half:], labels[half:].int(), model="phi_2", signature=SIGNATURE)
    return bank


def same(one: FeatureBank, other: FeatureBank) -> bool:
    plain = one.names == other.names and one.models == other.models and one.signature == other.signature
    tensors = ((one.features, other.features), (one.labels, other.labels))
    alike = all(torch.equal(a, b) for a, b in tensors) and one.storage == other.storage
    everything = torch.arange(len(one))
    return plain and alike and one.model_of(everything) == other.model_of(everything)


def naive(queries: Tensor, gallery: Tensor, k: int) -> tuple[Any, Any]:
    q, g = queries.double().numpy(), gallery.double().numpy()
    cosines = q @ g.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(g, axis=1)[None]
    order = np.argsort(-cosines, axis=1)[:, :k]
    return np.take_along_axis(cosines, order, axis=1), order


# ---- searching


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize("blocks", [(1024, 16384), (3, 4), (2, 50)])
def test_a_search_finds_what_a_full_sort_finds(
    k: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_bank, "_QUERIES", blocks[0])
    monkeypatch.setattr(feature_bank, "_ROWS", blocks[1])
    queries = rows(8, seed=1)
    found = filled().search(queries, k, signature=SIGNATURE)
    scores, order = naive(queries, rows(50), k)
    assert np.array_equal(found.rows.numpy(), order)
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-6)
    assert torch.equal(found.labels, found.rows % 7)
    assert found.scores.dtype == torch.float32


def test_half_precision_takes_half_the_room_and_moves_cosines_by_little() -> None:
    width = 1023
    gallery, queries = rows(200, width=width), rows(20, seed=1, width=width)
    banks = {}
    for storage in ("float32", "float16"):
        banks[storage] = FeatureBank(width, SIGNATURE, storage=storage)
        banks[storage].add(gallery, model="a", signature=SIGNATURE)
    wide, narrow = banks["float32"].features, banks["float16"].features
    assert narrow.element_size() * 2 == wide.element_size()
    found = banks["float16"].search(queries, 200, signature=SIGNATURE)
    exact = naive(queries, gallery, 200)[0]
    assert np.abs(found.scores.numpy() - exact).max() < 1e-4


def test_autocast_and_inference_mode_change_nothing() -> None:
    queries, expected = rows(8, seed=1), filled().search(rows(8, seed=1), 3, signature=SIGNATURE)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        bank = filled()
        found = bank.search(queries, 3, signature=SIGNATURE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    bank.add(rows(3), model="later", signature=SIGNATURE)  # no tensor of inference mode is in the way


def test_a_bank_grows_row_by_row_as_at_once() -> None:
    one, other = FeatureBank(D, SIGNATURE), FeatureBank(D, SIGNATURE)
    everything = rows(40)
    one.add(everything, torch.arange(40), model="a", signature=SIGNATURE)
    for row in range(40):
        other.add(everything[row : row + 1], torch.tensor([row]), model="a", signature=SIGNATURE)
    other.add(everything[:0], torch.arange(0), model="a", signature=SIGNATURE)
    assert same(one, other)
    assert one.models == {"a": 40}


def test_rows_say_which_model_wrote_them() -> None:
    bank = filled()
    assert bank.models == {"phi_1": 25, "phi_2": 25}
    assert bank.model_of(torch.tensor([0, 24, 25])) == ["phi_1", "phi_1", "phi_2"]
    assert bank.names[3] == "3.png"
    assert bank.names[30] == ""
    torch.testing.assert_close(bank.features.norm(dim=1), torch.ones(50))


def test_rows_without_labels_and_features_without_direction() -> None:
    bank = FeatureBank(D, SIGNATURE)
    bank.add(torch.zeros(2, D), model="a", signature=SIGNATURE)
    assert bank.labels.tolist() == [-1, -1]
    assert bank.search(rows(1), 2, signature=SIGNATURE).scores.tolist() == [[0.0, 0.0]]
    assert bank.search(rows(0), 2, signature=SIGNATURE).rows.shape == (0, 2)


def test_faiss_where_it_is_and_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = filled(storage="float16"), rows(8, seed=1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigurationError, match="backend='faiss' needs the package faiss, which is not installed"):
        bank.search(queries, 3, signature=SIGNATURE, backend="faiss")

    def knn(xq: Any, xb: Any, k: int, metric: str) -> tuple[Any, Any]:
        """Stands in for the function of that library: arrays of float32 in C order, inner products."""
        assert metric == "inner product"
        assert all(each.dtype == np.float32 and each.flags.c_contiguous for each in (xq, xb))
        order = np.argsort(-(xq @ xb.T), axis=1)[:, :k]
        return np.take_along_axis(xq @ xb.T, order, axis=1), order

    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(knn=knn, METRIC_INNER_PRODUCT="inner product"))
    found = bank.search(queries, 3, signature=SIGNATURE, backend="faiss")
    expected = bank.search(queries, 3, signature=SIGNATURE)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.scores, expected.scores)


# ---- what is refused

REFUSED: list[tuple[Callable[[FeatureBank], object], type[Exception], str]] = [
    (lambda b: b.add(rows(2), model="c", signature="axis-simplex-v1/7"), SignatureError, "'axis-simplex-v1/7'"),
    (lambda b: b.search(rows(2), signature="axis-cube-v1/6"), SignatureError, "the queries are of a model with"),
    (lambda b: b.search(rows(2), signature=None), SignatureError, "None"),  # type: ignore[arg-type]  # what is refused
    (lambda b: b.add(rows(2, width=6), model="c", signature=SIGNATURE), BatchError, r"features must be .*\(B, 5\)"),
    (
        lambda b: b.search(rows(2, width=6), signature=SIGNATURE),
        BatchError,
        r"queries must be .*\(B, 5\), got .*\(2, 6\)",
    ),
    (lambda b: b.search(rows(2)[0], signature=SIGNATURE), BatchError, "queries must be"),
    (
        lambda b: b.add(rows(2) * NAN, model="c", signature=SIGNATURE),
        BatchError,
        r"rows \[0, 1\] .* not finite",
    ),
    (lambda b: b.search(rows(2) / 0, signature=SIGNATURE), BatchError, "not finite"),
    (lambda b: b.add(rows(2), torch.arange(3), model="c", signature=SIGNATURE), BatchError, "labels must have shape"),
    (lambda b: b.add(rows(2), torch.ones(2), model="c", signature=SIGNATURE), BatchError, "labels must be integers"),
    (lambda b: b.add(rows(2), names=["a"], model="c", signature=SIGNATURE), BatchError, "names must be 2 strings"),
    (lambda b: b.add(rows(2), names=["a", 1], model="c", signature=SIGNATURE), BatchError, "names must be 2 strings"),
    (lambda b: b.add(rows(2), model="", signature=SIGNATURE), ArgumentError, "model must be the id"),
    (lambda b: b.search(rows(2), 51, signature=SIGNATURE), ArgumentError, "k must be at most 50"),
    (lambda b: b.search(rows(2), 0, signature=SIGNATURE), ArgumentError, "k must be an integer of at least 1"),
    (lambda b: b.search(rows(2), signature=SIGNATURE, backend="gpu"), ArgumentError, "backend must be"),  # type: ignore[arg-type]  # what is refused
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_is_refused_leaves_the_bank_as_it_was(case: int) -> None:
    call, error, says = REFUSED[case]
    bank = filled()
    with pytest.raises(error, match=says):
        call(bank)
    assert same(bank, filled())


def test_an_empty_bank_has_nothing_to_find() -> None:
    with pytest.raises(NotFittedError, match="the bank is empty"):
        FeatureBank(D, SIGNATURE).search(rows(1), signature=SIGNATURE)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ArgumentError, match="device must be one that torch has here, got 'nowhere'"):
        FeatureBank(D, SIGNATURE, device="nowhere")
    with pytest.raises(ArgumentError, match="width must be an integer of at least 1, got 0"):
        FeatureBank(0, SIGNATURE)
    with pytest.raises(ArgumentError, match="signature must say what the models share"):
        FeatureBank(D, "")
    with pytest.raises(ArgumentError, match="storage must be one of 'float32', 'float16', got 'int8'"):
        FeatureBank(D, SIGNATURE, storage="int8")  # type: ignore[arg-type]  # what is refused


# ---- files


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("number", [0, 2, 50])
def test_a_saved_bank_comes_back_to_the_bit(storage: Any, number: int, tmp_path: Path) -> None:
    bank = filled(number, storage=storage)
    if number == 50:
        bank.add(rows(1), model="phi_3", signature=SIGNATURE)  # now there is room for more rows
    bank.save(tmp_path / "deep" / "gallery.pt")
    loaded = FeatureBank.load(tmp_path / "deep" / "gallery.pt")
    assert same(loaded, bank)
    kept = len(bank) * D * loaded.features.element_size()
    assert (tmp_path / "deep" / "gallery.pt").stat().st_size < kept + 8000
    loaded.add(rows(3), model="phi_4", signature=SIGNATURE)
    assert len(loaded) == len(bank) + 3


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "use the clkit release that wrote it"),
    ({"storage": "float64"}, "'storage' must be 'float32' or 'float16'"),
    ({"storage": "float16"}, "features must be a float16 tensor"),
    ({"features": torch.full((50, D), NAN)}, "features must be"),
    ({"features": torch.full((50, D), 2.0)}, "features must be"),
    ({"features": torch.zeros(50, 0)}, "of width 0"),
    ({"labels": torch.zeros(49, dtype=torch.int64)}, "labels must be"),
    ({"model_of": torch.full((50,), 2)}, "are of 2 models; the file is damaged"),
    ({"models": ["a", "a"]}, "are of 2 models; the file is damaged"),
    ({"names": ["a"]}, "have 1 names"),
    ({"names": [1] * 50}, "names"),
    ({"signature": ""}, "the file is damaged"),
    ({"signature": None}, "signature must be str"),
    ({"more": 1}, "has the unknown 'more'"),
]


@pytest.mark.parametrize(("changes", "says"), DAMAGED)
def test_files_that_are_damaged_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    filled().save(tmp_path / "gallery.pt")
    torch.save({**torch.load(tmp_path / "gallery.pt", weights_only=True), **changes}, tmp_path / "gallery.pt")
    with pytest.raises(StateError, match=says):
        FeatureBank.load(tmp_path / "gallery.pt")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a bank")
    with pytest.raises(StateError, match="cannot be read as a checkpoint"):
        FeatureBank.load(tmp_path / "text.pt")
    with pytest.raises(ArgumentError, match="not a file"):
        FeatureBank.load(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, tmp_path / "run.ckpt")
    with pytest.raises(StateError, match=r"FeatureBank in .*run\.ckpt"):
        FeatureBank.load(tmp_path / "run.ckpt")


def test_a_write_that_fails_leaves_file_and_bank_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled().save(tmp_path / "gallery.pt")
    bank = filled()
    bank.add(rows(3), model="phi_3", signature=SIGNATURE)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(WriteError, match="No space left on device; the file of that name is unchanged"):
            bank.save(tmp_path / "gallery.pt")
    assert same(FeatureBank.load(tmp_path / "gallery.pt"), filled())
    assert [each.name for each in tmp_path.iterdir()] == ["gallery.pt"]
    assert len(bank) == 53


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the writer is killed in a fork of its own, which this system has not"
)
@pytest.mark.parametrize("moment", ["half of the draft is written", "the draft is whole", "it has replaced the file"])
def test_a_bank_killed_while_written_is_whole_or_as_before(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "gallery.pt"
    filled().save(path)
    larger = filled()
    larger.add(rows(30), model="phi_3", signature=SIGNATURE)
    child = os.fork()
    if child == 0:  # dies by the signal, at the moment
        write, replace = Path.write_bytes, Path.replace

        def half(draft: Path, data: Any) -> int:
            write(draft, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        def killed(draft: Path, target: Any) -> Path:
            if moment == "it has replaced the file":
                replace(draft, target)
            os.kill(os.getpid(), signal.SIGKILL)
            return draft

        name, dying = ("write_bytes", half) if moment == "half of the draft is written" else ("replace", killed)
        setattr(Path, name, dying)
        larger.save(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert same(FeatureBank.load(path), larger if moment == "it has replaced the file" else filled())
    larger.save(path)  # what a killed writer left behind is in nobody's way
    assert same(FeatureBank.load(path), larger)
