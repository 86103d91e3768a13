"""Editors trained in two processes are those of one process with the batches of both.

Run as a program, ``test_editor_training_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import quiet_trainer
from test_editor_training import Net, rows, turned
from torch import Tensor
from two_ranks import Ranks, Scenarios, drive

from clkit.methods import MetaExamples
from clkit.strategies import EditorSettings, EditorTrainingStrategy

NAMES = ("plain", "accumulated", "uneven")
SIZES = {"uneven": [(7, 3), (5, 5), (3, 6), (6, 3), (4, 7), (6, 6)]}  # of the batches of both ranks
EXAMPLES = MetaExamples(n_edits=4, n_loc=5, equivalents=1, equivalence=turned)
scenarios = Scenarios(__file__, quick=(), slow=NAMES)


class Batches:
    """The batches of one rank, or of both as one process would have them: first what is edited."""

    def __init__(self, name: str, rank: int | None) -> None:
        self.sizes = SIZES.get(name, [(6, 6)] * 6)
        self.rank = rank

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, sizes in enumerate(self.sizes):
            parts = [rows(size, 10 * number + rank) for rank, size in enumerate(sizes)]
            if self.rank is not None:
                yield parts[self.rank]
                continue
            counts = [EXAMPLES.edited(size, rank, 2) for rank, size in enumerate(sizes)]
            edits = [tuple(each[:count] for each in part) for part, count in zip(parts, counts, strict=True)]
            others = [tuple(each[count:] for each in part) for part, count in zip(parts, counts, strict=True)]
            yield tuple(torch.cat(each) for each in zip(*edits, *others, strict=True))  # type: ignore[misc]


def run(name: str, folder: Path, devices: int) -> dict[str, Any]:
    strategy = EditorTrainingStrategy(
        ["body.3", "head"], editor=EditorSettings(rank=3), examples=EXAMPLES, stat_edits=6, seed=5
    )
    trainer = quiet_trainer(
        folder,
        devices=devices,
        max_epochs=3,
        strategy=strategy,
        precision="64-true",
        use_distributed_sampler=False,
        accumulate_grad_batches=2 if name == "accumulated" else 1,
    )
    module = Net()
    if devices == 2:
        with torch.no_grad():
            module.head.bias += trainer.global_rank  # all get that of the first
    trainer.fit(module, Batches(name, trainer.global_rank if devices == 2 else None))
    assert strategy.editor is not None
    return {"networks": dict(strategy.editor.networks.state_dict()), "module": dict(module.state_dict())}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return scenarios.run_in(tmp_path_factory.mktemp("two"))


@scenarios.names(*NAMES)
def test_two_processes_train_the_editor_of_one(ranks: Ranks, tmp_path: Path, name: str) -> None:
    two, one = ranks(name), run(name, tmp_path, devices=1)
    for rank in two:
        torch.testing.assert_close(rank["module"], one["module"], rtol=0, atol=0)
    torch.testing.assert_close(two[0]["networks"], two[1]["networks"], rtol=0, atol=0)
    assert float(one["networks"]["networks.0.joint.U"].abs().max()) > 1e-3
    torch.testing.assert_close(two[0]["networks"], one["networks"], rtol=1e-7, atol=1e-9)


if __name__ == "__main__":
    sys.exit(drive(lambda name, folder: run(name, folder, devices=2)))
