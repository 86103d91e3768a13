"""Two processes with plain loaders: each row counts once, and another number of batches is an error and no hang.

Run as a program, ``test_plain_loaders_two_processes.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import LitPlain, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler, TensorDataset
from two_ranks import Ranks, Scenarios, drive

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.errors import ClkitError
from clkit.features.repeats import _repeats
from clkit.strategies import ERStrategy

TASKS = [(3, 0), (1, 2, 4)]
ROWS = 57


def part(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(ROWS) % 5
    centres = torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
    return centres[targets] + torch.randn(ROWS, 6, generator=generator), targets


def dataset(seed: int, classes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> TensorDataset:
    inputs, targets = part(seed)
    chosen = torch.isin(targets, torch.tensor(classes))
    return TensorDataset(inputs[chosen].reshape(-1, 1, 2, 3), targets[chosen])  # as images, which a memory wants


class Net(LitPlain):
    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classify(inputs.flatten(1))
        return logits


class Uneven(Sampler[int]):
    """The first process gets all rows but the last eight."""

    def __len__(self) -> int:
        return len(range(*self._range()))

    def __iter__(self) -> Iterator[int]:
        return iter(range(*self._range()))

    def _range(self) -> tuple[int, int]:
        return (0, ROWS - 8) if os.environ["LOCAL_RANK"] == "0" else (ROWS - 8, ROWS)


class Endless(IterableDataset[Any]):
    """Does not say how many rows it has: another number in each process."""

    def __iter__(self) -> Iterator[Any]:
        yield from (dataset(0)[row] for row in Uneven())


def run(
    folder: Path, strategy: Any, train: Callable[[tuple[int, ...]], Any], val: Any = None, **options: Any
) -> dict[str, Any]:
    """A fit for each task, and everything that counts."""
    heads, evaluation = [NMC("euclidean"), AEFOCL(balance="none")], StreamEvaluation(table=False, files=False)
    options = {"devices": 2, "strategy": strategy, "precision": "64-true", "max_epochs": 1, **options}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for task in TASKS:
            trainer = quiet_trainer(folder, callbacks=[*heads, evaluation], **options)
            trainer.fit(Net(), train(task), val or DataLoader(dataset(1), 4))
    said = [str(each.message) for each in caught if "clkit: " in str(each.message)]
    return {
        "counts": heads[0].head.counts.tolist(),
        "weight": heads[1].head.linear_readout()[0],
        "results": evaluation.results,
        "samples": sum(total for _, total in evaluation.class_counts("nmc").values()),
        "memory": strategy.memory.n_seen if isinstance(strategy, ERStrategy) else None,
        "said": said,
    }


def scenario(name: str, folder: Path) -> dict[str, Any]:
    def split(task: tuple[int, ...]) -> Any:
        return DataLoader(dataset(0, task), 4, shuffle=True)

    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "ddp": lambda: run(folder, "ddp", split),
        "free": lambda: run(folder, "gradient_free", split),
        "er": lambda: run(folder, ERStrategy(capacity=9, replay_batch=4, transform=None), split),
        "whole": lambda: run(folder, "ddp", split, use_distributed_sampler=False),
        "uneven": lambda: run(
            folder, "ddp", lambda task: DataLoader(dataset(0), 4, sampler=Uneven()), use_distributed_sampler=False
        ),
        "unsized": lambda: run(folder, "ddp", lambda task: DataLoader(Endless(), 4)),
        "uneven evaluation": lambda: run(
            folder,
            "ddp",
            lambda task: DataLoader(dataset(0, task), 4, sampler=DistributedSampler(dataset(0, task))),
            DataLoader(dataset(1), 4, sampler=Uneven()),
            use_distributed_sampler=False,
        ),
    }
    try:
        return runs[name]()
    except ClkitError as error:
        return {"error": f"{type(error).__name__}: {error}"}


QUICK = ("free", "uneven")
scenarios = Scenarios(__file__, QUICK, ("ddp", "er", "whole", "unsized", "uneven evaluation"))
names = scenarios.names


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return scenarios.run_in(tmp_path_factory.mktemp("plain"))


@names("free", "ddp", "er")
def test_rows_that_fill_a_share_up_are_learned_and_evaluated_once(ranks: Ranks, name: str) -> None:
    x, y = (tensor.double().numpy() for tensor in part(0))
    inputs, targets = (tensor.double().numpy() for tensor in part(1))
    wanted = np.linalg.solve(x.T @ x + np.eye(6), x.T @ np.eye(5)[y.astype(int)]).T
    matrix: list[list[float | None]] = []
    for stage in (1, 2):
        classes = np.array(sorted(sum(TASKS[:stage], ())))
        means = np.stack([x[y == label].mean(0) for label in classes])
        right = classes[((inputs[:, None] - means) ** 2).sum(2).argmin(1)] == targets
        matrix.append([right[np.isin(targets, TASKS[j])].mean() if j < stage else None for j in range(2)])
    for rank in ranks(name):
        assert rank["counts"] == np.bincount(y.astype(int)).tolist()
        assert np.abs(rank["weight"].numpy() - wanted).max() <= 1e-10
        assert rank["results"]["nmc"]["accuracy_matrix"] == [
            [None if value is None else pytest.approx(value, abs=1e-12) for value in row] for row in matrix
        ]
        assert rank["samples"] == ROWS
        assert rank["said"] == []
    if name == "er":
        assert [rank["memory"] for rank in ranks(name)] == [ROWS, ROWS]


@pytest.mark.slow
def test_a_loader_that_is_not_dealt_out_is_said_once_with_its_numbers(ranks: Ranks) -> None:
    first, second = ranks("whole")
    sizes = [int(torch.isin(part(0)[1], torch.tensor(task)).sum()) for task in TASKS]
    assert sum(first["counts"]) == 2 * ROWS
    said = [f"each of the 2 processes is given all {size} rows, which count as {2 * size}" for size in (*sizes, ROWS)]
    assert Counter(message.split("; ")[0] for message in first["said"]) == {
        f"clkit: {said[0]}": 1,
        f"clkit: {said[1]}": 1,
        f"clkit: {said[2]}": 2,
    }
    assert second["said"] == []


@names("uneven", "unsized")
def test_processes_with_different_numbers_of_batches_end_with_an_error(ranks: Ranks, name: str) -> None:
    says = {
        "uneven": "numbers of training batches (13, 2 in the",
        "unsized": "some (rank 1) have their last training batch",
    }
    for rank in ranks(name):
        assert rank["error"].startswith("ConfigurationError: ")
        assert says[name] in rank["error"]


@pytest.mark.slow
def test_processes_may_evaluate_different_numbers_of_batches(ranks: Ranks) -> None:
    for rank in ranks("uneven evaluation"):
        assert rank["samples"] == ROWS
        assert rank["results"] == ranks("free")[0]["results"] | {"module": rank["results"]["module"]}
    assert "how Uneven deals the rows to 2 processes is not known" in str(ranks("uneven evaluation")[0]["said"])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 4, 7])
def test_of_all_processes_each_row_is_left_in_once(batch_size: int | None, drop_last: bool) -> None:
    for processes in (2, 3, 5):
        for rows in (1, 2, 20, 21, 22, 57):
            data, left, full = TensorDataset(torch.arange(rows)), Counter[int](), 0
            for rank in range(processes):
                options: dict[str, Any] = {"sampler": DistributedSampler(data, processes, rank)}
                if batch_size is not None:
                    options["drop_last"] = drop_last
                loader = DataLoader(data, batch_size, **options)
                for index, (batch,) in enumerate(loader):
                    ids = batch.reshape(-1).tolist()
                    repeated, reason = _repeats(loader, processes, index, len(ids))
                    assert not reason
                    left.update(ids[: len(ids) - repeated])
                    full += len(ids)
            assert max(left.values(), default=1) == 1
            if batch_size is None or not drop_last:
                assert sorted(left) == list(range(rows))
                assert full == processes * -(-rows // processes)


def test_rows_in_a_batch_of_ones_own_sampler_all_count() -> None:
    class Own(BatchSampler):
        pass

    data = TensorDataset(torch.arange(57))
    loader = DataLoader(data, batch_sampler=Own(DistributedSampler(data, 2, 1), 4, drop_last=False))
    assert _repeats(loader, 2, 7, 1) == (
        0,
        "57 rows are dealt to 2 processes as 58, and in which batch Own puts those that come twice is not known, "
        "so all of them count",
    )


if __name__ == "__main__":
    sys.exit(drive(scenario))
