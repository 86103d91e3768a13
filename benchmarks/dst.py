"""What masks that move cost: a training step with and without them, one update of the topology, and memory.

    python benchmarks/dst.py [--threads 1] [--json FILE] [--device cuda] [--only step update memory matmul]

* step: a ResNet-18 (11.2 M weights) at batch 32 and 64 px trained by plain torch, the same with a topology of density
  0.1, taking turns; goal: at most 3 % more on the CPU.
* update: one move of that topology, 1,116,691 connections of 11,166,912, half of them; goal: at most 0.5 s. On a GPU
  that of a ViT-B/16 too (goal 5 ms, and 1 ms for the ResNet).
* memory: the largest resident set of a process that begins a task, trains a step and moves the topology, less that of
  one that trains a step without masks, beside what masks and bank need by themselves.
* matmul: on a GPU only: the two layers of a ViT-B/16's MLP with weights of two of four, against dense ones, in fp16.

Needs no data. Exit status 1 if a goal is missed; figures of a GPU have none but those named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from clkit.methods import PruneSchedule, SparseTopology
from clkit.surgery.masks import maskable_weights

BATCH, PIXELS, ROUNDS = 32, 64, 12


def network(name: str, device: str) -> nn.Module:
    """Return a timm network of ten classes, always of the same weights."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).to(device)


def topology_of(model: nn.Module, every: int) -> SparseTopology:
    """Return masks of density 0.1 over a network, that move every so many steps."""
    classifier = "head" if hasattr(model, "head") else "fc"
    return SparseTopology(maskable_weights(model, [classifier]), 0.1, schedule=PruneSchedule(update_every=every))


def seconds(run: Callable[[], Any], device: str) -> float:
    """Return how long a call takes, to the end of what it starts on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Training:
    """A network, its optimizer and one batch; with or without masks."""

    def __init__(self, name: str, device: str, *, masked: bool, every: int = 10**6, pixels: int = PIXELS) -> None:
        self.model = network(name, device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.inputs = torch.randn(BATCH, 3, pixels, pixels, device=device)
        self.targets = torch.arange(BATCH, device=device) % 10
        self.topology = topology_of(self.model, every) if masked else None
        if self.topology is not None:
            self.topology.begin_task(10**6)

    def step(self) -> None:
        """Train on the batch."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        if self.topology is not None:
            self.topology.after_backward()
        self.optimizer.step()
        if self.topology is not None:
            self.topology.after_step(self.optimizer)


def measure_step(name: str, device: str, rounds: int) -> dict[str, float]:
    """Return the seconds of a step without and with masks: the best of rounds that take turns."""
    runs = [Training(name, device, masked=masked) for masked in (False, True)]
    best = [float("inf")] * 2
    for number in range(rounds + 2):
        for place, run in enumerate(runs):
            taken = seconds(run.step, device)
            best[place] = min(best[place], taken) if number >= 2 else best[place]
    return {"plain": best[0], "masked": best[1], "overhead": best[1] / best[0] - 1}


def measure_update(name: str, device: str, rounds: int) -> dict[str, float]:
    """What a move of the topology adds to the end of a step: of two steps the second ends with one."""
    pixels = 224 if name.startswith("vit") else PIXELS
    run = Training(name, device, masked=True, every=2, pixels=pixels)
    topology = run.topology
    assert topology is not None
    ends: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * rounds + 2):
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(run.inputs[:2]), run.targets[:2]).backward()
        topology.after_backward()
        run.optimizer.step()
        taken = seconds(lambda: topology.after_step(run.optimizer), device)
        if number >= 2:
            ends[number % 2].append(taken)
    held = min(seconds(lambda: topology.clean(run.optimizer), device) for _ in range(rounds))
    weights = float(sum(weight.numel() for weight in topology.mask(0).values()))
    return {"weights": weights, "update": min(ends[1]) - min(ends[0]), "mask application": held}


def measure_memory(name: str) -> dict[str, float]:
    """Largest resident set, in MiB, of a process of its own with and without masks."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1); import dst; "
        "run = dst.Training(sys.argv[2], 'cpu', masked=sys.argv[3] == '1', every=1); run.step(); run.step(); "
        "status = pathlib.Path('/proc/self/status').read_text(); "  # getrusage has that of the parent, if it is more
        "print(int(status.split('VmHWM:')[1].split()[0]) / 1024)"
    )
    peaks = []
    for masked in "01":
        command = [sys.executable, "-c", code, str(Path(__file__).parent), name, masked]
        peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    weights = sum(weight.numel() for weight in maskable_weights(network(name, "cpu"), ["fc"]).values())
    kept = (4 + 4 + 4) * weights / 2**20  # bank; mask, used, blocked and fired; bits
    return {"plain": peaks[0], "masked": peaks[1], "more": peaks[1] - peaks[0], "bank and masks": kept}


def measure_matmul(rounds: int) -> dict[str, float]:
    """Milliseconds of the two layers of a ViT-B/16's MLP, 197 tokens of 64 images, dense and two of four."""
    found: dict[str, float] = {}
    tokens = 64 * 200  # 197, rounded up to a multiple of 8
    for rows, columns in ((3072, 768), (768, 3072)):
        dense = torch.randn(rows, columns, device="cuda", dtype=torch.float16)
        dense.view(-1, 4)[:, 2:] = 0
        inputs = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
        sparse = torch.sparse.to_sparse_semi_structured(dense)
        for kind, weight in (("dense", dense), ("2:4", sparse)):
            product = partial(nn.functional.linear, inputs, weight)
            taken = [seconds(product, "cuda") for _ in range(5 + rounds * 5)]
            found[f"{rows} x {columns} {kind}"] = 1000 * min(taken[5:])
    return found


def main() -> int:
    """Measure what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=["step", "update", "memory", "matmul"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, found, missed = options.device, {}, []
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")

    def told(what: str, figures: dict[str, float], name: str = "", most: float | None = None) -> None:
        found[what] = figures
        goal = "" if most is None else f"  (goal: {name} <= {most:g})"
        print(f"{what}: " + ", ".join(f"{key} {value:.5g}" for key, value in figures.items()) + goal)
        if most is not None and figures[name] > most:
            missed.append(what)

    on_cpu = device == "cpu"
    if "step" in options.only:
        told("step of resnet18", measure_step("resnet18", device, options.rounds), "overhead", 0.03 if on_cpu else None)
        if not on_cpu:
            told("step of vit_base_patch16_224", measure_step("vit_base_patch16_224", device, options.rounds))
    if "update" in options.only:
        told("update of resnet18", measure_update("resnet18", device, 5), "update", 0.5 if on_cpu else 0.001)
        if not on_cpu:
            told("update of vit_base_patch16_224", measure_update("vit_base_patch16_224", device, 5), "update", 0.005)
    if "memory" in options.only and on_cpu:
        told("memory of resnet18, MiB", measure_memory("resnet18"))
    if "matmul" in options.only and not on_cpu:
        told("matmul, ms", measure_matmul(options.rounds))
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "device": device, **found}, indent=1))
    for what in missed:
        print(f"missed: {what}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
