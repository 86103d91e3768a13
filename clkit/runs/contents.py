"""What a file of ``clkit learn`` says of itself: settings, names of classes, and which samples its head holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clkit.errors import StateError
from clkit.methods import Holdings
from clkit.schema import LEARNED, Instance, Named, Table, Whole, read_state

__all__ = ["Contents", "join_contents", "read_contents"]

_TABLE: Table = {
    "format": Whole(1, 1),
    "settings": Instance(dict),
    "class_names": Named(Instance(str)),
    "holds": Instance(dict),
}
_SETTINGS: Table = {
    "backbone": Instance(str),
    "model_kwargs": Instance(dict),
    "num_classes": Whole(optional=True),
    "layer": Instance(str),
    "preprocessing": Instance(dict),
}


@dataclass
class Contents:
    """The entry of a file that ``clkit learn`` wrote.

    Attributes:
        settings: What parts must have in common, as plain values; the head's own options are in the head.
        names: Of the classes, by id.
        holds: What the head has learned.
    """

    settings: dict[str, Any]
    names: dict[int, str]
    holds: Holdings

    def state(self) -> dict[str, Any]:
        """Return the entry."""
        return {
            "format": 1,
            "settings": self.settings,
            "class_names": {str(number): name for number, name in sorted(self.names.items())},
            "holds": self.holds.state_dict(),
        }


def read_contents(checkpoint: dict[str, Any], path: str | Path) -> Contents:
    """Return the entry of a file's content, which must have one.

    Raises:
        StateError: If it is damaged.
    """
    saved = read_state(checkpoint[LEARNED], _TABLE, str(path))
    settings = read_state(saved["settings"], _SETTINGS, f"{path}: the settings")
    if odd := [number for number in saved["class_names"] if not number.isdecimal() or len(number) > 9]:
        raise StateError(f"{path}: the class id {odd[0][:20]!r} is no number; the file is damaged")
    names = {int(number): name for number, name in saved["class_names"].items()}
    return Contents(settings, names, Holdings.of_state(saved["holds"], f"{path}: what it holds"))


def join_contents(mine: Contents, theirs: Contents, first: str | Path, file: str | Path) -> None:
    """Add to the content of the first file what that of another says.

    Raises:
        StateError: If features or classes are not the same; the message names the setting and both values.
        ArgumentError: If both hold a sample.
    """
    for name, ours in mine.settings.items():
        others = theirs.settings[name]
        if isinstance(ours, dict) and isinstance(others, dict):
            for part in [part for part in {**ours, **others} if ours.get(part) != others.get(part)]:
                raise StateError(
                    f"{first} has {name} with {part}={ours.get(part)!r}, {file} with {part}={others.get(part)!r}: "
                    "their features differ"
                )
        if ours != others:
            raise StateError(f"{first} has {name}={ours!r}, {file} has {name}={others!r}: their features differ")
    names = dict(mine.names)
    for number, name in theirs.names.items():
        if names.setdefault(number, name) != name:
            raise StateError(
                f"the class {number} is {names[number]!r} in {first} and {name!r} in {file}; learn the images of one "
                "into the other file (clkit learn FILE), or begin both with --like the same file"
            )
    mine.holds.merge(theirs.holds)
    mine.names = names
