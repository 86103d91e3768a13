"""Gradient-free learners on real images: one stream through a Trainer against joint fits of the same features.

    CLKIT_DATA=FOLDER python benchmarks/real_images.py --parts a,b,c --threads 1 --json real_images.json

Part a streams cached features of CIFAR-100, part b the images themselves, part c traffic signs with their natural
imbalance. All learners run together in one pass. The nearest mean and the plain ridge must end where joint fits end
that know nothing of clkit: features by a plain timm loop, heads by NumPy in float64. Exit status 0 if they do, 1 if one
of them is off by more than 0.05 points, 2 if the data is not there. README.md in this folder says what the data is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from bare_trainer import quiet_trainer
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch.nn.functional import interpolate

from clkit.callbacks import AEFOCL, LDA, NMC, Lift, StreamEvaluation
from clkit.callbacks.head import HeadCallback
from clkit.data import ClassIncremental, NpzImages, Preprocessing, Source, StreamDataModule
from clkit.data.sources.base import data_root
from clkit.errors import DataError
from clkit.models import TimmClassifier

NETWORK = "tf_efficientnet_lite0"
WEIGHTS = "weights/tf_efficientnet_lite0_in1k.safetensors"
SIZE = 128  # pixels
BATCH = 32  # on a CPU 1.5 times faster an image than 100, whose activations do not stay in the allocator
LIFT = 4096
LIFT_GAMMA = 100.0  # what GACL's authors use with a lift of 5000; with gamma 1 a lift of about N units interpolates
TOLERANCE = 0.05  # points

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Seconds:
    """On the clock and on the processor: they differ where a machine is shared."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """The clocks as they stand."""
        return cls(time.perf_counter(), time.process_time())

    def passed(self) -> Seconds:
        """Time since then."""
        now = Seconds.now()
        return Seconds(now.wall - self.wall, now.cpu - self.cpu)


@dataclass(frozen=True)
class Samples:
    """Features and class ids of both parts, and what their extraction cost."""

    train: Floats
    train_ids: Ids
    test: Floats
    test_ids: Ids
    seconds: Seconds | None = None


@dataclass(frozen=True)
class Part:
    """One stream, its joint counterpart and the figures that were measured on the same rows before.

    Attributes:
        reference: Joint heads by name: accuracy, and mean class accuracy where it is known, in per cent.
    """

    title: str
    files: tuple[str, ...]
    source: str | Source
    scenario: ClassIncremental
    backbone: str
    samples: Callable[[Path], Samples]
    reference: dict[str, tuple[float, float | None]] = field(default_factory=dict)


# ---- the independent side: timm, torch and NumPy only


def cached_samples(file: Path) -> Samples:
    """Features straight from the file."""
    with np.load(file, allow_pickle=False) as z:
        return Samples(
            z["f_train"].astype(np.float64),
            z["y_train"].astype(np.int64),
            z["f_test"].astype(np.float64),
            z["y_test"].astype(np.int64),
        )


def image_samples(file: Path, weights: Path, train_step: int, test_step: int) -> Samples:
    """Features of every ``step``-th image by a plain loop through the network."""
    import timm

    network = timm.create_model(NETWORK, pretrained=False, checkpoint_path=str(weights))
    network = network.eval().to(memory_format=torch.channels_last)
    with np.load(file, allow_pickle=False) as z:
        train_ids, test_ids = z["y_train"][::train_step].astype(np.int64), z["y_test"][::test_step].astype(np.int64)
        start = Seconds.now()
        train, test = (
            _plain_features(network, _images(z, name, step))
            for name, step in (("train", train_step), ("test", test_step))
        )
    return Samples(train, train_ids, test, test_ids, start.passed())


def _images(archive: Any, name: str, step: int) -> npt.NDArray[np.uint8]:
    """(N, H, W, 3), stored as pixels or as JPEG bytes."""
    if f"x_{name}" in archive.files:
        pixels: npt.NDArray[np.uint8] = archive[f"x_{name}"][::step]
        return pixels
    from PIL import Image

    data, offsets = archive[f"jpeg_{name}"], archive[f"offsets_{name}"]
    rows = range(0, len(offsets) - 1, step)
    return np.stack([np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()))) for i in rows])


@torch.no_grad()
def _plain_features(network: Any, images: npt.NDArray[np.uint8]) -> Floats:
    """Square images to (N, D): bicubic to 128 px on 0..255, clamped, scaled to [-1, 1], pre-logits."""
    rows = []
    for start in range(0, len(images), BATCH):
        x = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float()
        x = interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        rows.append(network.forward_head(network.forward_features(x), pre_logits=True))
    features: Floats = torch.cat(rows).double().numpy()
    return features


def joint_nearest_mean(samples: Samples) -> Ids:
    """Predicted ids: the nearest mean of unit-length features, the means not normalised again."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (samples.train, samples.test))
    classes = np.unique(samples.train_ids)
    means = np.stack([train[samples.train_ids == c].mean(axis=0) for c in classes])
    distances = np.stack([((test - mean) ** 2).sum(axis=1) for mean in means], axis=1)
    predicted: Ids = classes[distances.argmin(axis=1)]
    return predicted


def joint_ridge(samples: Samples) -> Ids:
    """Predicted ids: ridge regression on one-hot labels, gamma 1, no bias."""
    classes = np.unique(samples.train_ids)
    one_hot = (samples.train_ids[:, None] == classes).astype(np.float64)
    x = samples.train
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ one_hot)
    predicted: Ids = classes[(samples.test @ weights).argmax(axis=1)]
    return predicted


def accuracies(predicted: Ids, ids: Ids) -> tuple[float, float]:
    """Accuracy, and the mean of the accuracies of the classes present, in per cent."""
    hits = predicted == ids
    return 100 * float(hits.mean()), 100 * float(np.mean([hits[ids == c].mean() for c in np.unique(ids)]))


# ---- the streams

# The joint figures come with the data (its MANIFEST.md, "Baselines"): frozen features in float32, unit-length nearest
# mean, ridge with gamma 1 and no bias, logistic regression on standardised features with C=0.01; torch 2.15, timm
# 1.0.31, scikit-learn 1.9.1. The cached features of part a are rounded to 6 bits of mantissa, for which the same list
# allows 0.05 (nearest mean) and 0.25 points (ridge).
PARTS = {
    "a": Part(
        title="a: CIFAR-100, cached features (224 px), 5000 / 2000, ten stages of ten classes",
        files=("features_cifar100_tf_efficientnet_lite0.npz",),
        source="features:features_cifar100_tf_efficientnet_lite0",
        scenario=ClassIncremental(experiences=10, class_order="cifar100_icarl"),
        backbone="identity",
        samples=lambda root: cached_samples(root / "features_cifar100_tf_efficientnet_lite0.npz"),
        reference={"NMC": (56.60, None), "ridge": (62.50, None), "logistic": (66.00, None)},
    ),
    "b": Part(
        title="b: CIFAR-100, images at 128 px, 5000 / 2000, ten stages of ten classes",
        files=("cifar100_subset.npz", WEIGHTS),
        source=NpzImages("cifar100_subset", train_rows=[None, None, 2]),
        scenario=ClassIncremental(experiences=10, class_order="cifar100_icarl"),
        backbone=NETWORK,
        samples=lambda root: image_samples(root / "cifar100_subset.npz", root / WEIGHTS, 2, 1),
        reference={"NMC": (54.50, None), "ridge": (57.25, None), "logistic": (59.65, None)},
    ),
    "c": Part(
        title="c: traffic signs (GTSRB) at 128 px, 3921 / 1000, 43 classes of 21 to 225 images, ten stages",
        files=("gtsrb_subset.npz", WEIGHTS),
        source=NpzImages("gtsrb_subset", test_rows=[None, None, 2]),
        scenario=ClassIncremental(experiences=10),
        backbone=NETWORK,
        samples=lambda root: image_samples(root / "gtsrb_subset.npz", root / WEIGHTS, 1, 2),
        reference={"NMC": (48.10, 43.48), "ridge": (61.50, 49.98), "logistic": (65.50, 54.43)},
    ),
}

# Other networks, other amounts of data, some other metrics: for orientation, not for comparison.
PUBLISHED = [
    ("NMC", "CIFAR-100 10 x 10, all 50,000 images, ViT-B/16 (ImageNet-21k)", "88.53", "83.70", "2210.04428 v1, v2"),
    ("NMC (cosine)", "CIFAR-100 10 x 10, all images, ResNet-50", "", "61.5", "2307.02251"),
    ("ridge", "CIFAR-100 10 x 10, all images, ViT-B/16, gamma chosen a task", "", "87.0", "2307.02251"),
    ("ridge, lift 10,000", "the same (RanPAC without its first-task adapter)", "", "89.0", "2307.02251"),
    (
        "ridge, lift 8192",
        "CIFAR-100, ResNet-32 trained on 50 classes, then 25 stages; the public code's figures for ACIL",
        "71.05",
        "63.38",
        "2205.14922",
    ),
    ("AEF-OCL", "SODA10M, six periods of driving; as cited by others", "AMCA 66.32", "", "2405.17779"),
]


def learners(lift: int) -> dict[str, HeadCallback]:
    """All learners by what the table calls them."""
    found: dict[str, HeadCallback] = {
        "ridge": AEFOCL(balance="none", name="ridge"),
        "AEF-OCL (ridge + PFG)": AEFOCL(balance="pfg"),
        f"ridge, lift {lift}": AEFOCL(LIFT_GAMMA, Lift(lift), balance="none", name="ridge_lift"),
        f"AEF-OCL, lift {lift}": AEFOCL(LIFT_GAMMA, Lift(lift), balance="pfg", name="aef_ocl_lift"),
        "NMC (janson)": NMC(name="nmc"),
        "NMC (euclidean)": NMC("euclidean", name="nmc_euclidean"),
        "NMC (icarl)": NMC("icarl", name="nmc_icarl"),
        "NMC (cosine)": NMC("cosine", name="nmc_cosine"),
        "LDA": LDA(),
    }
    return found


CHECKED = {"NMC (janson)": ("NMC", joint_nearest_mean), "ridge": ("ridge", joint_ridge)}


def run_part(part: Part, root: Path, lift: int = LIFT) -> dict[str, Any]:
    """Streams a part, fits the joint heads, and compares.

    Returns:
        ``learners``, ``joint`` and ``reference`` in per cent, ``difference`` in points, and what ``run`` and
        ``extraction`` took.
    """
    streamed, document, seconds = _stream(part, root, lift)
    samples = part.samples(root)
    joint = {head: accuracies(fit(samples), samples.test_ids) for head, fit in CHECKED.values()}
    stages = document["stream"]["experiences"]
    evaluated = np.cumsum([stage["eval_samples"] for stage in stages])  # each stage evaluates all that was seen
    return {
        "title": part.title,
        "learners": streamed,
        "joint": joint,
        "reference": part.reference,
        "difference": {name: streamed[name]["final"] - joint[head][0] for name, (head, _) in CHECKED.items()},
        "run": {
            "images": int(evaluated.sum()) + sum(stage["train_samples"] for stage in stages),
            "seconds": seconds.wall,
            "cpu_seconds": seconds.cpu,
            "seconds_of_evaluation": document["seconds"]["evaluate"],
        },
        "extraction": samples.seconds
        and {
            "images": len(samples.train) + len(samples.test),
            "seconds": samples.seconds.wall,
            "cpu_seconds": samples.seconds.cpu,
        },
    }


def _stream(part: Part, root: Path, lift: int) -> tuple[dict[str, dict[str, float]], dict[str, Any], Seconds]:
    """One run of all learners: their figures in per cent, what the run wrote into ``results.json``, and its time."""
    pl.seed_everything(0, verbose=False)
    model = TimmClassifier(part.backbone, checkpoint_path=None if part.backbone == "identity" else str(root / WEIGHTS))
    model.network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    heads = learners(lift)
    evaluation = StreamEvaluation(table=False, figures=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            strategy="gradient_free",
            callbacks=[*heads.values(), evaluation],
            default_root_dir=folder,
        )
        stream = StreamDataModule(
            part.source,
            part.scenario,
            batch_size=BATCH,
            eval_batch_size=BATCH,
            preprocessing=Preprocessing(size=SIZE, interpolation="bicubic", mean=0.5, std=0.5),
            root=str(root),
        )
        start = Seconds.now()
        trainer.fit(model, datamodule=stream)
        seconds = start.passed()
        document = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    figures = {}
    for title, head in heads.items():
        summary = document["predictors"][head.name]
        counts = evaluation.class_counts(head.name).values()
        figures[title] = {
            "average": 100 * summary["average_incremental_accuracy"],
            "final": 100 * summary["final_accuracy"],
            "class_mean": 100 * float(np.mean([correct / total for correct, total in counts])),
            "amca": 100 * summary["amca"],
            "forgetting": 100 * summary["forgetting"],
        }
    return figures, document, seconds


# ---- the report


def part_table(result: dict[str, Any]) -> Table:
    """The figures of one part."""
    table = Table(title=result["title"], title_justify="left", title_style="bold")
    table.add_column("in per cent", no_wrap=True)
    for name in ("average", "final", "class mean", "AMCA", "forgets"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("[italic]one pass over the stream")
    for name, row in result["learners"].items():
        table.add_row(f"  {name}", *(f"{value:.2f}" for value in row.values()))
    for title, rows in (
        ("joint, same features, NumPy in float64", result["joint"]),
        ("joint, as measured with the data", result["reference"]),
    ):
        table.add_section()
        table.add_row(f"[italic]{title}")
        for name, (accuracy, class_mean) in rows.items():
            table.add_row(f"  {name}", "", f"{accuracy:.2f}", "" if class_mean is None else f"{class_mean:.2f}")
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Checks and times of one part, a line each."""
    lines = []
    for name, (head, _) in CHECKED.items():
        points = result["difference"][name]
        verdict = "equal" if abs(points) <= TOLERANCE else f"FAILED, more than {TOLERANCE} points"
        lines.append(f"{name}: stream minus joint {head} of the same features {points:+.3f} points: {verdict}")
    run, extraction = result["run"], result["extraction"]
    lines.append(
        f"the run: {run['seconds']:.0f} s (CPU {run['cpu_seconds']:.0f} s) for {run['images']} images through network "
        f"and learners, {run['seconds_of_evaluation']:.0f} s of it evaluation"
    )
    if extraction is not None:
        wall, cpu = (1000 * extraction[name] / extraction["images"] for name in ("seconds", "cpu_seconds"))
        lines.append(f"features alone, plain loop: {wall:.1f} ms an image (CPU {cpu:.1f} ms)")
    return lines


def published_table() -> Table:
    """What the papers report, in their settings."""
    table = Table(
        title="from the papers: OTHER SETTINGS, for orientation only", title_justify="left", title_style="bold"
    )
    for name, justify in (("in per cent", "left"), ("setting", "left"), ("average", "right"), ("final", "right")):
        table.add_column(name, justify=justify)
    table.add_column("arXiv")
    for row in PUBLISHED:
        table.add_row(*row)
    return table


def circumstances(arguments: Sequence[str], threads: int) -> dict[str, str]:
    """When, where, with what, and how to do it again."""
    versions = {name: importlib.metadata.version(name) for name in ("clkit", "torch", "lightning", "timm", "numpy")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores, {threads} thread(s) used; GPU: {gpu} (not used)",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; Python {platform.python_version()}",
        "command": "CLKIT_DATA=FOLDER " + shlex.join(["python", "benchmarks/real_images.py", *arguments]),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def find_data(parts: Sequence[str]) -> Path:
    """The data folder.

    Raises:
        DataError: There is none, or a file of these parts is missing.
    """
    files = sorted({file for part in parts for file in PARTS[part].files})
    root = data_root()
    if root is None:
        raise DataError(
            f"no data folder; set the environment variable CLKIT_DATA to the folder that holds {', '.join(files)}"
        )
    missing = [file for file in files if not (root / file).is_file()]
    if missing:
        raise DataError(f"the data folder {root} lacks {', '.join(missing)}; benchmarks/README.md says what they are")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--parts", default="a,b,c", help="which of a, b, c, with commas between (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and BLAS (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: {', '.join(map(repr, unknown))} is not one of {', '.join(PARTS)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    try:
        root = find_data(parts)
    except DataError as error:
        print(f"real_images: {error}", file=sys.stderr)
        return 2

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # advice on loaders that are not slow here
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    report: dict[str, Any] = circumstances(arguments, options.threads)
    for name, value in report.items():
        console.print(f"{name}: {value}", soft_wrap=True, markup=False)
    report["parts"] = {}
    with threadpool_limits(options.threads):
        for part in parts:
            print(f"running {PARTS[part].title}", file=sys.stderr)
            result = report["parts"][part] = run_part(PARTS[part], root)
            console.print()
            console.print(part_table(result))
            for line in notes(result):
                console.print(line, markup=False)
    console.print()
    console.print(published_table())
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    worst = max(abs(points) for result in report["parts"].values() for points in result["difference"].values())
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
