"""When, where, with what and on which data a benchmark runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path


def circumstances(script: str, arguments: Sequence[str], used: str, *, data: bool = False) -> list[str]:
    """Return date, hardware, versions and command, a line each.

    Args:
        script: Name of the benchmark's file.
        arguments: What followed it.
        used: What of the hardware was used.
        data: Whether it read a folder of data.
    """
    names = ("clkit", "torch", "lightning", "timm")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    folder = "CLKIT_DATA=FOLDER " if data else ""
    return [
        f"date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"hardware: {os.cpu_count()} CPU cores ({platform.machine()}), {used}",
        f"versions: {versions}; Python {platform.python_version()}",
        f"command: {folder}{shlex.join(['python', f'benchmarks/{script}', *arguments])}",
    ]


def data_folder(script: str, files: Sequence[str]) -> Path | None:
    """Return the folder of data, or nothing after a line on what it lacks.

    Args:
        script: Name of the benchmark, which begins the line.
        files: What has to be in the folder.
    """
    folder = Path(os.environ.get("CLKIT_DATA", ""))
    if missing := [name for name in files if not (folder / name).is_file()]:
        print(f"{script}: set CLKIT_DATA to the folder that holds {', '.join(missing)}", file=sys.stderr)
        return None
    return folder
