"""Settings of a ``clkit fit`` as a tree of plain values: those of a recipe, changed for a comparison."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from clkit._registry import STRATEGIES
from clkit.callbacks import StreamEvaluation
from clkit.data import StreamDataModule
from clkit.errors import ConfigurationError
from clkit.runs.settings import run
from clkit.strategies import GradientFreeStrategy

__all__ = ["RunSettings", "arguments_of", "gives_task_id", "reason_of", "shown"]


class RunSettings:
    """All settings of a run whose data are a stream: the tree that ``clkit fit --print_config`` prints."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.trainer: dict[str, Any] = tree["trainer"]
        self.data: dict[str, Any] = tree["data"].setdefault("init_args", {})
        given = self.trainer["callbacks"]
        self.callbacks: list[dict[str, Any]] = given if isinstance(given, list) else [given] if given else []
        self.trainer["callbacks"] = self.callbacks

    @classmethod
    def of_recipe(cls, name: str, file: Path, overrides: Sequence[str]) -> RunSettings:
        """Return the settings of a recipe and some options of ``clkit fit``, for runs that can be resumed."""
        printed, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            try:
                status: Any = run(["fit", "--config", str(file), *overrides, "--print_config"])
            except SystemExit as ended:
                status = ended.code
        if status:
            raise ConfigurationError(f"{name}: {reason_of(said.getvalue())}")
        tree = yaml.safe_load(printed.getvalue())
        kind = tree["data"]["class_path"]
        if not issubclass(resolve_name(kind), StreamDataModule):
            raise ConfigurationError(
                f"{name}: its data are a {kind}, which is no StreamDataModule; what is compared is a stream"
            )
        settings = cls(tree)
        for option in ("ckpt_path", "weights_only"):
            tree.pop(option, None)
        settings.trainer |= {"logger": False, "enable_checkpointing": True, "enable_progress_bar": False}
        settings.trainer["default_root_dir"] = None  # the folder is not among the settings
        if settings.trainer["strategy"] in list(STRATEGIES):  # a name alone has no place for a seed
            path = STRATEGIES[settings.trainer["strategy"]]
            arguments = {"seed": 0} if "seed" in inspect.signature(resolve_name(path)).parameters else {}
            settings.trainer["strategy"] = {"class_path": path, "init_args": arguments}
        bars = [each for each in settings.callbacks if issubclass(resolve_name(each["class_path"]), ProgressBar)]
        settings.callbacks[:] = [each for each in settings.callbacks if each not in bars]
        settings._callback(StreamEvaluation)["init_args"] |= {"files": True}
        checkpoint = settings._callback(ModelCheckpoint)["init_args"]
        checkpoint |= {"dirpath": None, "save_weights_only": False, "save_last": checkpoint.get("save_last") or True}
        return settings

    def _callback(self, kind: type) -> dict[str, Any]:
        """Return the first callback of a kind; append one where there is none."""
        for each in self.callbacks:
            if issubclass(resolve_name(each["class_path"]), kind):
                each.setdefault("init_args", {})
                return each
        self.callbacks.append({"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": {}})
        return self.callbacks[-1]

    def with_seed(self, seed: int) -> RunSettings:
        """Return a copy with one seed for all that draws; the stream (its scenario and source) stays the same."""
        seeded = copy.deepcopy(self)
        seeded.tree["seed_everything"] = seed
        for each in (seeded.tree["model"], seeded.tree["data"], seeded.trainer["strategy"], *seeded.callbacks):
            _set_seeds(arguments_of(each), seed)
        return seeded

    def fine_tuning(self) -> RunSettings:
        """Return plain training of the same model on the same data with the same optimizer."""
        plain = copy.deepcopy(self)
        plain.trainer |= {"strategy": "auto", "max_epochs": -1}
        plain.callbacks[:] = [plain._callback(StreamEvaluation)]
        plain.callbacks[0]["init_args"] |= {"module": True}
        plain._callback(ModelCheckpoint)["init_args"] |= {"save_last": True}
        plain.data["epochs_per_experience"] = self.training_epochs
        return plain

    def joint(self) -> RunSettings:
        """Return plain training on all experiences at once."""
        plain = self.fine_tuning()
        inner = plain.data.get("scenario")
        inner = inner or {"class_path": "clkit.data.ClassIncremental", "init_args": {"experiences": 5}}
        everything = {"inner": inner, "experiences": plain.data.get("stop_after")}
        plain.data |= {"scenario": {"class_path": "clkit.data.Joint", "init_args": everything}, "stop_after": None}
        return plain

    @property
    def training_epochs(self) -> int:
        """Epochs that train the network on an experience, or in a warm-up where that is longer."""
        warmup = arguments_of(self.trainer["strategy"]).get("warmup_epochs", 0)
        return max(int(self.data.get("epochs_per_experience", 1)), int(warmup))

    @property
    def freezes_network(self) -> bool:
        """Whether the strategy leaves the network as it is, once a warm-up is over."""
        strategy = self.trainer["strategy"]
        return isinstance(strategy, dict) and issubclass(resolve_name(strategy["class_path"]), GradientFreeStrategy)

    def difference(self, other: RunSettings, key: str = "") -> tuple[str, str, str, str] | None:
        """Return the first difference, below a key: its dotted path, both values, how many more; or ``None``."""
        one, two = (each.tree[key] if key else each.tree for each in (self, other))
        found = _differences(one, two, key)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return (*found[0], more) if found else None


def reason_of(said: str) -> str:
    """Return the line of a command's output that says why it failed."""
    lines = [line for line in said.splitlines() if line.strip()]
    ours = [line.removeprefix("clkit: ") for line in lines if line.startswith("clkit: ")]
    return (ours or lines[-1:] or ["it said nothing"])[0]


def arguments_of(entry: Any) -> dict[str, Any]:
    """Return the arguments of a class in YAML."""
    return entry.get("init_args") or {} if isinstance(entry, dict) else {}


def _set_seeds(arguments: dict[str, Any], seed: int) -> None:
    """Set each seed among arguments and groups of settings in them, but not of objects with arguments of their own."""
    for name, value in arguments.items():
        if (name == "seed" or name.endswith("_seed")) and isinstance(value, int):
            arguments[name] = seed
        elif isinstance(value, dict) and "class_path" not in value:
            _set_seeds(value, seed)


def gives_task_id(entry: Any) -> bool:
    """Return whether the scenario of some data, or one inside it, tells which task a sample belongs to."""
    if not isinstance(entry, dict):
        return False
    known = "class_path" in entry and getattr(resolve_name(entry["class_path"]), "gives_task_id", False) is True
    return known or any(map(gives_task_id, entry.values()))


def _differences(one: Any, two: Any, path: str) -> list[tuple[str, str, str]]:
    """Return where two trees differ: the dotted path, as an option names it, and both values."""
    if isinstance(one, dict) and isinstance(two, dict) and one.get("class_path") == two.get("class_path"):
        found = []
        for name in [*one, *(name for name in two if name not in one)]:
            inside = path if name == "init_args" else f"{path}.{name}" if path else name
            found += _differences(one.get(name), two.get(name), inside)
        return found
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [each for i in range(len(one)) for each in _differences(one[i], two[i], f"{path}.{i}")]
    return [] if one == two else [(path, shown(one), shown(two))]


def shown(value: Any) -> str:
    """Return a setting as a person writes it, shortened."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
