"""The base of a new method: what it hands to ``learn``, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clkit.callbacks import NMC, FeatureCallback
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import BatchError, TapError
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy

Make = Callable[..., Any]


class Record(FeatureCallback):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.batches: list[tuple[Tensor, Tensor]] = []

    def learn(self, features: Tensor, targets: Tensor) -> None:
        self.batches.append((features.clone(), targets.clone()))


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


def test_it_gets_the_inputs_of_the_classifier_checked_and_upcast(make_trainer: Make, lit_small: Make) -> None:
    record, module = Record(), lit_small(dropout=0.5)
    inputs, targets = torch.rand(5, 64), torch.tensor([3, -1, 0, 9, -1])
    trainer = make_trainer(callbacks=[record], max_epochs=1)
    module.training_step = lambda batch, batch_idx: module(batch[0]).sum() * 0
    trainer.fit(module, loader([(inputs, targets), (inputs[:1], targets[1:2]), (inputs[:0], targets[:0])]))
    ((features, ids),) = record.batches
    expected = torch.relu(inputs @ module.net.hidden.weight.T + module.net.hidden.bias)[[0, 2, 3]].double()
    assert torch.allclose(features, expected, rtol=0, atol=1e-6)
    assert features.dtype == torch.float64
    assert not features.requires_grad
    assert ids.tolist() == [3, 0, 9]
    assert ids.dtype == torch.int64


def test_a_warm_up_is_not_learned(make_trainer: Make, lit_small: Make) -> None:
    record, head = Record(), NMC()
    trainer = make_trainer(strategy=GradientFreeStrategy(warmup_epochs=2), callbacks=[record, head])
    trainer.fit(lit_small(), datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=3)))
    assert sum(len(ids) for _, ids in record.batches) == 899 == int(head.head.counts.sum())


def test_layer_and_reader_are_the_users(make_trainer: Make, lit_small: Make) -> None:
    record = Record(layer="net.hidden", batch_reader=lambda batch: (batch[1], batch[0]))
    module = lit_small()
    module.training_step = lambda batch, batch_idx: module(batch[1]).sum() * 0
    inputs = torch.rand(4, 64)
    make_trainer(callbacks=[record], max_epochs=1).fit(module, loader([(torch.arange(4), inputs)]))
    assert torch.equal(record.batches[0][0], inputs.double())


@pytest.mark.parametrize("limit", [5, 9])
def test_ids_have_a_limit(make_trainer: Make, limit: int) -> None:
    record = Record()
    record.max_classes = limit
    trainer = make_trainer(strategy="gradient_free", callbacks=[record], max_epochs=1)
    with pytest.raises(BatchError, match=rf"target 9 in row 1 is not below max_classes={limit}"):
        trainer.fit(TimmClassifier("identity"), loader([(torch.rand(2, 6), torch.tensor([1, 9]))]))
    assert record.batches == []


def test_a_subclass_without_learn_is_named(make_trainer: Make) -> None:
    class Empty(FeatureCallback):
        pass

    trainer = make_trainer(strategy="gradient_free", callbacks=[Empty()], max_epochs=1)
    with pytest.raises(NotImplementedError, match=r"Empty has no learn\(features, targets\)"):
        trainer.fit(TimmClassifier("identity"), loader([(torch.rand(2, 6), torch.tensor([1, 2]))]))


def test_a_layer_that_is_not_there_is_named(make_trainer: Make, lit_small: Make) -> None:
    with pytest.raises(TapError, match=r"layer='nowhere'"):
        make_trainer(callbacks=[Record(layer="nowhere")], max_epochs=1).fit(lit_small(), loader([]))
