"""How far a call travels through the package: calls of clkit's functions, and returns to a file that was left.

``python benchmarks/trips.py`` prints five trips: a training batch through AEFOCL, one of experience replay, saving a
checkpoint, loading a head, and one boundary up to ``results.json``. A call counts when a function of clkit is entered,
a return when the trail enters a file again that it had left. Calls by Lightning and torch in between do not count.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from bare_trainer import quiet_trainer

import clkit
from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.models import TimmClassifier
from clkit.strategies import ERStrategy

PACKAGE = str(Path(clkit.__file__).parent)


class Trail:
    """Counts while it is on."""

    def __init__(self) -> None:
        self.calls = self.returns = 0
        self._files: list[str] = []
        self._left: set[str] = set()

    def _see(self, frame: Any, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE) or frame.f_code.co_name.startswith("<"):
            return
        self.calls += 1
        if self._files and self._files[-1] == file:
            return
        self.returns += file in self._left
        self._left.update(self._files[-1:])
        self._files.append(file)

    def on(self) -> None:
        """Begin to count."""
        sys.setprofile(self._see)

    def off(self) -> None:
        """Stop."""
        sys.setprofile(None)


class Watch(pl.Callback):
    """Counts one training batch, from its start to the start of the next, and one boundary."""

    def __init__(self, batch: int, boundary: int | None = None) -> None:
        self.batch, self.boundary = batch, boundary
        self.of_batch, self.of_boundary = Trail(), Trail()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin or stop, first in the list of callbacks."""
        self.of_batch.off()
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            self.of_batch.on()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Begin at the last batch of an experience."""
        if self.boundary == trainer.current_epoch and trainer.is_last_batch:
            self.of_boundary.on()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop where the next experience begins."""
        self.of_boundary.off()


def fit(folder: Path, strategy: Any, callbacks: list[Any], **options: Any) -> pl.Trainer:
    """Run three experiences of digits."""
    pl.seed_everything(0, verbose=False)
    trainer = quiet_trainer(
        strategy=strategy,
        callbacks=callbacks,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )
    source = "digits" if strategy != "gradient_free" else "digits:flat"
    model = TimmClassifier("test_resnet", model_kwargs={"in_chans": 1}) if source == "digits" else None
    stream = StreamDataModule(source, ClassIncremental(experiences=5), batch_size=32)
    trainer.fit(model or TimmClassifier("identity"), datamodule=stream)
    return trainer


def counted(call: Callable[[], Any]) -> Trail:
    """Count one call."""
    trail = Trail()
    trail.on()
    try:
        call()
    finally:
        trail.off()
    return trail


def main() -> None:
    """Print the five trips."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = Watch(batch=4)
        trainer = fit(folder, "gradient_free", [heads, AEFOCL()], limit_val_batches=0)
        saved = counted(lambda: trainer.save_checkpoint(folder / "run.ckpt"))
        clkit.load_head(folder / "run.ckpt", "aef_ocl")  # what is imported late is not part of the trip
        loaded = counted(lambda: clkit.load_head(folder / "run.ckpt", "aef_ocl"))
        replay = Watch(batch=20)
        fit(folder, ERStrategy(capacity=50, replay_batch=10), [replay], limit_val_batches=0)
        evaluated = Watch(batch=-1, boundary=0)  # the first, since later ones write their files by the clock
        fit(folder, "gradient_free", [evaluated, NMC(), StreamEvaluation(table=False, figures=False)])
    trips = {
        "a batch through AEFOCL": heads.of_batch,
        "a batch of experience replay": replay.of_batch,
        "trainer.save_checkpoint": saved,
        "load_head": loaded,
        "a boundary up to results.json": evaluated.of_boundary,
    }
    print(f"{'trip':<32}{'calls':>8}{'returns':>9}")
    for what, trail in trips.items():
        print(f"{what:<32}{trail.calls:>8}{trail.returns:>9}")


if __name__ == "__main__":
    main()
