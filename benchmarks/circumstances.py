"""When, where and with what a benchmark ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime


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
