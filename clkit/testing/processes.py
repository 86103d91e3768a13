"""Two processes at once: each learns its share of the samples and writes what it holds then.

They are started by ``torchrun`` rather than by Lightning, so that both import at the same time. The method travels as a
pickled :class:`~clkit.testing.Entry`, so it must be one that another process can import.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
import unittest
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clkit.callbacks import NMC
from clkit.errors import ClkitError, ContractError
from clkit.testing._compare import far, leaves, require, same
from clkit.testing._runs import EXACT, Setting, Trial, isolated, settings, snapshot
from clkit.testing.entries import Entry

__all__ = ["agreed", "run", "two_processes_equal_one", "work"]

PROCESSES = 2
LIMIT = 120.0  # seconds; a process whose partner failed would wait for ever
TORCHRUN = f"-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node={PROCESSES} --no-python"
WORK = "import pathlib, sys; from clkit.testing.processes import work; work(pathlib.Path(sys.argv[1]))"

Learn = Callable[[Entry, Path, int, int], dict[str, Any]]


def run(entry: Entry, folder: Path, learn: Learn) -> list[dict[str, Any]]:
    """Return what ``learn(entry, folder, rank, processes)`` gives on each of two processes.

    They leave their files in the folder; nothing is done again where these are there.
    """
    reports = [folder / f"rank{rank}.pt" for rank in range(PROCESSES)]
    if not all(report.exists() for report in reports):
        (folder / "task.pkl").write_bytes(_pickled(entry, learn))
        path = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, *TORCHRUN.split(), sys.executable, "-W", "ignore", "-c", WORK, str(folder)],
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ContractError(
                f"one of {PROCESSES} processes failed, or waited {LIMIT:.0f} s for an exchange that the other never "
                f"reached; every process must take part in every exchange:\n{done.stderr[-6000:]}"
            )
    return [torch.load(report, weights_only=True) for report in reports]


def agreed(entry: Entry, reports: list[dict[str, Any]]) -> bool:
    """Require that the processes ended with the same, or refused where the entry says so.

    A report says why the process ``"refused"``, if it did, else what it holds at the ``"end"``. What is returned is
    whether that is to be compared with the end of one process.
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
        torch.distributed.barrier()
        # The group is not destroyed: torch 2.7 waits for this, with Python's lock held, for a thread that may need the
        # lock to let go of what was exchanged last. The process ends as a whole.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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


def two_processes_equal_one(setting: Setting) -> None:
    """Two processes (gloo) on shares of the stream end with the same state, that of one process, and save it once."""
    entry = setting.entry
    reports = run(entry, setting.folder, _learn_in_a_process)
    ends = [report[str(setting.strategy)] for report in reports]
    exact, one = agreed(entry, ends), ends[0]
    if one["refused"] is not None:
        return
    alone = setting.run(module=setting.fixed_module(), precision=EXACT)
    if one["saved"] is not None:
        fresh = NMC() if entry.kind == "strategy" else entry.make()
        fresh.load_state_dict(one["saved"])
        held = snapshot(fresh, entry.volatile, followed=False)
        seen = "the file of two processes holds another state than they do"
        same(one["end"]["learned"], held, seen, "sum over processes in state_dict()")
    if exact:
        apart = far(_essence(_end(alone)), _essence(one["end"]), entry.tolerance)
        require(
            not apart,
            f"two processes learned something else than one, at {', '.join(apart)}",
            "sum over processes once; what differs by rounding alone goes by the entry's tolerance",
        )


def _end(trial: Trial) -> dict[str, Any]:
    return {"weights": trial.weights(), "learned": trial.learned(followed=False)}


def _essence(end: dict[str, Any]) -> dict[str, Any]:
    """Give weights, and what is predicted and counted where it predicts (the same sums can be held in many ways)."""
    learned = end["learned"]
    if "scores(features)" in learned:
        learned = {
            path: leaf
            for path, leaf in leaves(learned).items()
            if path == "/scores(features)" or not (isinstance(leaf, Tensor) and leaf.is_floating_point())
        }
    return {**end, "learned": learned}


def _learn_in_a_process(entry: Entry, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Do one process's part of :func:`two_processes_equal_one`, in all settings."""
    report: dict[str, Any] = {}
    for setting in settings(entry, folder):
        options = {"strategy": "ddp"} if setting.strategy == "auto" else {}
        try:
            trial = setting.run(module=setting.fixed_module(), devices=world, precision=EXACT, **options)
        except ClkitError as error:
            report[str(setting.strategy)] = {"refused": str(error)}
            continue
        saved = trial.saved()["callbacks"].get(trial.callback.state_key)
        report[str(setting.strategy)] = {"refused": None, "end": _end(trial), "saved": saved}
    return report
