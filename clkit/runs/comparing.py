"""``clkit compare``: several recipes with several seeds on one stream, each run a ``clkit fit`` in its own process."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console

from clkit.callbacks.base import MODULE
from clkit.errors import ArgumentError, ConfigurationError, ProcessLostError, StateError, did_you_mean
from clkit.files import atomic_write
from clkit.report.comparison import COMPARED, ComparisonRow, joint_metrics, write_comparison
from clkit.report.tables import seeds_table
from clkit.runs._run_settings import RunSettings, arguments_of, gives_task_id, reason_of, shown
from clkit.runs.recipes import recipe_folder, recipe_names

__all__ = ["compare"]

FINE_TUNING, JOINT = "fine-tuning", "joint"


@dataclass(frozen=True)
class _Method:
    """What is run with each seed: a recipe, or an outer row."""

    name: str
    settings: RunSettings
    outer: bool = False


@dataclass(frozen=True)
class _Run:
    """One method with one seed."""

    method: _Method
    seed: int
    folder: Path
    settings: RunSettings

    @property
    def title(self) -> str:
        return f"{self.method.name}, seed {self.seed}"

    def results(self) -> dict[str, Any] | None:
        """Return what a finished run has written, ``None`` before it is complete: the file grows by experience."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        try:
            document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StateError(f"{file} cannot be read ({error}); remove the folder to do the run again") from error
        stages = max((len(summary["accuracy_matrix"]) for summary in document["predictors"].values()), default=0)
        whole = stages == len(document["stream"]["experiences"]) and not document["cut_short"]
        return document if stages and whole else None

    def check_folder(self) -> None:
        """Refuse a folder that holds something else than this run."""
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        advice = "give another folder with --out, or remove this one"
        file = self.folder / "settings.yaml"
        if not file.is_file():
            raise ConfigurationError(f"{self.folder} is there and holds no run of clkit compare; {advice}")
        before = RunSettings(yaml.safe_load(file.read_text(encoding="utf-8")))
        if found := before.difference(self.settings):
            path, old, new, more = found
            raise ConfigurationError(
                f"{self.folder} holds a run of other settings: {path} was {old}, now it is {new}{more}; {advice}"
            )


def compare(recipes: Sequence[str], seeds: int, root: Path, outer: bool, overrides: Sequence[str]) -> None:
    """Run recipes, with settings of ``clkit fit`` that all get, and the outer rows; print and write the table."""
    console, start = Console(), time.perf_counter()
    files = _recipe_files(recipes, outer)
    methods = [_Method(name, RunSettings.of_recipe(name, file, overrides)) for name, file in files.items()]
    for each in methods[1:]:
        if found := methods[0].settings.with_seed(0).difference(each.settings.with_seed(0), "data"):
            path, one, two, more = found
            raise ConfigurationError(
                f"{methods[0].name} and {each.name} run different streams: {path} is {one} in {methods[0].name} and "
                f"{two} in {each.name}{more}; set it for all, with --{path} or a file of settings by --config"
            )
    if outer:
        first = methods[0].settings
        fine_tuning = _Method(FINE_TUNING, first.fine_tuning(), outer=True)
        methods = [fine_tuning, *methods, _Method(JOINT, first.joint(), outer=True)]
    runs = []  # all methods with the first seed, then with the next: what is wrong with one is seen early
    for seed, method in itertools.product(range(seeds), methods):
        folder = root / (method.name.replace("-", "_") if method.outer else method.name) / f"seed_{seed}"
        runs.append(_Run(method, seed, folder, method.settings.with_seed(seed)))
    root.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(root / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise StateError(f"{root} is in use by another clkit compare; wait until it has ended, or end it") from error
    with lock:
        for run in runs:
            run.check_folder()
        for number, run in enumerate(runs, start=1):
            place = f"{number:>{len(str(len(runs)))}}/{len(runs)}  {run.title}"
            if run.results() is not None:
                said = "finished before, not run again"
            else:
                with console.status(place):
                    said = _complete(run)
            console.print(f"{place}: {said}", highlight=False, soft_wrap=True)
        _conclude(methods, runs, root, console)
    written = f"{root / 'compare.json'}, {root / 'compare.csv'}"
    console.print(f"{time.perf_counter() - start:.0f} s; {written}", highlight=False, soft_wrap=True)


def _recipe_files(recipes: Sequence[str], outer: bool) -> dict[str, Path]:
    """Return the files of the recipes by the names of their rows and folders."""
    files: dict[str, Path] = {}
    names = recipe_names()
    for recipe in recipes:
        file = recipe_folder() / f"{recipe}.yaml" if recipe in names else Path(recipe)
        name = recipe if recipe in names else file.stem
        if not file.is_file():
            hint = did_you_mean(recipe, names) or f"; the recipes are {', '.join(names)}"
            raise ArgumentError(f"there is no recipe or file {recipe!r}{hint}")
        if name in files:
            raise ArgumentError(f"two recipes are called {name!r}; give each once, and files names of their own")
        if outer and name in (FINE_TUNING, JOINT, "fine_tuning"):
            raise ArgumentError(
                f"the recipe {recipe!r} has the name of an outer row; rename the file, or give --no-outer"
            )
        files[name] = file
    return files


def _fit(arguments: Sequence[str], log: Path) -> int:
    """Run ``clkit fit`` in a process of its own and add what it prints to a file; return its exit status."""
    with log.open("ab") as output:
        # both would be said of each run: its folder holds settings.yaml, and what lay there before a resume is kept
        quiet = [f"-Wignore:{what} directory" for what in ("Experiment logs", "Checkpoint")]
        command = [sys.executable, *quiet, "-m", "clkit", "fit", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except KeyboardInterrupt:  # the process has got it too; its checkpoint may be half way to the disk
            process.wait()
            raise


def _complete(run: _Run) -> str:
    """Begin or resume a run; return what a person reads of it."""
    start = time.perf_counter()
    folder = run.folder
    saved = (folder / "checkpoints").glob("last*.ckpt")  # the newest is that to be resumed from
    checkpoint = max(saved, key=lambda file: file.stat().st_mtime_ns, default=None)
    with atomic_write(folder / "settings.yaml") as draft:
        draft.write_text(yaml.safe_dump(run.settings.tree, sort_keys=False), encoding="utf-8")
    place = {"save_dir": str(folder), "name": "", "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}
    arguments = ["--config", str(folder / "settings.yaml"), "--trainer.default_root_dir", str(folder)]
    arguments += ["--trainer.logger", json.dumps(logger)]
    if checkpoint is not None:
        arguments += ["--ckpt_path", str(checkpoint)]
        metrics = folder / "metrics.csv"
        if metrics.exists():  # Lightning's logger begins it anew when a run is resumed
            metrics.rename(folder / f"metrics_before_{len(list(folder.glob('metrics_before_*.csv'))) + 1}.csv")
    log = folder / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    status = _fit(arguments, log)
    reason = reason_of(log.read_bytes()[before:].decode(errors="replace")) if status else ""
    if status == 2:
        if checkpoint is None:  # refused before it began: nothing stands in the way of the corrected command
            shutil.rmtree(folder)
        hint = " (the outer rows train the network of the first recipe: put another first, or give --no-outer)"
        raise ConfigurationError(f"{run.title}: {reason}{hint if run.method.outer else ''}")
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise ProcessLostError(
            f"{run.title} was ended by {how}: {reason}; what it printed is in {log}, and the same command goes on from "
            "here"
        )
    if run.results() is None:
        raise ConfigurationError(
            f"{run.title} ended before its stream did, so there is nothing to compare; a limit of the trainer "
            f"(max_steps, max_time, fast_dev_run, limit_val_batches) may have ended it, see {log}"
        )
    how = "" if checkpoint is None else f"resumed from {checkpoint.name}, "
    return f"{how}{time.perf_counter() - start:.1f} s"


def _conclude(methods: Sequence[_Method], runs: Sequence[_Run], root: Path, console: Console) -> None:
    """Write the files and print the table."""
    finished = [(run, document) for run in runs if (document := run.results()) is not None]
    first, document = next((run.method, document) for run, document in finished if not run.method.outer)
    stages = [experience["classes"] for experience in document["stream"]["experiences"]]
    rows: list[ComparisonRow] = []
    for method in methods:
        rows += _rows(method, [each for each in finished if each[0].method is method], stages, root)
    seeds = [run.seed for run in runs if run.method is first]
    notes = _notes(methods, first, seeds)
    write_comparison(root, rows, seeds=seeds, stream=document["stream"], notes=notes)
    scenario, evaluated_on = document["stream"]["scenario"], document["evaluated_on"]
    source = shown(first.settings.data.get("source")).strip('"')
    title = f"{source}: {len(stages)} experiences, {scenario}, evaluated on {evaluated_on}"
    console.print()
    console.print(seeds_table(rows, title, "\n".join(notes)))


def _rows(
    method: _Method, finished: Sequence[tuple[_Run, dict[str, Any]]], stages: list[list[int]], root: Path
) -> list[ComparisonRow]:
    """Return one row for each predictor of a method."""
    # a module that the stream does not train says nothing of the method
    grafts = any(arguments_of(each).get("graft", "never") != "never" for each in method.settings.callbacks)
    shows_module = grafts or not method.settings.freezes_network
    predictors = [name for name in finished[0][1]["predictors"] if name != MODULE or shows_module]
    if not predictors:
        raise ConfigurationError(
            f"{method.name} trains no network and has no head, so it predicts nothing; give it a callback like NMC"
        )
    rows = []
    for predictor in predictors:
        values = []
        for run, document in finished:
            metrics = document["predictors"][predictor]
            if method.outer and method.name == JOINT:
                metrics = joint_metrics(metrics, run.folder / "per_class.csv", predictor, stages)
            folder = run.folder.relative_to(root).as_posix()
            values.append({"seed": run.seed, "folder": folder, **{metric: metrics[metric] for metric in COMPARED}})
        name = f"{method.name} / {predictor}" if len(predictors) > 1 else method.name
        rows.append(ComparisonRow(name, method.name, predictor, method.outer, values))
    return rows


def _notes(methods: Sequence[_Method], first: _Method, seeds: Sequence[int]) -> list[str]:
    """Return what a reader of the table must know."""
    n = len(seeds)
    listed = ", ".join(map(str, seeds)) if n <= 5 else f"0 to {n - 1}"
    interval = f"n = {n} seeds ({listed}): mean ± half-width of the 95 % t-interval."
    notes = ["n = 1 seed (0), which gives no interval." if n == 1 else interval]
    if not methods[0].outer:
        return notes
    epochs = first.settings.training_epochs
    notes.append(
        f"{FINE_TUNING} and {JOINT} train the network of {first.name} with its optimizer and nothing else: "
        f"{'1 epoch' if epochs == 1 else f'{epochs} epochs'} on each experience, or on all of them at once."
    )
    if any(method.settings.freezes_network for method in methods):
        notes.append("A network that a recipe keeps frozen is trained in these two rows.")
    if gives_task_id(first.settings.data):
        notes.append(f"{JOINT} is not told the task of a sample, as the others are.")
    return notes
