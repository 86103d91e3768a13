"""What a run has learned: in the checkpoint, whole, readable without executing anything, and bit for bit the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from small_runs import quiet_trainer
from torch import Tensor, nn

import clkit
from clkit.callbacks import AEFOCL, LDA, NMC, Lift, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, StateError
from clkit.models import TimmClassifier
from clkit.testing._compare import changed, leaves

Make = Callable[..., Any]

# 4, 4 and 2 classes: 12, 12 and 6 batches, because equal experiences would hide lost ones
STEPS = 30
LAST_OF = (12, 24, 30)


def stream(**options: Any) -> StreamDataModule:
    scenario = ClassIncremental(first_experience_classes=4, classes_per_experience=4)
    return StreamDataModule("digits:flat", scenario, **options)


def learners() -> list[Any]:
    return [
        AEFOCL(),
        AEFOCL(0.1, Lift(70), balance="none", name="lift"),
        AEFOCL(balance="none", solver="recursive", name="recursive"),
        AEFOCL(balance="reweight", name="reweight"),
        NMC(),
        LDA(),
    ]


class Net(pl.LightningModule):
    """Trains, with dropout, so that the global random state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def learned(callbacks: list[Any]) -> dict[str, Any]:
    states: dict[str, Any] = {}
    for callback in callbacks:
        state = callback.state_dict()
        state.pop("seconds", None)
        states[callback.state_key] = state
    return states


def says(message: str) -> Any:
    return pytest.warns(UserWarning, match=message)


def drift(strategy: str) -> Any:
    """Heads on a network that trains say so."""
    return says("the backbone still trains") if strategy == "auto" else nullcontext()


class Run:
    """A run of all heads; ``save`` keeps a checkpoint of every step."""

    def __init__(
        self, make_trainer: Make, strategy: str, *, save: Path | None = None, resume: Path | None = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.module: Any = Net() if strategy == "auto" else TimmClassifier("identity")
        self.heads = learners()
        self.evaluation = StreamEvaluation(table=False, files=False)
        callbacks: list[Any] = [*self.heads, self.evaluation]
        if save is not None:
            callbacks.append(
                ModelCheckpoint(str(save), filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False)
            )
        trainer = make_trainer(strategy=strategy, callbacks=callbacks, enable_checkpointing=save is not None, **options)
        if resume is not None:
            torch.manual_seed(99)  # whoever resumes has drawn other numbers
        ended = resume is not None and resume.stem == f"step={STEPS}"
        with says("this fit learned no batch") if ended else drift(strategy):
            trainer.fit(self.module, datamodule=stream(), ckpt_path=None if resume is None else str(resume))
        self.trainer = trainer


@pytest.fixture(scope="module", params=["gradient_free", "auto"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """An uninterrupted run that saved after every step."""
    folder = tmp_path_factory.mktemp("straight")
    return request.param, folder, Run(partial(quiet_trainer, folder), request.param, save=folder)


# ---- resume


@pytest.mark.parametrize("step", [7, 12, 13, 30])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: Make, straight: tuple[str, Path, Any], step: int
) -> None:
    strategy, folder, whole = straight
    run = Run(make_trainer, strategy, resume=folder / f"step={step}.ckpt")
    assert changed(learned(run.heads), learned(whole.heads)) == []
    assert run.evaluation.results == whole.evaluation.results
    assert changed(learned([run.evaluation]), learned([whole.evaluation])) == []
    assert changed(run.module.state_dict(), whole.module.state_dict()) == []
    assert run.trainer.global_step == STEPS


def test_a_run_cut_by_max_steps_goes_on_where_it_stopped(make_trainer: Make, straight: tuple[str, Path, Any]) -> None:
    strategy, _, whole = straight
    first = Run(make_trainer, strategy, max_steps=17)
    path = Path(first.trainer.default_root_dir) / "cut.ckpt"
    first.trainer.save_checkpoint(path)
    run = Run(make_trainer, strategy, resume=path)
    assert changed(learned(run.heads), learned(whole.heads)) == []
    assert run.evaluation.results == whole.evaluation.results


def test_a_validation_checkpoint_resumes_with_whole_rows(make_trainer: Make, straight: tuple[str, Path, Any]) -> None:
    """Saved between two batches of the validation that measures a row."""
    strategy, _, whole = straight
    path = Path(whole.trainer.default_root_dir) / "inside.ckpt"

    class Save(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if not trainer.sanity_checking and trainer.current_epoch == 1 and args[3] == 0:
                trainer.save_checkpoint(path)

    torch.manual_seed(0)
    module = Net() if strategy == "auto" else TimmClassifier("identity")
    parts = [*learners(), StreamEvaluation(table=False, files=False), Save()]
    with drift(strategy):
        make_trainer(strategy=strategy, callbacks=parts).fit(module, datamodule=stream())
    run = Run(make_trainer, strategy, resume=path)
    assert changed(learned(run.heads), learned(whole.heads)) == []
    assert run.evaluation.results == whole.evaluation.results


# ---- the file


def test_the_file_holds_tensors_and_plain_values_only(straight: tuple[str, Path, Any]) -> None:
    _, folder, whole = straight
    for step in (1, 13, 30):
        checkpoint = torch.load(folder / f"step={step}.ckpt", weights_only=True)
        keys = {callback.state_key for callback in [*whole.heads, whole.evaluation]}
        assert keys <= checkpoint["callbacks"].keys()
        kinds = {type(leaf) for key in keys for leaf in leaves(checkpoint["callbacks"][key]).values()}
        assert kinds <= {Tensor, int, float, str, bool, type(None)}
        assert checkpoint["state_dict"].keys() == whole.module.state_dict().keys()


def test_sums_are_float64_and_counts_are_exact(straight: tuple[str, Path, Any]) -> None:
    _, folder, _ = straight
    state = torch.load(folder / "step=12.ckpt", weights_only=True)["callbacks"]["NMC(nmc)"]["head"]
    floats = [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
    assert floats
    assert all(value.dtype == torch.float64 for value in floats)
    targets = load_digits(return_X_y=True)[1][::2]
    assert sorted(clkit.load_head(folder / "step=12.ckpt", "nmc").counts.tolist()) == sorted(
        int((targets == c).sum()) for c in range(4)
    )


# ---- without a trainer


@pytest.mark.parametrize("position", range(6))
def test_load_head_predicts_as_the_callback_did(straight: tuple[str, Path, Any], position: int) -> None:
    strategy, folder, whole = straight
    callback = whole.heads[position]
    head = clkit.load_head(folder / "step=30.ckpt", callback.name)
    width = 16 if strategy == "auto" else 64
    features = torch.rand(200, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert type(head) is type(callback.head)
    assert torch.equal(head.predict(features), callback.head.predict(features))
    assert torch.equal(head(features), callback.head(features))


def test_load_head_names_what_there_is(straight: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, folder, _ = straight
    with pytest.raises(ArgumentError, match=r"no head named 'ncm'; it has \['aef_ocl', 'lda', 'lift', 'nmc'"):
        clkit.load_head(folder / "step=30.ckpt", "ncm")
    with pytest.raises(ArgumentError, match=r"path='nowhere.ckpt' is not a file"):
        clkit.load_head("nowhere.ckpt", "nmc")


# ---- what does not fit is refused by name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one nearest-mean callback, in the middle of the second experience."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = quiet_trainer(folder, strategy="gradient_free", callbacks=[NMC()], max_steps=17)
    trainer.fit(TimmClassifier("identity"), datamodule=stream())
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


def rewritten(saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    checkpoint = torch.load(saved, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    return str(tmp_path / "changed.ckpt")


def resume(make_trainer: Make, path: Any, callback: Any, **options: Any) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback])
    trainer.fit(TimmClassifier("identity"), datamodule=stream(**options), ckpt_path=str(path))


def test_a_renamed_callback_is_an_error(make_trainer: Make, saved: Path) -> None:
    with (
        says(r"callbacks: \['NMC\(nmc\)'\]"),  # what Lightning says of it
        pytest.raises(StateError, match=r"no state for NMC\(other\), but for NMC\(nmc\).*`name`"),
    ):
        resume(make_trainer, saved, NMC(name="other"))


def test_a_new_callback_is_a_warning(make_trainer: Make, saved: Path) -> None:
    callback = LDA()
    with says(r"callbacks: \['NMC\(nmc\)'\]"), says(r"no state for LDA\(lda\): it starts with nothing learned"):
        resume(make_trainer, saved, callback)
    assert 0 < int(callback.head.counts.sum()) < 899


def test_another_option_is_an_error(make_trainer: Make, saved: Path) -> None:
    with pytest.raises(StateError, match="metric must be 'icarl', the saved state has 'janson'"):
        resume(make_trainer, saved, NMC("icarl"))


def test_another_width_is_an_error_and_nothing_is_learned(make_trainer: Make, saved: Path) -> None:
    callback = NMC()
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback])
    wider = stream(preprocessing=lambda images: torch.cat([images, images], dim=1))
    module = TimmClassifier("identity")
    with pytest.raises(StateError, match=r"NMC\(nmc\) has learned features of width 64 .*width 128"):
        trainer.fit(module, datamodule=wider, ckpt_path=str(saved))
    assert changed(dict(callback.head.state_dict()), dict(clkit.load_head(saved, "nmc").state_dict())) == []


def test_another_tap_point_is_an_error(make_trainer: Make, saved: Path) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC()])
    module = TimmClassifier("identity", num_classes=10, model_kwargs={"in_features": 64})
    path = rewritten(saved, saved.parent, lambda ck: ck["state_dict"].update(module.state_dict()))
    with pytest.raises(StateError, match=r"read at 'output'.*at 'fc:in'"):
        trainer.fit(module, datamodule=stream(), ckpt_path=path)


def test_a_batch_lost_by_a_callback_that_saves_too_early_is_an_error(make_trainer: Make, tmp_path: Path) -> None:
    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    make_trainer(strategy="gradient_free", callbacks=[Early(), NMC()]).fit(
        TimmClassifier("identity"), datamodule=stream()
    )
    with pytest.raises(StateError, match=r"NMC\(nmc\) had learned 4 of 5 batches"):
        resume(make_trainer, tmp_path / "early.ckpt", NMC())


def test_two_callbacks_of_one_name_are_refused(make_trainer: Make) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"more than one .*`NMC`"):
        make_trainer(strategy="gradient_free", callbacks=[NMC(), NMC("icarl")]).fit(
            TimmClassifier("identity"), datamodule=stream()
        )


def test_a_resumed_run_warns_of_callbacks_that_are_missing(make_trainer: Make, saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"NMC\(nmc\)"):
        make_trainer(strategy="gradient_free").fit(
            TimmClassifier("identity"), datamodule=stream(), ckpt_path=str(saved)
        )
