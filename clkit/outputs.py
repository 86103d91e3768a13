"""Where a command writes: never over something that is there, unless it is told to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clkit.errors import ArgumentError

__all__ = ["check_output"]


def check_output(output: str | Path, inputs: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Looks, before any work, whether a file may be written.

    Args:
        output: The file.
        inputs: Files that are read, for the message.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ArgumentError: If its folder is not there, it is a folder, or it exists and may not be replaced.

    Example:
        >>> check_output("no/such/folder/file.pt")
        Traceback (most recent call last):
        clkit.errors.ArgumentError: output='no/such/folder/file.pt': there is no folder no/such/folder; make it first
    """
    path = Path(output)
    if not path.parent.is_dir():
        raise ArgumentError(f"output={str(output)!r}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ArgumentError(f"output={str(output)!r} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        read = any(path.samefile(file) for file in inputs if file.exists())
        what = "is one of the files that are read" if read else "exists"
        raise ArgumentError(f"output={str(output)!r} {what}; give another name, or --force (overwrite=True)")
