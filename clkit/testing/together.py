"""What methods must do beside each other: all callbacks in one run."""

from __future__ import annotations

import random
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

from clkit.testing._compare import same, snapshot
from clkit.testing._runs import fit
from clkit.testing.checks_callback import subset_or_same
from clkit.testing.entries import Entry

__all__ = ["CHECKS_TOGETHER"]


def all_callbacks_in_one_run_learn_what_they_learn_alone(
    entries: Sequence[Entry], strategy: Entry | None, folder: Path
) -> None:
    """In one run, in several orders of the list, each callback learns the same bits as alone."""
    make: Callable[[], Any] = (lambda: "auto") if strategy is None else strategy.make
    trains = getattr(make(), "trains_module", True)
    admitted = [entry for entry in _one_progress_bar(entries) if trains or not entry.needs_gradients]
    quiet = [entry for entry in admitted if not entry.changes_training]
    # one that changes how the network is trained changes what all others see: it runs with them, but not with its like
    companies = [quiet, *([*quiet, entry] for entry in admitted if entry.changes_training)]
    if not any(companies):
        raise unittest.SkipTest("no callback of the table runs under this strategy")
    for company in companies:
        states = []
        for order in _orders(company):
            callbacks = {entry: entry.make() for entry in order}
            fit(folder, list(callbacks.values()), strategy=make())
            states.append({entry.name: snapshot(entry, callbacks[entry], followed=True) for entry in company})
        for other in states[1:]:
            same(states[0], other, "what is learned depends on the order of the callbacks", "read only in hooks")
        if company is quiet:
            for entry in quiet:
                alone = entry.make()
                fit(folder, [alone], strategy=make())
                learned = snapshot(entry, alone, followed=True)
                subset_or_same(entry, learned, states[0][entry.name], f"beside all others, {entry.name}:")


def _orders(company: Sequence[Entry]) -> list[list[Entry]]:
    """As listed, the other way round, so that each stands on both sides of each, and mixed."""
    mixed = list(company)
    random.Random(0).shuffle(mixed)
    return [list(company), list(reversed(company)), mixed]


def _one_progress_bar(entries: Sequence[Entry]) -> list[Entry]:
    """Lightning takes one only."""
    bars = [entry for entry in entries if isinstance(entry.make(), ProgressBar)]
    return [entry for entry in entries if entry not in bars[1:]]


CHECKS_TOGETHER: list[Callable[..., None]] = [all_callbacks_in_one_run_learn_what_they_learn_alone]
