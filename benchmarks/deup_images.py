"""What DEUP's numbers are worth on real images, beside the largest score, distances and neighbours.

    CLKIT_DATA=FOLDER python benchmarks/deup_images.py [--orders 3] [--images]

CIFAR-100 in ten stages of ten classes in random order, from kept features of a network that is not trained: a ridge
head (γ from the sums) and nearest means, the engine of ``DEUP`` with a memory of 1,024 rows. After the second,
fifth and ninth stage: the area under the ROC curve for test images of classes still to come and for mistakes, the
area under the risk-coverage curve on classes learned, and the mean total beside the error. After the last stage:
against images of Caltech-101 and traffic signs; with ``--images`` also textures and clutter, whose features are
computed first.

Some minutes on one core. Exit status 2 if the data is not there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from circumstances import data_folder
from coverage import HEADS, kept
from judging import MEMORY, judge
from novelty import FEATURES, IMAGES, other_images
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clkit.methods import FeatureMemory, FeatureStatistics, sample_loss
from clkit.metrics.ranking import aurc, auroc

STAGES, SHOWN = 10, (2, 5, 9)


def run(make: Callable[[int], Any], seed: int, others: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return figures by score."""
    part = kept("cifar100")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(100)).tensor_split(STAGES)
    head, width = make(part.train.shape[1]), part.train.shape[1]
    statistics, memory = FeatureStatistics(width, gram=True, scatter=True), FeatureMemory(MEMORY, seed)
    found: dict[str, dict[str, float]] = {}
    for number, new in enumerate(order, 1):
        rows = torch.isin(part.targets, new).nonzero()[:, 0]
        for learner in (head, statistics):
            learner.update(part.train[rows], part.targets[rows])
        memory.add(part.train[rows], part.targets[rows], rows)
        if number not in (*SHOWN, STAGES):
            continue
        of, known = judge(head, statistics, memory), torch.isin(part.test_targets, torch.cat(order[:number]))
        said, error = of(part.test), sample_loss("error", head(part.test), part.test_targets)
        learned = part.train[torch.isin(part.targets, torch.cat(order[:number]))]
        near = torch.cdist(part.test, learned).topk(5, largest=False).values[:, -1]
        said["5th neighbour, all rows"] = near
        for name, u in said.items():
            of_name = found.setdefault(name, {})
            if number in SHOWN:
                of_name[f"to come {number}"] = auroc(u, ~known)
                of_name[f"mistakes {number}"] = auroc(u[known], error[known])
                of_name[f"aurc {number}"] = aurc(u[known], error[known])
                of_name[f"total {number}"] = float(u[known].mean())
                of_name[f"error {number}"] = float(error[known].mean())
        if number == STAGES:
            for name, features in others.items():
                new_said = of(features)
                new_said["5th neighbour, all rows"] = (
                    torch.cdist(features, learned).topk(5, largest=False).values[:, -1]
                )
                for score, u in new_said.items():
                    flag = torch.cat([torch.zeros(len(near)), torch.ones(len(u))])
                    found[score][name] = auroc(torch.cat([said[score], u]), flag)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--images", action="store_true", help="also sets whose features are computed first")
    options = parser.parse_args(arguments)
    files = [FEATURES.format(name) for name in ("cifar100", "caltech101", "gtsrb")]
    folder = data_folder("deup_images", files + (list(IMAGES) if options.images else []))
    if folder is None:
        return 2
    others = {"Caltech-101": kept("caltech101").test, "traffic signs": kept("gtsrb").test}
    others |= other_images(folder) if options.images else {}
    shown = " ".join(map(str, SHOWN))
    columns = ("to come", "mistakes", "aurc")
    table = Table("head", "score", *(f"{name}, {shown}" for name in columns), "total / error", *others)
    for head in ("ridge", "nearest means"):
        runs = [run(HEADS[head], seed, others) for seed in range(options.orders)]
        for score in runs[0]:
            mean = {key: np.mean([one[score][key] for one in runs]) for key in runs[0][score]}
            cells = [" ".join(f"{mean[f'{name} {at}']:.3f}" for at in SHOWN) for name in columns]
            scale = " ".join(f"{mean[f'total {at}']:.2f}/{mean[f'error {at}']:.2f}" for at in SHOWN)
            table.add_row(head, score, *cells, scale if score == "DEUP" else "", *(f"{mean[n]:.3f}" for n in others))
    Console(width=170).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
