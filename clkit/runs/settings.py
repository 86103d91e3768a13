"""``clkit fit | validate | test | predict``: a LightningCLI that knows clkit's classes by their short names."""

from __future__ import annotations

import contextlib
import errno
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

from clkit._registry import STRATEGIES
from clkit.callbacks import StreamEvaluation
from clkit.errors import ArgumentError, ClkitError, ConfigurationError, did_you_mean, first_line
from clkit.stream._lightning import callbacks_of
from clkit.stream.checkpoint_io import read_run

__all__ = ["StreamCLI", "line_for_settings", "read_settings", "refusal", "run", "weights_line"]


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return a file of settings as a tree; one that is no such file is a ConfigurationError."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no file of settings: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{path} is no file of settings: it holds a {type(settings).__name__}, not names with values"
        )
    return settings


class _Parser(LightningArgumentParser):
    """A parser that says in one line what is wrong; ``verbose`` adds the forty of jsonargparse."""

    verbose = False

    def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> Any:
        """Read a file of settings; name one that cannot be read."""
        try:
            read_settings(str(cfg_path))
        except ConfigurationError as error:
            self.error(str(error))
        return super().parse_path(cfg_path, *arguments, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside another: the outer one speaks
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        known = [action.dest for action in parser._actions]
        sys.stderr.write(f"clkit: {line_for_settings(message, known)}; see {command} --help\n")
        if self.verbose:
            sys.stderr.write(f"\n{message}\n\nall settings: {command} --help.all\n")
        raise SystemExit(2)


class _SaveConfig(SaveConfigCallback):
    """The callback that saves the resolved configuration with the results and hands it to ``results.json``.

    It writes when the work begins, not in ``setup`` as Lightning's does: a run that is refused there leaves the
    settings of one that lies in its folder alone.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.loggers and Path(trainer.default_root_dir) == Path.cwd():
            raise ConfigurationError(
                "trainer.logger is false and trainer.default_root_dir is not set, so results would land in the current "
                "folder; set trainer.default_root_dir to the folder of this run"
            )
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        for callback in callbacks_of(trainer):
            if isinstance(callback, StreamEvaluation):
                callback.config = config

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def _evaluated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saved = Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename
        if trainer.state.fn != "fit" and not saved.exists():  # an evaluation leaves the settings of a fit alone
            super().setup(trainer, pl_module, str(trainer.state.fn))

    on_validation_start = on_test_start = on_predict_start = _evaluated


def _remove_empty_folder(trainer: pl.Trainer) -> None:
    """Remove what loggers made for a run that was refused, where nothing but its settings lies there."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        places = [getattr(logger, name, None) for name in ("log_dir", "root_dir", "save_dir")]
        if not places[0] or not Path(places[0]).is_dir():
            continue
        folder, *above = [Path(place) for place in places if place]
        files = list(folder.iterdir())
        if all(file.name in ("config.yaml", "hparams.yaml") or ".tfevents." in file.name for file in files):
            for file in files:
                file.unlink()
            with contextlib.suppress(OSError):  # a folder above holds other runs
                for each in (folder, *above):
                    each.rmdir()


class StreamCLI(LightningCLI):
    """LightningCLI with clkit's model, data and strategies as defaults; any other of the user's can be named.

    Args:
        arguments: The command and its options; those of the process by default.
        run: Whether to run the command, or only to build what it needs (``arguments`` then has no command).
        verbose: Whether what jsonargparse says of a wrong setting is printed below clkit's line.
    """

    def __init__(self, arguments: Sequence[str] | None = None, run: bool = True, *, verbose: bool = False) -> None:
        self._verbose = verbose
        try:
            super().__init__(
                model_class=pl.LightningModule,
                datamodule_class=pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=_SaveConfig,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                args=list(arguments) if arguments is not None else None,
                run=run,
            )
        except Exception as error:  # whatever it was is raised again; only the folder of a refused run goes first
            trainer = getattr(self, "trainer", None)
            if trainer is not None and line_for_error(error) is not None:
                _remove_empty_folder(trainer)
            raise

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        """Return a parser that says first what is wrong."""
        parser = _Parser(**{"prog": "clkit", **options})
        parser.verbose = self._verbose
        parser.add_argument("-c", "--config", action="config", help="path of a YAML file with settings")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults: a timm classifier on a stream of handwritten digits."""
        defaults = {"model": "clkit.models.TimmClassifier", "data": "clkit.data.StreamDataModule"}
        parser.set_defaults({name: {"class_path": path} for name, path in defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse a checkpoint that cannot be used before anything is made for it."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path and path not in ("best", "last", "hpc") and ":" not in str(path):  # those Lightning looks up
            if not Path(path).is_file():
                what = "a folder" if Path(path).is_dir() else "not a file"
                raise ArgumentError(f"ckpt_path={str(path)!r} is {what}; give the path of a checkpoint")
            read_run(path)

    def instantiate_trainer(self, **options: Any) -> pl.Trainer:
        """Build the trainer; what Lightning refuses of its settings is a ConfigurationError."""
        try:
            return super().instantiate_trainer(**options)
        except (ValueError, TypeError) as error:
            if isinstance(error, ClkitError):
                raise
            raise ConfigurationError(f"Lightning refuses the settings of the trainer: {first_line(error)}") from error

    def before_instantiate_classes(self) -> None:
        """Refuse in one line what Lightning would refuse with a traceback, and do what is plainly meant."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        strategies = ["auto", *StrategyRegistry.available_strategies()]
        accelerators = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
        for name, known, others in (
            ("strategy", strategies, f"clkit's own are {', '.join(STRATEGIES)}"),
            ("accelerator", accelerators, f"there are {', '.join(accelerators)}"),
        ):
            value = config.trainer[name]
            if isinstance(value, str) and value not in known:
                hint = did_you_mean(value, known) or f"; {others}"
                raise ConfigurationError(f"trainer.{name}: there is no {value!r}{hint}")
        if config.trainer.enable_progress_bar is False:  # a recipe may name a bar in its list of callbacks
            callbacks = config.trainer.callbacks
            listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
            config.trainer.callbacks = [each for each in listed if not each.class_path.endswith("ProgressBar")]


def run(arguments: Sequence[str] | None = None, *, verbose: bool = False) -> int:
    """Run one of Lightning's commands: ``arguments``, or those of the process.

    ``verbose`` prints beside the line of an error what Python or jsonargparse says of it.

    Returns:
        0, or 2 where clkit refused a setting or a file (the message is on standard error).
    """
    sys.path.insert(0, str(Path.cwd()))  # classes of the user's own, as with `python script.py`
    try:
        StreamCLI(arguments, verbose=verbose)
    except (ValueError, KeyError, RuntimeError, OSError, MisconfigurationException, ClkitError) as error:
        said = line_for_error(error)
        if said is None:
            raise
        if verbose:
            traceback.print_exception(error)
        sys.stderr.write(f"clkit: {said}\n")
        return 2
    return 0


# ---- what the parser and Lightning say of wrong settings, in one line of clkit's words


def line_for_error(error: Exception) -> str | None:
    """Return one line for an error that a setting or a file can cause, ``None`` for one that is the code's own."""
    cause = refusal(error) if isinstance(error, ClkitError | ValueError) else None  # jsonargparse wraps in ValueError
    if cause is not None:
        return str(cause)
    text = str(error.args[0]) if error.args else ""
    if isinstance(error, MisconfigurationException):  # by Lightning, of what a user has set
        return f"Lightning refuses the settings: {' '.join(text.split())}"
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict for"):
        return weights_line(text)
    if isinstance(error, KeyError) and text.startswith("Trying to restore optimizer state"):
        return (
            "the checkpoint holds weights only (ModelCheckpoint with save_weights_only=true): no fit can go on from "
            "it; take one that was saved whole"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a file'} could not be written: {error.strerror}; make room and resume"
    return None


def weights_line(message: str) -> str:
    """Return in one line what torch says in many of weights that do not fit: the first difference and what to do."""
    problems = [line.strip().rstrip(".") for line in message.splitlines()[1:] if line.strip()]
    first = re.sub(r"torch\.Size\((\[[^\]]*\])\)", r"\1", problems[0])
    first = first.replace("copying a param with shape", "shape").replace("the shape in current model is", "and here")
    names, more = first.partition(": ")[2].split(", "), len(problems) - 1
    if "key(s)" in first:  # a list of names
        first, more = f"{first.partition(': ')[0]}: {names[0]}", more + len(names) - 1
    others = f" (and {more} more)" if more else ""
    return (
        f"the checkpoint has the weights of another network: {first}{others}; give the model it was trained with, "
        "for instance by the config.yaml in the folder of its run"
    )


def refusal(error: BaseException | None) -> ClkitError | None:
    """Return the error of clkit that caused another, if there is one: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ClkitError):
        error = error.__cause__ or error.__context__
    return error


# What jsonargparse reports for one wrong setting is a tree of all the types that it tried. In it, "Parser key" lines
# lead to the place and one leaf says what is wrong there.
_PLACE = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NO_OPTION = re.compile(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: (?:--)?([^\s=]+)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_IMPORT = re.compile(r"(No module named '[^']+'|module '[^']+' has no attribute '[^']+')")
_GROUP = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_NO_GROUP = re.compile(r"Unable to load config '([^']+)'")
_VALUE = re.compile(r"Given value: (.*)")
_TYPES = re.compile(r"(?:Expected an? (?!dot import)|Not a valid (?=subclass of ))(.+?)(?:\. Got value: (.*))?$")


def line_for_settings(message: str, known: Iterable[str] = ()) -> str:
    """Return jsonargparse's message in one line for a person: the wrong setting or value, and what is near it."""
    if "is no file of settings" in message:
        return " ".join(message.split())
    lines = message.splitlines()
    for number, line in enumerate(lines):
        if found := _GROUP.search(line):
            group, name = found.group(1), found.group(2)
            return f"{_place(lines[:number], group)}{_tell_setting(group, name, lines[:number])}"
        if found := _NO_GROUP.search(line):
            return f"{_place(lines[:number])}{found.group(1)!r} does not fit, expected a group of settings"
    if found := _NO_OPTION.search(message):
        name = found.group(1) or found.group(2)
        known = list(known)
        top = ", ".join(key for key in known if "." not in key and key not in ("help", "print_config"))
        return f"there is no setting {name!r}{did_you_mean(name, known) or f'; at the top there are {top}'}"
    for pattern, tell in ((_OPTION, _tell_option), (_NO_IMPORT, None), (_NO_CLASS, _tell_class)):
        for number, line in enumerate(lines):
            if found := pattern.search(line):
                said = found.group(1) if tell is None else tell(found.group(1), lines[:number])
                return f"{_place(lines[:number])}{said}"
    # inside the class that is meant, if one was found
    begin = next((number for number, line in enumerate(lines) if _CLASS.search(line)), 0)
    for number, line in enumerate(lines[begin:], begin):
        if _TYPES.search(line):
            return f"{_place(lines[:number])}{_tell_type(lines[number:])}"
    return " ".join(_PLACE.sub(r"\1:", message).split())


def _place(lines: Sequence[str], *inside: str) -> str:
    keys = [*(found.group(1) for line in lines if (found := _PLACE.search(line))), *inside]
    return f"{'.'.join(keys)}: " if keys else ""


def _tell_option(name: str, lines: Sequence[str]) -> str:
    path = next(found.group(1) for line in reversed(lines) if (found := _CLASS.search(line)))
    kind, accepted = path.rpartition(".")[2], inspect.signature(resolve_name(path)).parameters
    return f"{kind} has no setting {name!r}{did_you_mean(name, accepted) or '; it has ' + ', '.join(accepted)}"


def _tell_setting(group: str, name: str, lines: Sequence[str]) -> str:
    path = next((found.group(1) for line in reversed(lines) if (found := _CLASS.search(line))), None)
    default = None
    for kind in () if path is None else resolve_name(path).__mro__:
        default = default or getattr(inspect.signature(kind).parameters.get(group), "default", None)
    accepted = getattr(default, "__dataclass_fields__", {})
    there = f"; it has {', '.join(accepted)}" if accepted else ""
    return f"there is no setting {name!r}{did_you_mean(name, accepted) or there}"


def _tell_class(name: str, lines: Sequence[str]) -> str:
    classes = [exported for namespace in NAMESPACES for exported in namespace.__all__]
    return f"there is no class {name!r}{did_you_mean(name, classes) or '; give its dotted path, package.module.Class'}"


def _tell_type(lines: Sequence[str]) -> str:
    value, types = None, []
    for line in lines:
        if found := _TYPES.search(line):
            kind = re.sub(r"<class '([^']+)'>|typing\.", r"\1", found.group(1)).replace("NoneType", "None")
            types.append(kind.replace("subclass of", "the settings of"))
            value = found.group(2)
        elif value is None and (found := _VALUE.search(line)):
            value = found.group(1)
        if value is not None:
            break
    return f"{value!r} does not fit, expected {' or '.join(types)}"


# Short names in YAML are looked up among the classes that are imported; these are offered where a name is misspelt.
NAMESPACES = [
    import_module(name)
    for name in (
        "clkit.callbacks",
        "clkit.data",
        "clkit.models",
        "clkit.strategies",
        "lightning.pytorch.callbacks",
        "lightning.pytorch.loggers",
        "lightning.pytorch.strategies",
    )
]
