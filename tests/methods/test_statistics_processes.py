"""Sums in two processes against one: exchanged once, exact, the same bits on both ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from two_ranks import drive, driven, enter_group

from clkit.errors import BatchError, ConfigurationError
from clkit.methods import AnalyticHead, FeatureStatistics, LDAHead, NearestMeanHead
from clkit.testing._compare import changed

PARTS = {"gram": True, "squares": True, "class_grams": True, "scatter": True}
TOTAL = 41


def sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(TOTAL, 6, generator=generator, dtype=torch.float64) + 3
    targets = torch.randint(0, 4, (TOTAL,), generator=generator) * 3
    targets[0::2][-2:] = 50  # a class that rank 0 alone sees
    return features, targets


def heads() -> list[Any]:
    return [
        AnalyticHead(6, balance="pfg"),
        AnalyticHead(6, expansion_dim=9, balance="pfg", bias=True),
        AnalyticHead(6, balance="reweight"),
        NearestMeanHead(6),
        LDAHead(6),
        AnalyticHead(6, gamma="auto"),
    ]


def learn(name: str, folder: Path) -> dict[str, Any]:
    """What one of two processes learns of its samples, and what it is refused."""
    rank = enter_group()
    features, targets = sample()
    features, targets = features[rank::2], targets[rank::2]  # 21 samples here, 20 there
    statistics = FeatureStatistics(6, **PARTS)
    learned = heads()
    states: dict[str, Any] = {}
    for name, part in {"half": slice(0, 9), "all": slice(9, None)}.items():
        for learner in (statistics, *learned):
            learner.update(features[part], targets[part])
        states[name + " before"] = statistics.counts
        for learner in (statistics, *learned):
            learner.synchronize()
        states[name] = statistics.state_dict()
    statistics.synchronize()
    states["twice"] = statistics.state_dict()
    states["heads"] = [head.state_dict() for head in learned]

    fresh = FeatureStatistics(6, **PARTS)
    fresh.load_state_dict(states["all"])
    fresh.synchronize()
    states["loaded"] = fresh.state_dict()
    fresh.subtract(*sample())
    states["emptied"] = fresh.classes
    fresh.update(features[:2], targets[:2])
    states["refusals"] = []
    try:
        fresh.subtract(features[:1], targets[:1])
    except ConfigurationError as error:
        states["refusals"].append(str(error))
    recursive = AnalyticHead(6, solver="recursive")
    for verb in (lambda: recursive.update(features, targets), recursive.synchronize):
        try:
            verb()
        except ConfigurationError as error:
            states["refusals"].append(str(error))
    fresh._bad = torch.tensor(7 if rank == 1 else 0)  # as an accelerator would leave it
    try:
        fresh.synchronize()
    except BatchError as error:
        states["refusals"].append(str(error))
    return states


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return driven(__file__, tmp_path_factory.mktemp("ranks"), ["learn"])["learn"]


@pytest.mark.parametrize("when", ["half", "all", "loaded"])
def test_ranks_hold_the_same_bits(ranks: list[dict[str, Any]], when: str) -> None:
    assert changed(ranks[0][when], ranks[1][when]) == []


def test_two_processes_equal_one(ranks: list[dict[str, Any]]) -> None:
    alone, together = FeatureStatistics(6, **PARTS), FeatureStatistics(6, **PARTS)
    alone.update(*sample())
    together.load_state_dict(ranks[0]["all"])
    assert int(together.counts.sum()) == TOTAL
    assert torch.equal(together.classes, alone.classes)
    assert torch.equal(together.counts, alone.counts)
    for name in ("sums", "means", "squares", "gram", "class_grams"):
        expected = getattr(alone, name)
        assert float((getattr(together, name) - expected).abs().max()) <= 1e-12 * float(expected.abs().max()), name


def test_exchanging_twice_counts_once(ranks: list[dict[str, Any]]) -> None:
    for states in ranks:
        assert changed(states["all"], states["twice"]) == []


def test_loaded_sums_are_shared_already(ranks: list[dict[str, Any]]) -> None:
    for states in ranks:
        assert changed(states["all"], states["loaded"]) == []


def test_readers_see_the_shared_and_the_own_part(ranks: list[dict[str, Any]]) -> None:
    assert [int(states["half before"].sum()) for states in ranks] == [9, 9]
    assert [int(states["all before"].sum()) for states in ranks] == [18 + 12, 18 + 11]


def test_all_ranks_unlearn_together(ranks: list[dict[str, Any]]) -> None:
    assert [states["emptied"].tolist() for states in ranks] == [[], []]


def test_what_needs_one_process_is_refused(ranks: list[dict[str, Any]]) -> None:
    for states in ranks:
        unshared, recursive_update, recursive_exchange, bad = states["refusals"]
        assert "synchronize" in unshared
        assert "recursive" in recursive_update
        assert "recursive" in recursive_exchange
        assert "batch number 7 of rank 1" in bad


def test_heads_of_two_processes_predict_like_one(ranks: list[dict[str, Any]]) -> None:
    features, targets = sample()
    for index, (alone, together) in enumerate(zip(heads(), heads(), strict=True)):
        assert changed(ranks[0]["heads"][index], ranks[1]["heads"][index]) == []
        alone.update(features, targets)
        together.load_state_dict(ranks[0]["heads"][index])
        torch.testing.assert_close(together.scores_seen(features), alone.scores_seen(features), rtol=1e-9, atol=1e-9)


def test_in_one_process_nothing_happens() -> None:
    statistics = FeatureStatistics(6, **PARTS)
    statistics.update(*sample())
    before = statistics.state_dict()
    statistics.synchronize()
    assert changed(statistics.state_dict(), before) == []


if __name__ == "__main__":
    sys.exit(drive(learn))
