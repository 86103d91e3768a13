"""MEND in two processes: the same edits on both, decided once, and those of one process with the same images.

Run as a program, ``test_mend_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LitPlain, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from two_ranks import Ranks, Scenarios, drive

from clkit.callbacks import MEND, NMC
from clkit.errors import BatchError
from clkit.methods import Guard
from clkit.strategies import GradientFreeStrategy

scenarios = Scenarios(__file__, quick=(), slow=("editor", "exact"))


class Net(LitPlain):
    rate = 0.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Linear(16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def rows() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(4).repeat(16)
    return TensorDataset(
        torch.randn(4, 6, generator=generator)[targets] + 0.5 * torch.randn(64, 6, generator=generator), targets
    )


def run(name: str, folder: Path, devices: int) -> dict[str, Any]:
    """Edits after a fit: two that are made, one that the guard refuses, one that is malformed."""
    warnings.simplefilter("ignore")
    exact = name == "exact"
    mend = MEND({"layers": "body.0", "alpha": 0.5, "norm_scope": "none"}, guard=None, weight=50)
    head = NMC()
    strategy: Any = GradientFreeStrategy() if exact else "auto" if devices == 1 else "ddp"
    trainer = quiet_trainer(
        folder, callbacks=[head, mend] if exact else [mend], max_epochs=1, devices=devices, strategy=strategy
    )
    module, data = Net(), rows()
    trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8))
    x, y = data.tensors
    rank = trainer.global_rank
    results = [mend.edit(x[at : at + 1] + rank, (y[at : at + 1] + 1 + rank) % 4) for at in (0, 5)]  # the first counts
    mend.guard = Guard(0.0, 0.0)
    results.append(mend.edit(-3 * x[9:10], (y[9:10] + 2) % 4))
    with pytest.raises(BatchError):
        mend.edit(x[:1], y[:1] - 5)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    edited = module.body[0].weight.detach().clone()
    sums = dict(head.head.state_dict()) if exact else {}
    mend.revert(0)
    return {
        "weight": edited,
        "sums": {each: value for each, value in sums.items() if isinstance(value, Tensor)},
        "status": [result.status for result in results],
        "seen": [0 if each.locality is None else each.locality.images for each in results],
        "ids": [entry.id for entry in mend.records],
        "reverted": module.body[0].weight.detach().clone(),
        "left": {k: v for k, v in head.head.state_dict().items() if isinstance(v, Tensor)} if exact else {},
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return scenarios.run_in(tmp_path_factory.mktemp("mend"))


@scenarios.names("editor", "exact")
def test_both_processes_have_the_edits_of_one(name: str, ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(name)
    alone = run(name, tmp_path, 1)
    for key in ("status", "seen", "ids"):
        assert first[key] == second[key] == alone[key], key
    assert first["status"][:2] == ["applied", "applied"]
    assert first["seen"][0] == 63  # all but the image itself
    for key in ("weight", "reverted"):
        assert torch.equal(first[key], second[key])
        assert torch.allclose(first[key], alone[key], atol=1e-6)
    for key in ("sums", "left"):
        for each, value in first[key].items():
            assert torch.equal(value, second[key][each]), each
            assert torch.allclose(value.double(), alone[key][each].double(), rtol=1e-9, atol=1e-9), each


if __name__ == "__main__":
    sys.exit(drive(lambda name, folder: run(name, folder, 2)))
