"""What every head must do, whatever its mathematics."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.exceptions
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ClkitError, ConfigurationError, NotFittedError, StateError
from clkit.methods import AnalyticHead, FeatureStatistics, LDAHead, NearestMeanHead, _checks
from clkit.methods.heads.base import Head

D = 6
MAKERS: dict[str, Callable[..., Head]] = {
    "ridge": lambda **o: AnalyticHead(D, **o),
    "ridge, bias": lambda **o: AnalyticHead(D, bias=True, **o),
    "ridge, lift": lambda **o: AnalyticHead(D, expansion_dim=11, **o),
    "ridge, sigmoid lift, bias": lambda **o: AnalyticHead(D, expansion_dim=11, activation="sigmoid", bias=True, **o),
    "ridge, pfg": lambda **o: AnalyticHead(D, balance="pfg", **o),
    "ridge, pfg, lift": lambda **o: AnalyticHead(D, balance="pfg", expansion_dim=11, **o),
    "ridge, expected, bias": lambda **o: AnalyticHead(D, balance="expected", bias=True, **o),
    "ridge, reweight": lambda **o: AnalyticHead(D, balance="reweight", **o),
    "recursive": lambda **o: AnalyticHead(D, solver="recursive", **o),
    "recursive, pfg, lift": lambda **o: AnalyticHead(D, solver="recursive", balance="pfg", expansion_dim=11, **o),
    "recursive, expected": lambda **o: AnalyticHead(D, solver="recursive", balance="expected", **o),
    "janson": lambda **o: NearestMeanHead(D, metric="janson", **o),
    "euclidean": lambda **o: NearestMeanHead(D, metric="euclidean", **o),
    "icarl": lambda **o: NearestMeanHead(D, metric="icarl", **o),
    "cosine": lambda **o: NearestMeanHead(D, metric="cosine", **o),
    "lda": lambda **o: LDAHead(D, shrinkage=0.1, **o),
}
EXACT = [name for name in MAKERS if not name.startswith("recursive")]


def sample(rows: int = 50, seed: int = 0, ids: tuple[int, ...] = (1, 4, 9)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(ids), (rows,), generator=generator)
    features = torch.randn(rows, D, generator=generator, dtype=torch.float64) + which[:, None].double()
    return features, torch.tensor(ids)[which]


def bits(head: torch.nn.Module) -> dict[str, Any]:
    return {
        key: value.cpu().numpy().tobytes() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in head.state_dict().items()
    }


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Head]:
    return MAKERS[request.param]


@pytest.fixture(params=EXACT)
def make_exact(request: pytest.FixtureRequest) -> Callable[..., Head]:
    return MAKERS[request.param]


def learned(make: Callable[..., Head], batch: int = 1000, **options: Any) -> Head:
    head = make(**options)
    features, targets = sample()
    for start in range(0, len(features), batch):
        head.update(features[start : start + batch], targets[start : start + batch])
    return head


# Scores and predictions -----------------------------------------------------------------------------------------


def test_columns_are_class_ids(make: Callable[..., Head]) -> None:
    head = learned(make)
    features, _ = sample(20, seed=1)
    scores = head(features)
    assert scores.shape == (20, 10)
    assert head.classes.tolist() == [1, 4, 9]
    seen = torch.isin(torch.arange(10), head.classes)
    assert bool(torch.isneginf(scores[:, ~seen]).all())
    assert bool(scores[:, seen].isfinite().all())
    assert torch.equal(scores[:, seen], head.scores_seen(features))
    assert torch.equal(head.predict(features), scores.argmax(1))
    assert head.predict(features).dtype == torch.int64


def test_preallocated_columns_change_no_score(make: Callable[..., Head]) -> None:
    features, _ = sample(20, seed=1)
    narrow, wide = learned(make), learned(make, num_classes=15)
    assert wide(features).shape == (20, 15)
    assert torch.equal(wide(features)[:, :10], narrow(features))
    assert bool(torch.isneginf(wide(features)[:, 10:]).all())
    assert torch.equal(wide.predict(features), narrow.predict(features))


def test_before_anything_is_learned(make: Callable[..., Head]) -> None:
    features, _ = sample(3)
    assert make()(features).shape == (3, 0)
    assert make()(features.float()).dtype == torch.float32
    scores = make(num_classes=4)(features)
    assert scores.shape == (3, 4)
    assert bool(torch.isneginf(scores).all())
    assert make().classes.tolist() == []
    weight, bias = make().linear_readout()
    assert weight.shape[0] == bias.shape[0] == 0
    with pytest.raises(NotFittedError) as raised:
        make().predict(features)
    assert isinstance(raised.value, ClkitError)
    assert isinstance(raised.value, sklearn.exceptions.NotFittedError)


def test_scores_come_in_the_precision_of_the_features(make: Callable[..., Head]) -> None:
    head = learned(make)
    features, _ = sample(20, seed=1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        low = features.to(dtype)
        scores, exact = head(low), head(low.double())
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(scores, exact.to(scores.dtype))
        assert torch.equal(head.predict(low), head.predict(low.double()))


def test_batch_of_one_and_of_none(make: Callable[..., Head]) -> None:
    head = make()
    features, targets = sample()
    for row in range(len(features)):
        head.update(features[row : row + 1], targets[row : row + 1])
    assert head.predict(features[:1]).shape == (1,)
    assert head.predict(features[:0]).shape == (0,)
    assert head(features[:0]).shape == (0, 10)
    torch.testing.assert_close(head(features), learned(make)(features), rtol=1e-9, atol=1e-9)


def test_one_class_of_one_sample(make: Callable[..., Head]) -> None:
    head = make()
    head.update(torch.ones(1, D), torch.tensor([2]))
    assert head.predict(torch.randn(4, D)).tolist() == [2] * 4
    assert bool(head.scores_seen(torch.randn(4, D)).isfinite().all())


def test_equal_classes_tie_to_the_lowest_id(make: Callable[..., Head]) -> None:
    features, _ = sample(40)
    head = make()
    for class_id in (7, 2, 5, 11, 3):  # the same samples under five labels
        head.update(features, torch.full((40,), class_id))
    if getattr(head, "solver", "gram") == "gram":  # recursion keeps no sums that could be equal
        for rows in (1, 2, 3, 5, 40):
            assert head.predict(features[:rows]).tolist() == [2] * rows


def test_linear_readout_ranks_like_the_head(make: Callable[..., Head]) -> None:
    head = learned(make)
    features, _ = sample(200, seed=2)
    weight, bias = head.linear_readout()
    design = torch.nn.functional.normalize(features, dim=1) if head.normalizes else head.feature_map(features)
    scores = design @ weight.T + bias
    assert torch.equal(head.classes[scores.argmax(1)], head.predict(features))
    difference = scores - head.scores_seen(features)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-9)


def test_scores_have_a_gradient_in_the_features(make: Callable[..., Head]) -> None:
    features, _ = sample(3)
    features.requires_grad_(True)
    assert torch.autograd.gradcheck(learned(make).scores_seen, (features,))


# Learning -------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", EXACT)
def test_split_order_and_ids_change_nothing(name: str, data: st.DataObject) -> None:
    ids = tuple(sorted(data.draw(st.sets(st.integers(0, 60), min_size=2, max_size=5))))
    features, targets = sample(30, data.draw(st.integers(0, 20)), ids)
    order = torch.tensor(data.draw(st.permutations(range(30))))
    cuts = sorted(data.draw(st.lists(st.integers(0, 30), max_size=4)))
    whole, parts = MAKERS[name](), MAKERS[name]()
    whole.update(features, targets)
    for start, stop in zip([0, *cuts], [*cuts, 30], strict=True):
        parts.update(features[order[start:stop]], targets[order[start:stop]])
    test, _ = sample(10, 77)
    assert torch.equal(whole.classes, parts.classes)
    torch.testing.assert_close(whole(test), parts(test), rtol=1e-9, atol=1e-9)


def test_refreshing_changes_nothing_that_lasts(make: Callable[..., Head]) -> None:
    features, targets = sample()
    often, once = make(), make()
    for start in range(0, 50, 10):
        often.update(features[start : start + 10], targets[start : start + 10])
        once.update(features[start : start + 10], targets[start : start + 10])
        before, random = bits(often), torch.get_rng_state()
        first = often(features)
        often.refresh()
        assert torch.equal(often(features), first)
        assert torch.equal(torch.get_rng_state(), random)
        assert bits(often) == before
    assert torch.equal(often(features), once(features))


def test_a_batch_between_predictions_is_noticed(make: Callable[..., Head]) -> None:
    head = learned(make)
    features, _ = sample(5)
    head(features)
    head.update(torch.ones(1, D), torch.tensor([12]))
    assert head(features).shape == (5, 13)


@pytest.mark.parametrize(
    ("features", "targets"),
    [
        (torch.full((2, D), torch.nan), torch.tensor([1, 1])),
        (torch.ones(2, D + 1), torch.tensor([1, 1])),
        (torch.ones(2, D), torch.tensor([1, -3])),
        (torch.ones(2, D), torch.tensor([1, 10**9])),
        (torch.ones(2, D), torch.tensor([1.0, 2.0])),
        (torch.ones(2, D), torch.tensor([1])),
    ],
    ids=["nan", "width", "negative", "huge", "float", "short"],
)
def test_a_bad_batch_changes_nothing(make: Callable[..., Head], features: Tensor, targets: Tensor) -> None:
    head = learned(make)
    before = bits(head)
    with pytest.raises(BatchError):
        head.update(features, targets)
    assert bits(head) == before


def test_fixed_columns_limit_the_ids(make: Callable[..., Head]) -> None:
    with pytest.raises(BatchError, match="num_classes=4"):
        make(num_classes=4).update(torch.ones(1, D), torch.tensor([4]))


def test_prediction_refuses_bad_features(make: Callable[..., Head]) -> None:
    head = learned(make)
    for features in (torch.ones(2, D + 1), torch.full((2, D), torch.nan), torch.ones(D)):
        for verb in (head.predict, head, head.scores_seen):
            with pytest.raises(BatchError):
                verb(features)


def test_a_masked_batch_is_named_once_and_leaves_no_trace(
    make: Callable[..., Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_checks, "_HOSTS", ())
    head = learned(make)
    expected, (features, _) = bits(head), sample(5)
    for number, read in enumerate(("predict", "state_dict", "synchronize"), start=2):
        head.update(torch.full((2, D), torch.inf), torch.tensor([1, 33]))
        with pytest.raises(BatchError, match=f"batch number {number} "):
            head.predict(features) if read == "predict" else getattr(head, read)()
    assert head.predict(features).shape == (5,)
    assert bits(head) == expected


def test_unlabelled_rows_are_not_learned(make: Callable[..., Head]) -> None:
    features, targets = sample()
    hidden = targets.clone()
    hidden[::2] = -1
    head, expected = make(), make()
    head.update(features, hidden)
    expected.update(features[1::2], targets[1::2])
    assert bits(head) == bits(expected)


# Merge, subtract, reset -----------------------------------------------------------------------------------------


def test_merged_halves_equal_the_union(make_exact: Callable[..., Head]) -> None:
    features, targets = sample()
    first, second = make_exact(), make_exact()
    first.update(features[:20], targets[:20])
    second.update(features[20:], targets[20:])
    first.merge(second)
    torch.testing.assert_close(first(features), learned(make_exact)(features), rtol=1e-9, atol=1e-9)


def test_subtract_equals_never_learned(make_exact: Callable[..., Head]) -> None:
    features, _ = sample()
    extra, extra_targets = sample(10, 5, (4, 30))
    head = learned(make_exact)
    head.update(extra, extra_targets)
    head.subtract(extra, extra_targets)
    assert head.classes.tolist() == [1, 4, 9]
    torch.testing.assert_close(head(features), learned(make_exact)(features), rtol=1e-8, atol=1e-8)
    before = bits(head)
    with pytest.raises(BatchError, match="class 30"):
        head.subtract(extra, extra_targets)
    assert bits(head) == before


def test_unlike_heads_do_not_merge(make_exact: Callable[..., Head]) -> None:
    head = learned(make_exact)
    before = bits(head)
    for other in (AnalyticHead(D, gamma=77.0), NearestMeanHead(D + 1), LDAHead(D, shrinkage=0.77)):
        with pytest.raises(ArgumentError):
            head.merge(other)
    assert bits(head) == before


def test_reset_forgets(make: Callable[..., Head]) -> None:
    head = learned(make)
    head.reset()
    assert bits(head) == bits(make())
    assert head(torch.ones(1, D)).shape == (1, 0)


# State ----------------------------------------------------------------------------------------------------------


def test_saved_and_continued_equals_uninterrupted(make: Callable[..., Head]) -> None:
    head = learned(make)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    features, targets = sample(20, 3, (0, 4, 12))
    assert torch.equal(fresh(features), head(features))
    for one in (head, fresh):
        one.update(features, targets)
    assert bits(fresh) == bits(head)
    assert torch.equal(fresh(features), head(features))


def test_the_options_build_the_same_head(make: Callable[..., Head]) -> None:
    head = learned(make)
    other = type(head)(**head.options)
    other.load_state_dict(head.state_dict())
    features, _ = sample(9)
    assert torch.equal(other(features), head(features))


def test_loading_into_fixed_columns(make: Callable[..., Head]) -> None:
    state = learned(make).state_dict()
    wide = make(num_classes=12)
    wide.load_state_dict(state)
    assert wide(torch.ones(1, D)).shape == (1, 12)
    narrow = make(num_classes=5)
    before = bits(narrow)
    with pytest.raises(StateError, match=r"ids from 0 to 4, .* has an int64 tensor \[1, 4, 9\]"):
        narrow.load_state_dict(state)
    assert bits(narrow) == before


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_of_another_head_is_refused(name: str) -> None:
    head = learned(MAKERS[name])
    before = bits(head)
    for other in MAKERS:
        if other != name:
            with pytest.raises(StateError):
                head.load_state_dict(learned(MAKERS[other]).state_dict())
    assert bits(head) == before


def test_an_incomplete_state_changes_nothing(make: Callable[..., Head]) -> None:
    head = learned(make)
    before = bits(head)
    state = learned(make, 7).state_dict()
    for key in state:
        with pytest.raises(StateError):
            head.load_state_dict({k: v for k, v in state.items() if k != key})
    assert bits(head) == before


def test_casts_and_copies(make: Callable[..., Head]) -> None:
    head = learned(make)
    features, _ = sample(9)
    before, scores = bits(head), head(features)
    head.half().bfloat16().to(torch.float32)
    assert bits(head) == before
    assert torch.equal(head(features), scores)
    other = copy.deepcopy(head)
    other.update(*sample(5))
    assert bits(head) == before
    assert not list(head.buffers())
    assert not list(head.parameters())


def test_works_in_inference_mode_and_autocast(make: Callable[..., Head]) -> None:
    features, targets = sample()
    expected = learned(make)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        head = make()
        head.update(features * 1, targets * 1)
        scores = head(features)
    assert torch.equal(scores, expected(features))
    head.update(*sample(5))
    expected.update(*sample(5))
    assert bits(head) == bits(expected)
    assert torch.equal(head(features), expected(features))


# Shared statistics ----------------------------------------------------------------------------------------------


def test_heads_share_one_set_of_sums() -> None:
    features, targets = sample()
    statistics = FeatureStatistics(D, gram=True, squares=True)
    ridge, lda = AnalyticHead(D, balance="pfg", statistics=statistics), LDAHead(D, statistics=statistics)
    statistics.update(features, targets)
    alone = AnalyticHead(D, balance="pfg"), LDAHead(D)
    for shared, own in zip((ridge, lda), alone, strict=True):
        own.update(features, targets)
        torch.testing.assert_close(shared(features), own(features), rtol=1e-10, atol=1e-10)
        for verb in ("update", "subtract"):
            with pytest.raises(ConfigurationError, match="shares"):
                getattr(shared, verb)(features, targets)
        with pytest.raises(ConfigurationError, match="shares"):
            shared.reset()
        with pytest.raises(ConfigurationError, match="shares"):
            shared.merge(own)


@pytest.mark.parametrize(
    "build",
    [
        lambda: LDAHead(D, statistics=FeatureStatistics(D)),
        lambda: LDAHead(D, statistics=FeatureStatistics(D + 1, gram=True)),
        lambda: AnalyticHead(D, balance="pfg", statistics=FeatureStatistics(D, gram=True)),
        lambda: AnalyticHead(D, bias=True, statistics=FeatureStatistics(D, gram=True)),
        lambda: AnalyticHead(D, expansion_dim=D, statistics=FeatureStatistics(D, gram=True)),
        lambda: AnalyticHead(D, solver="recursive", statistics=FeatureStatistics(D, gram=True)),
    ],
)
def test_sums_that_will_not_do_are_refused(build: Callable[[], Head]) -> None:
    with pytest.raises(ArgumentError):
        build()


def test_numpy_agrees_on_the_class_counts(make: Callable[..., Head]) -> None:
    _, targets = sample()
    assert learned(make, 7).counts.tolist() == np.unique(targets.numpy(), return_counts=True)[1].tolist()
