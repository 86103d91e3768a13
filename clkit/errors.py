"""The errors that clkit raises: each a :class:`ClkitError` and also the built-in exception that it refines."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from sklearn.exceptions import NotFittedError as _SklearnNotFittedError

__all__ = [
    "ArgumentError",
    "BatchError",
    "ClkitError",
    "ConfigurationError",
    "ContractError",
    "DataError",
    "NotFittedError",
    "ProcessLostError",
    "StateError",
    "TapError",
    "WriteError",
]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error message that ends with a misspelt name, empty where no known name is near.

    Example:
        >>> "no layer 'blok'" + did_you_mean("blok", ["block", "head"])
        "no layer 'blok', did you mean 'block'?"
    """
    near = get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message without its last stop, or the error's class where it says nothing.

    Example:
        >>> first_line(ValueError("too short:\n  3 of 4")), first_line(MemoryError())
        ('too short', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:;") if lines else type(error).__name__


class ClkitError(Exception):
    """Base of all errors that clkit raises on purpose."""


class ArgumentError(ClkitError, ValueError):
    """An argument of a constructor or a function has a value that is not allowed."""


class BatchError(ClkitError, ValueError):
    """A batch was refused: wrong width, non-finite features, negative or fractional labels.

    Whatever was learned before is bitwise unchanged when this is raised.
    """


class NotFittedError(ClkitError, _SklearnNotFittedError):  # type: ignore[misc]  # scikit-learn has no types
    """A prediction was asked for before anything was learned (also scikit-learn's ``NotFittedError``)."""


class StateError(ClkitError, RuntimeError):
    """A saved state does not fit the object that loads it (format, width, options), or is damaged."""


class TapError(ClkitError, RuntimeError):
    """The feature tap found no place to read features from, or none passed through it."""


class DataError(ClkitError, RuntimeError):
    """A data source is missing or malformed, or a stream cannot be cut as asked."""


class ConfigurationError(ClkitError, RuntimeError):
    """Two settings of a run exclude each other, or one is missing."""


class WriteError(ClkitError, OSError):
    """A file could not be written: disk full, no permission. The file of that name from before is unchanged."""


class ProcessLostError(ClkitError, RuntimeError):
    """Another process of the run died, or did not answer in time; the last checkpoint is whole."""


class ContractError(ClkitError, AssertionError):
    """A method breaks a rule of the contract in :mod:`clkit.testing`; the message names the rule."""
