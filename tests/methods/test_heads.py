"""What every head must do, whatever its mathematics: the public contract in all variants, and what is beyond it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sklearn.exceptions
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ClkitError, ConfigurationError, NotFittedError, StateError
from clkit.methods import AnalyticHead, FeatureStatistics, LDAHead, NearestMeanHead, _checks
from clkit.methods.heads.base import Head
from clkit.testing import Check, Entry, contract

D = 6
MAKERS: dict[str, Callable[..., Head]] = {
    "ridge": AnalyticHead,
    "ridge, bias": partial(AnalyticHead, bias=True),
    "ridge, lift": partial(AnalyticHead, expansion_dim=11),
    "ridge, sigmoid lift, bias": partial(AnalyticHead, expansion_dim=11, activation="sigmoid", bias=True),
    "ridge, pfg": partial(AnalyticHead, balance="pfg"),
    "ridge, pfg, lift": partial(AnalyticHead, balance="pfg", expansion_dim=11),
    "ridge, expected, bias": partial(AnalyticHead, balance="expected", bias=True),
    "ridge, reweight": partial(AnalyticHead, balance="reweight"),
    "recursive": partial(AnalyticHead, solver="recursive"),
    "recursive, pfg, lift": partial(AnalyticHead, solver="recursive", balance="pfg", expansion_dim=11),
    "recursive, expected": partial(AnalyticHead, solver="recursive", balance="expected"),
    "janson": partial(NearestMeanHead, metric="janson"),
    "euclidean": partial(NearestMeanHead, metric="euclidean"),
    "icarl": partial(NearestMeanHead, metric="icarl"),
    "cosine": partial(NearestMeanHead, metric="cosine"),
    "lda": partial(LDAHead, shrinkage=0.1),
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
    return partial(MAKERS[request.param], D)


@pytest.fixture(params=EXACT)
def make_exact(request: pytest.FixtureRequest) -> Callable[..., Head]:
    return partial(MAKERS[request.param], D)


def checks() -> list[Check]:
    """The contract of the variants that the library's own table lacks; processes and compilers know no options."""
    lacking = [name for name in MAKERS if name not in ("ridge", "ridge, pfg", "ridge, reweight", "recursive", "cosine")]
    entries = [
        Entry(
            name.replace(", ", "-").replace(" ", "_"),
            "head",
            MAKERS[name],
            tolerance=1e-9,
            merges=exact,
            subtracts=exact,
        )
        for name in lacking
        for exact in [name in EXACT]
    ]
    left_out = ("two_processes_equal_one", "a_compiled_head_gives_the_same_bits")
    return [check for entry in entries for check in contract(entry) if check.rule not in left_out]


@pytest.mark.parametrize("check", checks(), ids=lambda check: check.__name__)
def test_contract_of_a_variant(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


def learned(make: Callable[..., Head], batch: int = 1000, **options: Any) -> Head:
    head = make(**options)
    features, targets = sample()
    for start in range(0, len(features), batch):
        head.update(features[start : start + batch], targets[start : start + batch])
    return head


# Scores and predictions -----------------------------------------------------------------------------------------


def test_preallocated_columns_change_no_score(make: Callable[..., Head]) -> None:
    features, _ = sample(20, seed=1)
    narrow, wide = learned(make), learned(make, num_classes=15)
    assert wide(features).shape == (20, 15)
    assert torch.equal(wide(features)[:, :10], narrow(features))
    assert bool(torch.isneginf(wide(features)[:, 10:]).all())
    assert torch.equal(wide.predict(features), narrow.predict(features))


def test_equal_classes_tie_to_the_lowest_id(make: Callable[..., Head]) -> None:
    features, _ = sample(40)
    head = make()
    for class_id in (7, 2, 5, 11, 3):  # the same samples under five labels
        head.update(features, torch.full((40,), class_id))
    if getattr(head, "solver", "gram") == "gram":  # recursion keeps no sums that could be equal
        for rows in (1, 2, 3, 5, 40):
            assert head.predict(features[:rows]).tolist() == [2] * rows


def test_an_unlearned_head_has_an_empty_readout_and_an_error_of_both_libraries(make: Callable[..., Head]) -> None:
    weight, bias = make().linear_readout()
    assert weight.shape[0] == bias.shape[0] == 0
    with pytest.raises(NotFittedError) as raised:
        make().predict(torch.ones(1, D))
    assert isinstance(raised.value, ClkitError)
    assert isinstance(raised.value, sklearn.exceptions.NotFittedError)


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
    whole, parts = MAKERS[name](D), MAKERS[name](D)
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


def test_fixed_columns_limit_the_ids(make: Callable[..., Head]) -> None:
    with pytest.raises(BatchError, match="num_classes=4"):
        make(num_classes=4).update(torch.ones(1, D), torch.tensor([4]))


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


# Merge ----------------------------------------------------------------------------------------------------------


def test_unlike_heads_do_not_merge(make_exact: Callable[..., Head]) -> None:
    head = learned(make_exact)
    before = bits(head)
    for other in (AnalyticHead(D, gamma=77.0), NearestMeanHead(D + 1), LDAHead(D, shrinkage=0.77)):
        with pytest.raises(ArgumentError):
            head.merge(other)
    assert bits(head) == before


# State ----------------------------------------------------------------------------------------------------------


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
    head = learned(partial(MAKERS[name], D))
    before = bits(head)
    for other in MAKERS:
        if other != name:
            with pytest.raises(StateError):
                head.load_state_dict(learned(partial(MAKERS[other], D)).state_dict())
    assert bits(head) == before


def test_works_in_inference_mode_and_autocast(make: Callable[..., Head]) -> None:
    features, targets = sample()
    expected = learned(make)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        head = make()
        head.update(features * 1, targets * 1)
        scores = head(features)
    assert torch.equal(scores, expected(features))
    expected = copy.deepcopy(expected)
    head.update(*sample(5))
    expected.update(*sample(5))
    assert bits(head) == bits(expected)
    assert torch.equal(head(features), expected(features))


# Shared statistics ----------------------------------------------------------------------------------------------


def test_heads_share_one_set_of_sums() -> None:
    features, targets = sample()
    statistics = FeatureStatistics(D, scatter=True, squares=True)  # from which the Gram follows
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
        lambda: LDAHead(D, statistics=FeatureStatistics(D + 1, scatter=True)),
        lambda: LDAHead(D, statistics=FeatureStatistics(D, gram=True)),
        lambda: AnalyticHead(D, balance="pfg", statistics=FeatureStatistics(D, gram=True)),
        lambda: AnalyticHead(D, bias=True, statistics=FeatureStatistics(D, gram=True)),
        lambda: AnalyticHead(D, expansion_dim=D, statistics=FeatureStatistics(D, gram=True)),
        lambda: AnalyticHead(D, solver="recursive", statistics=FeatureStatistics(D, gram=True)),
    ],
)
def test_sums_that_will_not_do_are_refused(build: Callable[[], Head]) -> None:
    with pytest.raises(ArgumentError):
        build()
