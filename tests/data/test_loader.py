"""Batches: nothing lost, nothing repeated, and the same pixels however they are loaded."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from clkit.data import SourcePart
from clkit.data.loader import EvaluationLoader, Fetcher, TrainLoader, Workers, cut_batches, epoch_order
from clkit.errors import ClkitError, DataError


class Pictures(SourcePart):
    """Images whose pixels say which row they are."""

    def __init__(self, rows: int = 20) -> None:
        self.targets = np.arange(rows, dtype=np.int64) % 3

    def get_many(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices.astype(np.uint8))[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


def noisy(image: torch.Tensor) -> torch.Tensor:
    """Draws from torch's and from Python's global generators."""
    return image + torch.rand(image.shape) + random.random()


def fetcher(**options: object) -> Fetcher:
    part = Pictures()
    return Fetcher(part, part.targets, preprocess=lambda images: images, **options)


# ---- order


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    rows = np.arange(100, 180)
    first = epoch_order(rows, seed=3, epoch=2, shuffle=True)
    np.random.seed(99)  # noqa: NPY002  the global state must not matter
    assert (first == epoch_order(rows, seed=3, epoch=2, shuffle=True)).all()
    assert sorted(first) == list(rows)
    for seed, epoch in ((3, 3), (4, 2), (2, 3)):
        assert (first != epoch_order(rows, seed=seed, epoch=epoch, shuffle=True)).any()
    assert (epoch_order(rows, seed=3, epoch=2, shuffle=False) == rows).all()


# ---- batches


@given(total=st.integers(1, 400), batch_size=st.integers(1, 70), world_size=st.integers(1, 9), data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_row_is_lost_or_repeated_and_no_batch_is_empty(
    total: int, batch_size: int, world_size: int, data: st.DataObject
) -> None:
    rows = np.array(data.draw(st.permutations(range(total)))) if total < 40 else np.arange(total)[::-1]
    if total < world_size:
        with pytest.raises(DataError, match=f"{total} rows cannot be shared by {world_size} processes"):
            cut_batches(rows, batch_size, rank=0, world_size=world_size)
        return
    ranks = [cut_batches(rows, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert min(sizes) > 0
    assert max(sizes) <= batch_size + (batch_size == 1)
    assert max(sizes) - min(sizes) <= 1 + (world_size > 1)
    assert sorted(row for batches in ranks for batch in batches for row in batch) == list(range(total))


def test_the_number_of_batches_is_the_usual_one_in_a_single_process() -> None:
    for total, batch_size in ((181, 32), (64, 32), (1, 32), (33, 32)):
        assert len(cut_batches(np.arange(total), batch_size)) == len(DataLoader(range(total), batch_size=batch_size))


def test_every_rank_keeps_the_order_of_arrival() -> None:
    rows = np.array([5, 3, 8, 1, 9, 2, 7])
    assert np.concatenate(cut_batches(rows, 2)).tolist() == rows.tolist()
    assert np.concatenate(cut_batches(rows, 2, rank=1, world_size=2)).tolist() == [3, 1, 2]


# ---- fetching


def test_pixels_do_not_depend_on_the_number_of_workers_or_on_what_else_is_in_the_batch() -> None:
    keys = [(1, np.array([4, 7, 2])), (1, np.array([0, 19])), (2, np.array([4]))]
    here = list(Workers(fetcher(augment=noisy, seed=5), 0).batches(keys))
    workers = Workers(fetcher(augment=noisy, seed=5), 2)
    for _ in range(2):  # the same processes serve the second round
        there = list(workers.batches(keys))
        for (x, y), (other_x, other_y) in zip(here, there, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
    alone = fetcher(augment=noisy, seed=5)[1, np.array([7])][0]
    assert torch.equal(alone[0], here[0][0][1])  # another batch, as another rank cuts it
    assert not torch.equal(here[0][0][0], here[2][0][0])  # another epoch, other noise
    assert not torch.equal(here[0][0][0], fetcher(augment=noisy, seed=6)[1, np.array([4])][0][0])


def test_an_abandoned_round_of_the_workers_does_not_spoil_the_next() -> None:
    workers = Workers(fetcher(), 2)
    keys = [(0, np.array([row])) for row in range(20)]
    abandoned = workers.batches(keys)
    next(abandoned)
    assert [int(x[0, 0, 0, 0]) for x, _ in workers.batches(keys)] == list(range(20))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_left_alone(num_workers: int) -> None:
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    list(Workers(fetcher(augment=noisy), num_workers).batches([(0, np.arange(5))]))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state[1]).all()  # noqa: NPY002


def test_no_accelerator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` would seed them, and nobody would give them their state back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    fetcher(augment=noisy)[0, np.arange(5)]
    assert not seeded


def test_a_transform_that_fails_still_gives_the_generators_back() -> None:
    def broken(image: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        raise RuntimeError("on purpose")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        fetcher(augment=broken)[0, np.array([1])]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transform_may_change_sizes() -> None:
    part = Pictures()
    sizes = []

    def crop(image: torch.Tensor) -> torch.Tensor:
        return image[:, : 1 + int(image[0, 0, 0]) % 2]

    def preprocess(images: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        sizes.append([tuple(image.shape) for image in images])
        return torch.zeros(len(images), 1)

    Fetcher(part, part.targets, preprocess, augment=crop)[0, np.array([2, 3])]
    assert sizes == [[(1, 1, 4), (1, 2, 4)]]


def test_a_transform_may_change_the_dtype_of_some_images() -> None:
    part = Pictures()
    seen: list[Any] = []

    def augment(image: torch.Tensor) -> torch.Tensor:
        return image if int(image[0, 0, 0]) % 2 else image.float() / 255

    def preprocess(images: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        seen.extend(images)
        return torch.zeros(len(images), 1)

    Fetcher(part, part.targets, preprocess, augment=augment)[0, np.array([2, 3])]
    assert [image.dtype for image in seen] == [torch.float32, torch.uint8]  # bytes do not become numbers up to 255


def test_tasks_are_a_third_element() -> None:
    batch = fetcher(tasks=np.arange(20) // 10)[0, np.array([3, 15])]
    assert [part.tolist() for part in batch[1:]] == [[0, 0], [0, 1]]
    assert len(fetcher()[0, np.array([3])]) == 2


# ---- loaders


def test_the_training_loader_starts_where_the_run_stands() -> None:
    batches = [np.array([1, 2]), np.array([3, 4]), np.array([5])]
    done = {"batches": 0}
    loader = TrainLoader(Workers(fetcher(), 0), batches, 7, lambda epoch: done["batches"] if epoch == 7 else -99)
    assert len(loader) == 3
    early = iter(loader)  # Lightning makes iterators that it does not use: the position is asked for when it begins
    done["batches"] = 2
    assert [x[:, 0, 0, 0].tolist() for x, _ in early] == [[5]]
    done["batches"] = 0
    assert [x[:, 0, 0, 0].tolist() for x, _ in loader] == [[1, 2], [3, 4], [5]]


def test_evaluation_batches_go_round_robin_and_never_straddle_experiences() -> None:
    batches = {
        0: [np.array([0, 1]), np.array([2])],
        1: [np.array([10])],
        4: [np.array([5, 6]), np.array([7, 8]), np.array([9])],
    }
    loader = EvaluationLoader(Workers(fetcher(), 0), batches)
    assert [experience for experience, _ in loader.batches] == [0, 1, 4, 0, 4, 4]
    assert [x[:, 0, 0, 0].tolist() for x, _ in loader] == [[0, 1], [10], [5, 6], [2], [7, 8], [9]]
    assert loader.expected_samples() == {0: 3, 1: 1, 4: 5}
    assert loader.expected_samples(3) == {0: 2, 1: 1, 4: 2}
    assert len(EvaluationLoader(Workers(fetcher(), 0), {})) == 0


def test_lightning_does_not_take_the_loaders_for_ones_it_may_give_a_sampler() -> None:
    workers = Workers(fetcher(), 0)
    for loader in (TrainLoader(workers, [], 0, lambda epoch: 0), EvaluationLoader(workers, {})):
        assert not isinstance(loader, DataLoader)


def test_errors_are_of_the_library_and_of_python() -> None:
    with pytest.raises(ClkitError) as caught:
        cut_batches(np.arange(2), 4, rank=0, world_size=3)
    assert isinstance(caught.value, RuntimeError)
