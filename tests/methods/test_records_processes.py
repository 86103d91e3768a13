"""Bounded tables in two processes against one: the same rows on both, and exchanged once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from two_ranks import drive, driven, enter_group

from clkit.errors import BatchError
from clkit.methods import ErrorRecords, FeatureMemory
from clkit.testing._compare import changed

TOTAL = 201


def sample() -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(TOTAL, 4, generator=draws)
    labels = torch.randint(0, 5, (TOTAL,), generator=draws)
    labels[0::2][-2:] = 50  # a class that rank 0 alone sees
    features[7, 0] = torch.nan
    return features, labels, torch.arange(TOTAL)


def filled(rows: slice) -> list[Any]:
    features, labels, ids = (each[rows] for each in sample())
    memory, few, records, empty = FeatureMemory(40), FeatureMemory(3), ErrorRecords(60), ErrorRecords(60)
    for part in torch.arange(len(ids)).split(13):
        for each in (memory, few):
            each.add(features[part], labels[part], ids[part])
        records.add("prequential", features[part], features[part, 0].abs(), ids[part])
    if rows.start != 1:  # rank 1 has none of these
        records.add("novel", features[:9], torch.ones(9), ids[:9])
        empty.add("prequential", features[:9], torch.ones(9), ids[:9])
    return [memory, few, records, empty]


def learn(name: str, folder: Path) -> dict[str, Any]:
    """What one of two processes keeps after an exchange, and after another one."""
    rank = enter_group()
    states: dict[str, Any] = {}
    tables = filled(slice(rank, None, 2))
    for when in ("once", "twice"):
        for table in tables:
            table.synchronize()
        states[when] = [table.state_dict() for table in tables]
    odd = ErrorRecords(60)
    odd.add("prequential", torch.zeros(1, 2 + rank), torch.ones(1), torch.tensor([rank]))
    try:
        odd.synchronize()
    except BatchError as error:
        states["refusal"] = str(error)
    return states


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return driven(__file__, tmp_path_factory.mktemp("ranks"), ["learn"])["learn"]


def test_two_processes_keep_what_one_keeps(ranks: list[dict[str, Any]]) -> None:
    for at, alone in enumerate(filled(slice(0, None))):
        if at == 2:  # of "novel" rank 0 offered its own first nine
            continue
        if at == 3:
            alone = ErrorRecords(60)
            features, _, ids = (each[::2] for each in sample())
            alone.add("prequential", features[:9], torch.ones(9), ids[:9])
        assert changed(ranks[0]["once"][at], alone.state_dict()) == []
    features, _, ids = sample()
    alone = ErrorRecords(60)
    alone.add("prequential", features, features[:, 0].abs(), ids)
    alone.add("novel", features[::2][:9], torch.ones(9), ids[::2][:9])
    assert changed(ranks[0]["once"][2], alone.state_dict()) == []
    assert ranks[0]["once"][2]["rejected"] == 1


def test_ranks_hold_the_same_bits_and_exchanging_twice_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    assert changed(ranks[0]["once"], ranks[1]["once"]) == []
    for states in ranks:
        assert changed(states["once"], states["twice"]) == []


def test_records_of_different_widths_are_refused_on_both(ranks: list[dict[str, Any]]) -> None:
    assert all("phi must have one width in all processes, got [2, 3]" in states["refusal"] for states in ranks)


def test_in_one_process_nothing_happens() -> None:
    for table in filled(slice(0, None)):
        before = table.state_dict()
        table.synchronize()
        assert changed(table.state_dict(), before) == []


if __name__ == "__main__":
    sys.exit(drive(learn))
