"""The errors that clkit raises: each a :class:`ClkitError` and also the built-in exception that it refines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, get_args, get_type_hints

from sklearn.exceptions import NotFittedError as _SklearnNotFittedError

__all__ = [
    "ArgumentError",
    "BatchError",
    "CapacityError",
    "ClkitError",
    "ConfigurationError",
    "ContractError",
    "DataError",
    "EditConflictError",
    "NotFittedError",
    "ProcessLostError",
    "SignatureError",
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


class CapacityError(ClkitError, ValueError):
    """More classes were to be given vertices than are free; none of them was given one."""


class NotFittedError(ClkitError, _SklearnNotFittedError):  # type: ignore[misc]  # scikit-learn has no types
    """A prediction was asked for before anything was learned (also scikit-learn's ``NotFittedError``)."""


class SignatureError(ClkitError, ValueError):
    """Features of models that do not share their prototypes were to be compared; their similarities mean nothing."""


class StateError(ClkitError, RuntimeError):
    """A saved state does not fit the object that loads it (format, width, options), or is damaged."""


class TapError(ClkitError, RuntimeError):
    """The feature tap found no place to read features from, or none passed through it."""


class DataError(ClkitError, RuntimeError):
    """A data source is missing or malformed, or a stream cannot be cut as asked."""


class ConfigurationError(ClkitError, RuntimeError):
    """Two settings of a run exclude each other, or one is missing."""


class EditConflictError(ClkitError, RuntimeError):
    """Edited weights are not what the log of edits says, so that an edit cannot be taken back to the bit."""


class WriteError(ClkitError, OSError):
    """A file could not be written: disk full, no permission. The file of that name from before is unchanged."""


class ProcessLostError(ClkitError, RuntimeError):
    """Another process of the run died, or did not answer in time; the last checkpoint is whole."""


class ContractError(ClkitError, AssertionError):
    """A method breaks a rule of the contract in :mod:`clkit.testing`; the message names the rule."""


_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def refuse_unknown_arguments(cls: type, options: Mapping[str, Any], others: Collection[str] | None = None) -> None:
    """Refuse a keyword argument that none of the constructors behind a class takes.

    Args:
        cls: The class.
        options: The keyword arguments that its own constructor does not name.
        others: Names that the first class behind it takes that is not clkit's; ``None`` if it may take any.

    Raises:
        ArgumentError: If there is one; the message names the argument that is near, or the group that it belongs to.
    """
    known: dict[str, Parameter] = {}
    groups: dict[str, Any] = {}  # by argument the types that it takes
    for kind in [kind for kind in cls.__mro__ if "__init__" in vars(kind)]:
        init = vars(kind)["__init__"]
        own = signature(init).parameters
        known |= {name: each for name, each in own.items() if each.kind in _BY_NAME and name != "self"}
        if not any(each.kind is Parameter.VAR_KEYWORD for each in own.values()):
            break  # nobody gets what it does not name
        if kind.__module__.partition(".")[0] != "clkit":
            if others is None:
                return
            known |= dict.fromkeys(others, Parameter("option", Parameter.KEYWORD_ONLY))
            break
        if not options.keys() <= known.keys():
            groups |= {name: (hint, *get_args(hint)) for name, hint in get_type_hints(init).items()}
    for name in options.keys() - known.keys():
        fits = [key for key, kinds in groups.items() for kind in kinds if name in _settings(kind)]
        hint = f"; it is a setting of {fits[0]}" if fits else did_you_mean(name, known)
        raise ArgumentError(f"{cls.__name__} has no argument {name!r}{hint}")


def _settings(kind: Any) -> Any:
    """Return the names of the settings in a group of them; none of another type."""
    return getattr(kind, "__dataclass_fields__", ())


def few_names(names: Sequence[str]) -> str:
    """Return the first five of several names; what no terminal can show of them is written out.

    Example:
        >>> few_names(["crow", "jay"]), few_names(list("abcdefg"))
        ('crow, jay', 'a, b, c, d, e and 2 more')
    """
    text = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return text.encode(errors="backslashreplace").decode()
