"""Saved states of unknown origin: whatever stands in place of anything is a StateError that names the entry."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from clkit.errors import StateError
from clkit.schema import (
    FLOATS,
    Instance,
    Kind,
    Many,
    Numbers,
    OneOf,
    Settings,
    Whole,
    check_format,
    describe,
    read_state,
    saved_entry,
)

TABLE: dict[str, Kind] = {
    "format": OneOf((1,)),
    "ids": Numbers(("C",), least=0, most=99, ids=True),
    "sums": Numbers(("C", 2), torch.float64),
    "means": Numbers(("C", "p"), FLOATS),
    "rows": Numbers(("N", ...), None, any_value=True),
    "even": Numbers(("C",), rule=("even", lambda values: bool((values % 2 == 0).all()))),
    "step": Whole(),
    "limit": Whole(1, 9, optional=True),
    "policy": OneOf(("uniform", "class_balanced")),
    "rate": Instance(float | None),
    "steps": Many(Whole(1)),
    "options": Settings({"gamma": 1.0, "bias": False, "seed": 3}, free=("seed",)),
    "on": Instance(bool),
}


def state(**changes: Any) -> dict[str, Any]:
    """Returns a state that fits the table, with some entries changed."""
    good = {
        "format": 1,
        "ids": torch.tensor([1, 4, 9]),
        "sums": torch.ones(3, 2, dtype=torch.float64),
        "means": torch.ones(3, 5).half(),
        "rows": torch.full((4, 1, 2), torch.nan),
        "even": torch.tensor([0, -2, 4]),
        "step": 0,
        "limit": None,
        "policy": "uniform",
        "rate": 0.5,
        "steps": [1, 2],
        "options": {"gamma": 1.0, "bias": False, "seed": "any"},
        "on": True,
    }
    return {**good, **changes}


def deep() -> Any:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    return value


def shadowed(tensor: Tensor, **attributes: Any) -> Tensor:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


class Own(Tensor):
    """A class of tensors that a file must not bring along."""


def test_a_state_that_fits_is_returned_as_it_is() -> None:
    good = state()
    read = read_state(OrderedDict(good), TABLE, "Owner")
    assert read.keys() == good.keys()
    assert all(torch.equal(read[name], good[name]) for name in ("ids", "sums", "means", "even"))
    assert {name: read[name] for name in ("step", "limit", "policy", "rate", "steps")} == {
        name: good[name] for name in ("step", "limit", "policy", "rate", "steps")
    }
    prefixed = {"other.x": 3, **{f"a.{name}": value for name, value in good.items()}}
    assert read_state(prefixed, TABLE, "Owner", "a.").keys() == good.keys()
    assert not read_state({"x": torch.ones(1, requires_grad=True)}, {"x": Numbers((1,), FLOATS)}, "O")[
        "x"
    ].requires_grad


DOUBLE = torch.ones(3, 2, dtype=torch.float64)
LARGE = DOUBLE[:1, :1].expand(10**9, 10**9)
STANDING_IN: dict[str, Any] = {
    "a list": DOUBLE.tolist(),
    "nothing": None,
    "another dtype": DOUBLE.float(),
    "truth": DOUBLE.bool(),
    "complex": DOUBLE.to(torch.complex128),
    "a row more": torch.cat([DOUBLE, DOUBLE]),
    "a dimension more": DOUBLE[None],
    "stride zero": DOUBLE[:1].expand(3, 2),
    "stride zero in a large storage": torch.zeros(99, dtype=torch.float64).as_strided((3, 2), (0, 1)),
    "rows that overlap": torch.zeros(4, dtype=torch.float64).as_strided((3, 2), (1, 1)),
    "as large as a planet": LARGE,
    "meta": DOUBLE.to("meta"),
    "sparse": DOUBLE.to_sparse(),
    "negated later": torch._neg_view(DOUBLE),
    "conjugated later": DOUBLE.to(torch.complex128).conj(),
    "a class of its own": DOUBLE.as_subclass(Own),
    "with a method of its own": shadowed(DOUBLE.clone(), detach=3, shape_=deep()),
    "NaN": torch.full((3, 2), torch.nan, dtype=torch.float64),
    "infinite": -DOUBLE / 0,
    "squares that are infinite": DOUBLE * 1e300,
    "deep": deep(),
    "a long text": "x" * 10**6,
    "a number of many digits": 10**5000,
}


LAYOUTS = (torch.strided, torch.jagged)
RIGHT = {("limit", "nothing"), ("rate", "nothing"), ("means", "another dtype")}


@pytest.mark.filterwarnings("ignore:torch.quantize_per", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("entry", [name for name in TABLE if name != "rows"])
def test_nothing_stands_in_for_an_entry(entry: str) -> None:
    odd = {**STANDING_IN, "quantised": torch.quantize_per_tensor(DOUBLE.float(), 0.1, 0, torch.qint8)}
    odd |= {f"nested, {layout}": torch.nested.nested_tensor([DOUBLE[0]], layout=layout) for layout in LAYOUTS}
    for what, value in odd.items():
        if (entry, what) in RIGHT:
            continue
        with pytest.raises(StateError, match=f"^Owner: {entry}") as refused:
            read_state(state(**{entry: value}), TABLE, "Owner")
        assert len(str(refused.value)) < 500, what


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2, "more": 1}, "format must be 1, the saved state has 2; use the clkit release that wrote it"),
        ({"format": True}, "format must be 1, the saved state has True"),
        ({"more": 1, 'x"': 2}, "the saved state has the unknown 'more', 'x\"'"),
        ({"ids": torch.tensor([4, 1, 9])}, r"ids must be an int64 tensor of shape \(3,\) with sorted, distinct"),
        ({"ids": torch.tensor([1, 1, 9])}, "ids must be .*sorted, distinct"),
        ({"ids": torch.tensor([-1, 1, 9])}, "ids must be .*its values go from -1 to 9"),
        ({"ids": torch.tensor([1, 4, 100])}, r"ids must be .* to 99, the saved state has .* tensor \[1, 4, 100\]"),
        ({"ids": torch.tensor([1, 4])}, r"sums must be a float64 tensor of shape \(2, 2\).* float64 tensor \[\[1.0"),
        ({"sums": torch.zeros(0, 2).double()}, r"sums must be .*\(3, 2\)"),
        ({"means": torch.ones(3, 5).long()}, r"means must be a floating-point tensor of shape \(3, p\)"),
        ({"rows": torch.tensor(1)}, r"rows must be a tensor of shape \(N, \.\.\.\)"),
        ({"rows": torch.zeros(0, 10**9, 10**9)}, "rows must be .* a tensor that does not store each of its values"),
        ({"even": torch.tensor([0, 1, 2])}, r"even must be an int64 tensor of shape \(3,\).* that is even"),
        ({"step": True}, "step must be an integer from 0 to .*, the saved state has True"),
        ({"step": 2**63}, "step must be"),
        ({"limit": 10}, "limit must be an integer from 1 to 9 or None, the saved state has 10"),
        ({"policy": "balanced"}, "policy must be 'uniform' or 'class_balanced', the saved state has 'balanced'"),
        ({"rate": 1}, "rate must be float or NoneType, the saved state has 1"),
        ({"steps": [1, 0]}, r"steps\[1\] must be an integer from 1"),
        ({"options": {"gamma": 1, "bias": False, "seed": 3}}, "options: gamma must be 1.0, the saved state has 1"),
        ({"options": {"gamma": 1.0, "bias": False}}, "options must have the entries gamma, bias, seed, but .* 'seed'"),
        ({"options": {"gamma": 1.0, "bias": 0, "seed": deep()}}, "options: bias must be False"),
        ({"on": 1}, "on must be bool, the saved state has 1"),
        ({3: 1}, "each name in the saved state must be a string, the saved state has 3"),
        ({(): 1}, "each name in the saved state must be a string"),
    ],
)  # fmt: skip
def test_the_error_says_what_is_wanted_and_what_was_seen(changes: dict[Any, Any], words: str) -> None:
    with pytest.raises(StateError, match=f"^Owner: {words}"):
        read_state({**state(), **changes}, TABLE, "Owner")


@pytest.mark.parametrize("odd", [None, [], deep(), "text", torch.zeros(2), 3])
def test_what_is_no_dictionary(odd: Any) -> None:
    for read in (
        lambda: read_state(odd, TABLE, "Owner"),
        lambda: saved_entry(odd, "a", int, "Owner"),
        lambda: check_format(odd, 1, "Owner"),
    ):
        with pytest.raises(StateError, match=r"^Owner: the saved state must be a dictionary"):
            read()


def test_a_dictionary_with_methods_of_its_own() -> None:
    odd = OrderedDict(state())
    odd.__dict__.update(items=3, keys=3, get=3)
    assert read_state(odd, TABLE, "Owner")["step"] == 0


def test_one_entry_among_others() -> None:
    assert saved_entry({"a": None, "b": 1}, "a", int | None, "Owner") is None
    for entries, words in (
        ({}, "the saved state has no 'a'"),
        ({"a": True}, "'a' must be int, the saved state has True"),
        ({"a": "x"}, "'a' must be int"),
    ):
        with pytest.raises(StateError, match=f"^Owner: {words}"):
            saved_entry(entries, "a", int, "Owner")
    with pytest.raises(StateError, match="format must be 1, the saved state has None"):
        check_format({}, 1, "Owner")


def test_a_file_can_hold_such_tensors() -> None:
    file = io.BytesIO()
    torch.save({"sums": LARGE, "negated": torch._neg_view(DOUBLE), "parameter": torch.nn.Parameter(DOUBLE)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for name in ("sums", "negated"):
        with pytest.raises(StateError, match=f"^Owner: {name} must be"):
            read_state({name: loaded[name]}, {name: Numbers(("N", "M"), torch.float64)}, "Owner")
    read = read_state({"x": loaded["parameter"]}, {"x": Numbers(("N", "M"), torch.float64)}, "Owner")
    assert torch.equal(read["x"], DOUBLE)


def test_descriptions_are_short() -> None:
    assert describe(10**5000) == "a number of 16610 bits"
    assert describe("x" * 99) == f"'{'x' * 60}' and more"
    assert describe(LARGE) == "a Tensor"
    assert describe(deep()) == "a list"
