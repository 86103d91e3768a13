"""A network that `setup` or `configure_model` builds is read as one that the constructor builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import LitSmall, SmallNet, hooks_of
from torch import nn

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import TapError
from clkit.strategies import ERStrategy

Make = Callable[..., Any]


def network() -> SmallNet:
    torch.manual_seed(3)
    return SmallNet()


class Early(LitSmall):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()


class Empty(LitSmall):
    """Has a layer of another purpose when callbacks are set up, which must not be taken for the classifier."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.other = nn.Linear(3, 2).requires_grad_(False)
        self.net = None  # type: ignore[assignment]  # as Lightning's documentation writes it


class InSetup(Empty):
    def setup(self, stage: str) -> None:
        self.net = self.net or network()


class Configured(Empty):
    def configure_model(self) -> None:
        self.net = self.net or network()


class Compiled(Empty):
    def configure_model(self) -> None:
        if self.net is None:
            self.net = torch.compile(network(), backend="eager")


class Wrapped(Empty):
    def configure_model(self) -> None:
        self.net = self.net or nn.Sequential(network())  # type: ignore[assignment]  # a wrapper of another class


def stream() -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=2))


def learned(make_trainer: Make, kind: type[LitSmall], strategy: Any) -> tuple[AEFOCL, LitSmall, Any]:
    head, evaluation, module = AEFOCL(balance="none"), StreamEvaluation(table=False, files=False), kind()
    trainer = make_trainer(strategy=strategy, callbacks=[head, NMC(), evaluation])
    trainer.fit(module, datamodule=stream())
    again = trainer.validate(module, datamodule=stream(), verbose=False)
    assert hooks_of(module) == 0
    return head, module, (evaluation.results, again)


@pytest.mark.filterwarnings("ignore:.*the backbone still trains:UserWarning")
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        *((kind, strategy) for kind in (InSetup, Configured) for strategy in ("auto", "gradient_free", "er")),
        *((kind, "gradient_free") for kind in (Compiled, Wrapped)),
    ],
)
def test_a_network_built_late_is_read_when_it_exists(make_trainer: Make, kind: Any, strategy: str) -> None:
    torch.compiler.reset()

    def fresh() -> Any:  # images stay flat: no views
        return ERStrategy(capacity=20, transform=nn.Identity()) if strategy == "er" else strategy

    wanted, _, (results, shown) = learned(make_trainer, Early, fresh())
    found, _, (other_results, other_shown) = learned(make_trainer, kind, fresh())
    exact = kind is not Compiled
    assert found.head.classes.tolist() == list(range(10))
    gap = (found.head.statistics.gram - wanted.head.statistics.gram).abs().max()
    assert float(gap) == 0 if exact else float(gap) < 1e-4 * float(wanted.head.statistics.gram.max())
    if exact:
        assert other_results == results
        assert other_shown == shown
    torch.compiler.reset()


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_network_that_is_never_built_is_named_before_the_first_batch(make_trainer: Make, run: str) -> None:
    class Nothing(Empty):
        def __init__(self) -> None:
            super().__init__()
            self.other = None  # type: ignore[assignment]  # not even a layer of another purpose
            self.scale = nn.Parameter(torch.ones(1))

    parts = [StreamEvaluation(table=False, files=False), NMC()]  # what is said to the first is said to the second
    with pytest.raises(TapError, match="Nothing holds no network with get_classifier"):
        getattr(make_trainer(callbacks=parts), run)(Nothing(), datamodule=stream())


def test_the_tap_is_not_read_in_setup(make_trainer: Make) -> None:
    class Hasty(NMC):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            super().setup(*args, **kwargs)
            self.observer.tap  # noqa: B018  what is tested

    with pytest.raises(TapError, match="in `setup` the module may not have built it yet"):
        make_trainer(callbacks=[Hasty()]).fit(Early(), datamodule=stream())
