"""What a head says, once, when a run is likely not what its user meant; and silence otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from clkit.callbacks import AEFOCL, LDA, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError
from clkit.models import TimmClassifier

Make = Callable[..., Any]

TWICE = "a second epoch over an experience"
DRIFT = "the backbone still trains"
AGAIN = "it has learned before"
NOTHING = "it has learned nothing"
NO_BATCH = "this fit learned no batch"


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=3), **options)


def said(run: Callable[[], Any]) -> list[str]:
    """The starts of all warnings that a clkit callback gave."""
    known = (TWICE, DRIFT, AGAIN, NOTHING, NO_BATCH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [text for warning in caught for text in known if text in str(warning.message)]


def test_a_plain_run_is_silent(make_trainer: Make) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[AEFOCL(), NMC(), LDA(), StreamEvaluation(table=False)])
    module = TimmClassifier("identity")
    assert said(lambda: trainer.fit(module, datamodule=stream())) == []
    assert said(lambda: trainer.validate(module, datamodule=stream(), verbose=False)) == []


@pytest.mark.parametrize(("kind", "wanted"), [(AEFOCL, [TWICE]), (NMC, []), (LDA, [])])
def test_a_second_epoch_warns_where_it_counts_twice(make_trainer: Make, kind: Any, wanted: list[str]) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[kind()])
    data = stream(epochs_per_experience=3)
    assert said(lambda: trainer.fit(TimmClassifier("identity"), datamodule=data)) == wanted


def test_a_backbone_that_trains_is_said_once(make_trainer: Make, lit_small: Make) -> None:
    assert said(lambda: make_trainer(callbacks=[NMC()]).fit(lit_small(), datamodule=stream())) == [DRIFT]
    reset = NMC(reset_each_task=True)
    assert said(lambda: make_trainer(callbacks=[reset]).fit(lit_small(), datamodule=stream())) == []
    assert reset.head.classes.tolist() == [7, 8, 9]


def test_a_head_that_goes_on_with_another_stream_says_so(make_trainer: Make) -> None:
    head = NMC()
    for wanted in ([], [AGAIN]):
        trainer = make_trainer(strategy="gradient_free", callbacks=[head])
        assert said(lambda t=trainer: t.fit(TimmClassifier("identity"), datamodule=stream())) == wanted
    assert int(head.head.counts.sum()) == 2 * 899


def test_evaluating_without_knowledge_says_so(make_trainer: Make) -> None:
    trainer = make_trainer(callbacks=[NMC()])
    module = TimmClassifier("identity")
    assert said(lambda: trainer.validate(module, datamodule=stream(), verbose=False)) == [NOTHING]


def test_a_fit_that_learned_nothing_says_so(make_trainer: Make) -> None:
    data = stream()
    data.setup("validate")
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC()], max_epochs=1)
    module = TimmClassifier("identity")
    loader = data.train_dataloader()
    assert said(lambda: trainer.fit(module, loader)) == []
    assert said(lambda: trainer.fit(module, loader)) == [NO_BATCH]  # max_epochs is reached


def test_two_predictors_of_one_name_are_refused(make_trainer: Make) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(name="mine"), LDA(name="mine")])
    with pytest.raises(ConfigurationError, match=r"two callbacks have the name 'mine'; give one another: name='…'"):
        trainer.fit(TimmClassifier("identity"), datamodule=stream())


@pytest.mark.parametrize("name", ["module", "", "a/b", " nmc", "../up", "(x)"])
def test_a_name_that_cannot_name_a_log_or_a_file_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="name must be letters"):
        NMC(name=name)
