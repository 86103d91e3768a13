"""The study of sparse training in miniature: which initial topology and which growth, at which density.

    CLKIT_DATA=FOLDER python benchmarks/dst_study.py [--seeds 3] [--streams NAME ...] [--densities 0.2 0.1 0.05]
                                                     [--results FILE]

Five tasks of two classes each, task given at test, a small ResNet from scratch: ERK and uniform, and the four growth
rules, at three densities. Accuracy is the mean over the tasks after the last one, backward transfer is measured: the
network of each task is run after every later task, and a number other than 0 would show. Digits ship with
scikit-learn. ``fashion_subset`` are 500 training and 100 test images of each class of Fashion-MNIST, in the form of
``clkit.data.NpzImages``, and ``fashion`` is all of it; what the folder does not have is left out, and said so.
``--results`` keeps finished runs, so that an interrupted study goes on; all cells get a seed before any gets the next.

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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from bare_trainer import quiet_trainer
from circumstances import circumstances

from clkit.callbacks import DST, StreamEvaluation
from clkit.data import Preprocessing, StreamDataModule, TaskIncremental
from clkit.errors import ClkitError, first_line
from clkit.files import atomic_write
from clkit.methods import PruneSchedule
from clkit.models import TimmClassifier

INITIAL = ("erk", "uniform")
GROWTH = ("gradient", "random", "momentum", "unfired")
NETWORK = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64], "zero_init_last": False}


class Stream(NamedTuple):
    """Where images come from, and how long a task trains on them."""

    source: str
    batch_size: int
    epochs: int
    update_every: int  # steps


STREAMS = {
    "digits": Stream("digits", 32, 6, 2),
    "fashion_subset": Stream("npz:fashion_mnist_subset", 32, 2, 4),
    "fashion": Stream("torchvision:FashionMNIST", 128, 1, 4),
}

Results = dict[str, dict[str, dict[str, list[float]]]]
"""Stream -> ``density initial growth`` -> seed -> accuracy, backward transfer and seconds; per cent and points."""


def run(stream: str, density: float, initial: str, growth: str, seed: int) -> tuple[float, float]:
    """Return accuracy and backward transfer of one run, in per cent and points."""
    pl.seed_everything(seed, verbose=False)
    evaluation = StreamEvaluation(table=False, files=False, figures=False)
    source, batch_size, epochs, update_every = STREAMS[stream]
    data = StreamDataModule(
        source,
        TaskIncremental(experiences=5),
        batch_size=batch_size,
        epochs_per_experience=epochs,
        preprocessing=Preprocessing(mean=0.3, std=0.38, channels=3),
    )
    dst = DST(
        density,
        initial=initial,
        growth=growth,
        schedule=PruneSchedule(update_every=update_every),
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
        trainer = quiet_trainer(
            check_val_every_n_epoch=data.epochs_per_experience,
            callbacks=[dst, evaluation],
            default_root_dir=folder,
        )
        trainer.fit(model, datamodule=data)
    results = evaluation.results["module"]
    last = results["accuracy_matrix"][-1]
    return 100 * statistics.fmean(last), 100 * results["backward_transfer"]


def main() -> int:
    """Run what is not in the file of results, print the grid with what holds, and return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.1, 0.05])
    parser.add_argument("--results", type=Path, metavar="FILE", help="runs that are done; new ones are added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    done: Results = {}
    if options.results is not None and options.results.is_file():
        done = json.loads(options.results.read_text(encoding="utf-8"))
    for line in circumstances("dst_study.py", sys.argv[1:], "1 thread used", data=True):
        print(line)
    forgot = seconds = 0.0
    for stream in options.streams:
        try:
            measure(stream, options.densities, options.seeds, done, options.results)
        except ClkitError as error:
            print(f"{stream} is left out: {first_line(error)}")
            continue
        table: dict[tuple[float, str, str], list[float]] = {}
        for key in itertools.product(options.densities, INITIAL, GROWTH):
            runs = [done[stream][name_of(key)][str(seed)] for seed in range(options.seeds)]
            table[key] = [accuracy for accuracy, _, _ in runs]
            forgot = max(forgot, *(abs(transfer) for _, transfer, _ in runs))
            seconds += sum(each for _, _, each in runs)
            spread = statistics.stdev(table[key]) if options.seeds > 1 else 0.0
            worst = max((transfer for _, transfer, _ in runs), key=abs)
            line = f"{stream} density {key[0]:<5} {key[1]:<8} {key[2]:<9}"
            mean = statistics.fmean(table[key])
            print(f"{line} accuracy {mean:6.2f} ± {spread:4.2f}  backward transfer {worst:g}")
        print_findings(stream, table, options.densities)
    print(f"largest backward transfer in magnitude: {forgot:g} points; {seconds:.0f} s in all runs together")
    return int(forgot > 0)


def name_of(key: tuple[float, str, str]) -> str:
    """A cell of the grid, as it is called in the file of results."""
    return " ".join(map(str, key))


def measure(stream: str, densities: Sequence[float], seeds: int, done: Results, file: Path | None) -> None:
    """Run the cells of a stream that are not done, seed by seed, and write each down when it is."""
    for seed, key in itertools.product(range(seeds), list(itertools.product(densities, INITIAL, GROWTH))):
        runs = done.setdefault(stream, {}).setdefault(name_of(key), {})
        if str(seed) in runs:
            continue
        start = time.perf_counter()
        accuracy, transfer = run(stream, *key, seed)
        runs[str(seed)] = [accuracy, transfer, time.perf_counter() - start]
        print(f"{stream} {name_of(key)}, seed {seed}: {accuracy:.2f}", file=sys.stderr, flush=True)
        if file is not None:
            with atomic_write(file) as draft:
                draft.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


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
