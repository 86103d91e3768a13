"""What clkit is good for, in one table: a stream of handwritten digits, learned in three ways."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console

from clkit.callbacks import AEFOCL, LDA, NMC, StreamEvaluation
from clkit.data import ClassIncremental, Joint, Preprocessing, Scenario, StreamDataModule
from clkit.metrics.functional import accuracy_seen, staged_counts
from clkit.models import TimmClassifier
from clkit.report.tables import curves_table
from clkit.strategies import GradientFreeStrategy

__all__ = ["run_demo"]

EPOCHS = 8
STREAM = ClassIncremental(first_experience_classes=4, classes_per_experience=2)

HEADS = {"nearest mean": "nmc", "ridge": "ridge", "AEF-OCL": "aef_ocl", "LDA": "lda"}  # name of the callback by row
NOTES = {"fine-tuning": "trains on", **dict.fromkeys(HEADS, "frozen, no gradient"), "joint": "all data at once"}


def run_demo(folder: str | Path = "runs/demo") -> int:
    """Run the demo, print its table and return 0, an exit status; the results of the runs go into a folder.

    Three runs of one small network (``resnet10t`` from scratch, 32 px, 8 epochs) on scikit-learn's digits, cut into
    classes 0-3, then 4-5, 6-7 and 8-9: fine-tuning from stage to stage, gradient-free heads after a warm-up on the
    first stage, and joint training on everything as the upper reference.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # advice on loggers that the demo has no use for
    root, console, start = Path(folder), Console(), time.perf_counter()
    curves: dict[str, list[float | None]] = {}

    console.print("1/3  fine-tuning: each stage trains the whole network on its own classes", highlight=False)
    evaluation = _run(root / "fine_tuning", STREAM, EPOCHS, "auto", [])
    curves["fine-tuning"] = evaluation.results["module"]["accuracy_seen"]

    console.print("2/3  gradient-free: the first stage trains the network, then only heads learn", highlight=False)
    heads = [NMC(), AEFOCL(balance="none", name="ridge"), AEFOCL(), LDA()]
    evaluation = _run(root / "gradient_free", STREAM, 1, GradientFreeStrategy(warmup_epochs=EPOCHS), heads)
    for row, name in HEADS.items():
        curves[row] = evaluation.results[name]["accuracy_seen"]
    stages = [experience.classes for experience in _stream(STREAM, 1).experiences]

    console.print("3/3  joint: everything at once, as the upper reference", highlight=False)
    evaluation = _run(root / "joint", Joint(), EPOCHS, "auto", [])
    curves["joint"] = accuracy_seen(*staged_counts(evaluation.class_counts("module"), stages)).tolist()

    root.mkdir(parents=True, exist_ok=True)
    (root / "comparison.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    console.print()
    console.print(curves_table(curves, "all classes seen so far; stages bring digits 0-3, 4-5, 6-7, 8-9", NOTES))
    said = f"{time.perf_counter() - start:.0f} s; results, tables and figures of each run: {root}"
    console.print(said, highlight=False, soft_wrap=True)
    return 0


def _stream(scenario: Scenario, epochs: int) -> StreamDataModule:
    stream = StreamDataModule(
        "digits", scenario, batch_size=32, epochs_per_experience=epochs, preprocessing=Preprocessing(size=32)
    )
    stream.setup("validate")
    return stream


def _run(
    folder: Path, scenario: Scenario, epochs: int, strategy: str | GradientFreeStrategy, heads: Sequence[pl.Callback]
) -> StreamEvaluation:
    pl.seed_everything(0, verbose=False)
    evaluation = StreamEvaluation(table=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        strategy=strategy,
        callbacks=[*heads, evaluation],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        default_root_dir=str(folder),
    )
    model = TimmClassifier("resnet10t", model_kwargs={"in_chans": 1})
    trainer.fit(model, datamodule=_stream(scenario, epochs))
    return evaluation
