"""Times one update, one solve and one prediction of each head, and prints a table."""

import datetime
import os
import platform
import statistics
import time
from functools import partial

import torch

from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead

BATCH, CLASSES = 64, 100


def median_ms(action, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


torch.manual_seed(0)
torch.set_num_threads(1)
print(
    f"| head | D | state, MB | update, B = {BATCH}, ms | solve, ms | predict, B = {BATCH}, ms |"
)
print("|---|---:|---:|---:|---:|---:|")
for width in (512, 768, 2048):
    features, targets = torch.randn(4 * BATCH, width), torch.arange(4 * BATCH) % CLASSES
    for name, make in (
        ("`NearestMeanHead`", lambda d: NearestMeanHead(d)),
        ("`LDAHead`", lambda d: LDAHead(d, shrinkage=0.1)),
        ("`AnalyticHead`", lambda d: AnalyticHead(d)),
    ):
        head = make(width)
        head.update(features, targets)
        batch = features[:BATCH], targets[:BATCH]
        update = median_ms(partial(head.update, *batch), 5)

        def solve(head=head, features=features, targets=targets):
            head.update(
                features[:1], targets[:1]
            )  # so that there is something to solve
            head.refresh()

        solved = median_ms(solve, 3)
        predict = median_ms(partial(head.predict, batch[0]), 5)
        tensors = [
            value
            for value in head.state_dict().values()
            if isinstance(value, torch.Tensor)
        ]
        size = sum(value.numel() * value.element_size() for value in tensors) / 1e6
        print(
            f"| {name} | {width} | {size:.1f} | {update:.1f} | {solved:.1f} | {predict:.1f} |"
        )
print()
print(
    f"Medians, one thread, {CLASSES} classes, float32 features, {datetime.date.today()}, torch {torch.__version__}, "
    f"{platform.machine()} processor, {os.cpu_count()} cores."
)
