"""Writing files so that what was there before is never lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clkit.errors import ArgumentError, WriteError

__all__ = ["check_output", "whole_file"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A place beside a file to write its new content to; moved over the old one at the end, or removed.

    Whoever reads ``path`` sees the old content or the new, never a part: not when the disk is full, nor when the
    process is killed.

    Args:
        path: The file; its folder is made where there is none.

    Yields:
        Where to write.

    Raises:
        WriteError: If it cannot be written; the file from before is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(f"{folder}/numbers.txt") as draft:
        ...         _ = draft.write_text("1 2 3")
        ...     Path(folder, "numbers.txt").read_text(), len(list(Path(folder).iterdir()))
        ('1 2 3', 1)
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")  # in the same folder, so that the move is one step
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        kept = "the file of that name is unchanged" if path.exists() else "nothing was left there"
        raise WriteError(f"{path} could not be written: {reason}; {kept}") from error
    finally:
        with suppress(OSError):  # moved already, or never begun
            draft.unlink()


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
