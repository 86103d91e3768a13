"""Runs what a test program wants of two processes, and reads what they ended with.

One server imports everything once for all programs of a test session; each program runs in a fork of it, whose two
forks are the ranks, started as a cluster's launcher would.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import clkit

BOUND_S = 30.0  # in which the other one must end by itself when one is killed
HANG_S = 600.0  # for all scenarios of a program
Ranks = Callable[[str], list[dict[str, Any]]]


def drive(scenario: Callable[[str, Path], dict[str, Any]]) -> int:
    """The main of a test program, ``program.py FOLDER NAME ...``: each rank writes ``FOLDER/NAME-RANK.pt``.

    Both ranks end when one raises; when one is killed, the other has some seconds to end by itself.
    """
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", WORLD_SIZE="2")
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ["LOCAL_RANK"] = str(rank)
                for name in names:
                    torch.save(scenario(name, folder), folder / f"{name}-{rank}.pt")
                code = 0
            except BaseException:  # a forked child must not run on into the parent's code, whatever happened
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    failed, deadline = 0, time.monotonic() + HANG_S
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            failed = failed or int(status != 0)
            deadline = time.monotonic() + BOUND_S if os.WIFSIGNALED(status) else 0.0 if status else deadline
        elif time.monotonic() > deadline:
            for other in children:
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return failed


def enter_group() -> int:
    """Begins the process group of a rank, where it has none yet, and returns the rank's number.

    Nobody ends it: in torch 2.7 that waits, with Python's lock held, for a thread that may need this lock to let go of
    what was exchanged last. A rank ends as a whole.
    """
    rank = int(os.environ["LOCAL_RANK"])
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    return rank


def serve() -> None:
    """Runs programs, one for each line of JSON; answers by their exit codes."""
    import clkit.callbacks
    import clkit.data
    import clkit.strategies  # noqa: F401  imported once for all: the forked programs find them loaded

    for line in sys.stdin:
        arguments, log = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.argv = arguments
            code = 1
            try:
                with Path(log).open("a") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                sys.path.insert(0, str(Path(arguments[0]).parent))
                runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:  # as above
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


_servers: list[subprocess.Popen[str]] = []


def driven(
    program: str, folder: Path, scenarios: Sequence[str], *, lost: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """What both ranks of a test program ended with, by scenario; nothing of a rank that was ``lost``."""
    if not _servers:
        places = [str(Path(clkit.__file__).parents[1]), str(Path(__file__).parent)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(places)
        command = [sys.executable, "-c", "import two_ranks; two_ranks.serve()"]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        atexit.register(server.kill)
        _servers.append(server)
    server, log = _servers[0], folder / "log.txt"
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([[program, str(folder), *scenarios], str(log)]) + "\n")
    server.stdin.flush()
    code = server.stdout.readline().strip()
    assert code == str(int(lost)), log.read_text()[-3000:]
    files = {name: [folder / f"{name}-{rank}.pt" for rank in (0, 1)] for name in scenarios}
    return {
        name: [torch.load(path, weights_only=True) if path.exists() or not lost else {} for path in paths]
        for name, paths in files.items()
    }


class Scenarios:
    """The scenarios of a test program: those of a group run together when the first of them is asked for."""

    def __init__(self, program: str, quick: Sequence[str], slow: Sequence[str]) -> None:
        self.program, self.quick, self.slow = program, tuple(quick), tuple(slow)

    def names(self, *wanted: str) -> Any:
        """Parametrises a test over scenarios; those outside the quick group are slow."""
        return pytest.mark.parametrize(
            "name", [name if name in self.quick else pytest.param(name, marks=pytest.mark.slow) for name in wanted]
        )

    def run_in(self, folder: Path, before_slow: Callable[[], object] = lambda: None) -> Ranks:
        """Gives what both ranks ended with in a scenario."""
        found: dict[str, list[dict[str, Any]]] = {}

        def of(name: str) -> list[dict[str, Any]]:
            if name not in found:
                if name in self.slow:
                    before_slow()
                found.update(driven(self.program, folder, self.quick if name in self.quick else self.slow))
            return found[name]

        return of
