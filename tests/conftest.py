"""Shared by all tests: threads, quiet Lightning, warnings, and small things to train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import LitSmall, quiet_trainer

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def warnings_are_given(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked with ``warns(message)`` gives that warning; every other one is an error."""
    with ExitStack() as stack:
        for mark in request.node.iter_markers("warns"):
            stack.enter_context(pytest.warns(UserWarning, match=mark.args[0]))
        yield


@pytest.fixture
def lit_small() -> Callable[..., LitSmall]:
    """Makes the small module, always with the same start."""

    def make(**options: Any) -> LitSmall:
        torch.manual_seed(0)
        return LitSmall(**options)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """A quiet trainer whose files land in the test's folder."""
    return partial(quiet_trainer, tmp_path)
