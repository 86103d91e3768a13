"""Writing files so that what was there before is never lost."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from clkit.errors import ArgumentError, StateError, WriteError

__all__ = ["atomic_write", "check_output", "plain_values", "read_bytes", "read_checkpoint", "write_checkpoint"]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: the draft that is yielded replaces the old file when the block ends.

    Whoever reads ``path`` sees the old content or the new, never a part: not when the disk is full, nor when the
    process is killed. The folder of the file is made where there is none.

    Raises:
        WriteError: If it cannot be written; the file from before is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/numbers.txt") as draft:
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
    """Refuse, before any work, a file that may not be written.

    Raises:
        ArgumentError: If its folder is not there, it is a folder, or it exists and ``overwrite`` is not set; the
            message says whether it is one of the ``inputs``.

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


def plain_values(value: Any) -> Any:
    """Return settings as values that any file can hold: of a function there are none.

    Example:
        >>> plain_values({"size": (28, 28), "draw": print})
        {'size': [28, 28], 'draw': None}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(name): plain_values(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(part) for part in value]
    return value if isinstance(value, (str, int, float, bool)) else None


_FOLDER = 0x10  # of a zip entry's external attributes
_REFUSED = re.compile(r"Unsupported global: GLOBAL (\S+)|Trying to call reduce for unrecognized function (.+)")


def read_checkpoint(
    path: str | Path | io.BytesIO, *, map_location: Any = "cpu", weights_only: bool = True, what: str = ""
) -> dict[str, Any]:
    """Load a checkpoint file that Lightning wrote, or a buffer of such bytes, without executing anything in it.

    The checksums of the file are compared first: torch alone would take flipped bytes in a tensor for its values.

    ``map_location`` is that of :func:`torch.load`; ``weights_only=False`` trusts the file, whose objects may then
    execute anything. ``what`` is the name that messages give a buffer.

    Raises:
        ArgumentError: If there is no such file.
        StateError: If it is damaged, or holds objects other than tensors and plain values.
    """
    source: Any = path  # torch and zipfile take either
    if not isinstance(path, io.BytesIO):
        what = str(path)
        if not Path(path).is_file():
            found = "a folder" if Path(path).is_dir() else "not a file"
            raise ArgumentError(f"path={what!r} is {found}; give the path of a checkpoint")
    try:
        if weights_only or zipfile.is_zipfile(source):  # trusted files may be of torch's oldest form, which has no sums
            _compare_checksums(source)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        checkpoint = torch.load(source, map_location=map_location, weights_only=weights_only)
    except Exception as error:  # damaged bytes make torch and zipfile raise nearly anything
        if refused := _REFUSED.search(str(error)):
            name = (refused.group(1) or refused.group(2)).strip()
            raise StateError(
                f"{what} holds more than tensors and plain values: reading it would call {name}; nothing in it was "
                "executed. Take files from somebody you trust, and save plain values only"
            ) from error
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise StateError(
            f"{what} cannot be read as a checkpoint: it is damaged or of another kind ({reason}); take an earlier one"
        ) from error
    if not isinstance(checkpoint, dict):
        raise StateError(f"{what} holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def read_bytes(data: bytes, what: str) -> dict[str, Any]:
    """Load what :func:`torch.save` wrote into a buffer, as :func:`read_checkpoint` does a file; ``what`` names it.

    Raises:
        StateError: If it is damaged, or holds objects other than tensors and plain values.

    Example:
        >>> read_bytes(b"PK", "the message")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        clkit.errors.StateError: the message cannot be read as a checkpoint: it is damaged or of another kind (...
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise StateError(f"{what} must be bytes, got a {type(data).__name__}")
    return read_checkpoint(io.BytesIO(data), what=what)


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Save a dictionary of tensors and plain values as Lightning does, as :func:`atomic_write` writes."""
    buffer = io.BytesIO()  # torch itself, writing to a full disk, says "unexpected pos 704 vs 598"
    torch.save(checkpoint, buffer)
    with atomic_write(path) as draft:
        draft.write_bytes(buffer.getbuffer())


def _compare_checksums(source: Any) -> None:
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.external_attr & _FOLDER:  # torch reads no bytes for it, and takes what happens to be in memory
                raise ValueError(f"{entry.filename} is marked as a folder")
        if any(entry.CRC for entry in entries):  # all are 0 after `set_crc32_options(False)`
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
