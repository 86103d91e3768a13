"""What a fixed simplex saves, and what a search of a feature bank adds to the products that it consists of.

    python benchmarks/simplex.py [--threads 1] [--device cuda] [--only head bank hoc] [--json FILE]

* head: the forward of a head of 100,000 vertices for 256 features, beside the product with the matrix of its
  prototypes; goal: a hundredth of its time, and no more memory than four times the logits. The matrix is 37 GiB: where
  it does not fit, a slab of its rows is multiplied and the time scaled up, and the memory is what it would take.
* bank: queries in batches of 256 searched among 100,000 rows of 1,023 numbers, beside a bare product with topk in
  blocks of the same size, taking turns; goal: at most 1.1 times. Also writing, reading and adding, recall@1 of noisy
  copies, and the same with rows in half precision.
* hoc: a training step of a ResNet-18 at batch 32 and 64 px with the higher-order term against a frozen copy, beside the
  same step with the forward of the copy alone, taking turns; goal: at most 5 % more.

Needs no data. Exit status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from clkit.methods import FeatureBank, HOCLoss, SimplexHead
from clkit.methods.alignment import hoc_total
from clkit.methods.feature_bank import _ROWS

BATCH = 256
VERTICES, SLAB = 100_000, 1_000
ROWS, WIDTH, NEAREST = 100_000, 1_023, 10
ROUNDS = 5
IMAGES, PIXELS, CLASSES = 32, 64, 100


def seconds(run: Callable[[], Any], device: str) -> float:
    """Return how long a call takes: in time of the CPU, which other jobs hardly change, or until a GPU is done."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(runs: list[Callable[[], Any]], device: str, rounds: int) -> list[float]:
    """Return the best time of each call, of rounds that take turns after one to warm up."""
    taken = [[seconds(run, device) for run in runs] for _ in range(rounds + 1)]
    return [min(column) for column in list(zip(*taken[1:], strict=True))]


def measure_head(device: str, rounds: int, vertices: int = VERTICES, slab: int = SLAB) -> dict[str, float]:
    """Time and memory of the logits, without a matrix and with one."""
    head = SimplexHead(vertices)
    points = torch.randn(BATCH, vertices - 1, device=device)
    rows = head.prototypes(range(slab), dtype=torch.float32).to(device)
    own = head.logits(points)
    error = float((own[:, :slab] - points @ rows.T).abs().max())
    implicit, product = in_turns([lambda: head.logits(points), lambda: points @ rows.T], device, rounds)
    explicit = product * vertices / slab
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head.logits(points)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        peak = float(
            in_a_process("peak_of_head", vertices, forward=True) - in_a_process("peak_of_head", vertices, forward=False)
        )
    return {
        "implicit_s": implicit,
        "explicit_s": explicit,
        "share_of_time": implicit / explicit,
        "largest_difference": error,
        "implicit_mib": peak,
        "share_of_logits": peak / (own.numel() * 4 / 2**20),
        "matrix_mib": vertices * (vertices - 1) * 4 / 2**20,
    }


def peak_of_head(vertices: int, forward: bool) -> None:
    """Print the largest resident set, in MiB, of a process that has features and computes logits of them, or not."""
    points = torch.randn(BATCH, vertices - 1)
    if forward:
        SimplexHead(vertices).logits(points)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one too
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def in_a_process(name: str, *arguments: Any, **options: Any) -> float:
    """Return the number that one of the functions here prints in a process of its own."""
    call = f"simplex.{name}(*{arguments!r}, **{options!r})"
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1); import simplex; {call}"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def bare_search(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A product and a topk for each block of the gallery, and a topk of what they leave."""
    scores, rows = [], []
    for start in range(0, len(gallery), _ROWS):
        values, at = torch.topk(queries @ gallery[start : start + _ROWS].float().T, k, dim=1)
        scores.append(values)
        rows.append(at + start)
    values, order = torch.topk(torch.cat(scores, dim=1), k, dim=1)
    return values, torch.cat(rows, dim=1).gather(1, order)


def measure_bank(storage: Any, device: str, rounds: int, number: int = ROWS, width: int = WIDTH) -> dict[str, float]:
    """Times of a bank, of its search beside the bare one, and whether noisy copies find what they are of."""
    torch.manual_seed(0)
    features = torch.randn(number, width)
    bank = FeatureBank(width, "benchmark", storage=storage, device=device)
    added = seconds(lambda: bank.add(features, torch.arange(number), model="benchmark", signature="benchmark"), device)
    at = torch.randint(number, (BATCH,))
    queries = (features[at] + 0.5 * torch.randn(BATCH, width)).to(device)
    unit = torch.nn.functional.normalize(queries, dim=1)
    k = min(NEAREST, number)
    searches = [lambda: bank.search(queries, k, signature="benchmark"), lambda: bare_search(unit, bank.features, k)]
    ours, bare = in_turns(searches, device, rounds)
    found = bank.search(queries, k, signature="benchmark")
    assert torch.equal(found.rows, bare_search(unit, bank.features, k)[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bank.pt")
        written = seconds(lambda: bank.save(path), "cpu")
        size = path.stat().st_size / 2**20
        read = seconds(lambda: FeatureBank.load(path), "cpu")
    return {
        "search_s": ours,
        "bare_s": bare,
        "ratio": ours / bare,
        "recall_at_1": float((found.labels[:, 0].cpu() == at).float().mean()),
        "add_s": added,
        "save_s": written,
        "load_s": read,
        "rows_mib": bank.features.numel() * bank.features.element_size() / 2**20,
        "file_mib": size,
    }


def measure_hoc(device: str, rounds: int, network: str = "resnet18", pixels: int = PIXELS) -> dict[str, float]:
    """Time of a training step with the forward of a frozen copy, and with the higher-order term as well."""
    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=CLASSES).to(device)
    previous = copy.deepcopy(model).requires_grad_(False).eval()
    contrast, optimizer = HOCLoss(), torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randn(IMAGES, 3, pixels, pixels, device=device)
    labels = torch.randint(CLASSES, (IMAGES,), device=device)

    def step(aligned: bool) -> None:
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        loss = torch.nn.functional.cross_entropy(model.get_classifier()(features), labels)
        with torch.no_grad():
            old = previous.forward_head(previous.forward_features(images), pre_logits=True)
        if aligned:
            loss = hoc_total(loss, contrast(features, old, labels), 0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    plain, aligned = in_turns([lambda: step(False), lambda: step(True)], device, rounds)
    return {"forward_alone_s": plain, "with_hoc_s": aligned, "ratio": aligned / plain}


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=["head", "bank", "hoc"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, float]] = {}
    missed = []
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")

    def told(what: str, figures: dict[str, float], **goals: float) -> None:
        found[what] = figures
        print(f"{what}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        for name, most in goals.items():
            if figures[name] > most:
                missed.append(f"{what}: {name} {figures[name]:.3g}, goal {most:g}")

    if "head" in options.only:
        told("head", measure_head(options.device, options.rounds), share_of_time=0.01, share_of_logits=4)
    if "bank" in options.only:
        for storage in ("float32", "float16"):
            figures = measure_bank(storage, options.device, options.rounds)
            told(f"bank, {storage}", figures, ratio=1.1)
    if "hoc" in options.only:
        told("hoc", measure_hoc(options.device, 2 * options.rounds), ratio=1.05)
    if options.json:
        about = {"torch": torch.__version__, "device": options.device, "threads": options.threads}
        options.json.write_text(json.dumps({**about, **found}, indent=1))
    for what in missed:
        print(f"MISSED: {what}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
