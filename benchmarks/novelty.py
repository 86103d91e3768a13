"""Which score tells what was never learned, from features of a network that is not trained.

    CLKIT_DATA=FOLDER python benchmarks/novelty.py [--images]

CIFAR-100 is learned. Its test images are to be told from those of other sets: Caltech-101, traffic signs, and classes
of CIFAR-100 itself of which none was learned (half of them, five random halves); with ``--images`` also CIFAR-10,
textures and clutter, whose features are computed first (some minutes on one core). Beside distances and neighbours
stand the largest score of a ridge head and what DEUP's engine says of that head's errors (their epistemic part, since
no noise is taken off). Prints the area under the ROC curve and the false alarms where 95 % of the new images are found,
both in per cent, and how often thresholds for 5 % of false alarms cry out. Exit status 2 if the data is not there.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circumstances import data_folder
from judging import MEMORY, judge
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clkit.methods import AnalyticHead, FeatureMemory, FeatureStatistics, LDAHead, Novelty
from clkit.metrics.ranking import auroc, fpr_at_tpr

FEATURES = "features_{}_tf_efficientnet_lite0.npz"
NETWORK, WEIGHTS = "tf_efficientnet_lite0", "weights/tf_efficientnet_lite0_in1k.safetensors"
SIDE, BATCH = 224, 32
NEIGHBOUR = 5
SHRINKAGE = 1e-3
RATE = 0.05
HALVES = 5
IMAGES = ("cifar10_subset.npz", "ood_textures_clutter.npz", WEIGHTS)  # of which no features are kept


def rows(folder: Path, name: str, part: str) -> tuple[Tensor, Tensor]:
    """Return kept features of a part of a set, float64, and their class ids."""
    with np.load(folder / FEATURES.format(name), allow_pickle=False) as data:
        arrays = data[f"f_{part}"].astype(np.float64), data[f"y_{part}"].astype(np.int64)
    return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])


def scores(features: Tensor, targets: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return by name what is to be high for new images, of heads that have learned these rows."""
    width = features.shape[1]
    ridge, raw = AnalyticHead(width, gamma="auto"), LDAHead(width, shrinkage=SHRINKAGE)
    unit, chosen = Novelty(width, shrinkage=SHRINKAGE), Novelty(width, shrinkage="auto")
    relative = Novelty(width, shrinkage=SHRINKAGE / 10, relative=True)
    sums, memory = FeatureStatistics(width, gram=True, scatter=True), FeatureMemory(MEMORY)
    for learner in (ridge, raw, unit, chosen, relative, sums):
        learner.update(features, targets)
    memory.add(features, targets, torch.arange(len(targets)))
    judged = judge(ridge, sums, memory)
    units = torch.nn.functional.normalize(features)

    def neighbour(x: Tensor) -> Tensor:
        return torch.cdist(torch.nn.functional.normalize(x), units).topk(NEIGHBOUR, largest=False).values[:, -1]

    return {
        "largest ridge score": lambda x: -ridge(x).amax(dim=1),
        "DEUP, ridge": lambda x: judged(x)["DEUP"],
        "Mahalanobis": raw.distance,
        "unit length (Novelty)": unit.distance,
        'unit length, shrinkage="auto"': chosen.distance,
        "unit length, relative": relative.distance,
        "5th neighbour, unit length": neighbour,
    }


def image_features(images: Sequence[Any], folder: Path) -> Tensor:
    """Return the features of images (H, W, 3), uint8, as the kept ones were computed."""
    import timm

    network = timm.create_model(NETWORK, pretrained=False, checkpoint_path=str(folder / WEIGHTS)).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = torch.stack([_prepared(np.asarray(image)) for image in images[start : start + BATCH]])
            found.append(network.forward_head(network.forward_features(batch), pre_logits=True).double())
    return torch.cat(found)


def _prepared(image: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    scale = SIDE / min(pixels.shape[2:])
    size = [max(SIDE, round(side * scale)) for side in pixels.shape[2:]]
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = ((side - SIDE) // 2 for side in size)
    return resized[0, :, top : top + SIDE, left : left + SIDE] / 127.5 - 1


def other_images(folder: Path) -> dict[str, Tensor]:
    """Return features of the sets of which none are kept."""
    from PIL import Image

    with np.load(folder / IMAGES[0], allow_pickle=False) as data:
        found = {"CIFAR-10": image_features(data["x_test"], folder)}
    with np.load(folder / IMAGES[1], allow_pickle=False) as data:
        for name in ("textures", "clutter"):
            bytes_of, ends = data[f"jpeg_{name}"], data[f"offsets_{name}"]
            images = [Image.open(io.BytesIO(bytes_of[a:b].tobytes())) for a, b in pairwise(ends)]
            found[name] = image_features(images, folder)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", action="store_true", help="also sets whose features are computed first")
    wants_images = parser.parse_args(arguments).images
    files = [FEATURES.format(name) for name in ("cifar100", "caltech101", "gtsrb")]
    folder = data_folder("novelty", files + (list(IMAGES) if wants_images else []))
    if folder is None:
        return 2
    train, targets = rows(folder, "cifar100", "train")
    test, test_targets = rows(folder, "cifar100", "test")
    others = {"Caltech-101": rows(folder, "caltech101", "test")[0], "traffic signs": rows(folder, "gtsrb", "test")[0]}
    others |= other_images(folder) if wants_images else {}

    learned, halves = scores(train, targets), []
    for seed in range(HALVES):
        order = np.random.default_rng(seed).permutation(100)[:50]
        known, test_known = (torch.from_numpy(np.isin(ids.numpy(), order)) for ids in (targets, test_targets))
        halves.append((scores(train[known], targets[known]), test_known))
    for title, figure in (("area under the curve", auroc), ("false alarms at 95 %", fpr_at_tpr)):
        printed = Table(f"CIFAR-100 learned, {title}", *others, "its other half")
        for name, score in learned.items():
            cells = [f"{_told(figure, score(test), score(new)):.1f}" for new in others.values()]
            of_half = [_told(figure, half[name](test[known]), half[name](test[~known])) for half, known in halves]
            printed.add_row(name, *cells, f"{np.mean(of_half):.1f} ± {np.std(of_half, ddof=1):.1f}")
        Console(width=140).print(printed)

    print(f"alarms in per cent at a threshold for {100 * RATE:g} % false ones, from the rows learned:")
    for novelty in (Novelty(train.shape[1]), Novelty(train.shape[1], shrinkage=SHRINKAGE / 10, relative=True)):
        novelty.update(train, targets)
        threshold = novelty.threshold(train, targets, RATE)
        alarms = {"CIFAR-100": test, **others}
        rates = {name: float((novelty.distance(new) > threshold).double().mean()) for name, new in alarms.items()}
        kind = "relative" if novelty.relative else "plain"
        print(f"  {kind}: " + ", ".join(f"{name} {100 * rate:.1f}" for name, rate in rates.items()))
    return 0


def _told(figure: Callable[..., float], seen: Tensor, new: Tensor) -> float:
    return 100 * figure(torch.cat([seen, new]), torch.cat([torch.zeros(len(seen)), torch.ones(len(new))]))


if __name__ == "__main__":
    sys.exit(main())
