"""Small heads that have learned a sample, and how they refuse what they cannot do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clkit.errors import ClkitError
from clkit.testing._compare import require, same
from clkit.testing.entries import Entry

__all__ = ["IDS", "WIDTH", "absent", "all_of", "learned", "refused", "sample", "state_of", "taught", "unchanged"]

WIDTH = 6
IDS = (1, 4, 9)


def sample(rows: int = 50, start: int = 0, ids: tuple[int, ...] = IDS) -> tuple[Tensor, Tensor]:
    """Make features (rows, 6) float64 and ids, a function of ``start``."""
    generator = torch.Generator().manual_seed(start)
    which = torch.randint(len(ids), (rows,), generator=generator)
    features = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) + which[:, None].double()
    return features, torch.tensor(ids)[which]


def learned(entry: Entry, rows: int = 50, start: int = 0) -> Any:
    """Make a head that has learned the rows of a sample in batches."""
    head = entry.make(WIDTH)
    features, targets = sample(rows, start)
    for first in range(0, rows, 25):
        head.update(features[first : first + 25], targets[first : first + 25])
    return head


def taught(entry: Entry, features: Tensor, targets: Tensor) -> Any:
    """Make a head that has learned these rows in one batch."""
    head = entry.make(features.shape[1])
    head.update(features, targets)
    return head


def state_of(head: Any) -> dict[str, Any]:
    """Copy the saved state."""
    return dict(copy.deepcopy(head.state_dict()))


def all_of(head: Any, features: Tensor) -> list[Any]:
    """Give all that two equal heads share: state and scores."""
    return [state_of(head), head(features)]


@contextmanager
def unchanged(head: Any, seen: str, advice: str) -> Iterator[None]:
    """Require that a block changes no bit of the state.

    Raises:
        ContractError: If it does.
    """
    before = state_of(head)
    yield
    same(before, state_of(head), seen, advice)


def refused(act: Callable[[], Any], what: str, missing_key: bool = False) -> None:
    """Require that an act raises a ClkitError, or with ``missing_key`` what load_state_dict of PyTorch raises."""
    try:
        act()
    except ClkitError:
        return
    except RuntimeError as error:
        # what nn.Module.load_state_dict raises for a missing key, before it loads anything
        if missing_key and "Missing key" in str(error):
            return
        raise
    require(False, f"{what} was taken", "raise a ClkitError that says what was seen and what is allowed")


def absent(head: Any, verb: str, *arguments: Any) -> None:
    """Require that a head has no such method, or one that refuses."""
    if hasattr(head, verb):
        with unchanged(head, f"a refused {verb} changed the state", "refuse before any sum is touched"):
            refused(partial(getattr(head, verb), *arguments), f"{verb}, which the entry declares absent,")
