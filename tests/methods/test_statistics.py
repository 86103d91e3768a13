"""Sums over a stream against NumPy on all data at once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ConfigurationError, StateError
from clkit.methods import FeatureStatistics, _checks

ALL = {"gram": True, "squares": True, "class_grams": True, "scatter": True}
NAMES = ("scatter", "classes", "counts", "sums", "means", "squares", "deviations", "gram", "class_grams")


def sample(rows: int = 60, width: int = 5, ids: tuple[int, ...] = (1, 4, 9), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    targets = torch.tensor(ids)[torch.randint(len(ids), (rows,), generator=generator)]
    return features, targets


def filled(features: Tensor, targets: Tensor, batch: int = 1000, **parts: Any) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], **(parts or ALL))
    for start in range(0, len(features), batch):
        statistics.update(features[start : start + batch], targets[start : start + batch])
    return statistics


def by_numpy(features: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    x, y = features.double().numpy(), targets.numpy()
    ids = np.unique(y)
    of = [x[y == c] for c in ids]
    return {
        "scatter": sum(((f - f.mean(0)).T @ (f - f.mean(0)) for f in of), np.zeros((x.shape[1],) * 2)),
        "classes": ids,
        "counts": np.array([len(f) for f in of]),
        "sums": np.array([f.sum(0) for f in of]),
        "means": np.array([f.mean(0) for f in of]),
        "squares": np.array([((f - f.mean(0)) ** 2).sum(0) for f in of]),
        "deviations": np.array([f.std(0, ddof=1) if len(f) > 1 else np.zeros(x.shape[1]) for f in of]),
        "gram": x.T @ x,
        "class_grams": np.array([f.T @ f for f in of]),
    }


def assert_equals_numpy(statistics: FeatureStatistics, features: Tensor, targets: Tensor, rtol: float = 1e-12) -> None:
    for name, expected in by_numpy(features, targets).items():
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(
            getattr(statistics, name).numpy(), expected, rtol=rtol, atol=rtol * scale, err_msg=name
        )


def bits(module: torch.nn.Module) -> dict[str, bytes]:
    return {
        key: value.cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        for key, value in module.state_dict().items()
    }


# Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 10, 60, 7])
def test_sums_equal_numpy_for_any_batch_size(batch: int) -> None:
    features, targets = sample()
    assert_equals_numpy(filled(features, targets, batch), features, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_of_large_batches_of_many_classes_equal_numpy(dtype: torch.dtype) -> None:
    features, targets = sample(rows=450, width=64, ids=tuple(range(0, 60, 3)), seed=3)
    statistics = filled(features, targets, 200, dtype=dtype, **ALL)
    assert_equals_numpy(statistics, features, targets, 1e-12 if dtype == torch.float64 else 2e-6)
    statistics.subtract(features[:250], targets[:250])
    assert_equals_numpy(statistics, features[250:], targets[250:], 1e-11 if dtype == torch.float64 else 1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_sums_do_not_depend_on_split_order_or_ids(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 5000), min_size=1, max_size=6, unique=True))
    rows = data.draw(st.integers(1, 30))
    features, targets = sample(rows, 3, tuple(ids), seed=data.draw(st.integers(0, 99)))
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    statistics = FeatureStatistics(3, **ALL)
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        part = order[start:stop]
        statistics.update(features[part], targets[part])
    assert_equals_numpy(statistics, features, targets)


@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_deviations_keep_their_digits_far_from_zero(batch: int) -> None:
    features, targets = sample(1000, 4)
    features = features + 1e6
    statistics = filled(features, targets, batch, squares=True)
    expected = by_numpy(features, targets)
    np.testing.assert_allclose(statistics.means.numpy(), expected["means"], rtol=1e-12)
    np.testing.assert_allclose(statistics.deviations.numpy(), expected["deviations"], rtol=1e-12)
    np.testing.assert_allclose(statistics.sums.numpy(), expected["sums"], rtol=1e-12)


def test_constant_features_have_no_deviation() -> None:
    features = torch.full((500, 3), 0.1, dtype=torch.float32)
    statistics = filled(features, torch.zeros(500, dtype=torch.long), 7, squares=True)
    assert bool((statistics.deviations >= 0).all())
    assert float(statistics.deviations.max()) <= 1e-12 * 0.1


def test_sums_of_float32_features_are_exact() -> None:
    features = torch.rand(5000, 2) * 1000
    statistics = filled(features, torch.zeros(5000, dtype=torch.long), 64, sums=True)
    exact = [sum(int(v * 2**40) for v in column.double().tolist()) / 2**40 for column in features.T]
    assert statistics.sums[0].tolist() == exact


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_targets_of_any_integer_type(dtype: torch.dtype) -> None:
    features, targets = sample()
    assert_equals_numpy(filled(features, targets.to(dtype)), features, targets)


def test_float32_sums_stay_float32_and_are_close() -> None:
    features, targets = sample()
    statistics = filled(features, targets, 10, dtype=torch.float32, **ALL)
    assert statistics.gram.dtype == statistics.sums.dtype == torch.float32
    assert_equals_numpy(statistics, features, targets, rtol=1e-5)


def test_autocast_and_inference_mode_change_no_bit() -> None:
    features, targets = sample()
    features = features.float()
    expected = bits(filled(features, targets, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bits(filled(features, targets, 10)) == expected
    with torch.inference_mode():
        statistics = filled(features * 1, targets * 1, 10)
    statistics.update(features[:0], targets[:0])
    assert bits(statistics) == expected
    statistics.update(features, targets)  # would raise on a tensor born in inference mode


def test_state_does_not_grow_with_samples() -> None:
    def size(rows: int) -> int:
        file = io.BytesIO()
        features, targets = sample(rows)
        targets[:3] = torch.tensor([1, 4, 9])
        torch.save(filled(features, targets).state_dict(), file)
        return len(file.getvalue())

    assert size(20) == size(2000)


def test_a_nearest_mean_state_has_the_size_that_the_method_needs() -> None:
    features, targets = sample()
    state = filled(features, targets, sums=True).state_dict()
    size = sum(state[name].numel() * state[name].element_size() for name in ("counts", "sums"))
    assert size == 3 * (5 * 8 + 8)


# Merge and subtract ---------------------------------------------------------------------------------------------


def test_merged_halves_equal_the_union() -> None:
    features, targets = sample()
    targets[30:] += 3  # classes that only one half has
    first, second = filled(features[:30], targets[:30], 7), filled(features[30:], targets[30:], 9)
    untouched = bits(second)
    first.merge(second)
    assert_equals_numpy(first, features, targets)
    assert bits(second) == untouched


def test_merging_into_nothing_gives_the_same_bits() -> None:
    statistics = filled(*sample())
    fresh = FeatureStatistics(5, **ALL)
    fresh.merge(statistics)
    assert bits(fresh) == bits(statistics)


def test_merging_with_itself_doubles() -> None:
    features, targets = sample()
    statistics = filled(features, targets)
    statistics.merge(statistics)
    assert_equals_numpy(statistics, torch.cat([features, features]), torch.cat([targets, targets]))


@pytest.mark.parametrize(
    "other", [FeatureStatistics(4, **ALL), FeatureStatistics(5), torch.nn.Linear(5, 2)], ids=["width", "parts", "type"]
)
def test_unlike_statistics_do_not_merge(other: Any) -> None:
    statistics = filled(*sample())
    before = bits(statistics)
    with pytest.raises(ArgumentError):
        statistics.merge(other)
    assert bits(statistics) == before


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(0, 40), st.floats(-1e4, 1e4))
def test_subtract_equals_a_stream_without_the_rows(seed: int, count: int, offset: float) -> None:
    features, targets = sample(40, 3, seed=seed)
    features = features + offset
    statistics = filled(features, targets, 7)
    statistics.subtract(features[:count], targets[:count])
    expected = by_numpy(features[count:], targets[count:])
    assert statistics.classes.tolist() == expected["classes"].tolist()
    assert statistics.counts.tolist() == expected["counts"].tolist()
    if count < 40:
        scale = 1 + abs(offset)
        np.testing.assert_allclose(statistics.means.numpy(), expected["means"], rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(statistics.squares.numpy(), expected["squares"], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(statistics.gram.numpy(), expected["gram"], rtol=1e-11, atol=1e-11 * scale**2)
    else:
        assert not statistics.gram.any()


def test_subtract_leaves_no_deviation_for_one_row() -> None:
    features = torch.tensor([[0.1, 0.2], [0.3, 0.9], [0.7, 0.4]], dtype=torch.float64)
    statistics = filled(features, torch.tensor([2, 2, 2]), squares=True)
    statistics.subtract(features[1:], torch.tensor([2, 2]))
    assert statistics.squares.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("targets", [[1, 1, 1], [7], [4, 1, 1, 1]])
def test_subtracting_more_than_there_is_changes_nothing(targets: list[int]) -> None:
    statistics = filled(torch.ones(4, 2), torch.tensor([1, 1, 4, 4]))
    before = bits(statistics)
    with pytest.raises(BatchError, match="class"):
        statistics.subtract(torch.ones(len(targets), 2), torch.tensor(targets))
    assert bits(statistics) == before


# Batches that are refused ---------------------------------------------------------------------------------------

GOOD = torch.ones(3, 5)
IDS = torch.tensor([0, 1, 1])


def with_value(value: float) -> Tensor:
    features = GOOD.clone()
    features[1, 2] = value
    return features


REFUSED = {
    "nan": (with_value(torch.nan), IDS, r"rows \[1\]"),
    "inf": (with_value(torch.inf), IDS, r"rows \[1\]"),
    "-inf": (with_value(-torch.inf), IDS, r"rows \[1\]"),
    "squares overflow": (with_value(0.0).double() * 0 + 1e200, IDS, "1e.100"),
    "narrow": (GOOD[:, :4], IDS, r"\(B, 5\)"),
    "one-dimensional": (GOOD[0], IDS[:1], r"\(B, 5\)"),
    "images": (GOOD[:, :, None, None], IDS, r"\(B, 5\)"),
    "integers as features": (GOOD.long(), IDS, "floating-point"),
    "list as features": (GOOD.tolist(), IDS, "tensor"),
    "negative": (GOOD, torch.tensor([0, -2, 1]), "-2 in row 1"),
    "too large": (GOOD, torch.tensor([0, 1, 65536]), "65536 in row 2"),
    "float targets": (GOOD, torch.tensor([0.0, 1.5, 1.0]), "integer"),
    "whole floats": (GOOD, torch.tensor([0.0, 1.0, 1.0]), "integer"),
    "bool": (GOOD, torch.tensor([True, False, True]), "integer"),
    "short": (GOOD, IDS[:2], r"\(3,\)"),
    "column": (GOOD, IDS[:, None], r"\(3,\)"),
    "list as targets": (GOOD, IDS.tolist(), "tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("verb", ["update", "subtract"])
def test_a_bad_batch_changes_nothing(case: str, verb: str) -> None:
    features, targets, message = REFUSED[case]
    statistics = filled(GOOD, IDS)
    before = bits(statistics)
    with pytest.raises(BatchError, match=message):
        getattr(statistics, verb)(features, targets)
    assert bits(statistics) == before


def test_empty_batches_change_nothing() -> None:
    statistics = filled(*sample())
    before = bits(statistics)
    statistics.update(torch.empty(0, 5), torch.empty(0, dtype=torch.long))
    statistics.update(torch.ones(2, 5), torch.tensor([-1, -1]))
    statistics.subtract(torch.empty(0, 5), torch.empty(0, dtype=torch.long))
    assert bits(statistics) == before


class TestWithoutSynchronisation:
    """What happens on an accelerator, played on the CPU: values cannot be looked at before the update."""

    @pytest.fixture(autouse=True)
    def _far_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_checks, "_HOSTS", ())

    def test_a_good_batch_gives_the_same_values(self) -> None:
        features, targets = sample()
        assert_equals_numpy(filled(features, targets, 7), features, targets)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_bad_batch_is_masked_and_named_at_the_next_reading(self, value: float) -> None:
        features, targets = sample(20)
        statistics, expected = filled(features, targets, 20), filled(features, targets, 20)
        bad = features[:4].clone()
        bad[2, 1] = value
        statistics.update(bad, torch.tensor([1, 4, 9, 77]))  # 77 is new
        statistics.update(bad, torch.tensor([1, 4, 9, 9]))
        with pytest.raises(BatchError, match="batch number 2 "):
            statistics.check()
        assert bits(statistics) == bits(expected)  # and no error a second time

    @pytest.mark.parametrize(
        "read",
        [
            lambda s: s.classes,
            lambda s: s.samples,
            lambda s: s.means,
            lambda s: s.gram,
            lambda s: s.state_dict(),
            lambda s: s.merge(filled(*sample(20))),
            lambda s: filled(*sample(20)).merge(s),
        ],
    )
    def test_every_reader_says_so(self, read: Callable[[FeatureStatistics], Any]) -> None:
        statistics = filled(*sample(20))
        statistics.update(torch.full((1, 5), torch.nan), torch.tensor([1]))
        with pytest.raises(BatchError, match="batch number 2 "):
            read(statistics)

    def test_a_class_that_came_with_a_bad_batch_starts_afresh(self) -> None:
        features, targets = sample(20)
        statistics, expected = FeatureStatistics(5, **ALL), filled(features, targets, 20)
        statistics.update(features * torch.nan, targets)
        statistics.update(features, targets)
        with pytest.raises(BatchError, match="batch number 1 "):
            statistics.check()
        assert bits(statistics) == bits(expected)

    def test_labels_are_still_checked_at_once(self) -> None:
        with pytest.raises(BatchError, match="-2"):
            FeatureStatistics(5).update(GOOD, torch.tensor([0, 1, -2]))


# Saving, loading, moving ----------------------------------------------------------------------------------------


def test_saved_loaded_and_continued_equals_uninterrupted() -> None:
    features, targets = sample()
    whole = filled(features[:30], targets[:30], 7)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = FeatureStatistics(5, **ALL)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for statistics in (whole, resumed):
        statistics.update(features[30:], targets[30:])
    assert bits(resumed) == bits(whole)


def test_a_gram_of_whole_pages_continues_with_the_same_bits_in_the_same_layout() -> None:
    features, targets = sample(rows=40, width=512)
    whole = filled(features[:30], targets[:30], 7, gram=True)
    loaded, copied = FeatureStatistics(512, gram=True), copy.deepcopy(whole)
    loaded.load_state_dict(whole.state_dict())
    merged = FeatureStatistics(512, gram=True)
    merged.merge(whole)
    for statistics in (whole, loaded, copied, merged):
        statistics.update(features[30:], targets[30:])
        assert statistics.lower_gram().stride() == whole.lower_gram().stride()
    assert bits(loaded) == bits(copied) == bits(merged) == bits(whole)
    np.testing.assert_allclose(whole.gram.numpy(), features.numpy().T @ features.numpy(), rtol=1e-12, atol=1e-11)


def test_loading_shrinks_and_does_not_share_memory() -> None:
    small, large = filled(*sample(9, ids=(3,))), filled(*sample())
    state = small.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    large.load_state_dict(state)
    assert bits(large) == bits(small)
    large.update(*sample())
    small.update(*sample())
    assert all(torch.equal(state[key], before[key]) for key in state)


def _changed(**changes: Any) -> dict[str, Any]:
    state = dict(filled(*sample()).state_dict())
    state.update(changes)
    return {key: value for key, value in state.items() if value is not None}


DAMAGED = {
    "missing": ({"gram": None}, "has no 'gram'"),
    "surplus": ({"other": torch.zeros(1)}, "the unknown 'other'"),
    "format": ({"format": torch.tensor(99)}, "format must be .* equal to 1, .* has an int64 tensor 99; use the clkit"),
    "width": ({"sums": torch.zeros(3, 4, dtype=torch.float64)}, r"sums must be a float64 tensor of shape \(3, 5\)"),
    "too large": ({"classes": torch.tensor([1, 4, 70000])}, "classes must be .* ids from 0 to 65535"),
    "count": ({"counts": torch.tensor([1, 0, 9])}, "counts must be .* from 1"),
    "asymmetric": ({"gram": torch.arange(25.0).reshape(5, 5).double()}, "gram must be .* symmetric"),
}  # whatever holds for every tensor of a saved state is tested in test_bad_files.py


@pytest.mark.parametrize("case", DAMAGED)
def test_a_state_that_does_not_fit_changes_nothing(case: str) -> None:
    changes, message = DAMAGED[case]
    statistics = filled(*sample(seed=1))
    before = bits(statistics)
    with pytest.raises(StateError, match=message):
        statistics.load_state_dict(_changed(**changes))
    assert bits(statistics) == before


def test_casts_leave_the_sums_alone() -> None:
    statistics = filled(*sample())
    before = bits(statistics)
    for cast in ("half", "bfloat16", "float", "double"):
        getattr(torch.nn.Sequential(statistics), cast)()
    statistics.to(torch.float16)
    assert bits(statistics) == before
    assert statistics.gram.dtype == torch.float64


def test_device_moves_are_followed() -> None:
    statistics = filled(*sample())
    moved: list[torch.device] = []
    statistics._move = moved.append
    for device in ("meta", "mps"):  # no values or no float64 there: stay
        statistics._apply(lambda t, device=device: _Elsewhere(device))
    assert moved == []
    statistics._apply(lambda t: _Elsewhere("cuda:1"))
    assert moved == [torch.device("cuda:1")]


class _Elsewhere:
    """Stands in for a tensor on a device that this machine lacks."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def test_copies_are_independent() -> None:
    statistics = filled(*sample())
    other = copy.deepcopy(statistics)
    before = bits(statistics)
    other.update(*sample())
    assert bits(statistics) == before


@pytest.mark.parametrize(
    "arguments",
    [{"width": 0}, {"width": 2.0}, {"width": 2, "max_classes": 0}, {"width": 2, "dtype": torch.float16},
     {"width": 2, "sums": False, "squares": True}],
)  # fmt: skip
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        FeatureStatistics(**arguments)


def test_a_part_that_is_not_kept_is_named() -> None:
    with pytest.raises(ConfigurationError, match="gram=True"):
        _ = FeatureStatistics(3).gram
