"""What the parser and Lightning say of wrong settings, in one line of clkit's words."""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from pkgutil import resolve_name

from clkit.errors import ClkitError, did_you_mean

__all__ = ["line_for_error", "line_for_settings", "refusal"]


def line_for_error(error: Exception) -> str | None:
    """Return one line for an error that a setting or a file can cause, ``None`` for one that is the code's own."""
    cause = refusal(error) if isinstance(error, ClkitError | ValueError) else None  # jsonargparse wraps in ValueError
    if cause is not None:
        return str(cause)
    text = str(error.args[0]) if error.args else ""
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict for"):
        return _weights_line(text)
    if isinstance(error, KeyError) and text.startswith("Trying to restore optimizer state"):
        return (
            "the checkpoint holds weights only (ModelCheckpoint with save_weights_only=true): no fit can go on from "
            "it; take one that was saved whole"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a file'} could not be written: {error.strerror}; make room and resume"
    return None


def _weights_line(message: str) -> str:
    """Return in one line what torch says in many of weights that do not fit: the first difference and what to do."""
    problems = [line.strip().rstrip(".") for line in message.splitlines()[1:] if line.strip()]
    first = re.sub(r"torch\.Size\((\[[^\]]*\])\)", r"\1", problems[0])
    first = first.replace("copying a param with shape", "shape").replace("the shape in current model is", "and here")
    names, more = first.partition(": ")[2].split(", "), len(problems) - 1
    if "key(s)" in first:  # a list of names
        first, more = f"{first.partition(': ')[0]}: {names[0]}", more + len(names) - 1
    others = f" (and {more} more)" if more else ""
    return (
        f"the checkpoint has the weights of another network: {first}{others}; give the model it was trained with, "
        "for instance by the config.yaml in the folder of its run"
    )


def refusal(error: BaseException | None) -> ClkitError | None:
    """Return the error of clkit that caused another, if there is one: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ClkitError):
        error = error.__cause__ or error.__context__
    return error


# What jsonargparse reports for one wrong setting is a tree of all the types that it tried. In it, "Parser key" lines
# lead to the place and one leaf says what is wrong there.
_PLACE = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NO_OPTION = re.compile(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: (?:--)?([^\s=]+)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_IMPORT = re.compile(r"(No module named '[^']+'|module '[^']+' has no attribute '[^']+')")
_VALUE = re.compile(r"Given value: (.*)")
_TYPES = re.compile(r"Expected an? (?!dot import)(.+?)(?:\. Got value: (.*))?$")


def line_for_settings(message: str, known: Iterable[str] = ()) -> str:
    """Return jsonargparse's message in one line for a person: the wrong setting or value, and what is near it.

    Example:
        >>> line_for_settings("Subcommand 'fit' does not accept option 'trainer.max_epoch'", ["trainer.max_epochs"])
        "there is no setting 'trainer.max_epoch', did you mean 'trainer.max_epochs'?"
    """
    if "is no file of settings" in message:
        return " ".join(message.split())
    if found := _NO_OPTION.search(message):
        name = found.group(1) or found.group(2)
        known = list(known)
        top = ", ".join(key for key in known if "." not in key and key not in ("help", "print_config"))
        return f"there is no setting {name!r}{did_you_mean(name, known) or f'; at the top there are {top}'}"
    lines = message.splitlines()
    for pattern, tell in ((_OPTION, _tell_option), (_NO_IMPORT, None), (_NO_CLASS, _tell_class)):
        for number, line in enumerate(lines):
            if found := pattern.search(line):
                said = found.group(1) if tell is None else tell(found.group(1), lines[:number])
                return f"{_place(lines[:number])}{said}"
    for number, line in enumerate(lines):
        if _TYPES.search(line):
            return f"{_place(lines[:number])}{_tell_type(lines[number:])}"
    return " ".join(_PLACE.sub(r"\1:", message).split())


def _place(lines: Sequence[str]) -> str:
    keys = [found.group(1) for line in lines if (found := _PLACE.search(line))]
    return f"{'.'.join(keys)}: " if keys else ""


def _tell_option(name: str, lines: Sequence[str]) -> str:
    path = next(found.group(1) for line in reversed(lines) if (found := _CLASS.search(line)))
    kind, accepted = path.rpartition(".")[2], inspect.signature(resolve_name(path)).parameters
    return f"{kind} has no setting {name!r}{did_you_mean(name, accepted) or '; it has ' + ', '.join(accepted)}"


def _tell_class(name: str, lines: Sequence[str]) -> str:
    classes = [exported for namespace in NAMESPACES for exported in namespace.__all__]
    return f"there is no class {name!r}{did_you_mean(name, classes) or '; give its dotted path, package.module.Class'}"


def _tell_type(lines: Sequence[str]) -> str:
    value, types = None, []
    for line in lines:
        if found := _TYPES.search(line):
            types.append(re.sub(r"<class '([^']+)'>|typing\.", r"\1", found.group(1)).replace("NoneType", "None"))
            value = found.group(2)
        elif value is None and (found := _VALUE.search(line)):
            value = found.group(1)
        if value is not None:
            break
    return f"{value!r} does not fit, expected {' or '.join(types)}"


# Short names in YAML are looked up among the classes that are imported; these are offered where a name is misspelt.
NAMESPACES = [
    import_module(name)
    for name in (
        "clkit.callbacks",
        "clkit.data",
        "clkit.models",
        "clkit.strategies",
        "lightning.pytorch.callbacks",
        "lightning.pytorch.loggers",
        "lightning.pytorch.strategies",
    )
]
