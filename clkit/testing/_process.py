"""What one of several processes does; run as ``python -m clkit.testing._process FOLDER``."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
from pathlib import Path

import torch

from clkit.testing import checks_head, checks_shared, processes
from clkit.testing._runs import isolated
from clkit.testing.entries import Entry

__all__ = ["main"]


def main(folder: Path) -> None:
    """Learn this process's share and write ``rankN.pt``."""
    faulthandler.dump_traceback_later(processes.LIMIT, exit=True)
    torch.set_num_threads(1)
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    entry: Entry = pickle.loads((folder / "entry.pkl").read_bytes())
    with isolated():
        if entry.kind == "head":
            torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
            report = checks_head.learn_in_a_process(entry, rank, world)
        else:
            report = checks_shared.learn_in_a_process(entry, folder, world)
    torch.save(report, folder / f"rank{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
