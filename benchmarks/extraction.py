"""How fast ``clkit learn`` is beside a bare loop over the same images: the price of a head.

    python benchmarks/extraction.py --workers 0

Images are made as JPEG files, and read by one and the same loader: once for a bare ``torch.inference_mode()`` loop that
runs the network and keeps nothing, once for `learn_images`, which runs the network, learns the head and writes the
file. The two take turns in one process; the ratio is that of the medians. Weights are random, the price is the same.

Goal: at least 0.95 of the bare loop's images a second, the head included. Exit status 1 if it is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from PIL import Image

from clkit.data.loader import Workers, cut_batches
from clkit.runs.learned import LearnedModel, NewModel
from clkit.runs.learning import Loading, learn_images
from clkit.runs.listing import Reader, list_samples

GOAL = 0.95
CLASSES = 10


def make_images(folder: Path, number: int, side: int) -> None:
    """Smooth JPEG images, evenly many of each class."""
    for row in range(number):
        rng = np.random.default_rng(row)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        place = folder / f"class_{row % CLASSES}"
        place.mkdir(exist_ok=True)
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(place / f"{row}.jpg", quality=90)


def bare_loop(model: LearnedModel, data: str, options: argparse.Namespace) -> None:
    """What anybody would write: the loader, the network, nothing kept."""
    listing = list_samples(data)
    workers = Workers(Reader(listing.part, listing.targets, model.preprocessing), options.workers)
    batches = [(0, rows) for rows in cut_batches(np.arange(len(listing)), options.batch_size)]
    network = model.module.network
    with torch.inference_mode():
        for images, _, _ in workers.batches(batches):
            network.forward_head(network.forward_features(images.to(model.device)), pre_logits=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    workers.close()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Images a second of both, in turns."""
    (folder / "images").mkdir()
    make_images(folder / "images", options.images, options.side)
    weights = folder / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(options.backbone).state_dict(), weights)
    start, data = NewModel(options.backbone, weights, options.head), f"folder:{folder / 'images'}"
    loading = Loading(options.batch_size, options.workers, device=options.device)
    seconds: dict[str, list[float]] = {"bare": [], "learn": []}
    for turn in range(options.rounds + 1):  # the first warms up
        began = time.perf_counter()
        bare_loop(LearnedModel.new(start, options.device), data, options)
        halfway = time.perf_counter()
        learn_images(start, data, folder / "head.ckpt", loading=loading, overwrite=True)
        ended = time.perf_counter()
        if turn:
            seconds["bare"].append(halfway - began)
            seconds["learn"].append(ended - halfway)
    rates = {name: options.images / statistics.median(each) for name, each in seconds.items()}
    return {"bare_images_s": rates["bare"], "learn_images_s": rates["learn"], "ratio": rates["learn"] / rates["bare"]}


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description="clkit learn beside a bare loop.")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--head", default="lda")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as name:
        figures = measure(Path(name), options)
    print(f"{options.backbone}, {options.images} images of {options.side} px, {options.workers} workers")
    print(f"  bare loop {figures['bare_images_s']:8.1f} images/s")
    print(f"  learn     {figures['learn_images_s']:8.1f} images/s, head {options.head} included")
    reached = figures["ratio"] >= GOAL
    print(f"{'met' if reached else 'MISSED'}: ratio {figures['ratio']:.3f}, goal {GOAL}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
