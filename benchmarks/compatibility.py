"""The replacement protocol of d-Simplex in miniature: seven tasks, and three better models that come from elsewhere.

    CLKIT_DATA=FOLDER python benchmarks/compatibility.py [--features FILE] [--json FILE]

A client learns forty classes of CIFAR-100 in seven tasks, ten and then five more each. Before tasks 0, 2 and 4 its
network is replaced by a better one that a server trained on sixty other classes: a MobileNetV2 of a third of the width
that sees the images at 32 px, one of full width at 48 px, an EfficientNet-lite0 at 96 px. Their ImageNet weights are
frozen, so that their features are computed once; layers on top are trained. After each task the model is kept, and at
the end every model's queries are searched in the gallery of every earlier one, nothing indexed anew, on CIFAR-10, none
of whose images were trained on. Rows:

* ER: a learnable classifier and experience replay, in the server's networks a learnable classifier too;
* d-Simplex-HOC: the same with the fixed classifier, and with the contrastive term;
* ER + Procrustes: the models of the first row, and for each pair the rotation that fits best on the rows of the memory.

Without a data folder the digits of scikit-learn take the place of the images: six digits in eight symmetries are the
classes, the other four are searched, and better networks see more pixels. Exit status 1 if d-Simplex-HOC has an average
compatibility of less than 0.6, or ER of more than 0.2; on digits, if its average accuracy is not above that of ER (none
of their few classes resembles what is searched, so that old galleries stay worse than for their own models). 2 if the
folder lacks a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from bare_trainer import quiet_trainer
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from timm import create_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from clkit.callbacks import DSimplex, StreamCallback, attach_simplex_head
from clkit.data import ClassIncremental, Custom, Preprocessing, StreamDataModule
from clkit.data.sources.base import data_root
from clkit.errors import DataError
from clkit.methods import align
from clkit.metrics.compatibility import average_compatibility, average_multi_model_accuracy
from clkit.metrics.flips import negative_flip_rate
from clkit.metrics.retrieval import identified
from clkit.strategies import ERStrategy, MemorySettings
from clkit.stream.boundaries import backbone_changed
from clkit.surgery.copies import bare_copy

FILES = "cifar100_subset.npz", "cifar10_subset.npz"
# timm name, file of weights, further arguments, side of the images in pixels
STEMS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("mobilenetv2_035", "mobilenetv2_035_keras_in1k_features", {"pad_type": "same", "num_classes": 0}, 32),
    ("mobilenetv2_100", "mobilenetv2_100_coral_tf2ptq_in1k", {"pad_type": "same"}, 48),
    ("tf_efficientnet_lite0", "tf_efficientnet_lite0_in1k", {}, 96),
)
PER_CLASS, VERTICES, WIDTH = 20, 128, 128
REPLACED = (0, 2, 4)  # the tasks that start with another model
HIDDEN = ((256,), (256,), (320,))  # layers on top of each
GOALS = {"ER": ("at most", 0.2), "d-Simplex-HOC": ("at least", 0.6)}
# average compatibility and average accuracy (per cent) of N. Biondi et al., CVPR 2024, by their code: CIFAR-100 in
# seven tasks after 100, 300 and 600 classes of ImageNet32, ResNet-18, searched in CIFAR-10
PUBLISHED = {"ER": (0.00, 35.18), "d-Simplex-HOC": (0.95, 68.90)}
Rows = tuple[Tensor, Tensor]
"""Features (N, D) and class ids (N,)."""


@dataclass
class Data:
    """What is learned, and what is searched; the inputs of the three networks lie side by side in each row."""

    name: str
    server: Rows
    client: Rows
    queries: Rows
    gallery: Rows
    widths: tuple[int, ...]
    first: int  # classes of the client's first task
    later: int  # of each further one
    rich: bool  # whether the server's classes are many enough for the goals


def stem_features(root: Path, every: int) -> dict[str, np.ndarray]:
    """Features of every so many-th image through each stem, by part and name."""
    made: dict[str, np.ndarray] = {}
    for file, part in ((FILES[0], "train"), (FILES[1], "train"), (FILES[1], "test")):
        with np.load(root / file, allow_pickle=False) as arrays:
            step = every if part == "train" else 1
            images, ids = torch.from_numpy(arrays[f"x_{part}"][::step]), arrays[f"y_{part}"][::step]
        made[f"{file}:{part}:y"] = ids.astype(np.int64)
        for name, weights, options, side in STEMS:
            stem: Any = create_model(name, checkpoint_path=str(root / "weights" / f"{weights}.safetensors"), **options)
            stem = stem.eval().to(memory_format=torch.channels_last)
            prepare = Preprocessing(size=side, mean=0.5, std=0.5)
            rows = []
            with torch.inference_mode():
                for some in images.split(100):
                    inputs = prepare(some.permute(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
                    rows.append(stem.forward_head(stem.forward_features(inputs), pre_logits=True))
            made[f"{file}:{part}:{name}"] = torch.cat(rows).numpy()
    return made


def cifar(features: dict[str, np.ndarray]) -> Data:
    """CIFAR-100 cut by class between the two parties, CIFAR-10 to search."""

    def rows(file: str, part: str) -> Rows:
        sides = [torch.from_numpy(features[f"{file}:{part}:{name}"]) for name, *_ in STEMS]
        return torch.cat(sides, dim=1), torch.from_numpy(features[f"{file}:{part}:y"])

    x, y = rows(FILES[0], "train")
    y = torch.from_numpy(np.random.default_rng(0).permutation(100))[y]
    theirs = y < 60
    sides = [(x[theirs], y[theirs]), (x[~theirs], y[~theirs] - 60)]
    widths = tuple(features[f"{FILES[1]}:test:{name}"].shape[1] for name, *_ in STEMS)
    name = "CIFAR-100, searched in CIFAR-10"
    return Data(name, *sides, rows(FILES[1], "train"), rows(FILES[1], "test"), widths, 10, 5, True)


def digits() -> Data:
    """Six digits in eight symmetries, half of them the server's; the other four digits to search.

    The first network sees 2 x 2 pixels, the second 4 x 4, the third all.
    """
    data = load_digits()
    images = torch.from_numpy(data.images).float() / 8 - 1
    ids = torch.from_numpy(data.target).long()

    def pixels(of: Tensor) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(of[:, None], side).flatten(1) for side in (2, 4, 8)], dim=1)

    known = torch.tensor([2, 3, 4, 5, 7, 9])
    learned = torch.isin(ids, known)
    turned = [torch.rot90(side, turn, (1, 2)) for side in (images, images.flip(2)) for turn in range(4)]
    x = torch.cat([pixels(each[learned]) for each in turned])
    y = torch.cat([8 * torch.searchsorted(known, ids[learned]) + number for number in range(8)])
    y = torch.from_numpy(np.random.default_rng(0).permutation(48))[y]
    theirs = y < 24
    sides = [(x[theirs], y[theirs]), (x[~theirs], y[~theirs] - 24)]
    searched = [(pixels(images[~learned][start::2]), ids[~learned][start::2]) for start in (0, 1)]
    return Data("symmetries of digits, searched in other digits", *sides, *searched, (4, 16, 64), 6, 3, False)


class Network(nn.Module):
    """What is trained on top of one stem: layers, and a classifier.

    Args:
        number: Of the stem, whose part of the inputs it reads.
        data: Says how wide these parts are.
        classes: Of the classifier.
        seed: Of the weights.
    """

    def __init__(self, number: int, data: Data, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        start = sum(data.widths[:number])
        self.part = slice(start, start + data.widths[number])
        widths = [data.widths[number], *HIDDEN[number], WIDTH]
        layers = [[nn.Linear(*pair), nn.ReLU()] for pair in itertools.pairwise(widths)]
        self.body = nn.Sequential(nn.LayerNorm(widths[0]), *itertools.chain.from_iterable(layers))
        self.classifier = nn.Linear(WIDTH, classes)

    def get_classifier(self) -> nn.Module:
        """The classifier, as timm's networks give it."""
        return self.classifier

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.classifier(self.body(inputs[:, self.part]))
        return logits

    @torch.no_grad()
    def embed(self, inputs: Tensor) -> Tensor:
        """What is searched, of length 1: features of the simplex head, or those before a learnable classifier."""
        features = self.body(inputs[:, self.part])
        embed: Callable[[Tensor], Tensor] = getattr(self.classifier, "embed", partial(F.normalize, dim=1))
        return embed(features)


def served(number: int, simplex: bool, data: Data, options: argparse.Namespace) -> Network:
    """A network of the server, trained by a plain loop of its own, in which clkit is the head alone."""
    seed = 1000 * (options.seed + 1) + number
    x, y = data.server
    network = Network(number, data, int(y.max()) + 1, seed)
    if simplex:
        attach_simplex_head(network, VERTICES)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        rows = torch.randint(len(x), (128,), generator=draws)
        loss = F.cross_entropy(network(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not simplex:
        network.classifier = nn.Linear(WIDTH, int(data.client[1].max()) + 1)  # of the client's classes
    return network


class Learner(pl.LightningModule):
    """The client's module."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.network(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the same for all."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=5e-4)


class Replacements(StreamCallback):
    """Puts other networks into a module with a learnable classifier, as DSimplex does into one with the fixed one."""

    def __init__(self, models: dict[int, Network]) -> None:
        super().__init__()
        self.models = models

    def on_experience_start(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
        """Replace the network where there is a new one."""
        if experience.index in self.models:
            pl_module.network = self.models[experience.index]
            trainer.strategy.setup_optimizers(trainer)
            backbone_changed(trainer, "another model takes its place")


class Keeping(StreamCallback):
    """Keeps the model and the memory as they are after each task."""

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Network] = []
        self.memories: list[Tensor] = []

    def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
        """Keep both."""
        self.models.append(bare_copy(pl_module).network)
        memory = trainer.strategy.memory  # type: ignore[attr-defined]  # of a replay strategy
        self.memories.append(memory.data.clone())


def client(simplex: bool, data: Data, options: argparse.Namespace) -> Keeping:
    """The client's seven tasks, with the server's networks before three of them."""
    pl.seed_everything(options.seed, verbose=False)
    models = {task: served(number, simplex, data, options) for number, task in enumerate(REPLACED)}
    classes = int(data.client[1].max()) + 1
    theirs = list(range(int(data.server[1].max()) + 1))
    keeping = Keeping()
    with tempfile.TemporaryDirectory() as folder:
        replacing: pl.Callback = Replacements(models)
        if simplex:
            replacing = DSimplex(
                VERTICES, alignment="hoc", side="high", reserved=theirs, replacements=models, folder=folder
            )
        trainer = quiet_trainer(
            strategy=ERStrategy(
                PER_CLASS * classes,
                replay_batch=64,
                memory=MemorySettings(policy="class_balanced"),
                transform=nn.Identity(),
                seed=options.seed,
            ),
            callbacks=[replacing, keeping],
            default_root_dir=folder,
        )
        part = TensorDataset(*data.client)
        stream = StreamDataModule(
            Custom(part, part),
            ClassIncremental(classes_per_experience=data.later, first_experience_classes=data.first),
            batch_size=64,
            epochs_per_experience=options.epochs,
            preprocessing="unit",
            seed=options.seed,
        )
        trainer.fit(Learner(Network(0, data, classes, options.seed), options.learning_rate), datamodule=stream)
    return keeping


def searched(keeping: Keeping, data: Data, *, rotate: bool = False) -> tuple[np.ndarray, list[float | None]]:
    """The matrix, and for each model the share of queries that it spoils in the gallery of the one before.

    Args:
        keeping: The models.
        data: What is searched.
        rotate: Whether queries are rotated to fit the older model on the rows of the memory.
    """
    count = len(keeping.models)
    matrix = np.full((count, count), np.nan)
    flips: list[float | None] = [None]
    before = torch.empty(0, dtype=torch.int64)
    for i, model in enumerate(keeping.models):
        queries = model.embed(data.queries[0])
        for j, older in enumerate(keeping.models[: i + 1]):
            asked = queries
            if rotate and i > j:
                memory = keeping.memories[i]
                asked = queries @ align(older.embed(memory), model.embed(memory))
            found = identified(asked, data.queries[1], older.embed(data.gallery[0]), data.gallery[1])
            matrix[i, j] = float(found.mean())
            if j == i - 1:
                flips.append(negative_flip_rate(before, found.long(), torch.ones(len(found), dtype=torch.int64)))
        before = found.long()
    return matrix, flips


def measured(data: Data, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Matrix, negative flips, AC and AM of each row."""
    results: dict[str, dict[str, Any]] = {}
    for row, simplex in (("ER", False), ("d-Simplex-HOC", True)):
        keeping = client(simplex, data, options)
        found = {row: searched(keeping, data)}
        if not simplex:
            found["ER + Procrustes"] = searched(keeping, data, rotate=True)
        for name, (matrix, flips) in found.items():
            results[name] = {
                "matrix": [[float(value) for value in line[: i + 1]] for i, line in enumerate(matrix)],
                "flips": flips,
                "AC": average_compatibility(matrix),
                "AM": average_multi_model_accuracy(matrix),
            }
    return results


def matrix_table(name: str, result: dict[str, Any]) -> Table:
    """A matrix, with the negative flips beside it."""
    shown = Table(title=f"{name}: queries by the model of a row, gallery of that of a column", title_justify="left")
    count = len(result["matrix"])
    for column in ("after task", *map(str, range(count)), "negative flips"):
        shown.add_column(column, justify="right", no_wrap=True)
    for i, (line, flips) in enumerate(zip(result["matrix"], result["flips"], strict=True)):
        cells = [
            f"{100 * value:.1f}{'+' if j < i and value > result['matrix'][j][j] else ''}"
            for j, value in enumerate(line)
        ]
        cells += [""] * (count - len(cells))
        shown.add_row(str(i) + (" *" if i in REPLACED else ""), *cells, "" if flips is None else f"{100 * flips:.1f}")
    return shown


def summary(results: dict[str, dict[str, Any]]) -> Table:
    """AC and AM of all rows, beside what is published."""
    shown = Table(title="average compatibility, average accuracy (per cent)", title_justify="left")
    for column in ("", "AC", "AM", "published: AC", "AM"):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, result in results.items():
        known = [f"{value:.2f}" for value in PUBLISHED[name]] if name in PUBLISHED else ["-", "-"]
        shown.add_row(name, f"{result['AC']:.2f}", f"{100 * result['AM']:.2f}", *known)
    return shown


def goals(results: dict[str, dict[str, Any]], data: Data) -> dict[str, bool]:
    """What is wanted, a line each, and whether it holds."""
    if not data.rich:
        ours, theirs = (results[name]["AM"] for name in ("d-Simplex-HOC", "ER"))
        return {f"AM of d-Simplex-HOC {100 * ours:.2f} above that of ER {100 * theirs:.2f}": ours > theirs}
    lines = {}
    for name, (bound, value) in GOALS.items():
        reached = results[name]["AC"]
        lines[f"AC of {name} {bound} {value}: {reached:.2f}"] = (
            reached <= value if bound == "at most" else reached >= value
        )
    return lines


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=2, help="only every so many-th training image of the files")
    parser.add_argument("--epochs", type=int, default=5, help="passes over each task")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of the client")
    parser.add_argument("--steps", type=int, default=300, help="of the server, for each of its networks")
    parser.add_argument(
        "--features", type=Path, metavar="FILE", help="keeps the stems' features, and takes them from there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if min(options.every, options.epochs, options.steps, options.threads) < 1:
        parser.error("--every, --epochs, --steps and --threads must be at least 1")
    return options


def load(options: argparse.Namespace) -> Data:
    """The images' features where the folder has them, else the digits.

    Raises:
        DataError: The folder that is named lacks a file.
    """
    root = data_root()
    if root is None:
        return digits()
    wanted = *FILES, *(f"weights/{weights}.safetensors" for _, weights, *_ in STEMS)
    if absent := [name for name in wanted if not (root / name).is_file()]:
        raise DataError(f"the data folder {root} lacks {', '.join(absent)}; benchmarks/README.md says what they are")
    if options.features is not None and options.features.is_file():
        with np.load(options.features, allow_pickle=False) as kept:
            return cifar(dict(kept))
    features = stem_features(root, options.every)
    if options.features is not None:
        np.savez(options.features, **features)  # type: ignore[arg-type]  # numpy: names of its own options
    return cifar(features)


def setting(arguments: Sequence[str], options: argparse.Namespace, data: Data) -> list[str]:
    """When, where, with what, and what differs from the published setting."""
    used, given = f"{options.threads} thread(s) used", data_root() is not None
    return [
        *circumstances("compatibility.py", arguments, used, data=given),
        f"here: {data.name}; {len(data.server[0])} rows of {int(data.server[1].max()) + 1} classes for the server, "
        f"{len(data.client[0])} of {int(data.client[1].max()) + 1} for the client, {len(data.queries[0])} queries, "
        f"{len(data.gallery[0])} rows in the gallery; frozen features, layers on top; K = {VERTICES}, {PER_CLASS} "
        f"replayed rows a class, {options.epochs} passes, one seed",
        "published: CIFAR-100, 300 images of each of 100 classes, after ImageNet32 with 100, 300 and 600 classes; "
        "50,000 queries, 10,000 in the gallery; ResNet-18, all of it trained; K = 1024, 20 images a class, 70 passes",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both methods, prints what is found; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    # so it is: of the 20 rows of a class in the memory a few are the same image
    warnings.filterwarnings("ignore", message="epoch 1 is a further one over experience 0")
    torch.set_num_threads(options.threads)
    start = time.process_time()
    try:
        data = load(options)
    except DataError as error:
        print(f"compatibility: {error}", file=sys.stderr)
        return 2
    results = measured(data, options)
    lines = goals(results, data)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    said = setting(arguments, options, data)
    for line in (*said, f"seconds of the processor: {time.process_time() - start:.0f}"):
        console.print(line, markup=False, soft_wrap=True)
    for name, result in results.items():
        console.print(matrix_table(name, result))
    console.print("*: starts with a network of the server; +: finds more than the gallery's own model did (per cent)")
    console.print(summary(results))
    for line, holds in lines.items():
        console.print(f"{line}: {'holds' if holds else 'MISSED'}", markup=False)
    if options.json is not None:
        document = {"circumstances": said, "rows": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if all(lines.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
