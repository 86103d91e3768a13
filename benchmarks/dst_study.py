"""The study of sparse training in miniature: which initial topology and which growth, at which density.

    CLKIT_DATA=FOLDER python benchmarks/dst_study.py [--seeds 3] [--streams digits fashion] [--densities 0.2 0.1 0.05]

Five tasks of two classes each, task given at test, a small ResNet from scratch: ERK and uniform, and the four growth
rules, at three densities. Accuracy is the mean over the tasks after the last one, backward transfer is measured: the
network of each task is run after every later task, and a number other than 0 would show. Digits ship with
scikit-learn; split Fashion-MNIST is left out, and said so, where the folder does not have it.

Then it says which findings of Yildirim et al. (arXiv 2308.14831) hold in direction here: that ERK uses the network
better at 80 % sparsity, that uniform is the more robust at 90 and 95 %, and that no growth rule is best at all of them.
Exit status 1 if anything was forgotten.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from clkit.callbacks import DST, StreamEvaluation
from clkit.data import Preprocessing, StreamDataModule, TaskIncremental
from clkit.errors import ClkitError, first_line
from clkit.methods import PruneSchedule
from clkit.models import TimmClassifier

INITIAL = ("erk", "uniform")
GROWTH = ("gradient", "random", "momentum", "unfired")
NETWORK = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64], "zero_init_last": False}
SOURCES = {"digits": "digits", "fashion": "torchvision:FashionMNIST"}


def run(stream: str, density: float, initial: str, growth: str, seed: int) -> tuple[float, float]:
    """Return accuracy and backward transfer of one run, in per cent and points."""
    pl.seed_everything(seed, verbose=False)
    evaluation = StreamEvaluation(table=False, files=False, figures=False)
    small = stream == "digits"
    data = StreamDataModule(
        SOURCES[stream],
        TaskIncremental(experiences=5),
        batch_size=32 if small else 128,
        epochs_per_experience=6 if small else 1,
        preprocessing=Preprocessing(mean=0.3, std=0.38, channels=3),
    )
    dst = DST(
        density,
        initial=initial,
        growth=growth,
        schedule=PruneSchedule(update_every=2 if stream == "digits" else 4),
        table=False,
        seed=seed,
    )
    model = TimmClassifier(
        "resnet18",
        small_images=True,
        model_kwargs=NETWORK,
        task_heads=True,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            check_val_every_n_epoch=data.epochs_per_experience,
            callbacks=[dst, evaluation],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, datamodule=data)
    results = evaluation.results["module"]
    last = results["accuracy_matrix"][-1]
    return 100 * statistics.fmean(last), 100 * results["backward_transfer"]


def main() -> int:
    """Run the grid, print it with what holds, and return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--streams", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.1, 0.05])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    forgot, start = 0.0, time.perf_counter()
    for stream in options.streams:
        table: dict[tuple[float, str, str], list[float]] = {}
        try:
            for key in itertools.product(options.densities, INITIAL, GROWTH):
                runs = [run(stream, *key, seed) for seed in range(options.seeds)]
                table[key] = [accuracy for accuracy, _ in runs]
                forgot = max(forgot, *(abs(transfer) for _, transfer in runs))
                spread = statistics.stdev(table[key]) if options.seeds > 1 else 0.0
                line = f"{stream} density {key[0]:<5} {key[1]:<8} {key[2]:<9}"
                mean = statistics.fmean(table[key])
                print(f"{line} accuracy {mean:6.2f} ± {spread:4.2f}  backward transfer {runs[0][1]:g}", flush=True)
        except ClkitError as error:
            print(f"{stream} is left out: {first_line(error)}")
            continue
        found[stream] = {f"{density} {initial} {growth}": each for (density, initial, growth), each in table.items()}
        print_findings(stream, table, options.densities)
    print(f"largest backward transfer in magnitude: {forgot:g} points; {time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(forgot > 0)


def print_findings(stream: str, table: dict[tuple[float, str, str], list[float]], densities: list[float]) -> None:
    """Say which findings of the study hold on a stream, in direction."""

    def mean(density: float, **wanted: str) -> float:
        keys = [
            key
            for key in table
            if key[0] == density and key[1] == wanted.get("initial", key[1]) and key[2] == wanted.get("growth", key[2])
        ]
        return statistics.fmean(value for key in keys for value in table[key])

    for density in densities:
        erk, uniform = (mean(density, initial=initial) for initial in INITIAL)
        expected = erk > uniform if density >= 0.2 else uniform > erk
        better = "ERK" if density >= 0.2 else "uniform"
        print(
            f"{stream}, density {density}: ERK {erk:.2f}, uniform {uniform:.2f}; that {better} is better "
            f"{'holds' if expected else 'does not hold'} here"
        )
    best = {density: max(GROWTH, key=lambda growth: mean(density, growth=growth)) for density in densities}
    print(
        f"{stream}: the best growth is {best}; that it depends on the density "
        f"{'holds' if len(set(best.values())) > 1 else 'does not hold'} here"
    )


if __name__ == "__main__":
    sys.exit(main())
