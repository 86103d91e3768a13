"""What users do wrong is said early, by name, and in time to change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, LDA, NMC, StreamEvaluation, ungraft
from clkit.cli.main import main
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, BatchError, ConfigurationError
from clkit.models import TimmClassifier
from clkit.strategies import GradientFreeStrategy

Make = Callable[..., Any]


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=2), **options)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "module", " nmc"])
def test_a_name_that_cannot_name_a_file_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="name must be"):
        NMC(name=name)


def test_a_layer_that_is_no_path_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"layer must be .* got 3"):
        NMC(layer=3)


def test_two_predictors_of_one_name_are_refused(make_trainer: Make) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(name="h"), LDA(name="h"), StreamEvaluation()])
    with pytest.raises(ConfigurationError, match="two callbacks have the name 'h'"):
        trainer.fit(TimmClassifier("identity"), datamodule=stream())


@pytest.mark.parametrize("graft", ["fit_end", "experience_end"])
def test_two_grafts_for_one_classifier_are_refused_before_training(
    make_trainer: Make, lit_small: Make, graft: Any
) -> None:
    callbacks = [NMC(graft=graft), AEFOCL(graft=graft)]
    trainer = make_trainer(strategy="gradient_free", callbacks=callbacks)
    with pytest.raises(ConfigurationError, match=r"NMC\(nmc\) and AEFOCL\(aef_ocl\)"):
        trainer.fit(lit_small(), datamodule=stream())
    assert trainer.global_step == 0


def test_a_network_without_classifier_is_refused_before_training(make_trainer: Make) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(graft="fit_end")])
    with pytest.raises(ConfigurationError, match="no single classifier"):
        trainer.fit(TimmClassifier("identity"), datamodule=stream())
    assert trainer.global_step == 0


def test_a_left_graft_is_named_before_training_and_can_be_taken_off(make_trainer: Make, lit_small: Make) -> None:
    module = lit_small()
    own = module.net.head.weight.clone()
    make_trainer(strategy="gradient_free", callbacks=[AEFOCL(graft="fit_end")]).fit(module, datamodule=stream())
    again = make_trainer(strategy="gradient_free", callbacks=[AEFOCL(graft="fit_end")])
    with pytest.raises(ConfigurationError, match=r"ungraft\(module\)"):
        again.fit(module, datamodule=stream())
    assert again.global_step == 0
    ungraft(module)
    assert torch.equal(module.net.head.weight, own)
    make_trainer(strategy="gradient_free", callbacks=[AEFOCL(graft="fit_end")]).fit(module, datamodule=stream())
    assert not torch.equal(module.net.head.weight, own)


@pytest.mark.parametrize("graft", ["fit_end", "experience_end"])
def test_the_last_checkpoint_holds_the_graft(make_trainer: Make, lit_small: Make, tmp_path: Path, graft: Any) -> None:
    module, callback = lit_small(), AEFOCL(graft=graft)
    saving = ModelCheckpoint(str(tmp_path), save_last=True)
    make_trainer(strategy="gradient_free", callbacks=[callback, saving], enable_checkpointing=True).fit(
        module, datamodule=stream()
    )
    fresh, fresh_callback = lit_small(), AEFOCL(graft=graft)
    trainer = make_trainer(callbacks=[fresh_callback])
    (metrics,) = trainer.validate(fresh, datamodule=stream(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert metrics["val_acc"] == pytest.approx(metrics["aef_ocl/accuracy"])
    # and somebody without clkit reads the same from the file
    plain = lit_small()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    inputs = torch.rand(50, 64)
    features = torch.relu(plain.net.hidden(inputs))
    assert torch.equal(plain(inputs).argmax(1), callback.head.predict(features))


def test_a_head_that_learned_nothing_is_left_out_and_said(make_trainer: Make) -> None:
    evaluation = StreamEvaluation(files=False)
    trainer = make_trainer(callbacks=[NMC(), evaluation], strategy="gradient_free")
    with pytest.warns(UserWarning, match=r"NMC\(nmc\): it has learned nothing.*ckpt_path"):
        (metrics,) = trainer.validate(TimmClassifier("identity"), datamodule=stream(), verbose=False)
    assert metrics == {}


def test_a_fit_that_learns_no_batch_is_said(make_trainer: Make, lit_small: Make) -> None:
    loader = DataLoader(TensorDataset(torch.rand(8, 64), torch.arange(8) % 2), batch_size=4)
    trainer = make_trainer(callbacks=[NMC()], max_epochs=1)
    module = lit_small()
    trainer.fit(module, loader)
    with pytest.warns(UserWarning, match="this fit learned no batch"):
        trainer.fit(module, loader)


def test_learning_a_second_stream_on_top_is_said(make_trainer: Make) -> None:
    head = NMC()
    make_trainer(strategy="gradient_free", callbacks=[head]).fit(TimmClassifier("identity"), datamodule=stream())
    again = make_trainer(strategy="gradient_free", callbacks=[head])
    with pytest.warns(UserWarning, match="has learned before"):
        again.fit(TimmClassifier("identity"), datamodule=stream())
    assert int(head.head.counts.sum()) == 2 * 899


def test_a_misspelt_argument_of_a_strategy_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no argument 'warmup_epoch', did you mean 'warmup_epochs'"):
        GradientFreeStrategy(warmup_epoch=2)
    assert GradientFreeStrategy(gradient_as_bucket_view=True)._ddp_kwargs == {"gradient_as_bucket_view": True}


@pytest.mark.parametrize(
    "targets", [torch.eye(4, dtype=torch.int64), torch.eye(4), torch.zeros(4, 1, dtype=torch.int64)]
)
def test_targets_of_another_shape_are_named(make_trainer: Make, lit_small: Make, targets: torch.Tensor) -> None:
    loader = DataLoader(TensorDataset(torch.rand(4, 64), targets), batch_size=4)
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC()], max_epochs=1)
    with pytest.raises(BatchError, match="targets"):
        trainer.fit(lit_small(), loader)


def test_no_preprocessing_is_spelt_unit() -> None:
    with pytest.raises(ArgumentError, match=r"preprocessing must be .* got None"):
        stream(preprocessing=None)


def test_a_missing_checkpoint_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "nmc.yaml"
    arguments = ["validate", "--config", str(recipe), "--ckpt_path", str(tmp_path / "last.ckpt")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("clkit: ckpt_path=")


def test_images_for_a_network_of_ones_own_are_said_to_be_unnormalised(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
            self.net.pretrained_cfg = {"mean": (0.5,)}  # as every timm network has

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    images = StreamDataModule("digits", ClassIncremental(experiences=2))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(strategy="gradient_free", callbacks=[NMC()]).fit(Own(), datamodule=images)
    assert sum("data_config" in message for message in caplog.messages) == 1
