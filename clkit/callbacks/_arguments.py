"""Arguments that no constructor of a class has, named with what is near."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any, get_args, get_type_hints

from clkit.errors import ArgumentError, did_you_mean

__all__ = ["refuse_unknown_arguments"]

_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def refuse_unknown_arguments(cls: type, options: Mapping[str, Any]) -> None:
    """Refuse a keyword argument that none of the constructors behind a class takes.

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
            return  # a stranger's may take any name
        if not options.keys() <= known.keys():
            groups |= {name: (hint, *get_args(hint)) for name, hint in get_type_hints(init).items()}
    for name in options.keys() - known.keys():
        fits = [key for key, kinds in groups.items() for kind in kinds if name in _settings(kind)]
        hint = f"; it is a setting of {fits[0]}" if fits else did_you_mean(name, known)
        raise ArgumentError(f"{cls.__name__} has no argument {name!r}{hint}")


def _settings(kind: Any) -> Any:
    """Return the names of the settings in a group of them; none of another type."""
    return getattr(kind, "__dataclass_fields__", ())
