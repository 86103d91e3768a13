"""Run two processes at once: each learns its share of the samples and writes what it holds then.

They are started here rather than by Lightning, so that both import at the same time. The method travels as a pickled
:class:`~clkit.testing.Entry`, so it must be one that another process can import.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import subprocess
import sys
import time
import unittest
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clkit.errors import ContractError
from clkit.testing._compare import require, same
from clkit.testing._runs import isolated
from clkit.testing.entries import Entry

__all__ = ["agreed", "run", "work"]

PROCESSES = 2
LIMIT = 120.0  # seconds; a process whose partner failed would wait for ever

Learn = Callable[[Entry, Path, int, int], dict[str, Any]]


def run(entry: Entry, folder: Path, learn: Learn) -> list[dict[str, Any]]:
    """Have two processes do their part of a check.

    Args:
        entry: The method.
        folder: Where they leave their files; nothing is done again where these are there.
        learn: Does the part of one process: ``learn(entry, folder, rank, processes)``. What it returns is reported.

    Raises:
        unittest.SkipTest: If the entry cannot be sent to another process.
        ContractError: If a process fails, or they wait for each other.
    """
    reports = [folder / f"rank{rank}.pt" for rank in range(PROCESSES)]
    if not all(report.exists() for report in reports):
        (folder / "task.pkl").write_bytes(_pickled(entry, learn))
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        started = [_start(folder, rank, port) for rank in range(PROCESSES)]
        try:
            _wait(started, folder)
        finally:
            for process in started:
                process.kill()
                process.wait()
    return [torch.load(report, weights_only=True) for report in reports]


def agreed(entry: Entry, reports: list[dict[str, Any]]) -> bool:
    """Require that the processes ended with the same, or refused where the entry says so.

    Args:
        entry: The method.
        reports: Of each process: why it ``"refused"``, if it did, else what it holds at the ``"end"``.

    Returns:
        Whether there is an end to compare with that of one process.

    Raises:
        ContractError: If it is not so.
    """
    reasons = [report["refused"] for report in reports]
    if entry.processes == "refused":
        require(None not in reasons, "two processes were not refused", "raise a ClkitError on all of them")
        return False
    for reason in reasons:
        require(reason is None, f"it refused: {reason}", 'declare processes="refused"')
    same(
        reports[0]["end"],
        reports[1]["end"],
        "two processes hold different weights or states",
        "sum what was learned, and reduce gradients, over processes on all of them; broadcast what is drawn",
    )
    return entry.processes == "exact"


def work(folder: Path) -> None:
    """Do the part of this process and write ``rankN.pt``."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    entry, learn = pickle.loads((folder / "task.pkl").read_bytes())
    with isolated():
        report = learn(entry, folder, rank, PROCESSES)
    torch.save(report, folder / f"rank{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _pickled(entry: Entry, learn: Learn) -> bytes:
    maker = entry.make.func if isinstance(entry.make, partial) else entry.make
    if getattr(maker, "__module__", None) == "__main__":
        raise unittest.SkipTest(f"{maker!r} lives in __main__, which another process cannot import; put it in a module")
    try:
        return pickle.dumps((entry, learn))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise unittest.SkipTest(
            f"make cannot be sent to another process ({error}); use a class of a module, or functools.partial of one"
        ) from error


def _start(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    code = f"from pathlib import Path; from clkit.testing.processes import work; work(Path({str(folder)!r}))"
    with (folder / f"rank{rank}.txt").open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, stdout=output, stderr=output, text=True
        )


def _wait(started: list[subprocess.Popen[str]], folder: Path) -> None:
    """Wait for all; each ends itself after the limit and says then where it stood."""
    while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
        time.sleep(0.05)
    for rank, process in enumerate(started):
        if process.poll():
            text = (folder / f"rank{rank}.txt").read_text(encoding="utf-8")
            raise ContractError(
                f"process {rank} of {PROCESSES} failed, or waited {LIMIT:.0f} s for an exchange that the other never "
                f"reached; every process must take part in every exchange:\n{text[-3000:]}"
            )
