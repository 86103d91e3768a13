"""One strategy object in a new trainer for each task, as the guide recommends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import LitSmall
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.errors import ArgumentError
from clkit.strategies import ERStrategy, GradientFreeStrategy, MemorySettings, OnProStrategy

Make = Callable[..., Any]


def loader(task: int) -> DataLoader[Any]:
    torch.manual_seed(task)
    return DataLoader(TensorDataset(torch.randn(40, 64), torch.randint(2 * task, 2 * task + 2, (40,))), batch_size=10)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_memory_goes_along_and_each_trainer_keeps_its_settings(make_trainer: Make, precision: Any) -> None:
    strategy, module, seen = ERStrategy(capacity=20, transform=nn.Identity()), LitSmall(), []
    for task in range(3):
        trainer = make_trainer(strategy=strategy, max_epochs=1, precision=precision if task else "32-true")
        trainer.fit(module, loader(task))
        assert trainer.precision == (precision if task else "32-true")
        assert type(trainer.accelerator).__name__ == "CPUAccelerator"
        trainer.validate(module, loader(task), verbose=False)  # between two runs of one trainer nothing is lost
        assert strategy.memory is not None
        seen.append(strategy.memory.n_seen)
    assert seen == [40, 80, 120]


@pytest.mark.parametrize("make", [OnProStrategy, GradientFreeStrategy])
def test_every_strategy_can_be_given_to_another_trainer(make_trainer: Make, make: Any) -> None:
    strategy = make()
    for _ in range(2):
        assert make_trainer(strategy=strategy).strategy is strategy
        strategy.teardown()


@pytest.mark.parametrize("setting", ["policy", "storage", "scope"])
def test_a_choice_that_is_none_is_refused_also_without_a_memory(setting: str) -> None:
    with pytest.raises(ArgumentError, match=f"{setting} must be.*'typo'"):
        ERStrategy(capacity=0, memory=MemorySettings(**{setting: "typo"}))
