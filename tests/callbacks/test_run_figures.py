"""Figures of strategies and callbacks land in the run's folder, where StreamEvaluation draws its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.report.run_figures import plot_prototype_similarity
from clkit.strategies import ERStrategy

Make = Callable[..., Any]


class Keeping(ERStrategy):
    """A replay strategy that counts how often its figures are drawn, of which it has two."""

    times_drawn = 0

    def run_figures(self) -> dict[str, Figure]:
        self.times_drawn += 1
        assert self.memory is not None
        means = torch.stack([self.memory.data[self.memory.label == c].mean(0) for c in self.memory.classes()])
        similarity, _ = plot_prototype_similarity(self.memory.classes(), means)
        return {**super().run_figures(), "prototype_similarity": similarity}


class Blank(pl.Callback):
    """A callback with a figure whose name the strategy uses too; of its own width."""

    def __init__(self, width: float) -> None:
        self.width = width

    def run_figures(self) -> Mapping[str, Figure]:
        return {"memory_balance": Figure(figsize=(self.width, 1.0))}


def fitted(make_trainer: Make, module: Any, evaluation: StreamEvaluation, *others: Any, **options: Any) -> Keeping:
    strategy = Keeping(60, transform=nn.Identity())
    trainer = make_trainer(strategy=strategy, callbacks=[*others, evaluation], **options)
    trainer.fit(module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=5), batch_size=16))
    return strategy


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.png"))


OWN = ["accuracy_matrix.png", "accuracy_over_time.png"]


def test_the_strategys_figures_are_there_and_whole(make_trainer: Make, lit_small: Make, tmp_path: Path) -> None:
    strategy = fitted(make_trainer, lit_small(), StreamEvaluation(table=False))
    assert pictures(tmp_path) == [*OWN, "memory_balance.png", "prototype_similarity.png"]
    assert strategy.times_drawn == 1
    for name in pictures(tmp_path):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert min(image.size) > 300
    assert hasattr(strategy, "run_figures")
    assert not hasattr(NMC(), "run_figures")
    assert not hasattr(StreamEvaluation(), "run_figures")


@pytest.mark.parametrize(
    ("evaluation", "options"),
    [({"figures": False}, {}), ({"files": False}, {}), ({}, {"fast_dev_run": 2})],
    ids=["no figures", "no files", "a trial run"],
)
def test_they_follow_the_same_switch(
    make_trainer: Make, lit_small: Make, tmp_path: Path, evaluation: dict[str, Any], options: dict[str, Any]
) -> None:
    strategy = fitted(make_trainer, lit_small(), StreamEvaluation(table=False, **evaluation), **options)
    assert strategy.times_drawn == 0
    assert pictures(tmp_path) == []


def test_figures_of_one_name_are_numbered(make_trainer: Make, lit_small: Make, tmp_path: Path) -> None:
    fitted(make_trainer, lit_small(), StreamEvaluation(table=False), Blank(2.0), Blank(3.0))
    expected = ["memory_balance.png", "memory_balance_2.png", "memory_balance_3.png", "prototype_similarity.png"]
    assert pictures(tmp_path) == [*OWN, *expected]
    widths = []
    for name in expected[:3]:
        with Image.open(tmp_path / name) as image:
            widths.append(image.size[0])
    assert widths[0] > 600
    assert widths[1:] == [300, 450]


def test_they_are_drawn_where_nothing_was_evaluated(make_trainer: Make, lit_small: Make, tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(32, 64), torch.arange(32) % 4)
    trainer = make_trainer(
        strategy=Keeping(60, transform=nn.Identity()), callbacks=[StreamEvaluation(table=False)], max_epochs=1
    )
    trainer.fit(lit_small(), DataLoader(data, batch_size=8))
    assert pictures(tmp_path) == ["memory_balance.png", "prototype_similarity.png"]


def test_a_figure_that_fails_costs_no_results(make_trainer: Make, lit_small: Make, tmp_path: Path) -> None:
    class Broken(pl.Callback):
        def run_figures(self) -> Mapping[str, Figure]:
            raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        fitted(make_trainer, lit_small(), StreamEvaluation(table=False), Broken())
    assert (tmp_path / "results.json").is_file()
    assert set(OWN) <= set(pictures(tmp_path))
