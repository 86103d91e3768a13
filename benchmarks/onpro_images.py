"""Replay methods on CIFAR-10: ER, ER-ACE and OnPro on one stream with one network, beside the published figures.

    CLKIT_DATA=FOLDER python benchmarks/onpro_images.py [--results FILE] [--seeds 2] [--capacities 200 500]

Five stages of two classes in one pass, batches of ten, a ResNet from scratch, everything else as in ``configs/`` and in
the paper (``configs/paper/onpro_cifar10.yaml``). By default a small ResNet learns the reduced set in the data folder,
which a CPU can do; on a GPU the paper's network and rotations are

    ... --blocks 2 --width 64 --rotations rot4 rot16 --accelerator gpu --precision bf16-mixed --learning-rate 5e-4

The order of the methods is told, not required: with a tenth of the images it need not be the published one. Exit
status 2 if the data is not there.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bare_trainer import quiet_trainer
from circumstances import circumstances
from rich.console import Console
from rich.table import Table

from clkit.callbacks import StreamEvaluation
from clkit.data import ClassIncremental, NpzImages, Preprocessing, StreamDataModule
from clkit.data.sources.base import data_root
from clkit.errors import DataError
from clkit.methods import OnProLosses, RandomViews
from clkit.models import TimmClassifier
from clkit.strategies import ERACEStrategy, ERStrategy, OnProStrategy, Projection, ReplayStrategy

FILE = "cifar10_subset.npz"
MEAN, STD = [0.4914, 0.4824, 0.4467], [0.2471, 0.2435, 0.2616]
REPLAY_BATCH = 64

# method -> memory -> average accuracy after the last experience, per cent, mean and 95 % interval; Y. Wei et al., arXiv
# 2308.00301, as others copied it. All 50,000 images, ResNet-18 of 64 to 512 channels, 1000 steps a stage.
PUBLISHED = {
    "ER": {100: (19.4, 0.6), 200: (20.9, 0.9), 500: (26.0, 1.2)},
    "OnPro": {100: (57.8, 1.1), 200: (65.5, 1.0), 500: (72.6, 0.8)},
}
Results = dict[str, dict[str, list[float]]]
"""``method, M`` -> seed -> last accuracy, average incremental accuracy, forgetting and seconds; per cent."""


def strategy(method: str, capacity: int, seed: int, features: int) -> ReplayStrategy:
    """The strategy of a method, with the settings of the paper, p = D / 4 among them.

    Args:
        method: ``"ER"``, ``"ER-ACE"``, ``"OnPro rot4"`` or ``"OnPro rot16"``.
        capacity: M.
        seed: Of its draws.
        features: D, the width of the network's features.
    """
    name, _, rotation = method.partition(" ")
    shared: dict[str, Any] = {"replay_batch": REPLAY_BATCH, "transform": RandomViews(), "seed": seed}
    if name == "OnPro":
        losses: Any = {"rotation": rotation, "similarity_scale": 0.5}
        return OnProStrategy(capacity, losses=OnProLosses(**losses), projection=Projection(dim=features // 4), **shared)
    return {"ER": ERStrategy, "ER-ACE": ERACEStrategy}[name](capacity, **shared)


def run(method: str, capacity: int, seed: int, root: Path, options: argparse.Namespace) -> list[float]:
    """One run: last accuracy, average incremental accuracy, forgetting and seconds."""
    pl.seed_everything(seed, verbose=False)
    model = TimmClassifier(
        "resnet18",
        small_images=True,
        model_kwargs={
            "layers": [options.blocks] * 4,
            "channels": [options.width * 2**stage for stage in range(4)],
            "stem_type": "deep",
            "stem_width": options.width // 2,
            "zero_init_last": False,
        },
        optimizer=partial(torch.optim.Adam, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4),
    )
    if options.width >= 16:  # fewer channels are not safe in that layout
        model.network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    stream = StreamDataModule(
        NpzImages(FILE, train_rows=[None, None, options.every]),
        ClassIncremental(experiences=5),
        batch_size=10,
        preprocessing=Preprocessing(size=options.size, mean=MEAN, std=STD),
        seed=seed,
        root=str(root),
    )
    evaluation = StreamEvaluation(table=False, files=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            accelerator=options.accelerator,
            precision=options.precision,
            strategy=strategy(method, capacity, seed, 8 * options.width),
            callbacks=[evaluation],
            default_root_dir=folder,
        )
        start = time.perf_counter()
        trainer.fit(model, datamodule=stream)
        seconds = time.perf_counter() - start
    summary = evaluation.results["module"]
    values = summary["final_accuracy"], summary["average_incremental_accuracy"], summary["forgetting"]
    return [*(100 * float(value) for value in values if value is not None), seconds]


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def last(results: Results, method: str, capacity: int) -> float:
    """Mean last accuracy of a method."""
    return mean([figures[0] for figures in results[f"{method}, {capacity}"].values()])


def table(results: Results, methods: Sequence[str], capacities: Sequence[int]) -> Table:
    """Ours beside what is published."""
    shown = Table(title="CIFAR-10, five stages, per cent: mean of the seeds, lowest and highest", title_justify="left")
    shown.add_column("method", no_wrap=True)
    for name in ("M", "seeds", "last", "average incremental", "forgetting", "seconds", "published: last"):
        shown.add_column(name, justify="right", no_wrap=name != "published: last")
    for capacity in capacities:
        for method in methods:
            seeds = results[f"{method}, {capacity}"].values()
            columns = list(zip(*seeds, strict=True))
            cells = [f"{mean(column):.1f} [{min(column):.1f}, {max(column):.1f}]" for column in columns[:3]]
            known = PUBLISHED.get(method.split()[0], {}).get(capacity)
            published = "-" if known is None else f"{known[0]:.1f} ± {known[1]:.1f}"
            shown.add_row(method, str(capacity), str(len(seeds)), *cells, f"{mean(columns[3]):.0f}", published)
    return shown


def orders(results: Results, methods: Sequence[str], capacities: Sequence[int]) -> list[str]:
    """The order of the methods at each memory, a line each, and whether OnPro is above ER, as it is in the paper."""
    lines = []
    for capacity in capacities:
        ranked = sorted(methods, key=lambda method: -last(results, method, capacity))
        shown = " > ".join(f"{method} ({last(results, method, capacity):.1f})" for method in ranked)
        above = all(ranked.index(method) < ranked.index("ER") for method in ranked if method.startswith("OnPro"))
        lines.append(f"M {capacity}: {shown}: OnPro is {'above' if above else 'NOT above'} ER (published: above)")
    return lines


def find_data() -> Path:
    """The data folder.

    Raises:
        DataError: There is none, or it lacks the file.
    """
    root = data_root()
    if root is None:
        raise DataError(f"no data folder; set the environment variable CLKIT_DATA to the folder that holds {FILE}")
    if not (root / FILE).is_file():
        raise DataError(f"the data folder {root} lacks {FILE}; benchmarks/README.md says what it is")
    return root


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--results", type=Path, metavar="FILE", help="runs that are done; new ones are added")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--capacities", type=int, nargs="+", default=[200, 500], metavar="M")
    parser.add_argument("--rotations", nargs="+", default=["rot4"], choices=["rot4", "rot16"], help="of OnPro")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th training image")
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks a stage of the ResNet")
    parser.add_argument("--width", type=int, default=8, help="channels of its first stage, an even number")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if min(options.seeds, options.every, options.blocks, options.threads, *options.capacities) < 1:
        parser.error("--seeds, --every, --blocks, --threads and --capacities must be at least 1")
    if options.width < 2 or options.width % 2:
        parser.error(f"--width must be an even number, got {options.width}")
    return options


def setting(arguments: Sequence[str], options: argparse.Namespace) -> list[str]:
    """When, where, with what, and what differs from the published setting."""
    used = f"{options.threads} thread(s) used" if options.accelerator == "cpu" else torch.cuda.get_device_name()
    return [
        *circumstances("onpro_images.py", arguments, used, data=True),
        f"here: 1 in {options.every} of the file's training images at {options.size} px; ResNet of {options.blocks} "
        f"block(s) a stage and {options.width} to {8 * options.width} channels, Adam {options.learning_rate:g}, "
        f"{options.precision}, OnPro with {', '.join(options.rotations)}, {options.seeds} run(s)",
        "published: 10,000 images a stage at 32 px (the reduced set has 1,000); ResNet-18 of 2 blocks a stage and 64 "
        "to 512 channels, Adam 0.0005, float16 with a scaler, OnPro with rot16, ten runs",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is not in the file of results, prints the table; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    try:
        root = find_data()
    except DataError as error:
        print(f"onpro_images: {error}", file=sys.stderr)
        return 2
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    torch.set_num_threads(options.threads)
    methods = ["ER", "ER-ACE", *(f"OnPro {rotation}" for rotation in options.rotations)]
    done: Results = {}
    if options.results is not None and options.results.is_file():
        done = json.loads(options.results.read_text(encoding="utf-8"))
    for seed in range(options.seeds):
        for capacity in options.capacities:
            for method in methods:
                seeds = done.setdefault(f"{method}, {capacity}", {})
                if str(seed) in seeds:
                    continue
                figures = seeds[str(seed)] = run(method, capacity, seed, root, options)
                print(
                    f"{method}, M {capacity}, seed {seed}: last {figures[0]:.1f} ({figures[3]:.0f} s)", file=sys.stderr
                )
                if options.results is not None:
                    options.results.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    results = {
        name: dict(list(done[name].items())[: options.seeds])
        for name in (f"{method}, {capacity}" for capacity in options.capacities for method in methods)
    }
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for line in setting(arguments, options):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table(results, methods, options.capacities))
    for line in orders(results, methods, options.capacities):
        console.print(line, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
