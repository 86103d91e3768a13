"""The log of edits against sums by hand: taken back in any order to the bit, conflicts, commits, blocks, states."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clkit.errors import ArgumentError, ConfigurationError, EditConflictError, StateError
from clkit.methods._decomposition import Rows
from clkit.methods._edit_log import EditLog, Factors, stored_factors
from clkit.surgery.change import Change, changes_of
from clkit.surgery.edits import Edits

SHAPES = {"one": (6, 5), "two": (4, 2, 3, 3)}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def factors(seed: int, rows: int = 2) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (outputs, *rest) in SHAPES.items():
        inputs = torch.Size(rest).numel()
        halves = torch.randn(rows, inputs, generator=generator), torch.randn(rows, outputs, generator=generator)
        found[name] = stored_factors(Rows(*halves))
    return found


ENTRY = {"x": torch.zeros(1, 2), "y": torch.tensor([3])}


def logged(own: dict[str, nn.Parameter], *seeds: int) -> EditLog:
    log = EditLog()
    for seed in seeds:
        log.append(own, factors(seed), 0.1 * (seed + 1), **ENTRY)
    return log


def by_hand(start: dict[str, nn.Parameter], *seeds: int) -> dict[str, Tensor]:
    """Weights with edits, added one after another in float64."""
    found = {}
    for name, weight in start.items():
        total = weight.detach().double()
        for seed in seeds:
            own = factors(seed)[name]
            delta = own.dense.double() if own.P is None else own.P.double().T @ own.Q.double()
            total = total + (0.1 * (seed + 1) * delta).view_as(total)
        found[name] = total.to(weight.dtype)
    return found


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_taken_back_in_any_order_weights_are_those_of_the_edits_that_are_left(dtype: torch.dtype) -> None:
    for order in permutations(range(3)):
        own = weights(dtype)
        identity = {name: id(weight) for name, weight in own.items()}
        log = logged(own, 0, 1, 2)
        left = [0, 1, 2]
        assert same(own, by_hand(weights(dtype), *left))
        for each in order:
            log.revert(own, [each])
            left.remove(each)
            assert same(own, by_hand(weights(dtype), *left))
        assert same(own, weights(dtype))
        assert {name: id(weight) for name, weight in own.items()} == identity


def test_of_two_hundred_edits_a_random_half_is_taken_back_in_a_random_order() -> None:
    generator = torch.Generator().manual_seed(0)
    own, fresh = weights(), weights()
    log, other, scale = EditLog(), EditLog(), 0.01
    for seed in range(200):
        log.append(own, factors(seed), scale, **ENTRY)
    gone = torch.randperm(200, generator=generator)[:100].tolist()
    for each in gone:
        log.revert(own, [each])
    for record in log.records:
        other.append(fresh, record.factors, scale, **ENTRY)
    assert len(log) == len(other) == 100
    assert {record.id for record in log.records} == set(range(200)) - set(gone)
    assert same(own, fresh)
    assert not same(own, weights())
    log.revert(own, [record.id for record in log.records])
    assert same(own, weights())


def test_a_difference_alone_would_not_give_the_bits_back() -> None:
    own = weights()
    delta = {name: each.delta().float().view(SHAPES[name]) for name, each in factors(0).items()}
    with torch.no_grad():
        for name, weight in own.items():
            weight.add_(delta[name]).sub_(delta[name])
    assert not same(own, weights())


def test_taking_back_the_newest_gives_the_state_before_it() -> None:
    own = weights()
    log = logged(own, 4, 1)
    before = {name: weight.detach().clone() for name, weight in own.items()}
    log.append(own, factors(2), 0.3, **ENTRY)
    log.revert(own, [2])
    assert same(own, before)


def test_channels_last_and_frozen_weights_stay_what_they_are() -> None:
    own = weights()
    own["two"] = nn.Parameter(own["two"].detach().to(memory_format=torch.channels_last), requires_grad=False)
    log = logged(own, 0)
    assert own["two"].is_contiguous(memory_format=torch.channels_last)
    log.revert(own, [0])
    assert same(own, weights())
    assert not own["two"].requires_grad


def test_a_weight_that_something_else_changed_is_a_conflict() -> None:
    own = weights()
    log = logged(own, 0, 1)
    with torch.no_grad():
        own["two"][0, 0, 0, 0] += 1
    before = {name: weight.detach().clone() for name, weight in own.items()}
    for act in (
        lambda: log.revert(own, [0]),
        lambda: log.append(own, factors(2), 1.0, **ENTRY),
        lambda: log.commit(own, [0]),
        lambda: log.shown(own, [], alone=True).__enter__(),
    ):
        with pytest.raises(EditConflictError, match="the weight of 'two' is not what the log of edits says"):
            act()
    assert same(own, before)
    assert len(log) == 2
    log.rebase(own)
    assert same(own, before)
    log.revert(own, [0, 1])
    wanted = by_hand(weights(), 0, 1)
    for name, weight in own.items():
        trained = weights()[name].double() + (before[name] - wanted[name]).double()
        torch.testing.assert_close(weight.double(), trained, rtol=0, atol=1e-6)
    with torch.no_grad():
        own["one"] += 1  # with nothing in the log that is no conflict
    log.append(own, factors(2), 1.0, **ENTRY)


def test_commits_cannot_be_taken_back_and_leave_the_bits() -> None:
    own = weights()
    log = logged(own, 0, 1, 2)
    log.commit(own, [0])
    assert same(own, by_hand(weights(), 0, 1, 2))
    with pytest.raises(ArgumentError, match="edit 0 was committed"):
        log.revert(own, [0])
    with pytest.raises(ArgumentError, match=r"there is no edit 7 in the log, which has \[0, 1, 2\]"):
        log.revert(own, [1, 7])
    log.revert(own, [1])
    assert same(own, by_hand(weights(), 0, 2))
    log.commit(own, [2])
    assert [(record.committed, record.factors) for record in log.records] == [(True, {})] * 2
    assert same(own, by_hand(weights(), 0, 2))
    assert log.append(own, factors(3), 1.0, **ENTRY).id == 3
    log.revert(own, [3])
    assert same(own, by_hand(weights(), 0, 2))


def test_blocks_nest_and_give_the_bits_back_also_after_an_error() -> None:
    own = weights()
    log = logged(own, 0, 1)
    records = copy.deepcopy(log.records)
    extra = logged(weights(), 5).records
    applied = by_hand(weights(), 0, 1)
    with pytest.raises(KeyError), log.shown(own, extra, alone=False):  # noqa: PT012  # what stands inside is the subject
        assert same(own, by_hand(weights(), 0, 1, 5))
        with log.shown(own, [], alone=True):
            assert same(own, weights())
            with log.shown(own, extra, alone=False):
                assert same(own, by_hand(weights(), 5))
            assert same(own, weights())
        with log.shown(own, records[1:], alone=True):
            assert same(own, by_hand(weights(), 1))
        for act in (lambda: log.revert(own, [0]), lambda: log.append(own, factors(2), 1.0, **ENTRY)):
            with pytest.raises(ConfigurationError, match="leave it first"):
                act()
        raise KeyError
    assert same(own, applied)
    log.revert(own, [0, 1])
    assert same(own, weights())


def test_factors_are_stored_in_their_smaller_form_and_cut_to_a_rank() -> None:
    few, many = factors(0, rows=2)["one"], factors(0, rows=4)["one"]
    assert few.dense is None
    assert many.dense is not None
    assert many.dense.shape == (6, 5)
    generator = torch.Generator().manual_seed(0)
    rows = Rows(*(torch.randn(30, width, generator=generator) for width in (40, 50)))
    cut = stored_factors(rows, rank=3)
    exact = (rows.gradients.T @ rows.inputs).double()
    U, S, V = torch.linalg.svd(exact)
    best = U[:, :3] * S[:3] @ V[:3]
    assert cut.P is not None
    assert cut.P.shape == (3, 50)
    torch.testing.assert_close(cut.delta(), best, rtol=0, atol=1e-4)


def test_saved_and_loaded_a_log_takes_everything_back(tmp_path: Any) -> None:
    own = weights()
    log = logged(own, 0, 1, 2)
    log.commit(own, [0])
    log.revert(own, [1])
    torch.save([log.state_dict(), own], tmp_path / "log.pt")
    state, saved = torch.load(tmp_path / "log.pt", weights_only=True)
    fresh = EditLog()
    fresh.load_state_dict(state, saved)
    assert [(record.id, record.scale) for record in fresh.records] == [(0, 0.1), (2, pytest.approx(0.3))]
    assert fresh.append(saved, factors(4), 1.0, **ENTRY).id == 3
    fresh.revert(saved, [2, 3])
    assert same(saved, by_hand(weights(), 0))

    empty = EditLog()
    empty.load_state_dict(EditLog().state_dict(), own)
    assert len(empty) == 0


def test_damaged_logs_are_refused() -> None:
    own = weights()
    log = logged(own, 0)
    state = log.state_dict()
    (edit,) = state["edits"]
    for odd, says in [
        ({**state, "format": 9}, "use the clkit release that wrote it"),
        ({**state, "bank": {}}, "has edits of {}"),
        ({**state, "bank": {**state["bank"], "one": torch.zeros(5, 6)}}, r"has edits of \{'one': \(5, 6\)"),
        ({**state, "next_id": 0}, "or the file is damaged"),
        ({**state, "edits": [{**edit, "P": {}}]}, "whose factors do not belong together"),
        ({**state, "edits": [edit, edit]}, "or the file is damaged"),
        ({**state, "edits": [{**edit, "scale": float("nan")}]}, "scale must be a finite number"),
        ({**state, "bank": {**state["bank"], "one": state["bank"]["one"] * float("inf")}}, "finite values"),
    ]:
        fresh = EditLog()
        with pytest.raises(StateError, match=says):
            fresh.load_state_dict(odd, own)
        assert len(fresh) == 0
    fresh.load_state_dict(state, own)
    fresh.revert(own, [0])
    assert same(own, weights())


# ---- as a change of the user's network


class Other(Change):
    """Somebody else's change of a layer."""

    noun = "mask"

    def apply(self, module: nn.Module) -> None:
        self.mark(self.claim(module, "net.one"))

    restore = apply

    def undo(self, module: nn.Module) -> None:
        self.unmark(module.get_submodule("net.one"))

    def state(self) -> dict[str, Any]:
        return {}


class Holder(nn.Module):
    """A user's module with a network in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"one": nn.Linear(5, 6), "two": nn.Conv2d(2, 4, 3)})


def test_edits_are_seen_refused_beside_others_and_taken_back_in_a_copy() -> None:
    torch.manual_seed(0)
    module = Holder()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    own = {name: module.get_parameter(f"net.{name}.weight") for name in SHAPES}
    log = EditLog()
    edits = Edits("MEND", log)
    paths = {name: f"net.{name}" for name in SHAPES}
    edits.apply(module, paths)
    log.append(own, factors(0), 1.0, **ENTRY)
    assert changes_of(module) == [edits]
    with pytest.raises(ConfigurationError, match="already holds the edit of MEND; take its edits back first"):
        Other("DST").apply(module)
    copied = copy.deepcopy(module)
    (its,) = changes_of(copied)
    its.undo(copied)
    assert same(copied.state_dict(), before)
    assert changes_of(copied) == []
    assert not same(module.state_dict(), before)
    edits.undo(module)
    edits.undo(module)
    assert same(module.state_dict(), before)
    assert module.state_dict().keys() == before.keys()

    other = Other("DST")
    other.apply(module)
    with pytest.raises(
        ConfigurationError, match=r"the edit of MEND would change 'net\.one', which already holds the mask"
    ):
        edits.apply(module, paths)
    assert edits.state()["edits"] == []
