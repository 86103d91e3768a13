"""A simulated cluster: a stream is learned in shards, some of them are killed, and what is left comes together.

    python benchmarks/shards.py --json shards.json

A million feature rows, made and seeded, are learned by 64 processes, a part each, which leave their part behind as
bytes in a file. Eight of them are killed half-way (SIGKILL) and started again. The parts are then merged as a tree, in
a random order, and compared with one process that learned everything. Then the merge alone is measured where heads are
large: 2,048 features and 1,000 classes, 8 to 64 parts that are read from bytes one after the other.

Goals: counts are equal and no weight is further off than 1e-12 of the largest; a part that is given twice and one that
is missing are refused by name; of 8 times as many parts the merge holds at most 4 times the memory. Exit status 1 if
one is missed. Two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from clkit.errors import ArgumentError
from clkit.files import atomic_write
from clkit.methods import AnalyticHead, HeadPart, Holdings, shard_bounds

BLOCK = 1000  # rows of a batch, and of one draw
NAME = "made rows"
GOAL, GOAL_GROWTH = 1e-12, 4.0

Context = multiprocessing.get_context("fork")  # a start costs nothing, as the processes of one machine do


def rows(start: int, stop: int, width: int, classes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows ``[start, stop)`` of the stream, block by block; each is the same whoever asks for it."""
    centres = np.random.default_rng(0).normal(size=(classes, width))
    for block in range(start // BLOCK, math.ceil(stop / BLOCK)):
        rng = np.random.default_rng([1, block])
        targets = rng.integers(0, classes, BLOCK)
        features = centres[targets] + 2 * rng.normal(size=(BLOCK, width))
        some = slice(max(0, start - block * BLOCK), min(BLOCK, stop - block * BLOCK))
        yield torch.from_numpy(features[some]), torch.from_numpy(targets[some])


def work(file: Path, index: int, options: argparse.Namespace, fails: bool) -> None:
    """What one process of the cluster does: learn its shard and leave it in a file, or die half-way."""
    start, stop = shard_bounds(options.rows, index, options.shards)
    head = AnalyticHead(options.width, gamma=1.0)
    for features, targets in rows(start, stop, options.width, options.classes):
        head.update(features, targets)
        if fails and head.statistics.samples * 2 > stop - start:
            os.kill(os.getpid(), signal.SIGKILL)
    part = HeadPart(head, Holdings.shard(NAME, options.rows, index, options.shards))
    with atomic_write(file) as draft:
        draft.write_bytes(part.to_bytes())


def run_cluster(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Has all shards learned, as many processes at a time as there are cores; returns how often which were started."""
    rng = np.random.default_rng(2)
    doomed = set(rng.choice(options.shards, options.killed, replace=False).tolist())
    waiting, running, starts = list(rng.permutation(options.shards)), {}, [0] * options.shards
    killed = 0
    while waiting or running:
        while waiting and len(running) < options.processes:
            index = int(waiting.pop(0))
            fails = index in doomed and not starts[index]
            process = Context.Process(target=work, args=(folder / f"{index}.part", index, options, fails))
            process.start()
            running[index], starts[index] = process, starts[index] + 1
        for index, process in list(running.items()):
            process.join(0.01)
            if process.exitcode is None:
                continue
            del running[index]
            if process.exitcode == -signal.SIGKILL:  # as a scheduler does with a lost job
                killed += 1
                waiting.append(index)
            elif process.exitcode:
                raise RuntimeError(f"shard {index} ended with status {process.exitcode}")
    return {"killed": killed, "started": sum(starts)}


def read_parts(folder: Path, order: list[int]) -> Iterator[HeadPart]:
    """The parts in some order, each read when it is its turn."""
    for index in order:
        yield HeadPart.from_bytes((folder / f"{index}.part").read_bytes())


def refusal(folder: Path, order: list[int]) -> str:
    """What is said of parts that cannot be merged; empty where they can."""
    try:
        HeadPart.merge_all(read_parts(folder, order))
    except ArgumentError as error:
        return str(error)
    return ""


def measure_cluster(options: argparse.Namespace) -> dict[str, Any]:
    """Compares the cluster with one process."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        figures = run_cluster(folder, options)
        figures["cluster_s"] = time.perf_counter() - began
        order = np.random.default_rng(3).permutation(options.shards).tolist()
        began = time.perf_counter()
        merged = HeadPart.merge_all(read_parts(folder, order)).head
        figures["merge_s"] = time.perf_counter() - began
        figures["twice"] = refusal(folder, [*order, order[1]])
        figures["missing"] = refusal(folder, order[1:])
        figures["lost"], figures["doubled"] = order[0], order[1]
    began = time.perf_counter()
    whole = AnalyticHead(options.width, gamma=1.0)
    for features, targets in rows(0, options.rows, options.width, options.classes):
        whole.update(features, targets)
    figures["one_process_s"] = time.perf_counter() - began
    assert isinstance(merged, AnalyticHead)
    figures["same_counts"] = torch.equal(merged.counts, whole.counts) and torch.equal(merged.classes, whole.classes)
    weight = whole.weight
    figures["difference"] = float((merged.weight - weight).abs().max() / weight.abs().max())
    figures["samples"] = int(merged.counts.sum())
    return figures


def merge_large(file: Path, number: int, options: argparse.Namespace) -> None:
    """Merges parts of large heads that come as bytes; writes seconds and the growth of the process's memory."""
    rng = np.random.default_rng(4)
    head = AnalyticHead(options.large_width)
    targets = torch.arange(2 * options.large_classes) % options.large_classes
    head.update(torch.from_numpy(rng.normal(size=(len(targets), options.large_width))), targets)
    made = 0.0

    def parts() -> Iterator[HeadPart]:
        nonlocal made
        for index in range(number):
            began = time.perf_counter()
            data = HeadPart(head, Holdings.shard(NAME, number * len(targets), index, number)).to_bytes()
            made += time.perf_counter() - began
            yield HeadPart.from_bytes(data)

    next(parts())  # what is allocated once
    made, before = 0.0, peak()
    began = time.perf_counter()
    HeadPart.merge_all(parts())
    seconds = time.perf_counter() - began - made
    size = sum(each.numel() * each.element_size() for each in head.state_dict().values() if torch.is_tensor(each))
    found = {"parts": number, "seconds": seconds, "memory_mib": peak() - before, "part_mib": size / 2**20}
    file.write_text(json.dumps(found), encoding="utf-8")


def peak() -> float:
    """The most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_merge(options: argparse.Namespace) -> list[dict[str, float]]:
    """Time and memory of merging more and more parts, each number in a process of its own."""
    found = []
    with TemporaryDirectory() as name:
        for number in options.large_parts:
            file = Path(name) / f"{number}.json"
            process = Context.Process(target=merge_large, args=(file, number, options))
            process.start()
            process.join()
            found.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def goals(cluster: dict[str, Any], merge: list[dict[str, float]]) -> dict[str, bool]:
    """Which goals are met, by what they say."""
    growth = merge[-1]["memory_mib"] / max(merge[0]["memory_mib"], 1.0)
    return {
        "counts are equal": cluster["same_counts"],
        f"weights within {GOAL:g} of one process": cluster["difference"] <= GOAL,
        "a part given twice is refused by name": f"shard {cluster['doubled']}/" in cluster["twice"],
        "a missing part is named": f"shard {cluster['lost']}/" in cluster["missing"],
        f"memory of the merge grows {growth:.1f} times at most {GOAL_GROWTH:g}": growth <= GOAL_GROWTH,
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description="A simulated cluster, and the merge of large heads.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--killed", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--large-width", type=int, default=2048)
    parser.add_argument("--large-classes", type=int, default=1000)
    parser.add_argument("--large-parts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    merge = measure_merge(options)  # first, while this process is small
    cluster = measure_cluster(options)
    print(f"{options.shards} shards of {options.rows} rows, {options.width} features, {options.classes} classes")
    print(f"  killed half-way and started again: {cluster['killed']}; starts: {cluster['started']}")
    for name, what in (("cluster_s", "cluster"), ("merge_s", "merge"), ("one_process_s", "one process")):
        print(f"  {what}: {cluster[name]:.2f} s")
    print(f"  {cluster['samples']} samples, weights differ by {cluster['difference']:.1e} of the largest")
    print(f"  twice: {cluster['twice']}")
    print(f"  missing: {cluster['missing']}")
    print(f"merge of {options.large_width} features and {options.large_classes} classes")
    for row in merge:
        each = row["memory_mib"] / row["part_mib"]
        print(
            f"  {row['parts']:4.0f} parts of {row['part_mib']:.0f} MiB: {row['seconds']:6.2f} s, "
            f"{row['memory_mib']:6.0f} MiB more, {each:.1f} parts"
        )
    met = goals(cluster, merge)
    for goal, reached in met.items():
        print(f"{'met' if reached else 'MISSED'}: {goal}")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"cluster": cluster, "merge": merge, "goals": met}, indent=1), encoding="utf-8"
        )
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
