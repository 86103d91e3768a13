"""Whether the arguments of a constructor are of the types that it is annotated with, asked in one place.

Ranges, and what two arguments mean together, are for the constructor itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from inspect import Parameter, getattr_static, signature
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clkit.errors import ArgumentError

__all__ = ["check_arguments", "in_short"]

_OTHERS = Parameter.VAR_KEYWORD  # which another constructor checks
_WORDS = {
    bool: "True or False",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    type(None): "None",
}


def check_arguments(owner: type, values: Mapping[str, Any]) -> None:
    """Refuse arguments of another type than ``owner.__init__`` is annotated with; to be called before anything else.

    Args:
        owner: The class that defines the constructor.
        values: The arguments by name, as ``locals()`` gives them, or ``vars(self)`` in a data class; others are
            left alone.

    Raises:
        ArgumentError: Naming the argument, what it must be and the value seen.

    Example:
        >>> class Noise:
        ...     def __init__(self, scale: float, names: list[str] | None = None) -> None:
        ...         check_arguments(Noise, locals())
        >>> made = Noise(1)
        >>> Noise(0.5, names=["a", 3])
        Traceback (most recent call last):
        clkit.errors.ArgumentError: names must be a list, each a string, or None, got ['a', 3]
    """
    for name, (wanted, kinds, words) in _hints(owner).items():
        if name not in values:
            continue
        value = values[name]
        kind = type(value)
        # the usual values need no more than a look
        usual = value in words if kind is str and words else kind in kinds and (kind is not float or value == value)
        if not usual and not _fits(value, wanted):
            raise ArgumentError(f"{name} must be {_in_words(wanted)}, got {in_short(value)}")


def in_short(value: object) -> str:
    """Return what a message says of a value: its ``repr``, but not endlessly, and whatever that does.

    Example:
        >>> in_short("a" * 100), in_short(int)
        ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…", "<class 'int'>")
    """
    try:
        text = repr(value)
    except Exception:  # a repr of the user's own, or of a number with more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "…"


@cache
def _hints(owner: type) -> dict[str, tuple[Any, frozenset[type], frozenset[str]]]:
    """Return the annotated types of a constructor's arguments, each with classes and words that certainly fit it."""
    constructor = getattr_static(owner, "__init__")
    try:
        hints, parameters = get_type_hints(constructor), signature(constructor).parameters
    except NameError:  # a user's own subclass, with names that only a type checker knows
        return {}
    found = {}
    for name, hint in hints.items():
        if name in parameters and parameters[name].kind != _OTHERS:
            either = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            kinds = {each for each in either if isinstance(each, type) and get_origin(each) is None}
            words = {word for each in either if get_origin(each) is Literal for word in get_args(each)}
            found[name] = hint, frozenset(kinds | ({int} if float in kinds else set())), frozenset(words)
    return found


def _fits(value: Any, wanted: Any) -> bool:
    """Return whether a value is of an annotated type; of a type that is not known here everything is."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if wanted is None or wanted is type(None):
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if wanted is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if wanted is float:
        # NaN is compared with bounds in vain, so no range that is asked later would refuse it
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and not math.isnan(value)
    if origin is tuple and ... not in parts:
        return _is_row(value) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (list, tuple, Sequence, Collection):
        return _is_row(value) and all(_fits(each, parts[0]) for each in value)
    if origin in (dict, Mapping):
        key, kind = parts
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, kind) for k, v in value.items())
    if wanted is Callable or origin is Callable:
        return callable(value)
    kind = origin or wanted
    known = isinstance(kind, type) and wanted is not Any and not getattr(kind, "_is_protocol", False)
    return isinstance(value, kind) if known else True


def _is_row(value: object) -> bool:
    return isinstance(value, list | tuple)


def _in_words(wanted: Any) -> str:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        words = list(dict.fromkeys(map(_in_words, parts)))
        most = ", ".join(words[:-1])
        return f"{most}{',' * (' or ' in most or ',' in words[0])} or {words[-1]}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if wanted in _WORDS:
        return _WORDS[wanted]
    if origin is tuple and ... not in parts:
        return f"a list of {len(parts)}: {', '.join(map(_in_words, parts))}"
    if origin in (list, tuple, Sequence, Collection):
        return f"a list, each {_in_words(parts[0])}"
    if origin in (dict, Mapping):
        return f"a dictionary of {_in_words(parts[0])} to {_in_words(parts[1])}"
    if wanted is Callable or origin is Callable:
        return "a function"
    name = getattr(origin or wanted, "__name__", str(wanted))
    return f"{name}(…)" if is_dataclass(wanted) else f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
