"""The histories of a memory and of prototypes: bounded, evenly spread, and the same after save and load."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.errors import ArgumentError, StateError
from clkit.methods.replay.history import MemoryHistory, PrototypeHistory


def counts_of(step: int) -> dict[int, int]:
    """Classes come one every 40 steps and go again, in no order of their ids."""
    return {(7 * c) % 31: 1 + (step + c) % 5 for c in range(step // 120, step // 40 + 1)}


def filled(steps: int, every: int = 1) -> MemoryHistory:
    history = MemoryHistory()
    for step in range(1, steps + 1, every):
        history.note(step, counts_of(step))
        if step % 50 == 0:
            history.boundary(step)
    return history


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint is read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


# ---- the memory


@given(st.integers(1, 5000))
@settings(max_examples=40, deadline=None)
def test_at_most_256_points_with_their_own_counts_at_even_steps(steps: int) -> None:
    history = filled(steps)
    kept, counts = history.points()
    assert min(steps, 129) <= len(kept) <= 256
    assert kept[0] == 1
    gaps = {after - before for before, after in pairwise(kept)}
    assert len(gaps) <= 1
    assert counts == [dict(sorted(counts_of(step).items())) for step in kept]
    interval = gaps.pop() if gaps else 1
    assert interval & (interval - 1) == 0  # a power of two
    assert kept[-1] > steps - interval


def test_short_streams_are_kept_whole_and_sparse_steps_are_taken_as_they_come() -> None:
    assert filled(256).points()[0] == list(range(1, 257))
    assert filled(2000, every=10).points()[0] == list(range(1, 2000, 10))


def test_due_tells_what_note_keeps() -> None:
    asked, told = MemoryHistory(), MemoryHistory()
    questions = 0
    for step in range(1, 3000):
        told.note(step, counts_of(step))
        if asked.due(step):
            questions += 1
            asked.note(step, counts_of(step))
    assert asked.points() == told.points()
    assert questions < 800  # 256, and 128 for each doubling


def test_the_present_is_shown_and_not_kept() -> None:
    history = filled(1000)
    steps, counts = history.points(1000, {5: 2, 3: 1})
    assert (steps[-1], counts[-1]) == (1000, {3: 1, 5: 2})
    assert history.points() == (steps[:-1], counts[:-1])
    assert history.points(steps[-2], {9: 9}) == history.points()  # that step is there already


def test_what_was_noted_is_a_copy() -> None:
    history, counts = MemoryHistory(), {1: 2}
    history.note(1, counts)
    counts[1] = 99
    history.points()[1][0][1] = 98
    assert history.points() == ([1], [{1: 2}])


def test_boundaries_are_bounded_and_each_is_there_once() -> None:
    history = MemoryHistory()
    for step in (10, 10, 20, 15):
        history.boundary(step)
    assert history.boundaries == [10, 20]
    for step in range(30, 20000, 10):
        history.boundary(step)
    assert len(history.boundaries) <= 256
    assert history.boundaries[0] == 10
    assert history.boundaries == sorted(set(history.boundaries))


@pytest.mark.parametrize("cut", [0, 1, 200, 256, 257, 700])
def test_a_history_goes_on_from_a_file_as_if_nothing_had_been(cut: int) -> None:
    whole, resumed = filled(900), MemoryHistory()
    resumed.load_state_dict(reloaded(filled(cut).state_dict()))
    for step in range(cut + 1, 901):
        resumed.note(step, counts_of(step))
        if step % 50 == 0:
            resumed.boundary(step)
    assert resumed.points() == whole.points()
    assert resumed.boundaries == whole.boundaries
    assert same(resumed.state_dict(), whole.state_dict())


def test_an_empty_memory_is_a_point_too() -> None:
    history, again = MemoryHistory(), MemoryHistory()
    history.note(1, {})
    history.note(2, {4: 1})
    history.note(3, {})
    again.load_state_dict(history.state_dict())
    assert again.points() == history.points() == ([1, 2, 3], [{}, {4: 1}, {}])


def test_the_state_of_a_large_memory_is_small() -> None:
    history = MemoryHistory()
    for step in range(1, 3000):
        history.note(step, dict.fromkeys(range(1000), 2))
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    assert len(file.getvalue()) < 256 * 1000 * 16 + 10_000


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_steps_are_numbers_from_0(step: Any) -> None:
    with pytest.raises(ArgumentError, match="step"):
        MemoryHistory().note(step, {})
    with pytest.raises(ArgumentError, match="step"):
        MemoryHistory().boundary(step)


MEMORY_DAMAGE: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("has no \\['rows'\\]", lambda state: state.pop("rows")),
    ("nothing here reads", lambda state: state.update(more=1)),
    ("format", lambda state: state.update(format=2)),
    ("interval", lambda state: state.update(interval=0)),
    ("interval", lambda state: state.update(interval=True)),
    ("steps", lambda state: state.update(steps=state["steps"].flip(0))),
    ("steps", lambda state: state.update(steps=[1, 2])),
    ("boundaries", lambda state: state.update(boundaries=-state["boundaries"])),
    ("more than 256", lambda state: state.update(boundaries=torch.arange(300))),
    ("lengths", lambda state: state.update(lengths=state["lengths"][1:])),
    ("lengths", lambda state: state["lengths"][0].fill_(-1)),
    ("rows", lambda state: state.update(rows=state["rows"][1:])),
    ("rows", lambda state: state["rows"][0].fill_(-1)),
    ("rows", lambda state: state.update(rows=state["rows"].float())),
    ("classes", lambda state: state["classes"].fill_(3)),
    ("classes", lambda state: state.update(classes=state["classes"][1:])),
]


@pytest.mark.parametrize(("message", "damage"), MEMORY_DAMAGE)
def test_a_damaged_history_is_refused_and_the_old_one_kept(message: str, damage: Callable[..., Any]) -> None:
    history, state = filled(30), filled(300).state_dict()
    before = history.state_dict()
    damage(state)
    with pytest.raises(StateError, match=message):
        history.load_state_dict(state)
    assert same(history.state_dict(), before)


def test_a_state_that_is_no_dictionary_is_refused() -> None:
    history: Any
    for history in (MemoryHistory(), PrototypeHistory()):
        with pytest.raises(StateError, match="list, not a dictionary"):
            history.load_state_dict([])


# ---- prototypes


def noted(number: int) -> PrototypeHistory:
    history = PrototypeHistory()
    for experience in range(1, number + 1):
        ids = torch.arange(min(experience, 6)) * 3
        history.note(experience, ids, torch.full((len(ids), 4), float(experience)))
    return history


@given(st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_at_most_12_snapshots_with_the_first_the_last_and_even_ones_between(number: int) -> None:
    snapshots = noted(number).snapshots
    kept = [snapshot.experience for snapshot in snapshots]
    assert kept[0] == 1
    assert kept[-1] == number
    assert min(number, 7) <= len(kept) <= 12
    assert len({after - before for before, after in pairwise(kept[:-1])}) <= 1
    for snapshot in snapshots:
        assert snapshot.ids.tolist() == [3 * c for c in range(min(snapshot.experience, 6))]
        assert bool((snapshot.means == snapshot.experience).all())


def test_twelve_are_kept_whole() -> None:
    assert [snapshot.experience for snapshot in noted(12).snapshots] == list(range(1, 13))
    assert [snapshot.experience for snapshot in noted(13).snapshots] == [1, 3, 5, 7, 9, 11, 13]


def test_means_are_copied_without_their_graph() -> None:
    history, ids = PrototypeHistory(), torch.tensor([1, 2], dtype=torch.int32)
    means = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    history.note(1, ids, means * 2)
    kept = torch.ones(2, 3)
    history.note(2, ids, kept)
    kept.zero_()
    first, second = history.snapshots
    assert (first.ids.dtype, first.means.dtype, first.means.requires_grad) == (torch.int64, torch.float32, False)
    assert torch.equal(second.means, torch.ones(2, 3))


@pytest.mark.parametrize("cut", [0, 1, 12, 13, 40])
def test_snapshots_go_on_from_a_file_as_if_nothing_had_been(cut: int) -> None:
    whole, resumed = noted(60), PrototypeHistory()
    resumed.load_state_dict(reloaded(noted(cut).state_dict()))
    for experience in range(cut + 1, 61):
        ids = torch.arange(min(experience, 6)) * 3
        resumed.note(experience, ids, torch.full((len(ids), 4), float(experience)))
    assert same(resumed.state_dict(), whole.state_dict())


def test_malformed_means_are_refused() -> None:
    history = noted(2)
    for ids, means in (
        (torch.arange(2), torch.ones(3, 4)),
        (torch.ones(2, 2), torch.ones(2, 4)),
        (torch.arange(2), torch.ones(2, 4, dtype=torch.int64)),
    ):
        with pytest.raises(ArgumentError, match=r"ids must have shape \(K,\)"):
            history.note(3, ids, means)
    with pytest.raises(ArgumentError, match="experience"):
        history.note(0, torch.arange(1), torch.ones(1, 4))
    assert same(history.state_dict(), noted(2).state_dict())


PROTOTYPE_DAMAGE: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("has no \\['noted'\\]", lambda state: state.pop("noted")),
    ("format", lambda state: state.update(format="1")),
    ("interval", lambda state: state.update(interval=-4)),
    ("noted", lambda state: state.update(noted=1)),
    ("places", lambda state: state.update(places=state["places"].flip(0))),
    ("places", lambda state: state.update(places=torch.arange(13))),
    ("experiences", lambda state: state.update(experiences=state["experiences"][1:])),
    ("experiences", lambda state: state["experiences"].fill_(0)),
    ("ids of", lambda state: state.update(ids=state["ids"][1:])),
    ("ids of", lambda state: state["ids"][2].fill_(1)),
    ("means of", lambda state: state.update(means=torch.ones(3, 2, 4))),
    ("means of", lambda state: state["means"].__setitem__(1, torch.ones(9, 4))),
    ("means of", lambda state: state["means"].__setitem__(1, torch.ones(2))),
    ("means of", lambda state: state["means"].__setitem__(1, "no tensor")),
]


@pytest.mark.parametrize(("message", "damage"), PROTOTYPE_DAMAGE)
def test_damaged_snapshots_are_refused_and_the_old_ones_kept(message: str, damage: Callable[..., Any]) -> None:
    history, state = noted(2), noted(5).state_dict()
    damage(state)
    with pytest.raises(StateError, match=message):
        history.load_state_dict(state)
    assert same(history.state_dict(), noted(2).state_dict())
