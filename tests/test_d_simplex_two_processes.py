"""DSimplex with plain loaders in two processes: one allocation of all classes, and one matrix of all searches.

Run as a program, ``test_d_simplex_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LitSmall, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from two_ranks import Ranks, Scenarios, drive

from clkit.callbacks import DSimplex
from clkit.metrics.retrieval import identification

K = 16
scenarios = Scenarios(__file__, quick=(), slow=("plain",))


def rows(labels: Tensor, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(torch.rand(len(labels), 64, generator=generator), labels), batch_size=8)


def scenario(name: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    module, sides = LitSmall(), [rows(torch.arange(40) % 4, seed) for seed in (1, 2)]
    simplex = DSimplex(K, alignment="hoc", queries=sides[0], gallery=sides[1], folder=folder)
    features = []
    for labels in ([0, 1], [2, 7]):
        # unshuffled: Lightning's sampler gives every other row, so that each rank sees one class alone
        trainer = quiet_trainer(folder, devices=2, strategy="ddp", max_epochs=1, callbacks=[simplex])
        trainer.fit(module, rows(torch.tensor(labels).repeat(16), seed=3))
        trainer.save_checkpoint(folder / f"{labels[0]}.ckpt")
        features.append([simplex.embed(module, side.dataset.tensors[0]) for side in sides])  # type: ignore[attr-defined]
    return {
        "classes": torch.tensor(simplex.allocator.classes),
        "matrix": simplex.compatibility,
        "features": features,
        "weight": module.net.hidden.weight.detach(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return scenarios.run_in(tmp_path_factory.mktemp("two"))


@pytest.mark.filterwarnings("ignore:.*of one class")
@scenarios.names("plain")
def test_both_ranks_have_all_classes_and_one_matrix(ranks: Ranks, name: str) -> None:
    first, second = ranks(name)
    labels = torch.arange(40) % 4
    for each in (first, second):
        assert each["classes"].tolist() == list(range(8))
        for i, (queries, _) in enumerate(each["features"]):
            for j, (_, gallery) in enumerate(each["features"][: i + 1]):
                wanted = identification(queries, labels, gallery.half().float(), labels)
                assert float(each["matrix"][i, j]) == pytest.approx(wanted, abs=1e-12)
    assert torch.equal(first["weight"], second["weight"])
    assert torch.equal(first["matrix"].nan_to_num(-1), second["matrix"].nan_to_num(-1))


if __name__ == "__main__":
    sys.exit(drive(scenario))
