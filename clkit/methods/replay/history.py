"""What a replay memory and its prototypes were in the course of a stream, in little space however long it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clkit.errors import ArgumentError, StateError
from clkit.methods._checks import check_count

__all__ = ["MemoryHistory", "PrototypeHistory", "PrototypeSnapshot"]

_FORMAT = 1
_MOST_POINTS = 256
_MOST_SNAPSHOTS = 12
_Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


class MemoryHistory:
    """How many rows of each class a memory held, at 129 to 256 steps of the stream, whatever its length.

    Every step is kept at first; whenever there are more than 256, every second is dropped and from then on twice as
    many steps are let pass. So a history of any stream takes about as much as 256 dictionaries of counts.

    Example:
        >>> history = MemoryHistory()
        >>> for step in range(1000):
        ...     if history.due(step):  # counting takes a moment, so ask before
        ...         history.note(step, {3: step + 1})
        >>> history.boundary(500)
        >>> steps, counts = history.points(999, {3: 1000})
        >>> len(steps), steps[:3], counts[-1], history.boundaries
        (251, [0, 4, 8], {3: 1000}, [500])
    """

    def __init__(self) -> None:
        self._interval = 1
        self._steps: list[int] = []
        self._counts: list[tuple[_Ids, _Ids]] = []
        self._boundaries: list[int] = []

    @property
    def boundaries(self) -> list[int]:
        """Steps at which an experience ended; of more than 256 every second, and so on."""
        return list(self._boundaries)

    def due(self, step: int) -> bool:
        """Whether :meth:`note` would keep this step."""
        return not self._steps or step >= self._steps[-1] + self._interval

    def note(self, step: int, class_counts: Mapping[int, int]) -> None:
        """Keeps the state of a step, or does nothing where too little has passed since the last that was kept.

        Args:
            step: Number of the training step, at least 0.
            class_counts: Rows in memory of each class, as :meth:`ReservoirBuffer.class_counts` gives them.

        Raises:
            ArgumentError: If the step is no number from 0.
        """
        check_count("step", step, at_least=0)
        if not self.due(step):
            return
        ids = np.array(sorted(class_counts), dtype=np.int64)
        self._steps.append(step)
        self._counts.append((ids, np.array([class_counts[int(c)] for c in ids], dtype=np.int64)))
        if len(self._steps) > _MOST_POINTS:
            self._steps, self._counts = self._steps[::2], self._counts[::2]
            self._interval *= 2

    def boundary(self, step: int) -> None:
        """Keeps that an experience ended before this step; one that is not after the last is kept once.

        Raises:
            ArgumentError: If the step is no number from 0.
        """
        check_count("step", step, at_least=0)
        if self._boundaries and step <= self._boundaries[-1]:
            return
        self._boundaries.append(step)
        if len(self._boundaries) > _MOST_POINTS:
            self._boundaries = self._boundaries[::2]

    def points(
        self, step: int | None = None, class_counts: Mapping[int, int] | None = None
    ) -> tuple[list[int], list[dict[int, int]]]:
        """What was kept, and the present state behind it if given; nothing is kept of that.

        Args:
            step: The present step.
            class_counts: Rows in memory of each class now.

        Returns:
            The steps, ascending, and for each the rows in memory by class: lists of the same length.
        """
        steps = list(self._steps)
        counts = [dict(zip(ids.tolist(), rows.tolist(), strict=True)) for ids, rows in self._counts]
        if step is not None and class_counts is not None and (not steps or step > steps[-1]):
            steps.append(step)
            counts.append(dict(sorted(class_counts.items())))
        return steps, counts

    def state_dict(self) -> dict[str, Any]:
        """Small tensors and plain types, loadable with ``weights_only=True``."""
        return {
            "format": _FORMAT,
            "interval": self._interval,
            "steps": _tensor(self._steps),
            "boundaries": _tensor(self._boundaries),
            "lengths": _tensor([ids.size for ids, _ in self._counts]),
            "classes": _joined([ids for ids, _ in self._counts]),
            "rows": _joined([rows for _, rows in self._counts]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            StateError: If it is damaged or of another kind; nothing is changed then.
        """
        owner = "the history of the memory"
        _check_entries(state, owner, ["interval", "steps", "boundaries", "lengths", "classes", "rows"])
        interval = _saved_count(state, "interval", owner)
        steps = check_saved_ids(f"steps of {owner}", state["steps"])
        boundaries = check_saved_ids(f"boundaries of {owner}", state["boundaries"])
        if max(steps.size, boundaries.size) > _MOST_POINTS:
            raise StateError(f"{owner} has more than {_MOST_POINTS} steps or boundaries: the file is damaged")
        lengths = check_saved(f"lengths of {owner}", state["lengths"], (steps.size,), torch.int64)
        if bool((lengths < 0).any()):
            raise StateError(f"lengths of {owner} has negative numbers: the file is damaged")
        total, cuts = int(lengths.sum()), lengths.cumsum(0)[:-1].cpu().numpy()
        rows = check_saved(f"rows of {owner}", state["rows"], (total,), torch.int64).cpu().numpy().copy()
        classes = check_saved(f"classes of {owner}", state["classes"], (total,), torch.int64).cpu()
        if (rows < 0).any():
            raise StateError(f"rows of {owner} has negative numbers: the file is damaged")
        parts = [] if not steps.size else np.split(classes.numpy(), cuts)
        ids = [check_saved_ids(f"classes of {owner}", torch.from_numpy(part)) for part in parts]
        self._interval, self._steps, self._boundaries = interval, steps.tolist(), boundaries.tolist()
        self._counts = list(zip(ids, [] if not ids else np.split(rows, cuts), strict=True))


class PrototypeSnapshot(NamedTuple):
    """The class means at the end of an experience.

    Attributes:
        experience: Number of the experience, from 1.
        ids: (K,) int64 class ids.
        means: (K, p) float32.
    """

    experience: int
    ids: Tensor
    means: Tensor


class PrototypeHistory:
    """The class means at the ends of at most 12 experiences: the first, the last, and others evenly between.

    Example:
        >>> history = PrototypeHistory()
        >>> for experience in range(1, 101):
        ...     history.note(experience, torch.tensor([0, 3]), torch.eye(2))
        >>> [snapshot.experience for snapshot in history.snapshots]
        [1, 17, 33, 49, 65, 81, 97, 100]
    """

    def __init__(self) -> None:
        self._interval = 1
        self._noted = 0
        self._snapshots: list[tuple[int, PrototypeSnapshot]] = []  # behind how many were noted before it

    @property
    def snapshots(self) -> list[PrototypeSnapshot]:
        """What is kept, in the order of the stream."""
        return [snapshot for _, snapshot in self._snapshots]

    def note(self, experience: int, ids: Tensor, means: Tensor) -> None:
        """Keeps a copy of the means at the end of an experience.

        Args:
            experience: Number of the experience, from 1.
            ids: (K,) distinct integer class ids, ascending.
            means: (K, p) floating point.

        Raises:
            ArgumentError: If they are of another form; nothing is kept then.
        """
        check_count("experience", experience)
        if ids.ndim != 1 or means.ndim != 2 or len(ids) != len(means) or not means.is_floating_point():
            raise ArgumentError(
                f"ids must have shape (K,) and means (K, p), floating point, got {tuple(ids.shape)} and "
                f"{tuple(means.shape)}, {means.dtype}"
            )
        kept = PrototypeSnapshot(
            experience,
            ids.detach().to("cpu", torch.int64, copy=True),
            means.detach().to("cpu", torch.float32, copy=True),
        )
        # the last one stays only where it is one of those at even distances
        self._snapshots = [*self._even(), (self._noted, kept)]
        self._noted += 1
        if len(self._snapshots) > _MOST_SNAPSHOTS:
            self._interval *= 2
            last = self._snapshots[-1]
            self._snapshots = self._even()
            if self._snapshots[-1] is not last:
                self._snapshots.append(last)

    def _even(self) -> list[tuple[int, PrototypeSnapshot]]:
        return [each for each in self._snapshots if each[0] % self._interval == 0]

    def state_dict(self) -> dict[str, Any]:
        """Small tensors and plain types, loadable with ``weights_only=True``."""
        return {
            "format": _FORMAT,
            "interval": self._interval,
            "noted": self._noted,
            "places": _tensor([place for place, _ in self._snapshots]),
            "experiences": _tensor([snapshot.experience for snapshot in self.snapshots]),
            "ids": [snapshot.ids.clone() for snapshot in self.snapshots],
            "means": [snapshot.means.clone() for snapshot in self.snapshots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            StateError: If it is damaged or of another kind; nothing is changed then.
        """
        owner = "the history of the prototypes"
        _check_entries(state, owner, ["interval", "noted", "places", "experiences", "ids", "means"])
        interval, noted = _saved_count(state, "interval", owner), _saved_count(state, "noted", owner, at_least=0)
        places = check_saved_ids(f"places of {owner}", state["places"])
        if places.size > _MOST_SNAPSHOTS or (places.size and places[-1] >= noted):
            raise StateError(f"{owner} has places that do not fit noted={noted}: the file is damaged")
        numbers = check_saved(f"experiences of {owner}", state["experiences"], (places.size,), torch.int64).tolist()
        if any(number < 1 for number in numbers):
            raise StateError(f"experiences of {owner} has numbers below 1: the file is damaged")
        for name in ("ids", "means"):
            if not isinstance(state[name], list) or len(state[name]) != places.size:
                raise StateError(f"{name} of {owner} must be a list of {places.size} tensors: the file is damaged")
        snapshots = []
        for place, number, ids, means in zip(places.tolist(), numbers, state["ids"], state["means"], strict=True):
            known = check_saved_ids(f"ids of {owner}", ids)
            width = means.shape[1] if isinstance(means, Tensor) and means.ndim == 2 else 0
            kept = check_saved(f"means of {owner}", means, (known.size, width), torch.float32)
            snapshots.append((place, PrototypeSnapshot(number, torch.from_numpy(known), kept.to("cpu", copy=True))))
        self._interval, self._noted, self._snapshots = interval, noted, snapshots


def _check_entries(state: Mapping[str, Any], owner: str, names: list[str]) -> None:
    if not isinstance(state, Mapping):
        raise StateError(f"the saved state of {owner} is a {type(state).__name__}, not a dictionary")
    check_keys(state, "", ["format", *names])
    missing = [name for name in ["format", *names] if name not in state]
    if missing:
        raise StateError(f"the saved state of {owner} has no {missing}: the file is damaged")
    if type(state["format"]) is not int or state["format"] != _FORMAT:
        raise StateError(f"format of {owner} is {state['format']!r} in the saved state, {_FORMAT} here")


def _saved_count(state: Mapping[str, Any], name: str, owner: str, *, at_least: int = 1) -> int:
    value = state[name]
    if type(value) is not int or value < at_least:
        raise StateError(f"{name} of {owner} must be a number from {at_least}, the saved state has {value!r}")
    return value


def _tensor(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _joined(parts: list[_Ids]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def check_keys(state: Mapping[str, Any], prefix: str, known: Iterable[str], parts: Iterable[str] = ()) -> None:
    """Refuses entries that nobody would read, which torch would only name after everything was loaded.

    Args:
        state: The saved state.
        prefix: Only entries whose name starts so are looked at.
        known: The names that are read.
        parts: Names of parts, whose entries they check themselves.

    Raises:
        StateError: Naming the entries.
    """
    for key in state:
        if not isinstance(key, str):
            raise StateError(f"the saved state has an entry {key!r}; its names must be strings")
    own = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    ours, parts = set(known), tuple(f"{part}." for part in parts)
    surplus = [prefix + name for name in own if name not in ours and not name.startswith(parts)]
    if surplus:
        raise StateError(f"the saved state has {surplus}, which nothing here reads: it is of another kind")


def check_saved(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, *, finite: bool = True) -> Tensor:
    """A tensor of a saved state, with finite values unless ``finite=False``.

    Raises:
        StateError: If it is of another form, or has values that are not finite.
    """
    if not isinstance(value, Tensor):
        raise StateError(f"{name} must be a tensor, the saved state has a {type(value).__name__}")
    plain = value.layout is torch.strided and not value.is_nested and not value.is_meta
    if not plain or tuple(value.shape) != shape or value.dtype != dtype:
        seen = f"shape {tuple(value.shape)} and {value.dtype}" if plain else "a tensor without plain values"
        raise StateError(f"{name} must have shape {shape} and {dtype}, the saved state has {seen}")
    if finite and value.is_floating_point() and not bool(value.isfinite().all()):
        raise StateError(f"{name} has values that are not finite: the file is damaged")
    return value.detach()


def check_saved_ids(name: str, value: Any) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Class ids of a saved state, on the host.

    Raises:
        StateError: If they are not sorted, distinct int64 numbers from 0.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested or value.is_meta:
        raise StateError(f"{name} must be a plain tensor, the saved state has a {type(value).__name__}")
    if value.dtype != torch.int64 or value.ndim != 1 or bool((value < 0).any()) or bool((value.diff() <= 0).any()):
        raise StateError(f"{name} must be sorted, distinct int64 ids from 0, the saved state has {value}")
    ids: np.ndarray[tuple[int], np.dtype[np.int64]] = value.detach().cpu().numpy().copy()
    return ids
