"""What users do wrong is said early, by name, and in time to change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from clkit.callbacks import AEFOCL, NMC, ungraft
from clkit.cli.main import main
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError
from clkit.strategies import GradientFreeStrategy, OnProStrategy

Make = Callable[..., Any]


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=2), **options)


def test_a_layer_that_is_no_path_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"layer must be .* got 3"):
        NMC(layer=3)


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


def test_a_misspelt_argument_of_a_strategy_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no argument 'warmup_epoch', did you mean 'warmup_epochs'"):
        GradientFreeStrategy(warmup_epoch=2)
    with pytest.raises(ArgumentError, match=r"OnProStrategy has no argument .rotation.; it is a setting of losses$"):
        OnProStrategy(rotation="rot4")
    with pytest.raises(ArgumentError, match=r"OnProStrategy has no argument .memry., did you mean .memory.\?"):
        OnProStrategy(memry=None)
    assert GradientFreeStrategy(gradient_as_bucket_view=True)._ddp_kwargs == {"gradient_as_bucket_view": True}


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
