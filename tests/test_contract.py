"""Every head, callback and strategy of clkit passes the public contract, alone and together."""

from __future__ import annotations

import inspect
import unittest
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import Strategy

import clkit.callbacks
import clkit.methods
import clkit.strategies
from clkit._registry import STRATEGIES
from clkit.testing import Check, clkit_entries, contract, contract_together

# what the options of a callback or strategy can break, or the losses of a replay method; the rest is the same code
OF_A_VARIANT = {
    "yaml_builds_the_same",
    "state_is_in_the_checkpoint",
    "a_resumed_run_equals_an_uninterrupted_one",
}
OF_A_HEAD = {"a_compiled_head_gives_the_same_bits"}  # what no option of a head can break
VARIANTS = {entry.name for entry in clkit_entries() if "-" in entry.name}
VARIANTS |= {"ERStrategy", "ERACEStrategy", "DERPPStrategy", "SCRStrategy"}  # OnProStrategy shows their base whole
VARIANTS |= {"LearningStrategy", "StreamProgressBar"}  # whose state is nothing
HEADS = {entry.name for entry in clkit_entries() if entry.kind == "head"}
CHECKS = [check for entry in clkit_entries() for check in contract(entry)] + contract_together()
BASES = {
    clkit.callbacks.StreamCallback,
    clkit.callbacks.FeatureCallback,
    clkit.callbacks.HeadCallback,
    clkit.strategies.ReplayStrategy,
}
REASONS = ("there is no CUDA device", "the entry says that it")


def marked(check: Check) -> Any:
    """Two processes take seconds to start, and what does not depend on options is shown by one entry of a kind."""
    variant = check.name.removeprefix("together-") in VARIANTS
    same_code = check.rule in OF_A_HEAD if check.name in HEADS else check.rule not in OF_A_VARIANT
    slow = check.rule.startswith("two_processes") or check.name == "together-OnProStrategy" or (variant and same_code)
    return pytest.param(check, marks=pytest.mark.slow if slow else [])


@pytest.mark.parametrize("check", [marked(check) for check in CHECKS], ids=lambda check: check.__name__)
def test_contract(check: Check, tmp_path: Path) -> None:
    try:
        check(tmp_path)
    except unittest.SkipTest as reason:
        if not any(known in str(reason) for known in REASONS):
            pytest.fail(f"left out for another reason: {reason}")
        raise


def test_nobody_is_left_out() -> None:
    """A new public head, callback or strategy must stand in the table."""
    table = {entry.make.func if isinstance(entry.make, partial) else entry.make for entry in clkit_entries()}
    public = [
        getattr(package, name)
        for package in (clkit.methods, clkit.callbacks, clkit.strategies)
        for name in package.__all__
    ]
    classes = {value for value in public if inspect.isclass(value)}
    heads = {value for value in classes if hasattr(value, "update") and hasattr(value, "predict")}
    parts = {value for value in classes if issubclass(value, pl.Callback | Strategy)} - BASES
    assert len(heads) >= 3
    assert len(parts) >= 7
    assert heads | parts <= table


def test_every_registered_name_stands_in_the_table() -> None:
    assert {entry.registered for entry in clkit_entries()} - {None} == set(STRATEGIES)


def test_names_tell_the_entries_apart() -> None:
    names = [check.__name__ for check in CHECKS]
    assert len(set(names)) == len(names)
