"""One look at each batch for all callbacks, and nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import hooks_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import BatchError
from clkit.features.observer import BatchObserver
from clkit.features.tap import evaluating
from clkit.strategies import LearningStrategy

Make = Callable[..., Any]


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=2), **options)


drift = pytest.mark.warns("the backbone still trains")


@drift
def test_callbacks_of_one_layer_share_their_hooks(make_trainer: Make, lit_small: Make) -> None:
    counts: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            counts.append(hooks_of(pl_module))

    module = lit_small()
    parts = [NMC(), AEFOCL(), *(NMC(name=f"n{i}") for i in range(4)), StreamEvaluation(table=False), Look()]
    make_trainer(callbacks=parts).fit(module, datamodule=stream())
    make_trainer(callbacks=[NMC(), Look()], limit_val_batches=0).fit(lit_small(), datamodule=stream())
    assert len(set(counts)) == 1
    assert hooks_of(module) == 0


def test_each_layer_is_read_where_it_is_asked_for(make_trainer: Make, lit_small: Make) -> None:
    module = lit_small(width=7)
    deep, shallow = NMC("euclidean", name="deep"), NMC("euclidean", name="shallow", layer="net.hidden")
    make_trainer(strategy="gradient_free", callbacks=[deep, shallow]).fit(module, datamodule=stream())
    assert deep.head.in_features == 7
    assert shallow.head.in_features == 64
    assert hooks_of(module) == 0


@drift
def test_scores_are_computed_once_a_batch_whoever_asks(make_trainer: Make, lit_small: Make) -> None:
    class Counting(NMC):
        calls = 0

        def scores(self, features: Tensor) -> Tensor:
            self.calls += 1
            return super().scores(features)

    head, batches = Counting(), []

    class Batches(pl.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            batches.append(1)

    make_trainer(callbacks=[head, StreamEvaluation(table=False), Batches()]).fit(lit_small(), datamodule=stream())
    assert head.calls == len(batches) > 0


def test_features_are_detached(make_trainer: Make, lit_small: Make) -> None:
    seen: list[bool] = []

    class Watching(NMC):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(self.observer.features().requires_grad)
            super().on_train_batch_end(*args)

    make_trainer(callbacks=[Watching()]).fit(lit_small(), datamodule=stream(stop_after=1))
    assert seen
    assert not any(seen)


@drift
def test_of_several_forwards_in_a_batch_the_first_counts(make_trainer: Make, lit_small: Make) -> None:
    """LBFGS runs the step many times; each row is still learned once, from the network as it was."""
    kind = type(lit_small())

    class Closure(kind):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    module = Closure()
    firsts: list[Tensor] = []
    current: list[int] = []

    def note(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if layer.training and current:
            current.clear()
            firsts.append(args[0].detach().double().sum(0))

    module.net.head.register_forward_hook(note)

    class Begin(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            current.append(1)

    head = NMC("euclidean")
    make_trainer(callbacks=[Begin(), head], limit_val_batches=0).fit(module, datamodule=stream())
    assert int(head.head.counts.sum()) == 899
    assert torch.allclose(head.head.statistics.sums.sum(0), torch.stack(firsts).sum(0), rtol=1e-10)


class Doubling(LearningStrategy):
    """Runs every batch twice in one forward, the batch's own rows first."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        inputs, targets = args[0]
        logits = module(torch.cat([inputs, inputs + 1]))
        return nn.functional.cross_entropy(logits, torch.cat([targets, targets]))


def test_a_strategy_with_more_rows_says_which_are_the_streams(make_trainer: Make, lit_small: Make) -> None:
    class Told(Doubling):
        stream_rows = slice(0, 8)

    def batches() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randn(8, 64, generator=generator), torch.arange(8) % 3) for _ in range(3)]
        return DataLoader(data, batch_size=None)

    head = NMC("euclidean", layer="net.hidden")
    make_trainer(strategy=Told(), callbacks=[head], max_epochs=1).fit(lit_small(), batches())
    total = torch.stack([x.double().sum(0) for x, _ in batches()]).sum(0)
    assert torch.allclose(head.head.statistics.sums.sum(0), total, rtol=1e-12)
    asked = NMC("euclidean", layer="net.hidden")  # nobody says what was run, so the batch is run once more
    make_trainer(strategy=Doubling(), callbacks=[asked], max_epochs=1).fit(lit_small(), batches())
    assert torch.allclose(asked.head.statistics.sums.sum(0), total, rtol=1e-12)
    with (
        pytest.warns(UserWarning, match="no forward of the step is given the batch's own inputs"),
        pytest.raises(BatchError, match=r"'net.head:in' had 16 rows and the batch has 8 targets.*`stream_rows`"),
    ):
        make_trainer(strategy=Doubling(), callbacks=[NMC(forward="shared")], max_epochs=1).fit(lit_small(), batches())


@drift
@pytest.mark.parametrize("what", ["fit", "validate", "predict"])
def test_no_batch_outlives_a_run(make_trainer: Make, lit_small: Make, what: str) -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            kept.append(weakref.ref(batch[0]))

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
            kept.append(weakref.ref(batch[0]))

        def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
            kept.append(weakref.ref(batch[0]))

    module = lit_small()
    trainer = make_trainer(callbacks=[NMC(), StreamEvaluation(table=False), Keep()])
    trainer.fit(module, datamodule=stream())
    if what != "fit":
        kept.clear()
        getattr(trainer, what)(module, datamodule=stream())
    gc.collect()
    assert kept
    assert all(reference() is None for reference in kept)


@drift
def test_a_trainer_can_be_collected(make_trainer: Make, lit_small: Make) -> None:
    trainer = make_trainer(callbacks=[NMC(), StreamEvaluation(table=False, files=False)])
    trainer.fit(lit_small(), datamodule=stream())
    assert trainer not in BatchObserver._of_trainer or not BatchObserver._of_trainer[trainer]
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None


def test_a_classifier_that_the_user_replaces_between_fits_is_found_again(make_trainer: Make, lit_small: Make) -> None:
    module, head = lit_small(), NMC("euclidean")
    trainer = make_trainer(strategy="gradient_free", callbacks=[head])
    trainer.fit(module, datamodule=stream(stop_after=1))
    module.net.head = nn.Linear(16, 12)
    (metrics,) = trainer.validate(module, datamodule=stream(stop_after=1), verbose=False)
    assert metrics["nmc/accuracy"] > 0.5


def test_evaluating_gives_every_part_its_own_mode_back() -> None:
    norm, dropout = nn.BatchNorm1d(2).eval(), nn.Dropout(0.5).eval()
    net = nn.Sequential(nn.Linear(2, 2), norm, nn.Sequential(dropout, nn.ReLU()))
    before = [part.training for part in net.modules()]
    with evaluating(net):
        assert not any(part.training for part in net.modules())
    assert [part.training for part in net.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(net):
        raise ZeroDivisionError
    assert [part.training for part in net.modules()] == before
