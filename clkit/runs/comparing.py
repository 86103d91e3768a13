"""``clkit compare``: several recipes with several seeds on one stream, in one table.

Every run is a process of its own, ``clkit fit`` with the settings in its folder, so that no run sees what another has
left behind, and a comparison that was interrupted goes on from what lies in the folders.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from rich.console import Console

from clkit._registry import STRATEGIES
from clkit._version import __version__
from clkit.callbacks import StreamEvaluation
from clkit.callbacks.base import MODULE
from clkit.data import StreamDataModule
from clkit.errors import ArgumentError, ClkitError, ConfigurationError, ProcessLostError, StateError
from clkit.files import atomic_write
from clkit.metrics.functional import staged_counts, summarize
from clkit.report.intervals import CONFIDENCE, Interval, t_interval
from clkit.report.tables import seeds_table
from clkit.runs.recipes import read_recipe, recipe_folder, recipe_names
from clkit.runs.settings import run as run_trainer
from clkit.strategies import GradientFreeStrategy

__all__ = ["run_compare"]

Settings = dict[str, Any]

FORMAT = 1
METRICS = ("average_accuracy", "final_accuracy", "average_incremental_accuracy", "forgetting")
HEADS = ("average\naccuracy", "final\naccuracy", "average\nincremental", "\nforgetting")
FINE_TUNING, JOINT = "fine-tuning", "joint"


# ---- the mathematics


# ---- what is compared


@dataclass(frozen=True)
class _Contender:
    """One line of runs: a recipe, or an outer row."""

    name: str
    settings: Settings
    outer: bool = False

    @property
    def folder(self) -> str:
        return self.name.replace("-", "_") if self.outer else self.name

    @property
    def frozen(self) -> bool:
        """Whether its strategy leaves the module as it is, once a warm-up is over."""
        strategy = _strategy_class(self.settings)
        return strategy is not None and issubclass(strategy, GradientFreeStrategy)

    def shows(self, predictor: str) -> bool:
        """Whether a predictor gets a row: the classifier of a module that the stream does not train says nothing."""
        if predictor != MODULE or not self.frozen:
            return True
        return any(_arguments(each).get("graft", "never") != "never" for each in _callbacks(self.settings))


@dataclass(frozen=True)
class _Run:
    """One contender with one seed."""

    contender: _Contender
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.contender.name}, seed {self.seed}"

    @property
    def settings(self) -> Settings:
        return _seeded(self.contender.settings, self.seed)

    def results(self) -> dict[str, Any] | None:
        """What a finished run has written; ``None`` before it is complete: the file grows with each experience."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        try:
            document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StateError(
                f"{file} cannot be read ({error}); remove the folder, and the run is done again"
            ) from error
        rows = max((len(summary["accuracy_matrix"]) for summary in document["predictors"].values()), default=0)
        return document if rows and rows == len(document["stream"]["experiences"]) else None

    def checkpoint(self) -> Path | None:
        """The newest of the checkpoints that a run saves to be resumed from."""
        files = (self.folder / "checkpoints").glob("last*.ckpt")
        return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)

    def check_folder(self) -> None:
        """Refuses a folder that holds something else than this run."""
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        advice = "give another folder with --out, or remove this one"
        file = self.folder / "settings.yaml"
        if not file.is_file():
            raise ConfigurationError(f"{self.folder} is there and holds no run of clkit compare; {advice}")
        there = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = _differences(there, self.settings)
        if found:
            path, old, new = found[0]
            raise ConfigurationError(
                f"{self.folder} holds a run of other settings: {path} was {old}, now it is {new}{_more(found)}; "
                f"{advice}"
            )


def _file_of(recipe: str) -> Path:
    if recipe in recipe_names():
        return recipe_folder() / f"{recipe}.yaml"
    if Path(recipe).is_file():
        return Path(recipe)
    try:
        read_recipe(recipe)
    except KeyError as error:
        raise ArgumentError(f"{error.args[0]}, nor a file of that name") from error
    raise AssertionError("a recipe of that name was looked for first")


def _named(recipes: Sequence[str], outer: bool) -> dict[str, Path]:
    """Files of the recipes by what their rows and folders are called."""
    named: dict[str, Path] = {}
    for recipe in recipes:
        file = _file_of(recipe)
        name = recipe if recipe in recipe_names() else file.stem
        if name in named:
            raise ArgumentError(f"two recipes are called {name!r}; give each once, and files names of their own")
        if outer and name in (FINE_TUNING, JOINT, "fine_tuning"):
            raise ArgumentError(
                f"the recipe {recipe!r} has the name of an outer row; rename the file, or give --no-outer"
            )
        named[name] = file
    return named


def _resolved(name: str, file: Path, overrides: Sequence[str]) -> Settings:
    """All settings of a recipe with the overrides, as ``clkit fit`` would take them."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            status: Any = run_trainer(["fit", "--config", str(file), *overrides, "--print_config"])
        except SystemExit as ended:
            status = ended.code
    if status:
        raise ConfigurationError(f"{name}: {_reason(said.getvalue())}")
    settings: Settings = yaml.safe_load(printed.getvalue())
    data = settings.get("data") or {}
    if not issubclass(_class(data["class_path"]), StreamDataModule):
        raise ConfigurationError(
            f"{name}: its data are a {data['class_path']}, which is no StreamDataModule; what is compared is a stream"
        )
    return _prepared(settings)


def _prepared(settings: Settings) -> Settings:
    """The settings of a run in a folder of its own that can be resumed; where that is, is not among them."""
    settings = copy.deepcopy(settings)
    for name in ("ckpt_path", "weights_only"):
        settings.pop(name, None)
    trainer = settings["trainer"]
    trainer |= {"logger": False, "default_root_dir": None, "enable_checkpointing": True, "enable_progress_bar": False}
    callbacks = [each for each in _callbacks(settings) if not issubclass(_class(each["class_path"]), ProgressBar)]
    evaluation = _first(callbacks, StreamEvaluation)
    evaluation["init_args"] |= {"files": True}
    checkpoint = _first(callbacks, ModelCheckpoint)
    checkpoint["init_args"] |= {"dirpath": None, "save_weights_only": False}
    checkpoint["init_args"]["save_last"] = checkpoint["init_args"].get("save_last") or True
    trainer["callbacks"] = callbacks
    return settings


def _first(callbacks: list[Settings], kind: type) -> Settings:
    """The first callback of a kind; one is added where there is none."""
    for each in callbacks:
        if issubclass(_class(each["class_path"]), kind):
            each.setdefault("init_args", {})
            return each
    callbacks.append({"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": {}})
    return callbacks[-1]


def _outer_rows(first: Settings) -> tuple[Settings, Settings]:
    """Fine-tuning and joint training with the model, optimizer and data of a recipe."""
    fine_tuning = copy.deepcopy(first)
    fine_tuning["trainer"] |= {"strategy": "auto", "max_epochs": -1}
    evaluation = _first(_callbacks(fine_tuning), StreamEvaluation)
    evaluation["init_args"] |= {"module": True}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    fine_tuning["trainer"]["callbacks"] = [evaluation, checkpoint]
    fine_tuning["data"]["init_args"]["epochs_per_experience"] = _outer_epochs(first)
    joint = copy.deepcopy(fine_tuning)
    data = joint["data"]["init_args"]
    inner = data.get("scenario") or {"class_path": "clkit.data.ClassIncremental", "init_args": {"experiences": 5}}
    everything = {"inner": inner, "experiences": data.get("stop_after")}
    data |= {"scenario": {"class_path": "clkit.data.Joint", "init_args": everything}, "stop_after": None}
    return fine_tuning, joint


def _outer_epochs(first: Settings) -> int:
    """As many as the recipe trains its network on an experience: those of a warm-up, where that is longer."""
    return max(
        int(first["data"]["init_args"].get("epochs_per_experience", 1)),
        int(_arguments(first["trainer"]["strategy"]).get("warmup_epochs", 0)),
    )


def _seeded(settings: Settings, seed: int) -> Settings:
    """The settings with one seed for all that draws; the stream itself (its scenario and source) stays the same."""
    settings = copy.deepcopy(settings)
    settings["seed_everything"] = seed
    trainer = settings["trainer"]
    strategy = trainer["strategy"]
    if isinstance(strategy, str) and strategy in STRATEGIES:  # a name alone has no place for a seed
        module, attribute, _ = STRATEGIES[strategy]
        trainer["strategy"] = {"class_path": f"{module}.{attribute}"}
        kind = _strategy_class(settings)
        assert kind is not None
        trainer["strategy"]["init_args"] = {"seed": seed} if "seed" in _parameters(kind) else {}
    for part in (settings["model"], settings["data"], trainer["strategy"], *_callbacks(settings)):
        arguments = _arguments(part)
        for name, value in arguments.items():
            if (name == "seed" or name.endswith("_seed")) and isinstance(value, int):
                arguments[name] = seed
    return settings


def _check_same_stream(resolved: Mapping[str, Settings]) -> None:
    (first, settings), *others = resolved.items()
    for name, other in others:
        found = _differences(_seeded(settings, 0)["data"], _seeded(other, 0)["data"], "data")
        if found:
            path, one, two = found[0]
            raise ConfigurationError(
                f"{first} and {name} run different streams: {path} is {one} in {first} and {two} in {name}"
                f"{_more(found)}; set it for all, with --{path} or a file of settings by --config"
            )


# ---- settings as trees


def _class(path: str) -> type:
    module, _, attribute = path.rpartition(".")
    found: type = getattr(import_module(module), attribute)
    return found


def _parameters(kind: type) -> list[str]:
    from inspect import signature

    return list(signature(kind).parameters)


def _strategy_class(settings: Settings) -> type | None:
    strategy = settings["trainer"]["strategy"]
    if isinstance(strategy, dict):
        return _class(strategy["class_path"])
    if strategy in STRATEGIES:
        module, attribute, _ = STRATEGIES[strategy]
        return _class(f"{module}.{attribute}")
    return None


def _callbacks(settings: Settings) -> list[Settings]:
    callbacks = settings["trainer"]["callbacks"]
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _arguments(part: Any) -> Settings:
    return part.get("init_args") or {} if isinstance(part, dict) else {}


def _differences(one: Any, two: Any, path: str = "") -> list[tuple[str, str, str]]:
    """Where two trees of settings differ: the dotted path, as an option names it, and both values."""
    if isinstance(one, dict) and isinstance(two, dict) and one.get("class_path") == two.get("class_path"):
        found = []
        for name in [*one, *(name for name in two if name not in one)]:
            inside = path if name == "init_args" else f"{path}.{name}" if path else name
            found += _differences(one.get(name), two.get(name), inside)
        return found
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [each for i in range(len(one)) for each in _differences(one[i], two[i], f"{path}.{i}")]
    return [] if one == two else [(path, _shown(one), _shown(two))]


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _more(found: Sequence[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _reason(said: str) -> str:
    """The line that says why a command failed."""
    lines = [line for line in said.splitlines() if line.strip()]
    ours = [line.removeprefix("clkit: ") for line in lines if line.startswith("clkit: ")]
    return (ours or lines[-1:] or ["it said nothing"])[0]


# ---- running


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[tuple[int, ...]]:
    """Lets one comparison at a time work in a folder.

    Yields:
        What a process that is started inside must inherit: it holds the lock even when this process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # no such lock there: two comparisons in one folder are the user's to avoid
        yield ()
        return
    import fcntl

    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(
                f"{folder} is in use by another clkit compare, or by the last run of one that was killed; wait until "
                "that has ended, or end it"
            ) from error
        yield (lock.fileno(),)


def _fit(arguments: Sequence[str], log: Path, inherited: tuple[int, ...]) -> int:
    """Runs ``clkit fit`` in a process of its own; what it prints is added to a file."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "clkit", "fit", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
        )
        try:
            return process.wait()
        except KeyboardInterrupt:  # the process has got it too; its checkpoint may be half way to the disk
            process.wait()
            raise


def _do(run: _Run, inherited: tuple[int, ...]) -> str:
    """Runs or resumes one run; gives what a person reads of it."""
    start = time.perf_counter()
    folder, checkpoint = run.folder, run.checkpoint()
    with atomic_write(folder / "settings.yaml") as draft:
        draft.write_text(yaml.safe_dump(run.settings, sort_keys=False), encoding="utf-8")
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": ""},
    }
    arguments = ["--config", str(folder / "settings.yaml"), "--trainer.default_root_dir", str(folder)]
    arguments += ["--trainer.logger", json.dumps(logger)]
    if checkpoint is not None:
        arguments += ["--ckpt_path", str(checkpoint)]
        _keep_metrics(folder)
    log = folder / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    status = _fit(arguments, log, inherited)
    if status:
        raise _failure(run, status, log.read_bytes()[before:].decode(errors="replace"), log)
    if run.results() is None:
        raise ConfigurationError(
            f"{run.title} ended before its stream did, so there is nothing to compare; a limit of the trainer "
            f"(max_steps, max_time, fast_dev_run, limit_val_batches) may have ended it, see {log}"
        )
    how = "" if checkpoint is None else f"resumed from {checkpoint.name}, "
    return f"{how}{time.perf_counter() - start:.1f} s"


def _keep_metrics(folder: Path) -> None:
    """Lightning's logger begins its file anew when a run is resumed; what was logged before is put aside."""
    file = folder / "metrics.csv"
    if file.exists():
        before = len(list(folder.glob("metrics_before_*.csv")))
        file.rename(folder / f"metrics_before_{before + 1}.csv")


def _failure(run: _Run, status: int, said: str, log: Path) -> ClkitError:
    if status == 2:
        hint = ""
        if run.contender.outer:
            hint = " (the outer rows train the network of the first recipe: put another first, or give --no-outer)"
        return ConfigurationError(f"{run.title}: {_reason(said)}{hint}")
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return ProcessLostError(
        f"{run.title} was ended by {how}: {_reason(said)}; what it printed is in {log}, and the same command goes on "
        "from here"
    )


# ---- what is shown and written


class _Row(NamedTuple):
    """One row of the table, with what each seed gave."""

    name: str
    contender: _Contender
    predictor: str
    values: list[dict[str, float | None]]

    def interval(self, metric: str) -> Interval | None:
        """Over the seeds; ``None`` where a metric is not defined."""
        values = [seed[metric] for seed in self.values]
        known = [value for value in values if value is not None]
        return t_interval(known) if len(known) == len(values) else None


def _rows_of(contender: _Contender, documents: Sequence[dict[str, Any]]) -> list[_Row]:
    predictors = [name for name in documents[0]["predictors"] if contender.shows(name)]
    if not predictors:
        raise ConfigurationError(
            f"{contender.name} trains no network and has no head, so it predicts nothing; give it a callback like NMC"
        )
    rows = []
    for predictor in predictors:
        name = f"{contender.name} / {predictor}" if len(predictors) > 1 else contender.name
        values = [{metric: document["predictors"][predictor][metric] for metric in METRICS} for document in documents]
        rows.append(_Row(name, contender, predictor, values))
    return rows


def _joint_row(
    contender: _Contender, runs: Sequence[_Run], documents: Sequence[dict[str, Any]], stages: list[list[int]]
) -> _Row:
    """Joint training as the stream would measure it; where a class comes twice, only the last accuracy is known."""
    disjoint = sum(map(len, stages)) == len({label for stage in stages for label in stage})
    values: list[dict[str, float | None]] = []
    for run, document in zip(runs, documents, strict=True):
        seen: dict[str, Any] = dict.fromkeys(METRICS)
        if disjoint:
            seen = summarize(*staged_counts(_class_counts(run.folder / "per_class.csv"), stages))
        seen["final_accuracy"] = document["predictors"][MODULE]["final_accuracy"]
        values.append({**{metric: seen[metric] for metric in METRICS}, "forgetting": None})
    return _Row(contender.name, contender, MODULE, values)


def _class_counts(file: Path) -> dict[int, tuple[int, int]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return {
            int(line["class"]): (int(line["correct"]), int(line["samples"]))
            for line in csv.DictReader(lines)
            if line["predictor"] == MODULE
        }


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    with atomic_write(folder / "compare.json") as draft:
        draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_write(folder / "compare.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
        writer.writerow(["name", "recipe", "predictor", "seeds", *columns])
        for row in document["rows"]:
            ends = [row["summary"][metric][end] for metric in METRICS for end in ("mean", "low", "high")]
            cells = ["" if value is None else f"{value:.6f}" for value in ends]
            writer.writerow([row["name"], row["recipe"], row["predictor"], len(row["runs"]), *cells])


def _document(rows: Sequence[_Row], runs: Mapping[str, list[_Run]], root: Path, **more: Any) -> dict[str, Any]:
    listed = []
    for row in rows:
        summary = {}
        for metric in METRICS:
            interval = row.interval(metric)
            mean, half = (None, None) if interval is None else interval
            low, high = (None, None) if mean is None or half is None else (mean - half, mean + half)
            summary[metric] = {"mean": mean, "half_width": half, "low": low, "high": high}
        listed.append(
            {
                "name": row.name,
                "recipe": row.contender.name,
                "predictor": row.predictor,
                "outer": row.contender.outer,
                "runs": [
                    {"seed": run.seed, "folder": run.folder.relative_to(root).as_posix(), **values}
                    for run, values in zip(runs[row.contender.name], row.values, strict=True)
                ],
                "summary": summary,
            }
        )
    return {"format": FORMAT, "clkit": __version__, "confidence": CONFIDENCE, **more, "rows": listed}


def _notes(contenders: Sequence[_Contender], seeds: int) -> list[str]:
    """What a reader of the table must know."""
    numbers = ", ".join(map(str, range(seeds))) if seeds <= 5 else f"0 to {seeds - 1}"
    if seeds == 1:
        notes = ["n = 1 seed (0), which gives no interval."]
    else:
        notes = [f"n = {seeds} seeds ({numbers}): mean ± half-width of the 95 % t-interval."]
    recipes = [contender for contender in contenders if not contender.outer]
    if len(recipes) == len(contenders):
        return notes
    first = recipes[0]
    epochs = _outer_epochs(first.settings)
    count = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    notes.append(
        f"{FINE_TUNING} and {JOINT} train the network of {first.name} with its optimizer and nothing else: {count} on "
        f"each experience, or on all of them at once."
    )
    if any(contender.frozen for contender in recipes):
        notes.append("A network that a recipe keeps frozen is trained in these two rows.")
    if _gives_task_id(first.settings["data"]):
        notes.append(f"{JOINT} is not told the task of a sample, as the others are.")
    return notes


def _gives_task_id(part: Any) -> bool:
    """Whether a scenario, or one inside it, tells which task a sample belongs to."""
    if not isinstance(part, dict):
        return False
    known = getattr(_class(part["class_path"]), "gives_task_id", False) if "class_path" in part else False
    return known is True or any(_gives_task_id(inside) for inside in part.values())


# ---- the command


def run_compare(options: argparse.Namespace, overrides: Sequence[str] = ()) -> int:
    """Runs the command.

    Args:
        options: What was parsed of the command line: ``recipes``, ``seeds``, ``out`` and ``outer``.
        overrides: Settings of ``clkit fit``, as they stand on the line, that all recipes get.

    Returns:
        0; 2 where something was refused or a run failed (the message is on standard error); 130 after an interrupt.
    """
    try:
        _compare(options.recipes, options.seeds, Path(options.out), options.outer, overrides)
    except ClkitError as error:
        sys.stderr.write(f"clkit: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("clkit: interrupted; the same command goes on from here\n")
        return 130
    return 0


def _compare(recipes: Sequence[str], seeds: int, root: Path, outer: bool, overrides: Sequence[str]) -> None:
    console, start = Console(), time.perf_counter()
    files = _named(recipes, outer)
    resolved = {name: _resolved(name, file, overrides) for name, file in files.items()}
    _check_same_stream(resolved)
    contenders = [_Contender(name, settings) for name, settings in resolved.items()]
    if outer:
        fine_tuning, joint = _outer_rows(next(iter(resolved.values())))
        contenders = [_Contender(FINE_TUNING, fine_tuning, True), *contenders, _Contender(JOINT, joint, True)]
    runs = {
        each.name: [_Run(each, seed, root / each.folder / f"seed_{seed}") for seed in range(seeds)]
        for each in contenders
    }
    # all recipes with the first seed, then with the next: what is wrong with one is seen early
    ordered = [runs[each.name][seed] for seed in range(seeds) for each in contenders]
    with _alone(root) as inherited:
        for run in ordered:
            run.check_folder()
        for number, run in enumerate(ordered, start=1):
            place = f"{number:>{len(str(len(ordered)))}}/{len(ordered)}  {run.title}"
            if run.results() is not None:
                said = "finished before, not run again"
            else:
                with console.status(place):
                    said = _do(run, inherited)
            console.print(f"{place}: {said}", highlight=False, soft_wrap=True)
        _conclude(contenders, runs, root, seeds, console)
    console.print(
        f"{time.perf_counter() - start:.0f} s; {root / 'compare.json'}, {root / 'compare.csv'}",
        highlight=False,
        soft_wrap=True,
    )


def _conclude(
    contenders: Sequence[_Contender], runs: Mapping[str, list[_Run]], root: Path, seeds: int, console: Console
) -> None:
    """The table and the files."""
    documents: dict[str, list[dict[str, Any]]] = {}
    for name, listed in runs.items():
        found = [run.results() for run in listed]
        documents[name] = [document for document in found if document is not None]
    first = next(each for each in contenders if not each.outer)
    stream = documents[first.name][0]["stream"]
    stages = [experience["classes"] for experience in stream["experiences"]]
    above: list[_Row] = []
    own: list[_Row] = []
    below: list[_Row] = []
    for each in contenders:
        if each.outer and each.name == JOINT:
            below.append(_joint_row(each, runs[each.name], documents[each.name], stages))
        else:
            (above if each.outer else own).extend(_rows_of(each, documents[each.name]))
    notes = _notes(contenders, seeds)
    rows = [*above, *own, *below]
    _write(root, _document(rows, runs, root, seeds=list(range(seeds)), stream=stream, notes=notes))
    groups = [{row.name: [row.interval(metric) for metric in METRICS] for row in part} for part in (above, own, below)]
    evaluated = documents[first.name][0]["evaluated_on"]
    source = _shown(first.settings["data"]["init_args"].get("source")).strip('"')
    title = f"{source}: {len(stages)} experiences, {stream['scenario']}, evaluated on {evaluated}"
    console.print()
    console.print(seeds_table(groups, HEADS, title, "\n".join(notes)))
