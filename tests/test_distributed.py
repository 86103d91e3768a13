"""Exchanges between processes: two of them, joined by gloo, and one alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from two_ranks import drive, driven, enter_group

from clkit.distributed import broadcast, gather_objects, gather_rows, report_lost_process, world_size
from clkit.errors import ArgumentError, ProcessLostError


def exchange(name: str, folder: Path) -> dict[str, Any]:
    """What one of two processes gets from each function."""
    me = enter_group()
    alone = dist.new_group([me], use_local_synchronization=True)
    shared = [torch.full((2,), me), torch.nn.Parameter(torch.full((3,), float(me)))]
    broadcast(shared, "numbers")
    return {
        "world": [world_size(), world_size(alone)],
        "objects": gather_objects({"rank": me}, "numbers"),
        "first": gather_objects(me, "numbers", first_only=True),
        "rows": gather_rows(torch.full((2 + me, 2), me), [2, 3]),
        "no rows": gather_rows(torch.zeros(me), [0, 1]),
        "shared": [tensor.detach() for tensor in shared],
    }


def test_two_processes(tmp_path: Path) -> None:
    found = driven(__file__, tmp_path, ["exchange"])["exchange"]
    for me, each in enumerate(found):
        assert each["world"] == [2, 1]
        assert each["objects"] == [{"rank": 0}, {"rank": 1}]
        assert each["first"] == ([0, 1] if me == 0 else [])
        assert [part.tolist() for part in each["rows"]] == [[[0, 0]] * 2, [[1, 1]] * 3]
        assert [part.tolist() for part in each["no rows"]] == [[], [0.0]]
        assert [tensor.tolist() for tensor in each["shared"]] == [[0, 0], [0.0] * 3]


def test_one_process() -> None:
    rows = torch.eye(2)
    assert world_size() == 1
    assert gather_objects({"a": 1}, "a value") == gather_objects({"a": 1}, "a value", first_only=True) == [{"a": 1}]
    assert gather_rows(rows, [2])[0] is rows
    broadcast([rows], "rows")
    assert torch.equal(rows, torch.eye(2))


def test_only_a_failure_of_the_backend_is_a_lost_process() -> None:
    with (
        pytest.raises(ProcessLostError, match=r"exchange the sums: .* \(closed by peer\)"),
        report_lost_process("the sums"),
    ):
        raise RuntimeError("closed by peer. Details")
    with pytest.raises(ArgumentError, match="mine"), report_lost_process("the sums"):
        raise ArgumentError("mine")
    with pytest.raises(KeyError), report_lost_process("the sums"):
        raise KeyError("x")


if __name__ == "__main__":
    sys.exit(drive(exchange))
