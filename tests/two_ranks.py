"""Starts two processes that a test program runs in, as a cluster's launcher would, and reads what they ended with."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import clkit


def drive(scenario: Callable[[str, Path], dict[str, Any]]) -> int:
    """The main of a test program, ``program.py FOLDER NAME ...``: each rank writes ``FOLDER/NAME-RANK.pt``.

    The program has imported everything by now; the two ranks are forked from it. Both end when one fails.
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
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = 1
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failed


def driven(program: str, folder: Path, scenarios: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What both ranks of a test program ended with, by scenario."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(Path(clkit.__file__).parents[1]), str(Path(__file__).parent)]),
    }
    done = subprocess.run(
        [sys.executable, program, str(folder), *scenarios],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)] for name in scenarios
    }
