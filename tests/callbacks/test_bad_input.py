"""Bad input in the middle of a run is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clkit.callbacks import AEFOCL, LDA, NMC, Lift, StreamEvaluation
from clkit.errors import ArgumentError, BatchError, ClkitError, TapError
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy
from clkit.testing._compare import changed

Make = Callable[..., Any]
Batch = tuple[Tensor, Tensor]


def good(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loader(batches: list[Any]) -> DataLoader[Any]:
    """Hands these batches out as they are."""
    return DataLoader(batches, batch_size=None)


def nan(batch: Batch) -> Any:
    batch[0][3, 2] = torch.nan
    return batch


def infinite(batch: Batch) -> Any:
    batch[0][0, 0] = -torch.inf
    return batch


def negative(batch: Batch) -> Any:
    batch[1][5] = -2
    return batch


def fractional(batch: Batch) -> Any:
    return batch[0], batch[1].float() + 0.5


def too_large(batch: Batch) -> Any:
    batch[1][2] = 100
    return batch


def too_few_labels(batch: Batch) -> Any:
    return batch[0], batch[1][:5]


def wide_labels(batch: Batch) -> Any:
    return batch[0], torch.nn.functional.one_hot(batch[1], 4)


def lone_tensor(batch: Batch) -> Any:
    return batch[0]


def unknown_keys(batch: Batch) -> Any:
    return {"pixels": batch[0], "label": batch[1]}


# what is wrong, and what the message must say: the value seen and where
BAD: dict[str, tuple[Callable[[Batch], Any], str]] = {
    "nan": (nan, r"features of rows \[3\] are not finite"),
    "infinite": (infinite, r"features of rows \[0\] are not finite"),
    "negative": (negative, r"targets must be class ids.*got -2 in row 5.*ignore_index"),
    "fractional": (fractional, r"targets of type float32 are no class ids.*single-label classification"),
    "too large": (too_large, r"target 100 in row 2 is not below max_classes=50"),
    "too few labels": (too_few_labels, r"8 rows.*5 targets|5 targets"),
    "one-hot": (wide_labels, r"targets of shape \(8, 4\) look like several labels a sample, or one-hot"),
    "a lone tensor": (lone_tensor, r"a batch must be \(inputs, targets, …\) or a mapping, got Tensor.*batch_reader"),
    "unknown keys": (unknown_keys, r"no inputs in a batch with keys \['label', 'pixels'\].*batch_reader"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_is_refused_by_name(make_trainer: Make, bad: str) -> None:
    """That no bit of what was learned changes is in the contract of every head."""
    spoil, message = BAD[bad]
    head = NMC(max_classes=50)
    trainer = make_trainer(strategy="gradient_free", callbacks=[head], max_epochs=1)
    with pytest.raises(BatchError, match=f"(?s){message}") as caught:
        trainer.fit(TimmClassifier("identity"), loader([good(0), good(1), spoil(good(2)), good(3)]))
    assert isinstance(caught.value, ValueError)
    assert int(head.head.counts.sum()) == 16


@pytest.mark.parametrize("bad", ["nan", "negative", "fractional", "too large"])
def test_no_head_of_several_learns_a_part_of_a_bad_batch_that_an_earlier_one_refused(
    make_trainer: Make, bad: str
) -> None:
    spoil, message = BAD[bad]
    heads = [NMC(max_classes=50), LDA(max_classes=50), AEFOCL(max_classes=50)]
    trainer = make_trainer(strategy="gradient_free", callbacks=heads, max_epochs=1)
    with pytest.raises(BatchError, match=message):
        trainer.fit(TimmClassifier("identity"), loader([good(0), spoil(good(1))]))
    assert [int(head.head.counts.sum()) for head in heads] == [8, 8, 8]


def test_a_bad_evaluation_batch_is_refused_by_name(make_trainer: Make) -> None:
    head = NMC()
    trainer = make_trainer(strategy="gradient_free", callbacks=[head], max_epochs=1, num_sanity_val_steps=0)
    module = TimmClassifier("identity")
    trainer.fit(module, loader([good(0)]))
    before = dict(head.head.state_dict())
    with pytest.raises(BatchError, match=r"features of rows \[3\] are not finite"):
        trainer.validate(module, loader([nan(good(1))]), verbose=False)
    assert changed(dict(head.head.state_dict()), before) == []


def test_a_width_that_changes_is_refused_by_name(make_trainer: Make) -> None:
    head = NMC()
    wide = (torch.randn(8, 7), torch.zeros(8, dtype=torch.int64))
    trainer = make_trainer(strategy="gradient_free", callbacks=[head], max_epochs=1)
    with pytest.raises(ClkitError, match=r"NMC\(nmc\) has learned features of width 5 .*gives width 7"):
        trainer.fit(TimmClassifier("identity"), loader([good(0), wide]))
    assert int(head.head.counts.sum()) == 8


def test_unusual_batches_are_read_by_the_users_own_reader(make_trainer: Make) -> None:
    def reader(batch: Any) -> tuple[Any, Tensor]:
        return batch["pixels"], batch["meta"]["class"]

    data = [{"pixels": good(i)[0], "meta": {"class": good(i)[1]}} for i in range(3)]
    head, evaluation = NMC(batch_reader=reader), StreamEvaluation(table=False, files=False, batch_reader=reader)
    trainer = make_trainer(
        strategy=GradientFreeStrategy(batch_reader=reader), callbacks=[head, evaluation], max_epochs=1
    )
    batches = loader(data)
    trainer.fit(TimmClassifier("identity", batch_reader=reader), batches, batches)
    assert int(head.head.counts.sum()) == 24
    assert evaluation.results["nmc"]["final_accuracy"] > 0.3


# ---- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AEFOCL(gamma=0.0), r"gamma must be a finite number above 0, got 0.0"),
        (lambda: AEFOCL(balance="smote"), r"balance must be one of .*'pfg'.*got 'smote'"),
        (lambda: AEFOCL(10.0, Lift(5.5)), r"expansion_dim .*got 5.5"),
        (lambda: AEFOCL(10.0, 500), r"lift must be Lift\(…\) or None, got 500"),
        (lambda: AEFOCL(pseudo_features={"noise": 0.5}), r"pseudo_features must be PseudoFeatures\(…\), got \{'noise'"),
        (lambda: AEFOCL(balance="expected", lift=Lift(10)), r"expected.*expansion_dim"),
        (lambda: AEFOCL(max_classes=0), r"max_classes .*got 0"),
        (lambda: NMC("manhattan"), r"metric must be one of 'janson', 'euclidean', 'icarl', 'cosine', got 'manhattan'"),
        (lambda: LDA(shrinkage=1.5), r"shrinkage .*1.5"),
        (lambda: LDA(name=3), r"name must be a string, got 3"),
        (lambda: StreamEvaluation(keep_features="1GB"), r"keep_features must be an integer, got '1GB'"),
        (lambda: NMC(forward="train"), r"forward must be one of 'auto', 'shared', 'eval', got 'train'"),
        (lambda: NMC(graft="always"), r"graft must be one of 'never', 'experience_end', 'fit_end', got 'always'"),
    ],
)
def test_a_wrong_argument_is_an_error_before_any_training(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)


def test_a_layer_that_is_not_there_is_named_before_any_training(make_trainer: Make, lit_small: Make) -> None:
    trainer = make_trainer(callbacks=[NMC(layer="net.haed")], max_epochs=1)
    with pytest.raises(TapError, match=r"layer='net.haed'.*net.head"):
        trainer.fit(lit_small(), loader([good()]))


def test_a_step_that_never_runs_the_tapped_layer_is_named(make_trainer: Make, lit_small: Make) -> None:
    module = lit_small()
    module.spare = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 3))
    data = [(torch.randn(8, 64), torch.zeros(8, dtype=torch.int64))]
    trainer = make_trainer(callbacks=[NMC(layer="spare.1")], max_epochs=1)
    with pytest.raises(TapError, match=r"no features passed the tap at 'spare.1:in'.*`layer=`"):
        trainer.fit(module, loader(data))
