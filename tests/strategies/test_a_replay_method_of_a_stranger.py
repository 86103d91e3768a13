"""A replay method that the guide writes on the public base: maximally interfered retrieval (Aljundi et al., 2019)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onpro_runs import Lit, lit, stream
from torch import Tensor

from clkit.callbacks import NMC
from clkit.testing import Check, Entry, contract

SNIPPETS = Path(__file__).parents[2] / "docs" / "snippets"
sys.path.append(str(SNIPPETS))

from interfered_replay import MIRStrategy  # noqa: E402  the file that the guide shows

Make = Callable[..., Any]


class Descent(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.5)


def naive_loss(net: Any, image: Tensor, label: Tensor) -> Tensor:
    logits = net(image[None])[0]
    return logits.exp().sum().log() - logits[label]


def naive_choice(net: Any, x: Tensor, y: Tensor, rows: Any, count: int) -> list[int]:
    """Arrivals of the rows whose loss a step of gradient descent on the batch raises most, image by image."""
    stepped = copy.deepcopy(net).eval()
    optimizer = torch.optim.SGD(stepped.parameters(), lr=0.5)
    losses = [naive_loss(stepped, image, label) for image, label in zip(x, y, strict=True)]
    (sum(losses[1:], losses[0]) / len(losses)).backward()
    optimizer.step()
    before = copy.deepcopy(net).eval()
    raised = []
    with torch.no_grad():
        for image, label, arrival in zip(rows.data, rows.label, rows.arrival.tolist(), strict=True):
            change = naive_loss(stepped, image, label) - naive_loss(before, image, label)
            raised.append((float(change), arrival))
    return [arrival for _, arrival in sorted(raised, reverse=True)[:count]]


def test_it_replays_the_rows_whose_loss_a_step_would_raise_most(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, steps = MIRStrategy(20, candidates=12, replay_batch=4, seed=3), []
    retrieve = MIRStrategy.retrieve

    def watched(self: Any, new: Any, count: int, generator: torch.Generator) -> Any:
        sampled = self.memory.sample(12, copy_of(generator))
        net = copy.deepcopy(self.lightning_module.net)
        rows = retrieve(self, new, count, generator)
        same = all(torch.equal(one, two) for one, two in zip(state(net), state(module.net), strict=True))
        expected = naive_choice(net, new.images, new.labels, sampled, count)
        steps.append((rows.arrival.tolist(), expected, module.net.training, same))
        return rows

    monkeypatch.setattr(MIRStrategy, "retrieve", watched)
    module = lit(Descent, dropout=0.3)
    make_trainer(strategy=strategy).fit(module, datamodule=stream())
    assert len(steps) == 11  # all but the first
    assert all(chosen == expected for chosen, expected, *_ in steps)
    assert all(training and same for *_, training, same in steps)  # looking leaves no trace
    assert {len(chosen) for chosen, *_ in steps} == {4}


def copy_of(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().set_state(generator.get_state())


def state(net: Any) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


@pytest.mark.warns("the backbone still trains")
def test_with_all_rows_as_candidates_and_replayed_it_is_er(make_trainer: Make) -> None:
    """Up to the order of the rows, of which the loss is a mean."""
    from clkit.strategies import ERStrategy

    ends = []
    for strategy in (MIRStrategy(20, candidates=20, replay_batch=20), ERStrategy(20, replay_batch=20)):
        module = lit(Descent, norm=False)
        trainer = make_trainer(strategy=strategy, callbacks=[NMC()])
        strategy.augmentation.is_identity = True  # views are drawn by position
        trainer.fit(module, datamodule=stream())
        ends.append(module.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-4, atol=1e-5)


def marked(check: Check) -> Any:
    slow = check.rule.startswith(("two_processes", "a_compiled_module"))
    return pytest.param(check, marks=pytest.mark.slow if slow else [])


@pytest.mark.parametrize(
    "check",
    [marked(check) for check in contract(Entry("MIR", "strategy", MIRStrategy, processes="agree"))],
    ids=lambda check: check.rule,
)
def test_it_passes_the_contract(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


def test_the_method_of_the_guide_has_less_than_forty_lines() -> None:
    assert len((SNIPPETS / "interfered_replay.py").read_text(encoding="utf-8").splitlines()) < 40
