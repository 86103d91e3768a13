"""Replay methods on handwritten digits, from the recipes, beside the figures of an independent implementation.

    python benchmarks/onpro_digits.py [--results FILE] [--rows NAME ...] [--seeds 3] [--weights timm|torch]

Five stages of two digits, 450 steps of ten images in a single pass, a ResNet of 78,000 weights from scratch: stream,
network and optimizer of ``configs/onpro.yaml``. The reference is a prototype written from the equations before this
library, two or three seeds a row; how its network was initialised is not known: ``--weights torch`` starts from the
convolutions' own initialisation, about 2.4 times smaller than timm's. Forgetting is the column maximum of the accuracy
matrix less its last row, the mean over all stages but the last. A mean that is more than 5 points from the reference's
is marked. Exit status 1 if a direction is missed that must hold: at a memory of 50, OnPro ends 40 points above
fine-tuning and forgets less than ER; and it ends higher with a memory of 200 than with one of 50.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from torch import nn

from clkit.callbacks import StreamEvaluation
from clkit.runs.recipes import read_recipe
from clkit.runs.settings import StreamCLI

FIGURES = ("last", "average incremental", "forgetting")
TOLERANCE = 5.0  # points
ABOVE_FINE_TUNING = 40.0  # points


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        recipe: Which recipe is run.
        reference: Last accuracy, average incremental accuracy and forgetting of the reference, per cent.
        changes: Settings of the strategy that differ from the recipe's.
    """

    recipe: str
    reference: tuple[float, float, float]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slow(self) -> bool:
        """Whether a run takes minutes: then at most two seeds, as the reference has."""
        return self.changes.get("losses.rotation") == "rot16"


ROWS = {
    "fine-tuning": Row("er", (14.4, 43.6, 95.7), {"capacity": 0}),
    "ER, M 20": Row("er", (68.4, 83.2, 34.2), {"capacity": 20}),
    "ER, M 50": Row("er", (80.8, 89.8, 14.9)),
    "ER, M 200": Row("er", (90.3, 92.9, 2.1), {"capacity": 200}),
    "ER-ACE, M 50": Row("er_ace", (65.0, 84.4, 12.4)),
    "OnPro V 4, M 20": Row("onpro", (53.4, 75.0, 14.0), {"capacity": 20}),
    "OnPro V 4, M 50": Row("onpro", (68.2, 79.9, 4.8)),
    "OnPro V 4, M 200": Row("onpro", (75.5, 81.6, 1.0), {"capacity": 200}),
    "OnPro V 4 joint, M 50": Row("onpro", (70.7, 85.4, 8.2), {"batch_norm": "joint"}),
    "OnPro V 1, M 50": Row("onpro", (68.7, 77.4, 7.9), {"losses.rotation": "none"}),
    "OnPro V 4, ce_new 1, M 50": Row("onpro", (77.2, 88.1, 23.6), {"losses.ce_new": 1.0}),
    "OnPro V 4, ce_new 1, M 200": Row("onpro", (85.4, 91.5, 14.0), {"losses.ce_new": 1.0, "capacity": 200}),
    "OnPro V 16, M 50": Row("onpro", (72.3, 84.4, 2.7), {"losses.rotation": "rot16"}),
    "OnPro V 16 without APF, M 50": Row("onpro", (72.5, 83.9, 2.7), {"losses.rotation": "rot16", "mixing": None}),
}
BASELINE, REPLAY, ONPRO, LARGE = "fine-tuning", "ER, M 50", "OnPro V 4, M 50", "OnPro V 4, M 200"

Results = dict[str, dict[str, dict[str, Any]]]
"""Row -> seed -> what :func:`run` gives."""


def run(row: Row, seed: int, weights: str = "timm") -> dict[str, Any]:
    """One run of a recipe: its three ``figures``, per cent, and the whole accuracy ``matrix``."""
    settings = yaml.safe_load(read_recipe(row.recipe))
    settings["seed_everything"] = seed
    settings["data"]["init_args"]["seed"] = seed
    options = settings["trainer"]["strategy"]["init_args"]
    options["seed"] = seed
    for path, value in row.changes.items():
        part, _, name = path.rpartition(".")
        (options[part] if part else options)[name] = value
    settings["trainer"] |= {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "StreamEvaluation", "init_args": {"table": False, "files": False}}],
    }
    with tempfile.TemporaryDirectory() as folder:
        settings["trainer"]["default_root_dir"] = folder
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        cli = StreamCLI(["--config", str(file)], run=False)
        if weights == "torch":
            for layer in cli.model.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.reset_parameters()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    (evaluation,) = (each for each in cli.trainer.callbacks if isinstance(each, StreamEvaluation))
    summary = evaluation.results["module"]
    matrix = np.array(summary["accuracy_matrix"], dtype=np.float64)
    forgotten = np.nanmax(matrix, axis=0)[:-1] - matrix[-1, :-1]
    values = summary["final_accuracy"], summary["average_incremental_accuracy"], forgotten.mean()
    return {"figures": [100 * float(value) for value in values], "matrix": summary["accuracy_matrix"]}


def mean(results: Results, row: str, figure: int) -> float:
    """Of the seeds of a row."""
    values = [each["figures"][figure] for each in results[row].values()]
    return sum(values) / len(values)


def directions(results: Results) -> dict[str, bool]:
    """What must hold, as far as the rows it speaks of were run."""
    said: dict[str, bool] = {}
    if {BASELINE, ONPRO} <= set(results):
        gain = mean(results, ONPRO, 0) - mean(results, BASELINE, 0)
        said[f"{ONPRO} ends {gain:.1f} points above fine-tuning, at least {ABOVE_FINE_TUNING:.0f}"] = (
            gain >= ABOVE_FINE_TUNING
        )
    if {REPLAY, ONPRO} <= set(results):
        less = mean(results, REPLAY, 2) - mean(results, ONPRO, 2)
        said[f"{ONPRO} forgets {less:.1f} points less than {REPLAY}, more than 0"] = less > 0
    if {ONPRO, LARGE} <= set(results):
        more = mean(results, LARGE, 0) - mean(results, ONPRO, 0)
        said[f"{LARGE} ends {more:.1f} points above {ONPRO}, more than 0"] = more > 0
    return said


def table(results: Results) -> Table:
    """Our means and ranges beside the reference's means."""
    shown = Table(title="per cent: mean of the seeds, lowest and highest; reference; difference", title_justify="left")
    shown.add_column("row", no_wrap=True)
    shown.add_column("seeds", justify="right", no_wrap=True)
    for name in FIGURES:
        shown.add_column(name, justify="right", no_wrap=True)
    for name, seeds in results.items():
        cells = []
        for figure, reference in enumerate(ROWS[name].reference):
            values = [each["figures"][figure] for each in seeds.values()]
            difference = sum(values) / len(values) - reference
            mark = " !" if abs(difference) > TOLERANCE else ""
            ours = f"{sum(values) / len(values):.1f} [{min(values):.1f}, {max(values):.1f}]"
            cells.append(f"{ours}; {reference:.1f}; {difference:+.1f}{mark}")
        shown.add_row(name, str(len(seeds)), *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is not in the file of results, prints the table; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--results", type=Path, metavar="FILE", help="runs that are done; new ones are added")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a row; at most two where V is 16")
    parser.add_argument("--weights", choices=["timm", "torch"], default="timm", help="how the network is initialised")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    torch.set_num_threads(options.threads)
    done: Results = {}
    if options.results is not None and options.results.is_file():
        done = json.loads(options.results.read_text(encoding="utf-8"))
    for name in options.rows:
        for seed in range(min(options.seeds, 2) if ROWS[name].slow else options.seeds):
            seeds = done.setdefault(name, {})
            if str(seed) in seeds:
                continue
            start = time.perf_counter()
            seeds[str(seed)] = run(ROWS[name], seed, options.weights)
            figures = ", ".join(
                f"{figure} {value:.1f}" for figure, value in zip(FIGURES, seeds[str(seed)]["figures"], strict=True)
            )
            print(f"{name}, seed {seed}: {figures} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
            if options.results is not None:
                options.results.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    results = {name: done[name] for name in ROWS if name in options.rows}
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for line in circumstances("onpro_digits.py", arguments, f"{options.threads} thread(s) used"):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table(results))
    said = directions(results)
    for text, holds in said.items():
        console.print(f"{text}: {'holds' if holds else 'MISSED'}", markup=False)
    return int(not all(said.values()))


if __name__ == "__main__":
    sys.exit(main())
